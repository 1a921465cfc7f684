"""Whether the files of a checkpoint hold the weights that its config.json describes, all of them and nothing that matters besides.

transformers fills what is missing with random numbers, leaves out what it has no place for and turns integers into floats, each with no
more than a warning: the model that would be compressed is then another one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from fisherfold.network.layers import linear_modules
from fisherfold.network.weight_check import check_weight
from fisherfold.run.checkpoint import read_tensors
from fisherfold.run.errors import InputError

PACKED = (
    "I8",
    "U8",
    "I16",
    "U16",
    "I32",
    "U32",
)  # as packed weights are stored; ids and positions are I64, masks have four dimensions

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
        InputError: a matrix in the safetensors files of `folder` is of 8 bits or integers, and so quantised whatever config.json says.
    """
    found = next(_packed(folder), None)
    if found:
        raise InputError(
            f"The weights of model {name!r} are quantised: {found[0]!r} is stored as {found[1]}, and config.json does not say how to undo it. "
            "Compress the original model instead."
        )


def _packed(folder: Path) -> Iterator[tuple[str, str]]:
    """Matrices that no arithmetic of floats is meant for, and what they are stored as."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  a file is no mapping
                    stored = file.get_slice(name)
                    kind, sizes = stored.get_dtype(), stored.get_shape()
                    if (
                        len(sizes) in (2, 3)
                        and sizes[0] > 1
                        and (kind in PACKED or kind.startswith(("F8", "F4", "F6")))
                    ):
                        yield name, kind
        except (SafetensorError, OSError):  # whoever needs the file will say so
            continue


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
