"""The nearest Kronecker pair of the Fisher of single tokens, from every calibration token: a pass after that of stage `capture`.

    R = (1/N) Σ_t (d_t d_tᵀ) ⊗ (x_t x_tᵀ):   B' = (1/N) Σ_t (x_tᵀ A x_t) d_t d_tᵀ,   A' = (1/N) Σ_t (d_tᵀ B d_t) x_t x_tᵀ

One pass over the tokens takes both steps from the same A and B: those of `kfac` in the first pass, then those of the pass before. What is
kept of a token is nothing, so sums have the size of the factors, and `kronecker.token_pass.layers_per_pass` bounds how many of them are in memory.

Source: YAQA's Sketch A (arXiv 2505.22988); taking both steps at once, clipping, and the start from the token-wise factors are ours.

Shapes: N tokens, x [N, m] and d [N, n] of one layer; A [m, m], B [n, n] of unit norm.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch

from fisherfold.fisher.gradient_samples import GradientSamples, token_norms
from fisherfold.linalg.gram import add_gram, mirror
from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.labels import LABELS
from fisherfold.network.layers import LinearLayer, forward_hooks, input_embedding, linear_modules
from fisherfold.run.errors import NumericalError
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import KroneckerParams
from fisherfold.run.store import read_array
from fisherfold.run.tables import read_sequences
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.shard import layer_slices, loaded_model

PARTS = 4  # of the sequences, each a unit with sums of its own
GROUP = "sums"
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TokenPass:
    """What a unit of a pass reads.

    Attributes:
        model, table, capture: folder of the prepared model, calibration table, output of stage `capture`.
        params: of stage `kronecker`.
        before: folders of the units of the pass before, for the same layers; none in the first pass.
    """

    model: Path
    table: Path
    capture: Path
    params: KroneckerParams
    before: tuple[Path, ...] = ()

    def start(self, statistics: Statistics, layer: LinearLayer) -> Pair:
        """A and B of unit norm that the tokens are weighed by; zeros where they vanish."""
        if self.before:
            A, B = step_sums(self.before, layer)
        else:
            A, B = statistics.input_covariance(layer), statistics.output_covariance(layer)
        return _unit(A), _unit(B)


def step_sums(parts: Sequence[Path], layer: LinearLayer) -> Pair:
    """Σ_t (d_tᵀ B d_t) x_t x_tᵀ and Σ_t (x_tᵀ A x_t) d_t d_tᵀ of all parts, added in their order in float64."""
    return _added(parts, f"{layer.name}/A"), _added(parts, f"{layer.name}/B")


def _added(parts: Sequence[Path], name: str) -> torch.Tensor:
    total = read_array(parts[0] / GROUP, name).double()
    for part in parts[1:]:
        total += read_array(part / GROUP, name)
    return total


def _unit(matrix: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return (matrix / norm if norm > 0 else matrix).float()


class WeightedSums:
    """Both sums of one layer, and the pair that weighs their tokens.

    Args:
        start: A and B.
        limit: tokens are scaled down to this norm ‖d‖ ‖x‖; None leaves them.
        trim: first tokens of every sequence that are left out, where a layer sees all tokens.
    """

    def __init__(self, start: Pair, limit: float | None, trim: int, device: torch.device) -> None:
        self.A, self.B = (M.to(device) for M in start)
        self.limit, self.trim = limit, trim
        self.inputs, self.outputs = torch.zeros_like(self.A), torch.zeros_like(self.B)

    def add(self, x: torch.Tensor, d: torch.Tensor, shape: tuple[int, int]) -> None:
        """Add the tokens of x [..., m] and d [..., n], of a batch of `shape` [B, T]."""
        x, d = x.flatten(0, -2).float(), d.flatten(0, -2).float()
        if self.trim and len(d) == shape[0] * shape[1]:
            d = d * (torch.arange(len(d), device=d.device) % shape[1] >= self.trim)[:, None]
        if self.limit is not None:
            d = d * (self.limit / token_norms(x, d)).clamp(max=1.0)[:, None]  # a norm of 0 gives inf, then 1
        for_outputs = ((x @ self.A) * x).sum(1).clamp(min=0).sqrt()
        for_inputs = ((d @ self.B) * d).sum(1).clamp(min=0).sqrt()
        add_gram(self.outputs, for_outputs[:, None] * d)
        add_gram(self.inputs, for_inputs[:, None] * x)


def pass_part(folder: Path, source: TokenPass, layers: Sequence[LinearLayer], low: int, high: int) -> None:
    """Unit of work: the sums of some layers over the calibration sequences `low` … `high` − 1, without those that `capture` left out.

    Raises:
        NumericalError: the sums of a layer are not finite; names it.
    """
    options, statistics = source.params.token_pass, Statistics(source.capture)
    model, _ = loaded_model(source.model, options.dtype)
    modules = linear_modules(model)
    watched = {layer.name: modules[layer.name] for layer in layers}
    devices = {name: cast(torch.device, module.weight.device) for name, module in watched.items()}
    sums = {layer.name: _sums(source, statistics, layer, devices[layer.name]) for layer in layers}
    ids = read_sequences(source.table, len(input_embedding(model)))
    skipped = {sequence["sequence"] for sequence in statistics.facts["skipped"]}
    numbers = [number for number in range(low, min(high, len(ids))) if number not in skipped]
    for first in range(0, len(numbers), options.batch_size):
        some = numbers[first : first + options.batch_size]
        labels = LABELS[statistics.facts["labels"]](some, statistics.facts["seed"], 0)
        with forward_hooks(watched, _adder(sums, (len(some), ids.shape[1]))):
            gradient_pass(model, ids[some], draws=[labels])
    write_arrays(folder / GROUP, _arrays(sums))


def _adder(sums: dict[str, WeightedSums], shape: tuple[int, int]) -> Callable[[str, torch.Tensor, torch.Tensor], None]:
    """A hook that adds a layer's tokens as soon as their gradients are there."""

    def on_forward(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        if output.requires_grad:
            seen = x.detach()
            output.register_hook(lambda d: sums[name].add(seen, d, shape))

    return on_forward


def _sums(source: TokenPass, statistics: Statistics, layer: LinearLayer, device: torch.device) -> WeightedSums:
    params = source.params
    limit = None if params.clip is None else GradientSamples(statistics, layer, params).token_limit()
    return WeightedSums(source.start(statistics, layer), limit, params.trim_tokens, device)


def _arrays(sums: dict[str, WeightedSums]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, own in sums.items():
        for side, total in (("A", own.inputs), ("B", own.outputs)):
            if not total.diagonal().isfinite().all():
                raise NumericalError(
                    f"Stage 'kronecker', module {name!r}: its sums over weighted tokens are not finite. Set kronecker.clip to 3, or "
                    "kronecker.token_pass.dtype to float32."
                )
            yield f"{name}/{side}", mirror(total).cpu()


def part_bounds(sequences: int, batch_size: int) -> list[tuple[int, int]]:
    """The first and the next-to-last sequence of at most PARTS parts of whole batches, as equal as they go."""
    batches = -(-sequences // batch_size)
    parts = min(PARTS, batches)
    edges = [batch_size * (batches * part // parts) for part in range(parts)] + [sequences]
    return list(pairwise(edges))


def slices(statistics: Statistics, params: KroneckerParams) -> list[list[LinearLayer]]:
    """The layers of each round of units; all in one if nothing bounds them."""
    return layer_slices(statistics.layers, params.token_pass.layers_per_pass)
