"""Matrices of few bits as compressed-tensors' format "pack-quantized" has them, which transformers and vLLM read.

    weight_packed   int32 [n, m · b / 32]: codes + 2^(b−1), from the lowest bits of a word to the highest
    weight_scale    [n, m / GROUP]
    weight_shape    int64 [2]: n, m

They stand in the place of a layer's `weight`; the configuration names the modules that have them.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherfold.linalg.group_grid import GROUP, Rounded
from fisherfold.run.checkpoint import StoredTensor, read_tensors

WIDTHS = (8, 4)
"""Bits that vLLM has kernels for."""
METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
WORD = 32


def packed_tensors(rounded: Rounded) -> dict[str, torch.Tensor]:
    """The three tensors of a matrix, its scales in float16."""
    return {
        PACKED: torch.from_numpy(pack(rounded.codes, rounded.grid.bits)),
        SCALE: torch.from_numpy(rounded.grid.scales).half(),
        SHAPE: torch.tensor(rounded.codes.shape),
    }


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, m] of 4 or 8 bits in int32 words [n, m b / 32]."""
    whole = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    halves = whole if bits == 8 else whole[:, ::2] | whole[:, 1::2] << 4
    return np.ascontiguousarray(halves).view("<i4")


def unpacked(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix [n, m] that the three tensors stand for, float64."""
    n, m = tensors[SHAPE].tolist()
    bits = _bits_of(tensors[PACKED].shape[1], m)
    whole = tensors[PACKED].contiguous().numpy().view(np.uint8)
    halves = whole if bits == 8 else np.stack([whole & 15, whole >> 4], axis=-1).reshape(n, m)
    codes = halves.astype(np.float64) - 2 ** (bits - 1)
    return torch.from_numpy(codes * np.repeat(tensors[SCALE].double().numpy(), GROUP, axis=1))


def _bits_of(words: int, columns: int) -> int:
    """The width of the numbers of a row, packed in so many words."""
    return WORD * words // columns


def matrices(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with each packed matrix, float64, in the place of the three that it is packed in."""
    whole = {name: tensor for name, tensor in tensors.items() if _matrix_of(name) is None}
    for name in filter(None, {_matrix_of(name) for name in tensors}):
        prefix = name.removesuffix("weight")
        whole[name] = unpacked({part: tensors[prefix + part] for part in (PACKED, SCALE, SHAPE)})
    return whole


def _matrix_of(name: str) -> str | None:
    """The matrix that a packed tensor is a part of."""
    prefix, part = name[: name.rfind(".") + 1], name.rpartition(".")[2]
    return f"{prefix}weight" if part in (PACKED, SCALE, SHAPE) else None


def quantization_config(modules: Mapping[int, Iterable[str]]) -> dict[str, Any] | None:
    """What config.json says of modules that are stored in few bits, by their width; None if there are none."""
    if not modules:
        return None
    groups = {
        f"bits_{bits}": {
            "targets": sorted(names),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
        }
        for bits, names in sorted(modules.items())
    }
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def count_stored(tensors: Mapping[str, StoredTensor]) -> int:
    """Numbers that these tensors stand for: of a packed matrix those of the matrix."""
    plain = [tensor.numbers for name, tensor in tensors.items() if _matrix_of(name) is None]
    packed = [tensor.numbers * GROUP for name, tensor in tensors.items() if name.endswith(f".{SCALE}")]
    return sum(plain) + sum(packed)


def as_stored(name: str, tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """A layer's tensor in the checkpoint's dtype; scales stay in 16 bits, which both half-precision formats keep exactly."""
    return tensor if name.endswith(SCALE) else tensor.cast(dtype)


def with_packed(tensors: Mapping[str, StoredTensor], packed: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """The checkpoint's tensors with the packed weights of dense layers, which lie in these folders, in the place of the plain ones."""
    found = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in packed}
    for module, folder in packed.items():
        found |= {f"{module}.{part}": tensor for part, tensor in read_tensors(folder).items()}
    return dict(sorted(found.items()))


def packed_modules(tensors: Mapping[str, StoredTensor]) -> dict[int, list[str]]:
    """The modules whose weight is packed, by its bits."""
    found: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if name.endswith(f".{PACKED}"):
            module = name.removesuffix(f".{PACKED}")
            columns = tensors[f"{module}.{SCALE}"].shape[1] * GROUP
            found.setdefault(_bits_of(tensor.shape[1], columns), []).append(module)
    return found


def unpacked_weights(packed: Mapping[str, Path], dense: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights of dense layers as their packed form has them, in the dtype and by the names of `dense`."""
    found = {}
    for module, folder in packed.items():
        plain = dense[f"{module}.weight"]
        found[f"{module}.weight"] = StoredTensor(plain.shape, plain.dtype, partial(_unpacked_as, folder, plain.dtype))
    return found


def _unpacked_as(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    return unpacked({name: tensor.read() for name, tensor in read_tensors(folder).items()}).to(dtype)
