"""Matrices of few bits as compressed-tensors' format "pack-quantized" has them, which transformers and vLLM read.

    weight_packed   int32 [n, m · b / 32]: codes + 2^(b−1), from the lowest bits of a word to the highest
    weight_scale    [n, m / GROUP]
    weight_shape    int64 [2]: n, m

They stand in the place of a layer's `weight`; the configuration names the modules that have them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fisherfold.linalg.group_grid import GROUP, Rounded
from fisherfold.run.checkpoint import StoredTensor

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
    bits = WORD * tensors[PACKED].shape[1] // m
    whole = tensors[PACKED].contiguous().numpy().view(np.uint8)
    halves = whole if bits == 8 else np.stack([whole & 15, whole >> 4], axis=-1).reshape(n, m)
    codes = halves.astype(np.float64) - 2 ** (bits - 1)
    return torch.from_numpy(codes * np.repeat(tensors[SCALE].double().numpy(), GROUP, axis=1))


def quantization_config(modules: Mapping[int, Iterable[str]]) -> dict[str, Any]:
    """What config.json says of modules that are stored in few bits, by their width."""
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


def stored_numbers(tensors: Mapping[str, StoredTensor]) -> int:
    """Numbers that these tensors stand for: of a packed matrix those of the matrix."""
    plain = [
        tensor.numbers for name, tensor in tensors.items() if name.rpartition(".")[2] not in (PACKED, SCALE, SHAPE)
    ]
    packed = [tensor.numbers * GROUP for name, tensor in tensors.items() if name.endswith(f".{SCALE}")]
    return sum(plain) + sum(packed)
