"""A seeded sample of every sequence's tokens: what layers read there, and the gradients of what they put out.

Shapes: B sequences of T tokens in a batch, t <= T sampled positions of each, R rows of a sequence that one use of a layer
sees, p features.
"""

from collections.abc import Sequence

import torch

from fisherfold.run.determinism import seeded_generator


def sample_positions(sequences: Sequence[int], length: int, count: int, seed: int) -> torch.Tensor:
    """Positions [B, t] of each sequence, ascending and all different; t = min(count, length).

    They depend on the seed and on the sequence's number in the table, not on its batch or shard.
    """
    return torch.stack([_positions(sequence, length, seed)[:count].sort().values for sequence in sequences])


def _positions(sequence: int, length: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=seeded_generator(seed, f"positions/{sequence}"))


class TokenSample:
    """The sampled rows of one layer's input or output gradient, over the batches of a shard.

    A layer that sees only some of a sequence's tokens (an expert) has zeros at positions past its last row, so that t/T of
    its rows are expected in the sample. One that is used several times in a pass gives its uses in turn.

    Args:
        features: p.
        dtype: that the rows are kept in.
        device: of the rows of a layer that is never used.
    """

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self._nothing = torch.zeros((), dtype=dtype, device=device)
        self._features = features
        self._uses: list[torch.Tensor | None] = []
        self.kept: list[torch.Tensor] = []

    def use(self) -> int:
        """The number of one more use in this pass, whose rows may come later."""
        self._uses.append(None)
        return len(self._uses) - 1

    def see(self, use: int, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Sample the rows [B, R, p] of a use at positions [B, t]."""
        self._uses[use] = pick_rows(rows, positions.to(rows.device)).to(self._nothing)

    def end_pass(self, positions: torch.Tensor) -> None:
        """Keep the sample [B, t, p] of the batch."""
        nothing = self._nothing.expand(*positions.shape, self._features)
        uses = [nothing if rows is None else rows for rows in self._uses] or [nothing]
        self._uses.clear()
        turns = torch.arange(positions.shape[1])
        self.kept.append(torch.stack(uses)[turns % len(uses), :, turns].movedim(0, 1))


def pick_rows(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows [B, t, p] of values [B, R, p] at positions [B, t], zero where there is no such row."""
    rows = values.shape[1]
    picked = values.new_zeros(*positions.shape, values.shape[2])
    sequence, place = torch.nonzero(positions < rows, as_tuple=True)
    picked[sequence, place] = values[sequence, positions[sequence, place]]
    return picked
