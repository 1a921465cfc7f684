"""A compressed folder multiplied out, by the folder alone: the dense architecture again, as a Hugging Face folder or as GGUF.

The same tensors as stage factorize writes with `factorize.dense_export` and `factorize.gguf_export`, made afterwards and anywhere.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fisherfold.export.architecture import DenseArchitecture, copy_companions, dense_architecture
from fisherfold.export.gauges import product, right_factor
from fisherfold.export.gguf_export import check_gguf, write_gguf
from fisherfold.export.lineage import pass_on_lineage
from fisherfold.export.original_names import original_tensors
from fisherfold.export.packed import matrices
from fisherfold.export.stored_layer import OWN_BIAS, exact
from fisherfold.network.models import DTYPES
from fisherfold.run.checkpoint import StoredTensor, read_tensors, write_tensors
from fisherfold.run.errors import InputError

OURS = ("fisherfold", "auto_map", "quantization_config")  # in config.json
CODE = "modeling_fisherfold"


def export(folder: Path, target: Path, form: str) -> None:
    """Write a compressed model multiplied out.

    Args:
        folder: of the compressed model.
        target: the folder, or the GGUF file, to be written; it must not exist.
        form: one of FORMS.

    Raises:
        InputError: the folder is none of ours, has low-rank experts, or cannot be written in this form.
    """
    config = _config(folder)
    if target.exists():
        raise InputError(f"{target} exists already: name another place.")
    if "experts" in config["fisherfold"]:
        raise InputError(
            f"{folder} has low-rank experts, which are multiplied out by the run that makes them: fisherfold run --set factorize.dense_export=true"
        )
    FORMS[form](folder, target, config)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = dict[str, Any](json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is no model folder ({error}).") from None
    if "fisherfold" not in config:
        raise InputError(
            f"{folder} is not a model that Fisherfold compressed: its config.json names no low-rank layers."
        )
    return config


def write_dense_folder(folder: Path, target: Path, config: Mapping[str, Any]) -> None:
    """An ordinary checkpoint: weights, configuration, tokenizer."""
    target.mkdir(parents=True)
    architecture = _dense_config(target, config)
    write_tensors(target, _whole(folder, config, architecture))
    copy_companions(folder, target)
    for code in target.glob(f"{CODE}*.py"):
        code.unlink()
    pass_on_lineage(folder, target)


def write_gguf_file(folder: Path, target: Path, config: Mapping[str, Any]) -> None:
    """One file for llama.cpp."""
    check_gguf(config, folder)
    beside = target.with_name(f"{target.name}.partial")
    beside.mkdir(parents=True)
    try:
        architecture = _dense_config(beside, config)
        whole = _whole(folder, config, architecture)
        write_gguf(target, architecture.config, folder, whole, DTYPES[architecture.dtype])
    finally:
        (beside / "config.json").unlink(missing_ok=True)
        beside.rmdir()


FORMS: dict[str, Callable[[Path, Path, Mapping[str, Any]], None]] = {
    "dense": write_dense_folder,
    "gguf": write_gguf_file,
}


def _dense_config(target: Path, config: Mapping[str, Any]) -> DenseArchitecture:
    """Write the dense model's config.json, and read it as an architecture."""
    plain = {key: value for key, value in config.items() if key not in OURS}
    path = target / "config.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    plain["architectures"] = [dense_architecture(target).model_class]
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return dense_architecture(target)


def _whole(folder: Path, config: Mapping[str, Any], architecture: DenseArchitecture) -> dict[str, StoredTensor]:
    """The dense model's tensors by their names on the hub, each multiplied out when it is read."""
    tensors, model, dtype = read_tensors(folder), architecture.empty_model(), DTYPES[architecture.dtype]
    layers: Mapping[str, Mapping[str, Any]] = config["fisherfold"]["layers"]
    own = {name: _below(tensors, name) for name in layers}
    whole = {
        name: tensor for name, tensor in tensors.items() if not any(name.startswith(f"{each}.") for each in layers)
    }
    for name, entry in layers.items():
        module = model.get_submodule(name)
        weight = cast(torch.Tensor, module.weight)
        shared = right_factor(own[entry["source"]]) if "source" in entry else {}
        read = partial(
            _weight, own[name] | shared, entry["kind"], weight.shape, not isinstance(module, nn.Linear), dtype
        )
        whole[f"{name}.weight"] = StoredTensor(tuple(weight.shape), dtype, read)
        if module.bias is not None:
            whole[f"{name}.bias"] = own[name]["bias" if entry["kind"] in OWN_BIAS else "up.bias"]
    return original_tensors(model, _unpacked(whole, dtype))


def _below(tensors: Mapping[str, StoredTensor], layer: str) -> dict[str, StoredTensor]:
    """A layer's own tensors by their names in it, without the empty one that stands for the dense weight."""
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name != f"{prefix}weight"
    }


def _weight(
    tensors: Mapping[str, StoredTensor], kind: str, shape: Sequence[int], transposed: bool, dtype: torch.dtype
) -> torch.Tensor:
    """The product, as the dense model stores it: [m, n] in a Conv1D."""
    outputs, inputs = reversed(shape) if transposed else shape
    values = {name: tensor.read() for name, tensor in tensors.items() if name not in ("bias", "up.bias")}
    factors = {name: exact(tensor) for name, tensor in matrices(values).items()}
    weight = torch.from_numpy(product(kind, factors, outputs, inputs)).to(dtype)
    return weight.T if transposed else weight


def _unpacked(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, StoredTensor]:
    """The same with the weights of dense layers in few bits as plain matrices."""
    parts = [name for name in tensors if name.rpartition(".")[2].startswith("weight_")]
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for module in {name.rpartition(".")[0] for name in parts}:
        found = matrices({name: tensors[name].read() for name in parts if name.rpartition(".")[0] == module})
        whole |= {name: StoredTensor.of(matrix.to(dtype)) for name, matrix in found.items()}
    return whole
