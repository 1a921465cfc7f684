"""Whether the files of a checkpoint hold the weights that its config.json describes, all of them and nothing that matters besides.

transformers fills what is missing with random numbers, leaves out what it has no place for and turns integers into floats, each with no
more than a warning: the model that would be compressed is then another one.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from fisherfold.network.layers import linear_modules
from fisherfold.network.weight_check import check_weight
from fisherfold.run.checkpoint import NAMES, read_tensors
from fisherfold.run.errors import InputError

COUNTED = ("F64", "F32", "F16", "BF16", "I64")  # ids and positions are I64
"""What numbers of a checkpoint are stored as that is not packed in some way."""
DEQUANTISED: dict[str, Callable[..., Any]] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Methods of quantisation whose weights transformers multiplies out as it loads them."""


def quantisation(config: PreTrainedConfig) -> str | None:
    """The method by which a model's weights are quantised; None if they are not."""
    quantised = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    method = quantised.get("quant_method", "by no named method") if isinstance(quantised, dict) else quantised
    return str(getattr(method, "value", method)) if method else None


def require_floats(name: str, folder: Path) -> None:
    """
    Raises:
        InputError: a matrix in the files of `folder` is of 8 bits, integers, truth values or complex numbers, so something else than
            config.json says.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    found = next((pair for path in files for pair in _packed(path)), None)
    if found:
        raise InputError(
            f"The weights of model {name!r} are quantised: {found[0]!r} is stored as {found[1]}, and config.json does not say how to undo it. "
            "Compress the original model instead."
        )


def _packed(path: Path) -> Iterator[tuple[str, str]]:
    """Matrices that no arithmetic of real numbers is meant for, and what they are stored as."""
    try:
        for name, kind, sizes in (_of_safetensors if path.suffix == ".safetensors" else _of_pickle)(path):
            if len(sizes) in (2, 3) and sizes[0] > 1 and kind not in COUNTED:  # masks have four dimensions
                yield name, kind
    except (SafetensorError, OSError, RuntimeError, UnpicklingError):  # whoever needs the file will say so
        return


def _of_safetensors(path: Path) -> Iterator[tuple[str, str, Sequence[int]]]:
    """(name, dtype, sizes) of each tensor."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  a file is no mapping
            stored = file.get_slice(name)
            yield name, stored.get_dtype(), stored.get_shape()


def _of_pickle(path: Path) -> Iterator[tuple[str, str, Sequence[int]]]:
    for name, value in torch.load(path, mmap=True, weights_only=True).items():
        if isinstance(value, torch.Tensor):
            yield name, NAMES[value.dtype] if NAMES.get(value.dtype) in COUNTED else str(value.dtype), value.shape


@torch.no_grad()
def separate(model: PreTrainedModel) -> None:
    """Give each parameter a contiguous tensor of its own: those of a pickled checkpoint may be views of one another, which no safetensors file holds."""
    held = [parameter for parameter in model.parameters() if not parameter.is_meta]
    owners = Counter(parameter.untyped_storage().data_ptr() for parameter in held)
    for parameter in held:
        if owners[parameter.untyped_storage().data_ptr()] > 1 or not parameter.is_contiguous():
            parameter.data = parameter.clone(memory_format=torch.contiguous_format)


def require_whole(name: str, loaded: PreTrainedModel, found: Mapping[str, Collection[Any]]) -> None:
    """
    Args:
        found: what ``from_pretrained`` tells with ``output_loading_info``.

    Raises:
        InputError: weights are missing or of another shape, or the files hold more of a linear layer than the model has a place for.
    """
    others = sorted(map(str, found["unexpected_keys"]))
    if shapes := sorted(map(tuple, found["mismatched_keys"])):
        key, stored, described = (*shapes[0], (), ())[:3]
        raise InputError(
            f"Model {name!r} has {len(shapes)} of its weights in another shape than its config.json describes, the first {key}: "
            f"{list(stored)} in the file, {list(described)} by config.json."
        )
    if lost := sorted(found["missing_keys"]):
        instead = f" It holds {len(others)} others, the first {others[0]}." if others else ""
        raise InputError(
            f"Model {name!r} lacks {len(lost)} of its weights, the first {lost[0]}. The folder does not hold all that its config.json "
            f"describes.{instead}"
        )
    if more := next(_of_linear_layers(loaded, others), None):
        raise InputError(
            f"Model {name!r} holds {more!r}, for which the layer that its config.json describes has no place, so another function would be "
            "compressed. Mend config.json (a bias?), or undo what was added (an adapter: merge it; scales: take the original model)."
        )


def require_sound(name: str, folder: Path) -> None:
    """Look at every number of a model that was written, one tensor in memory at a time.

    Raises:
        InputError: a weight is not finite in float16.
        NumericalError: see `check_weight`.
    """
    for key, tensor in read_tensors(folder).items():
        weight = tensor.read()
        if weight.dtype == torch.float16 and not torch.isfinite(weight).all():
            raise InputError(
                f"Weight {key!r} of model {name!r} is not finite in {weight.dtype}. Choose another prepare.dtype."
            )
        check_weight(key, weight)


def _of_linear_layers(loaded: PreTrainedModel, names: Sequence[str]) -> Iterator[str]:
    """Those of `names` that belong to a linear layer of the model."""
    layers = linear_modules(loaded).keys()
    for name in names:
        parts = name.split(".")
        if any(".".join(parts[:end]) in layers for end in range(1, len(parts))):
            yield name
