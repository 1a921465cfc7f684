"""ρ, FASC's dependence violation score: how far a layer's input x and the gradient g that comes back to it are from independent.

    ρ_F    = ‖S_xg‖_F / √(‖S_xx‖_F ‖S_gg‖_F)
    ρ_cca  = ‖S_xx^-½ S_xg S_gg^-½‖_F / √m                        both damped by RIDGE of their mean diagonal
    ρ_kfac = |E[(gᵀx)²] − tr(S_xx S_gg)| / tr(S_xx S_gg)          how far the Fisher of a step along x is from K-FAC's

The source leaves the formula open (METHODS: section 4), so each has its name. A finite sample is never exactly 0: each comes with
the 95 % interval of its permutation null (g shuffled over the tokens) and a 95 % bootstrap interval (sequences drawn with
replacement). All are inner products of N x N kernels of the sampled tokens, so a permutation or a resample costs N² and not N m²:

    ‖S_xg‖_F² = Σ_tu w_t w_u (x_t·x_u)(g_t·g_u),   tr(S_xx S_gg) = Σ_tu w_t w_u (x_t·g_u)²,   Σ_t w_t = 1

Shapes: N tokens, x and g [N, m], kernels [N, N].
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages.errors import ParameterError
from stages.weighted_svd import metric_root

RIDGE = 0.01
INTERVAL = (0.025, 0.975)
TABLE = "dependence.parquet"
FORMS = ("rho_F", "rho_cca", "rho_kfac")
DEPENDENCE = pa.schema(
    [
        ("module", pa.string()),  # the group: its first layer
        ("dimension", pa.int32()),
        ("tokens", pa.int32()),
        *(
            (f"{form}{part}", pa.float64())
            for form in FORMS
            for part in ("", "_low", "_high", "_null_low", "_null_high")
        ),
    ]
)
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

    def scores(self, weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """(ρ_F, ρ_cca, ρ_kfac) of the pairs x_t, g_order(t) with weights w [N] that sum to 1."""
        pairs = torch.outer(weights, weights)
        g, white_g = (kernel[order][:, order] for kernel in (self.g, self.white_g))
        joint = (pairs * self.x * g).sum().clamp(min=0)
        sizes = (pairs * self.x.square()).sum() * (pairs * g.square()).sum()
        cca = (pairs * self.white_x * white_g).sum().clamp(min=0) / self.dimension
        independent = (pairs * self.crossed[:, order].square()).sum()
        second = (weights * self.crossed[torch.arange(len(order)), order].square()).sum()
        return torch.stack([joint.sqrt() / sizes**0.25, cca.sqrt(), (second - independent).abs() / independent])


def kernels(x: torch.Tensor, g: torch.Tensor) -> Kernels:
    """Of tokens x and g [N, m]."""
    white_x, white_g = _whitened(x), _whitened(g)
    return Kernels(x @ x.T, g @ g.T, x @ g.T, white_x @ white_x.T, white_g @ white_g.T, x.shape[1])


def _whitened(rows: torch.Tensor) -> torch.Tensor:
    root = metric_root(rows.T @ rows / len(rows), RIDGE, "a second moment of tokens")
    return (rows @ root.vectors) / root.scales


def measure_dependence(x: torch.Tensor, g: torch.Tensor, draws: int, seed: int) -> dict[str, float]:
    """The three ρ of x and g [S, t, m], with the intervals of `draws` permutations and `draws` resamples.

    Returns:
        a row of the table but for the module; without any ρ where x or g is zero throughout.
    """
    sequences, length, dimension = x.shape
    row = {"dimension": dimension, "tokens": sequences * length}
    if not x.any() or not g.any():
        return row
    found, count = kernels(x.flatten(0, 1).double(), g.flatten(0, 1).double()), sequences * length
    generator, alike, same = (
        torch.Generator().manual_seed(seed),
        torch.full((count,), 1 / count).double(),
        torch.arange(count),
    )
    row |= dict(zip(FORMS, found.scores(alike, same).tolist()))
    if draws:
        null = [found.scores(alike, torch.randperm(count, generator=generator)) for _ in range(draws)]
        weights = [_resample(sequences, length, generator) for _ in range(draws)]
        row |= _interval(null, "_null") | _interval([found.scores(each, same) for each in weights], "")
    return row


def _resample(sequences: int, length: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(sequences, (sequences,), generator=generator)
    return torch.bincount(drawn, minlength=sequences).double().repeat_interleave(length) / (sequences * length)


def _interval(scores: list[torch.Tensor], kind: str) -> dict[str, float]:
    low, high = torch.stack(scores).quantile(torch.tensor(INTERVAL).double(), dim=0)
    ends = {"low": low.tolist(), "high": high.tolist()}
    return {f"{form}{kind}_{end}": value for end, values in ends.items() for form, value in zip(FORMS, values)}


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
