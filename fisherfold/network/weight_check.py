"""Weights that no training leaves behind: found before the passes that they would spoil."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from fisherfold.network.streamed_model import is_stand_in
from fisherfold.run.errors import NumericalError

LARGEST = 1e9  # training leaves weights below 1e4; from 1e19 on a square overflows float32


def check_weights(model: nn.Module) -> None:
    """Refuse a model with a weight in memory that is not finite or larger than `LARGEST` in size.

    Raises:
        NumericalError: names the tensor and the value.
    """
    for name, weight in model.named_parameters():
        if not weight.is_meta and not is_stand_in(weight):
            check_weight(name, weight)


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Refuse one weight; see `check_weights`."""
    if not weight.numel():
        return
    low, high = (value.item() for value in weight.detach().aminmax())
    worst = next((value for value in (low, high) if not abs(value) <= LARGEST), None)
    if worst is not None:
        raise NumericalError(
            f"The weight {name!r} of the prepared model holds the value {worst:g}, which no training leaves behind, so activations and "
            "their sums overflow. The checkpoint is damaged: fetch it again (`dvc repro --force --single-item prepare`), or mend that "
            "tensor in its source."
        )


def zero_weights(folder: Path) -> Iterator[str]:
    """Names of the matrices in the safetensors files of `folder` that are zero everywhere."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a file is no mapping
                if len(file.get_slice(name).get_shape()) > 1 and not torch.any(file.get_tensor(name)):
                    yield name
