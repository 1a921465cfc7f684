"""The captured gradients of one layer as an estimator wants them: whole sequences, averages of several, or single tokens.

Blocks have a fixed size whatever the shards' size, so shards change no bit.

Shapes: n outputs, m inputs, S sequences, k sketch rank, t sampled tokens of a sequence, c sequences an averaged gradient.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from fisherfold.fisher.gradient_blocks import (
    BLOCK_COLUMNS,
    BLOCK_NUMBERS,
    ExactGradients,
    Gradients,
    SketchedGradients,
    TokenGradients,
)
from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import DTYPES, decomposing_device
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import KroneckerParams
from fisherfold.statistics.layer_statistics import Statistics

Arrays = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class GradientSamples:
    """What one layer's Fisher is estimated from.

    Attributes:
        statistics: of stage `capture`.
        layer: the layer.
        params: of stage `kronecker`.
        half: 0 or 1 for every second gradient (every second sequence, of tokens); None for all.
    """

    statistics: Statistics
    layer: LinearLayer
    params: KroneckerParams
    half: int | None = None

    def blocks(self) -> Iterator[Gradients]:
        """Gradients of sequences, or averages of kronecker.sequences_per_gradient of them."""
        for arrays in regroup(self.statistics.gradient_shards(self.layer), self._sequences_per_block):
            arrays = self._every_second(averaged(self._moved(arrays), self.params.sequences_per_gradient))
            if len(arrays[0]):
                yield ExactGradients(*arrays) if len(arrays) == 1 else SketchedGradients(*arrays)

    def token_blocks(self) -> Iterator[TokenGradients]:
        """Gradients of single tokens, trimmed and clipped."""
        limit = self.token_limit()
        for x, d, positions in regroup(self.statistics.token_shards(self.layer), _tokens_per_block):
            x, d, positions = self._every_second((*self._moved((x, d)), positions))
            if not len(x):
                continue
            used = (positions >= self.params.trim_tokens).to(d.device)
            d = d * used[..., None]
            if limit is not None:
                d = d * (limit / token_norms(x, d)).clamp(max=1.0)[..., None]  # a norm of 0 gives inf, then 1
            yield TokenGradients(x, d, int(used.sum()))

    def tokens(self, side: str) -> Iterator[torch.Tensor]:
        """The sampled tokens' inputs ("x", [S', t, m]) or output gradients ("d", [S', t, n]) as they were captured."""
        for x, d, _ in regroup(self.statistics.token_shards(self.layer), _tokens_per_block):
            yield {"x": x, "d": d}[side]

    def token_limit(self) -> float | None:
        """kronecker.clip times the median of ‖d_t x_tᵀ‖ over tokens that have a gradient; None if nothing is to be clipped.

        Holds one number a token.

        Raises:
            ParameterError: kronecker.trim_tokens leaves no token.
        """
        trim = self.params.trim_tokens
        norms = torch.cat(
            [token_norms(x, d)[positions >= trim] for x, d, positions in self.statistics.token_shards(self.layer)]
        )
        if not len(norms):
            raise ParameterError(
                f"kronecker.trim_tokens = {trim} leaves no token of the capture's sequences of "
                f"{self.statistics.facts['sequence_length']}. Lower it."
            )
        seen = norms[norms > 0]
        return None if self.params.clip is None or not len(seen) else self.params.clip * seen.median().item()

    def _moved(self, arrays: Arrays) -> Arrays:
        device, dtype = decomposing_device(), DTYPES[self.params.dtype]
        return tuple(array.to(device, dtype) for array in arrays)

    def _every_second(self, arrays: Arrays) -> Arrays:
        return arrays if self.half is None else tuple(array[self.half :: 2] for array in arrays)

    def _sequences_per_block(self, shard: Arrays) -> int:
        """As many as a block holds, a multiple of 2 c, so that averages and halves do not depend on where blocks end."""
        exact = len(shard) == 1
        held = BLOCK_NUMBERS // shard[0][0].numel() if exact else BLOCK_COLUMNS // shard[0].shape[2]
        together = self.params.sequences_per_gradient * (1 if self.half is None else 2)
        return max(1, held // together) * together


def _tokens_per_block(shard: Arrays) -> int:
    """Sequences whose sampled tokens fill a block, an even number."""
    return max(1, BLOCK_COLUMNS // shard[0].shape[1] // 2) * 2


def token_norms(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """‖d_t x_tᵀ‖ = ‖d_t‖ ‖x_t‖ [S, t]."""
    return torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(d, dim=-1)


def averaged(arrays: Arrays, together: int) -> Arrays:
    """The mean gradient of every `together` sequences in turn; the last is the mean of those that remain.

    Sketches of rank k become sketches of rank c k, their columns side by side, or exact gradients where those are smaller.
    """
    if together == 1:
        return arrays
    sequences = len(arrays[0])
    groups = -(-sequences // together)
    counts = torch.full((groups,), float(together), dtype=arrays[0].dtype, device=arrays[0].device)
    counts[-1] = sequences - (groups - 1) * together
    missing = [(0, 0) * (array.ndim - 1) + (0, groups * together - sequences) for array in arrays]
    split = [
        torch.nn.functional.pad(array, pad).view(groups, together, *array.shape[1:])
        for array, pad in zip(arrays, missing)
    ]
    if len(arrays) == 1:
        return (split[0].sum(1) / counts[:, None, None],)
    left, right = (part.transpose(1, 2).flatten(2) for part in split)
    left = left / counts[:, None, None]
    return (left @ right.mT,) if left.shape[2] >= min(left.shape[1], right.shape[1]) else (left, right)


def regroup(shards: Iterable[Arrays], block_size: Callable[[Arrays], int]) -> Iterator[Arrays]:
    """Shards of arrays [S, …] cut and joined to blocks of equal numbers of sequences."""
    pieces: list[Arrays] = []
    held = 0
    for shard in shards:
        size = block_size(shard)
        while held + len(shard[0]) >= size:
            yield _join([*pieces, tuple(array[: size - held] for array in shard)])
            shard = tuple(array[size - held :] for array in shard)
            pieces, held = [], 0
        if len(shard[0]):
            pieces.append(shard)
            held += len(shard[0])
    if pieces:
        yield _join(pieces)


def _join(pieces: list[Arrays]) -> Arrays:
    return tuple(torch.cat(arrays) for arrays in zip(*pieces))
