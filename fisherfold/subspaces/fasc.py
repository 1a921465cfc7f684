"""FASC: the input of a group of layers is projected, W_c x → (W_c L)(R x), and all layers c of the group share R.

The projector keeps what the loss sees of the input, see ``fisherfold.subspaces.projectors``; an input on which x and the gradient g that comes
back to it are nearly independent (ρ below `subspace.fasc.threshold`) keeps its principal components instead, as in the paper.

σ_i² of the spectrum is what component i adds to the objective when it and all later ones are dropped, so that sums of it are
comparable from one input to another: f(k) − f(k+1) of the best objective reached with at most k components. For
`as_printed`, whose surrogate measures something else, and for principal components it is that of `gaussian`.

Shapes: m inputs, W [Σ n_c, m] of the group's layers stacked, r = min(m, Σ n_c).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import decomposing_device, read_weight
from fisherfold.run.errors import NumericalError, ParameterError
from fisherfold.run.params import FascParams
from fisherfold.run.registry import Registry
from fisherfold.statistics.dependence import read_dependence
from fisherfold.statistics.input_gradients import Moments, input_gradient_shards, input_moments
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.metrics import METRICS, MetricSources, OwnDecomposition
from fisherfold.subspaces.projectors import (
    Basis,
    Empirical,
    Gaussian,
    Objective,
    Tokens,
    balanced_basis,
    best_start,
    descend,
    losses,
    nested,
    orthonormal_bases,
    printed_basis,
    variance_basis,
)


@dataclass(frozen=True)
class GroupInput:
    """What is known of one input: damped moments, and x and g [N', m] of its sampled tokens, read anew by every call."""

    moments: Moments
    tokens: Callable[[], Tokens]


@dataclass(frozen=True)
class FascObjective:
    """An entry of the registry.

    Attributes:
        find: (input, params, rank) -> the objective that the spectrum reports, and a basis whose projector of that rank is
            the best that was found.
        nested: whether its projectors of all other ranks are as good, so that its order stays.
    """

    find: Callable[[GroupInput, FascParams, int], tuple[Objective, Basis]]
    nested: bool = False


OBJECTIVES: Registry[FascObjective] = Registry("subspace.fasc.objective")


def as_printed(known: GroupInput, params: FascParams, rank: int) -> tuple[Objective, Basis]:
    """The surrogate that the paper prints."""
    return Gaussian(known.moments), printed_basis(known.moments, params.projector == "orthonormal")


def gaussian(known: GroupInput, params: FascParams, rank: int) -> tuple[Objective, Basis]:
    """The objective if x and g are jointly normal, from the best of several closed forms."""
    objective = Gaussian(known.moments)
    return objective, _minimised(objective, _closed_forms(known.moments, params), params, rank)


def empirical(known: GroupInput, params: FascParams, rank: int) -> tuple[Objective, Basis]:
    """The objective itself over sampled tokens, from the best of the other methods' bases."""
    objective = Empirical(known.tokens)
    starts = [gaussian(known, params, rank)[1], *_closed_forms(known.moments, params)]
    starts.append(printed_basis(known.moments, params.projector == "orthonormal"))
    return objective, _minimised(objective, starts, params, rank)


def variance(known: GroupInput, params: FascParams, rank: int) -> tuple[Objective, Basis]:
    """The principal components of x, and what dropping them costs by `gaussian`; the choice below the threshold."""
    return Gaussian(known.moments), variance_basis(known.moments)


OBJECTIVES.register("as_printed")(FascObjective(as_printed, nested=True))
OBJECTIVES.register("gaussian")(FascObjective(gaussian))
OBJECTIVES.register("empirical")(FascObjective(empirical))
VARIANCE = FascObjective(variance, nested=True)


def optimal_projector(objective: FascObjective, known: GroupInput, params: FascParams, rank: int) -> torch.Tensor:
    """The best projector P [m, m] of one rank that an objective finds."""
    return objective.find(known, params, rank)[1].projector(rank)


def _minimised(objective: Objective, starts: Sequence[Basis], params: FascParams, rank: int) -> Basis:
    start = best_start(objective, starts, rank)
    return descend(objective, start, rank, params.steps, params.projector == "orthonormal")


def _closed_forms(moments: Moments, params: FascParams) -> list[Basis]:
    if params.projector == "orthonormal":
        return orthonormal_bases(moments)
    return [balanced_basis(moments), variance_basis(moments)]


def nested_basis(chosen: FascObjective, known: GroupInput, params: FascParams, rank: int) -> tuple[Objective, Basis]:
    """A basis that keeps the best projector of `rank`, and is good at all other ranks.

    On either side of that rank components are those of the closed forms within the side, in greedy order.
    """
    objective, found = chosen.find(known, params, rank)
    if chosen.nested:
        return objective, found

    def axes(side: Basis) -> Basis:
        inside = Gaussian(known.moments).inside(side)
        return best_start(inside, _closed_forms(inside.moments, params), len(side.right) // 2)

    return objective, nested(objective, found, rank, axes)


def group_input(sources: MetricSources, model: Path, group: Sequence[LinearLayer]) -> GroupInput:
    """What is known of a group's input; its moments are damped as those of metric `kfac` are.

        S_xx ← (1 − δ) S_xx + δ mean(diag S_xx) I,   S_gg ← (1 − δ) S_gg + δ Σ_c mean(diag E[d_c d_cᵀ]) W_cᵀ W_c

    The latter is that of E[d dᵀ], so that what the weights do not read stays free to drop.
    """
    statistics, params = sources.statistics, sources.params
    if isinstance(params.input_damping, str) or isinstance(params.output_damping, str):
        raise ParameterError("subspace.metric = 'fasc' wants numbers for subspace.input_damping and output_damping.")
    raw = input_moments(statistics, model, group)
    share, noise = params.input_damping, params.output_damping
    level = raw.xx.diagonal().mean() * torch.eye(len(raw.xx)).to(raw.xx)
    reads = sum(statistics.output_covariance(layer).diagonal().double().mean() * _gram(model, layer) for layer in group)
    moments = Moments((1 - share) * raw.xx + share * level, raw.xg, (1 - noise) * raw.gg + noise * reads)
    device = decomposing_device()

    def tokens() -> Tokens:
        for x, g in input_gradient_shards(statistics, model, group):
            yield x.flatten(0, 1).to(device), g.flatten(0, 1).to(device)

    return GroupInput(Moments(*(each.to(device) for each in (moments.xx, moments.xg, moments.gg))), tokens)


def _gram(model: Path, layer: LinearLayer) -> torch.Tensor:
    W = read_weight(model, layer).double()
    return W.T @ W


def decompose_inputs(
    sources: MetricSources, model: Path, group: Sequence[LinearLayer], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Arrays of one group: <group>/right [r, m] once, <layer>/left [n_c, r] of every layer; one row of facts.

    Raises:
        ParameterError: the objective is unknown, or what it needs was not captured.
        NumericalError: the moments are not finite.
    """
    chosen = OBJECTIVES.lookup(sources.params.fasc.objective)
    site, params = group[0].group, sources.params.fasc
    reason = unreadable(sources.statistics, group)
    if reason:
        rows.append({"module": site, "sigma": [], "dense": reason})
        return
    known, method = group_input(sources, model, group), _method(sources, site)
    _check_finite(known.moments, site)
    components = min(group[0].inputs, sum(layer.outputs for layer in group))
    rank = min(components, max(1, round(params.share * group[0].inputs)))
    objective, basis = nested_basis(VARIANCE if method == "variance" else chosen, known, params, rank)
    kept = basis.pick(slice(0, components))
    yield f"{site}/right", kept.right.float()
    for layer in group:
        weight = read_weight(model, layer).to(kept.left)
        yield f"{layer.name}/left", (weight @ kept.left).float()
    rows.append(_row(sources, site, method, known.moments, losses(objective, basis)[: components + 1]))


METRICS.register("fasc")(OwnDecomposition(decompose_inputs))


def unreadable(statistics: Statistics, group: Sequence[LinearLayer]) -> str | None:
    """Why nothing can be said of an input, or None if something can."""
    if not statistics.input_gram(group[0]).any():
        return "its input is zero at every calibration token"
    if not any(statistics.output_gram(layer).any() for layer in group):
        return "no calibration token gave it a gradient"
    return None


def _method(sources: MetricSources, site: str) -> str:
    threshold = sources.params.fasc.threshold
    if threshold is None:
        return "fasc"
    rho = read_dependence(sources.kronecker, sources.params.fasc.rho)
    return "fasc" if rho.get(site, 0.0) > threshold else "variance"


def _check_finite(moments: Moments, site: str) -> None:
    for name in ("xx", "xg", "gg"):
        if not getattr(moments, name).isfinite().all():
            raise NumericalError(
                f"Stage 'subspace', module {site!r}: S_{name} holds values that are not finite. Run stage 'capture' again."
            )


def _row(sources: MetricSources, site: str, method: str, moments: Moments, cost: torch.Tensor) -> dict[str, Any]:
    best = torch.cummin(cost, 0).values
    output = torch.linalg.eigvalsh(moments.gg).clamp(min=0)
    return {
        "module": site,
        "method": method,
        "sigma": (best[:-1] - best[1:]).clamp(min=0).sqrt().tolist(),
        "input_condition": moments.input_root.condition,
        "output_condition": (output.max() / output.min()).item(),
        "input_damping": sources.params.input_damping,
        "output_damping": sources.params.output_damping,
        "dense": None,
    }
