"""Layers of a checkpoint that hold nothing but zeros.

One such layer can be too small a loss for any figure to show, and is damage all the same: a cut file, a failed write, a bad edit. A
layer that was allotted rank 0 holds no matrix at all and is not meant here, nor is one whose dense weight is zero.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from fisherfold.run.checkpoint import StoredTensor, read_tensors


def find_zero_layers(folder: Path, dense: Path, compressed: Path) -> None:
    """Unit: write the names of such layers. One tensor is in memory at a time."""
    (folder / "zero_layers.json").write_text(
        json.dumps(zero_layers(read_tensors(dense), read_tensors(compressed))), encoding="utf-8"
    )


def read_zero_layers(folder: Path) -> list[str]:
    """What `zero_layers` found, as its unit wrote it."""
    return json.loads((folder / "zero_layers.json").read_text(encoding="utf-8"))


def zero_layers(dense: Mapping[str, StoredTensor], compressed: Mapping[str, StoredTensor]) -> list[str]:
    """Modules of `compressed` with a matrix that is all zero where `dense` has one that is not, sorted."""
    found = set()
    for name, tensor in compressed.items():
        if _is_matrix(tensor) and not tensor.read().any():
            module = _dense_module(name, dense)
            if module is None or dense[f"{module}.weight"].read().any():
                found.add(module or name.removesuffix(".weight"))
    return sorted(found)


def _is_matrix(tensor: StoredTensor) -> bool:
    return tensor.dtype.is_floating_point and len(tensor.shape) > 1 and tensor.numbers > 0


def _dense_module(name: str, dense: Mapping[str, StoredTensor]) -> str | None:
    """The dense layer that a tensor belongs to: ``a.b.up.weight`` to ``a.b``, where the dense model has ``a.b.weight``."""
    module = name
    while module:
        module = module.rpartition(".")[0]
        if f"{module}.weight" in dense:
            return module
    return None
