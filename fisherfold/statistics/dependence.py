"""ρ, FASC's dependence violation score: how far a layer's input x and the gradient g that comes back to it are from independent.

    ρ_F    = ‖S_xg‖_F / √(‖S_xx‖_F ‖S_gg‖_F)
    ρ_cca  = ‖S_xx^-½ S_xg S_gg^-½‖_F / √m                        both damped by RIDGE of their mean diagonal
    ρ_kfac = |E[(gᵀx)²] − tr(S_xx S_gg)| / tr(S_xx S_gg)          how far the Fisher of a step along x is from K-FAC's

The source leaves the formula open (METHODS: section 4), so each has its name. A finite sample is never exactly 0: each comes with
the 95 % interval of its permutation null (g shuffled over the tokens) and a 95 % interval of ± 1.96 bootstrap standard errors (sequences
drawn with replacement; a sequence drawn twice raises every norm, so resamples give the spread and not the place). All are inner products of N x N kernels of the sampled tokens, so a permutation or a resample costs N² and not N m²:

    ‖S_xg‖_F² = Σ_tu w_t w_u (x_t·x_u)(g_t·g_u),   tr(S_xx S_gg) = Σ_tu w_t w_u (x_t·g_u)²,   Σ_t w_t = 1

Shapes: N tokens, x and g [N, m], kernels [N, N].
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisherfold.network.layers import LinearLayer, by_group
from fisherfold.network.models import decomposing_device
from fisherfold.run.errors import NumericalError, ParameterError
from fisherfold.run.params import KroneckerParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.input_gradients import input_gradient_shards
from fisherfold.statistics.layer_statistics import Statistics

RIDGE = 0.01
MOST_TOKENS = 512  # a draw costs their square
ROW = "dependence.json"
INTERVAL = (0.025, 0.975)
NORMAL = 1.96  # standard errors to either side
TABLE = "dependence.parquet"
FORMS = ("rho_F", "rho_cca", "rho_kfac")
PARTS = ("", "_low", "_high", "_null_low", "_null_high")
RHO_FIELDS = [
    ("dimension", pa.int32()),
    ("tokens", pa.int32()),
    *((f"{form}{part}", pa.float64()) for form in FORMS for part in PARTS),
]
DEPENDENCE = pa.schema([("module", pa.string()), *RHO_FIELDS])  # the group: its first layer
"""ρ, its bootstrap interval and that of the permutation null; null where x or g is zero, or no draws were asked for."""


@dataclass(frozen=True)
class Kernels:
    """Inner products of tokens [N, N]: of x, of g, of x with g, and of x and g each whitened."""

    x: torch.Tensor
    g: torch.Tensor
    crossed: torch.Tensor
    white_x: torch.Tensor
    white_g: torch.Tensor
    dimension: int

    def resampled(self, weights: torch.Tensor) -> torch.Tensor:
        """(ρ_F, ρ_cca, ρ_kfac) [R, 3] of the pairs x_t, g_t under R weights w [R, N] that each sum to 1."""
        w = weights.to(self.x)

        def mean(kernel: torch.Tensor) -> torch.Tensor:
            return ((w @ kernel) * w).sum(1)

        second = w @ self.crossed.diagonal().square()
        return self._scores(
            mean(self.x * self.g),
            mean(self.white_x * self.white_g),
            mean(self.x.square()) * mean(self.g.square()),
            mean(self.crossed.square()),
            second,
        )

    def permuted(self, order: torch.Tensor) -> torch.Tensor:
        """(ρ_F, ρ_cca, ρ_kfac) [3] of the pairs x_t, g_order(t), equally weighted."""
        order = order.to(self.x.device)
        joint, white = (
            (x * g.index_select(0, order).index_select(1, order)).mean()[None]
            for x, g in ((self.x, self.g), (self.white_x, self.white_g))
        )
        second = self.crossed.gather(1, order[:, None]).square().mean()[None]
        return self._scores(joint, white, self.sizes, self.independent, second)[0]

    @cached_property
    def sizes(self) -> torch.Tensor:
        """‖S_xx‖_F² ‖S_gg‖_F², which no permutation changes."""
        return (self.x.square().mean() * self.g.square().mean())[None]

    @cached_property
    def independent(self) -> torch.Tensor:
        """tr(S_xx S_gg), which no permutation changes."""
        return self.crossed.square().mean()[None]

    def _scores(
        self,
        joint: torch.Tensor,
        white: torch.Tensor,
        sizes: torch.Tensor,
        independent: torch.Tensor,
        second: torch.Tensor,
    ) -> torch.Tensor:
        rho_F = joint.clamp(min=0).sqrt() / sizes**0.25
        rho_cca = (white.clamp(min=0) / self.dimension).sqrt()
        return torch.stack([rho_F, rho_cca, (second - independent).abs() / independent], 1).cpu()


def kernels(x: torch.Tensor, g: torch.Tensor) -> Kernels:
    """Of tokens x and g [N, m]."""
    plain_x, plain_g = x @ x.T, g @ g.T
    return Kernels(plain_x, plain_g, x @ g.T, whitened(plain_x, x.shape[1]), whitened(plain_g, x.shape[1]), x.shape[1])


def whitened(kernel: torch.Tensor, dimension: int) -> torch.Tensor:
    """X M⁻¹ Xᵀ [N, N] for K = X Xᵀ and the damped M = (1 − δ) Xᵀ X / N + δ tr(Xᵀ X) / (N m) I, without M itself.

    It is K ((1 − δ) K / N + μ I)⁻¹, μ the multiple of I.
    """
    count = len(kernel)
    level = RIDGE * kernel.trace() / (count * dimension)
    damped = (1 - RIDGE) * kernel / count + level * torch.eye(count).to(kernel)
    return torch.linalg.solve(damped, kernel)


def measure_dependence(x: torch.Tensor, g: torch.Tensor, draws: int, seed: int) -> dict[str, float]:
    """The three ρ of x and g [S, t, m], with the intervals of `draws` permutations and `draws` resamples.

    Returns:
        a row of the table but for the module; without any ρ where x or g is zero throughout.
    """
    sequences, length, dimension = x.shape
    row: dict[str, float] = {"dimension": dimension, "tokens": sequences * length}
    if not x.any() or not g.any():
        return row
    found, count = kernels(x.flatten(0, 1).double(), g.flatten(0, 1).double()), sequences * length
    generator = torch.Generator().manual_seed(seed)
    row |= dict(zip(FORMS, found.resampled(torch.full((1, count), 1 / count, dtype=torch.float64))[0].tolist()))
    if draws:
        null = torch.stack([found.permuted(torch.randperm(count, generator=generator)) for _ in range(draws)])
        weights = torch.stack([_resample(sequences, length, generator) for _ in range(draws)])
        low, high = null.quantile(torch.tensor(INTERVAL).double(), dim=0)
        spread = NORMAL * found.resampled(weights).std(0)
        for i, form in enumerate(FORMS):
            row |= {f"{form}_null_low": low[i].item(), f"{form}_null_high": high[i].item()}
            row |= {f"{form}_low": max(0.0, row[form] - spread[i].item()), f"{form}_high": row[form] + spread[i].item()}
    return row


def dependence_rows(scratch: Scratch, workspace: Workspace, params: KroneckerParams) -> list[dict[str, Any]] | None:
    """Rows of the table, one for every input of the model but those of experts; None if no tokens were captured."""
    statistics = Statistics(workspace.out("capture"))
    if not statistics.has_tokens:
        return None
    inputs = by_group(statistics.layers)
    groups = {f"dependence.{name}": group for name, group in inputs.items() if not group[0].stack}
    pieces = {name: (workspace.out("capture"), workspace.model, group, params) for name, group in groups.items()}
    sizes = {name: sum(layer.dense_numbers for layer in group) for name, group in groups.items()}
    folders = scratch.map("measuring dependence", measure_group, pieces, sizes)
    return [json.loads((folder / ROW).read_text(encoding="utf-8")) for folder in folders.values()]


def measure_group(
    folder: Path, capture: Path, model: Path, group: Sequence[LinearLayer], params: KroneckerParams
) -> None:
    """Unit of work: the row of one group, from some tokens of every sequence if there are more than MOST_TOKENS.

    Raises:
        NumericalError: a token's values are not finite.
    """
    statistics, name = Statistics(capture), group[0].group
    tokens = statistics.facts["tokens_per_sequence"]
    each = min(tokens, max(1, MOST_TOKENS // statistics.sequences))
    spread = torch.arange(each) * tokens // each
    shards = [(x[:, spread], g[:, spread]) for x, g in input_gradient_shards(statistics, model, group)]
    x, g = (torch.cat(parts)[:MOST_TOKENS].to(decomposing_device()) for parts in zip(*shards))
    if not (x.isfinite().all() and g.isfinite().all()):
        raise NumericalError(
            f"Stage 'kronecker', module {name!r}: its tokens are not finite. Run stage 'capture' again."
        )
    row = {"module": name, **measure_dependence(x, g, params.dependence_draws, params.seed)}
    (folder / ROW).write_text(json.dumps(row, sort_keys=True), encoding="utf-8")


def _resample(sequences: int, length: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(sequences, (sequences,), generator=generator)
    return torch.bincount(drawn, minlength=sequences).double().repeat_interleave(length) / (sequences * length)


def read_dependence(kronecker: Path, form: str) -> dict[str, float]:
    """One form of ρ by group, from the output of stage `kronecker`; 0 where it could not be measured.

    Raises:
        ParameterError: it was not measured at all.
    """
    try:
        table = pq.read_table(kronecker / TABLE, columns=["module", form]).to_pylist()
    except FileNotFoundError:
        raise ParameterError(
            "subspace.fasc.threshold needs ρ of every input, which stage 'kronecker' measures on sampled tokens. "
            "Set capture.tokens_per_sequence to 16, say, or subspace.fasc.threshold to null."
        ) from None
    return {row["module"]: row[form] or 0.0 for row in table}
