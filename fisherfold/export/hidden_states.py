"""Hidden states of two networks between decoder blocks: in memory where there are few of them, else on the disk.

    <folder>/dense, <folder>/compressed     of those that are more than HELD bytes: x [S, T, h] of either network, a sequence an array

Shapes: S sequences of T tokens, B of them a batch, h hidden dimensions.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from fisherfold.run.group_writer import GroupWriter, group_file
from fisherfold.run.store import close_groups, read_array

NETWORKS = (DENSE, COMPRESSED) = ("dense", "compressed")
HELD = 2**29  # bytes of both networks' states; twice as many are in memory while a block is trained

Batches = Iterable[tuple[str, list[int], torch.Tensor]]
"""Table, numbers of its sequences in order, and their x [B, T, h]."""


class States(Protocol):
    """Hidden states of both networks at one place."""

    def read(self, network: str, part: str, numbers: list[int]) -> torch.Tensor:
        """x [B, T, h] of the sequences of these numbers in the table `part`."""

    def drop(self) -> None:
        """Let go of them: the next block's are complete."""


class LeftStates(States, Protocol):
    """Those that leave a block."""

    def take(self, network: str, batches: Batches) -> None:
        """All of one network."""


class HeldStates:
    """States in memory."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, str], torch.Tensor] = {}

    def read(self, network: str, part: str, numbers: list[int]) -> torch.Tensor:
        """See `States`."""
        return self._states[network, part][numbers]

    def take(self, network: str, batches: Batches) -> None:
        """See `LeftStates`."""
        parts: dict[str, list[torch.Tensor]] = {}
        for part, _, x in batches:
            parts.setdefault(part, []).append(x)
        self._states |= {(network, part): torch.cat(found) for part, found in parts.items()}

    def drop(self) -> None:
        """See `States`."""
        self._states.clear()


class StoredStates:
    """States on the disk, read onto `device`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    @property
    def complete(self) -> bool:
        """Whether those of both networks lie there."""
        return all(group_file(self._folder / network).exists() for network in NETWORKS)

    def read(self, network: str, part: str, numbers: list[int]) -> torch.Tensor:
        """See `States`."""
        found = [read_array(self._folder / network, f"{part}.{number}") for number in numbers]
        return torch.stack(found).to(self._device)

    def take(self, network: str, batches: Batches) -> None:
        """See `LeftStates`."""
        with GroupWriter(self._folder / network) as writer:
            for part, numbers, states in batches:
                for number, x in zip(numbers, states, strict=True):
                    writer.write(f"{part}.{number}", x)

    def drop(self) -> None:
        """See `States`."""
        close_groups()
        for network in NETWORKS:
            group_file(self._folder / network).unlink(missing_ok=True)
