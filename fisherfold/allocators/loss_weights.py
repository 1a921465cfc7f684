"""What cuts and roundings are measured to cost, group of layers by group, for the knapsack over bytes (``widths``).

    KL(p ‖ p_g) ≈ ½ Σ_{l in g} w_g τ_l (t_l / τ_l)^b_g   of truncation,     ½ Σ_{l in g} v_g ρ_l   of rounding

t_l = Σ_{i>r} σ_i² and ρ_l are what the metric predicts. p is what the dense model predicts on tuning sequences, p_g what it predicts with errors in the layers of one
group g alone (``corrected.groups_of``): those of a shallow cut, at the highest rank at which t_l is at least ρ_l of the fewest bits, which is τ_l; of a deep one,
DEEP times that; and those that rounding to the fewest bits leaves, drawn and not made. So a cut can be compared to a rounding, both in nats a token. Of w and v
themselves half is taken, √(w v̄) and √(v v̄) with v̄ the geometric mean of all v: they are measured on little text, and all of it loses on other text.

A metric is wrong by group, by kind of error and by depth: it sums a few huge activations that the next norm levels out, so that layers which read them
seem to lose ten times what they do, and it is of the dense model, whose nearly settled softmax it takes for one that no cut of a query will unsettle.

Memory: the model, and of the layers of one group three times their weights, in float32.

Shapes: L sites, W and E [n, m] of a layer.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from fisherfold.allocators.allocation import Allocation, finite
from fisherfold.allocators.corrected import SEQUENCES, Group, groups_of
from fisherfold.allocators.fermi_descent import Softened, softened_model
from fisherfold.linalg.factor_rounding import LayerMetric
from fisherfold.linalg.kronecker_rounding import rounding_errors
from fisherfold.linalg.rounding_losses import RoundingUnits
from fisherfold.network.divergence import divergence
from fisherfold.network.layers import removed
from fisherfold.network.sites import Site
from fisherfold.run.determinism import seeded_generator
from fisherfold.run.errors import NumericalError
from fisherfold.run.registry import Registry

MOST = 32.0  # how many times that of the middle group, or what part of it, what is measured over what is predicted of one counts as
MEASURED = "measured.json"
KINDS = ("shallow cut", "deep cut", "rounding")
DEEP = 8.0  # what a deep cut is predicted to lose by what a shallow one is
STEEPEST = 3.0  # power of a group's losses


@dataclass(frozen=True)
class LossWeights:
    """How predicted losses of a site become measured ones: w τ (t / τ)^b of truncation, v ρ of rounding."""

    truncation: float = 1.0
    rounding: float = 1.0
    power: float = 1.0
    shallow: float = 1.0

    def of_truncation(self, lost: np.ndarray) -> np.ndarray:
        """Of every t."""
        return self.truncation * self.shallow * (lost / self.shallow) ** self.power


UNWEIGHTED = LossWeights()


def truncation_losses(sigma: np.ndarray) -> np.ndarray:
    """t = Σ_{i>=r} σ_i² at every rank r = 0 … k, [k + 1]."""
    return np.append(np.cumsum(np.square(sigma)[::-1])[::-1], 0.0)


Drawing = Callable[[Site, Sequence[int], int], Mapping[str, np.ndarray]]
"""(site, ranks, bits) -> E of its weight by KINDS, cut to a shallow and to a deep rank, and rounded to the bits; can be pickled."""
Weigher = Callable[[Allocation, Sequence[RoundingUnits | None], Drawing], list[LossWeights]]
"""(allocation, what rounding each site is predicted to lose, errors) -> weights [L]; None: a site that is not rounded."""
WEIGHERS: Registry[Weigher] = Registry("ranks.allocator")


@WEIGHERS.register("fisher")
def as_predicted(allocation: Allocation, units: Sequence[RoundingUnits | None], draw: Drawing) -> list[LossWeights]:
    """Losses as the metric predicts them."""
    return [UNWEIGHTED] * len(allocation.sites)


@WEIGHERS.register("corrected")
def as_measured(allocation: Allocation, units: Sequence[RoundingUnits | None], draw: Drawing) -> list[LossWeights]:
    """See the module. ``allocation.tables["corrections"]``: kind, part, error, predicted (½ Σ), measured (nats a token), weight.

    Raises:
        NumericalError: a divergence is not finite; names the group.
    """
    bits = min(allocation.params.widths)
    foreseen = {
        row: foresee(allocation.spectra[row], np.flatnonzero(allocation.allowed[row]), own, bits)
        for row, own in enumerate(units)
        if own is not None
    }
    groups = {
        group: seen
        for group, rows in groups_of(allocation.sites).items()
        if (seen := [row for row in rows if row in foreseen])
    }
    measured = measure_groups(allocation, groups, {row: own.ranks for row, own in foreseen.items()}, bits, draw)
    found = site_weights(groups, foreseen, measured)
    allocation.tables["corrections"] = pa.Table.from_pylist(found.table)
    return [found.of_sites.get(row, UNWEIGHTED) for row in range(len(allocation.sites))]


@dataclass(frozen=True)
class Foreseen:
    """The ranks that a site is cut to when it is measured, a shallow and a deep one, and what is predicted to be lost by KINDS."""

    ranks: tuple[int, int]
    losses: dict[str, float]


def foresee(sigma: np.ndarray, ranks: np.ndarray, units: RoundingUnits, bits: int) -> Foreseen:
    """Of a site that may have `ranks`: the highest at which it loses what rounding to `bits` does, or DEEP times that; the lowest, if it always loses less."""
    lost, rounded = truncation_losses(sigma), units.of_dense(bits)

    def highest(least: float) -> int:
        enough = ranks[lost[ranks] >= least]
        return int(enough[-1] if len(enough) else ranks[0])

    shallow = highest(rounded)
    deep = highest(DEEP * lost[shallow])
    return Foreseen((shallow, deep), dict(zip(KINDS, (float(lost[shallow]), float(lost[deep]), rounded))))


def errors_of(
    name: str,
    W: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    ranks: Sequence[int],
    bits: int,
    metric: LayerMetric,
) -> dict[str, np.ndarray]:
    """E of W by KINDS: of left [n, k] right [k, m] cut to a shallow and to a deep rank, and of a rounding to `bits`, drawn for the layer's name."""
    cut = [left[:, :rank] @ right[:rank] - W for rank in ranks]
    drawn = rounding_errors(W, bits, metric.inputs, metric.outputs, seeded_generator(0, name))
    return dict(zip(KINDS, (*cut, drawn)))


class SiteWeights(NamedTuple):
    """The weights of every site that was measured, and how they were found, a row a group and kind of error."""

    of_sites: dict[int, LossWeights]
    table: list[dict[str, Any]]


def site_weights(
    groups: Mapping[Group, Sequence[int]],
    foreseen: Mapping[int, Foreseen],
    measured: Mapping[Group, Mapping[str, float]],
) -> SiteWeights:
    """From the sites of each group, what was predicted of each, and what was measured of the group by KINDS."""
    predicted = {
        kind: {group: 0.5 * sum(foreseen[site].losses[kind] for site in own) for group, own in groups.items()}
        for kind in KINDS
    }
    quotients = {kind: quotients_of(predicted[kind], {g: own[kind] for g, own in measured.items()}) for kind in KINDS}
    shallow, deep, rounding = KINDS
    middle = float(np.exp(np.mean(np.log(list(quotients[rounding].values()) or [1.0]))))
    weights = {
        kind: {group: weight_of(quotients[kind].get(group, middle), middle) for group in groups} for kind in KINDS
    }
    table = [
        {"kind": group[0], "part": group[1], "error": kind, "predicted": predicted[kind][group]}
        | {"measured": measured[group][kind], "weight": weights[kind][group]}
        for kind in KINDS
        for group in groups
    ]
    of_sites = {}
    for group, own in groups.items():
        power = 1.0
        if group in quotients[shallow] and group in quotients[deep]:
            deeper = predicted[deep][group] / predicted[shallow][group]
            power = power_of(deeper, quotients[deep][group] / quotients[shallow][group])
        for site in own:
            least = foreseen[site].losses[shallow] or 1.0
            of_sites[site] = LossWeights(weights[shallow][group], weights[rounding][group], power, least)
    return SiteWeights(of_sites, table)


def quotients_of(predicted: Mapping[Group, float], measured: Mapping[Group, float]) -> dict[Group, float]:
    """Measured by predicted, of every group of which something is either."""
    return {group: measured[group] / loss for group, loss in predicted.items() if loss > 0 and measured[group] > 0}


def weight_of(quotient: float, middle: float) -> float:
    """√(middle · quotient): half of what is corrected, since it is measured on little text; no further from the middle than MOST."""
    return float(np.sqrt(middle * np.clip(quotient, middle / MOST, middle * MOST)))


def power_of(deeper: float, steeper: float) -> float:
    """b where losses that are predicted `deeper` times as high have `steeper` times the weight: 1 + log steeper / log deeper, within 1 and STEEPEST."""
    if deeper <= 1:
        return 1.0
    return float(np.clip(1 + np.log(steeper) / np.log(deeper), 1.0, STEEPEST))


def measure_groups(
    allocation: Allocation,
    groups: Mapping[Group, Sequence[int]],
    ranks: Mapping[int, Sequence[int]],
    bits: int,
    draw: Drawing,
) -> dict[Group, dict[str, float]]:
    """The divergence by every kind of errors in nats a token, of every group; a group is a restartable unit.

    Raises:
        NumericalError: one is not finite.
    """
    scratch, workspace = allocation.scratch, allocation.workspace
    assert scratch is not None and workspace is not None
    plain = Softened(workspace, allocation.params.measured.dtype, ())
    units = {
        f"group-{number}": (plain, [(allocation.sites[row], ranks[row]) for row in rows], bits, draw)
        for number, rows in enumerate(groups.values())
    }
    folders = scratch.map("measuring groups of layers", measure_group, units)
    measured = [json.loads((folder / MEASURED).read_text(encoding="utf-8")) for folder in folders.values()]
    for group, found in zip(groups, measured, strict=True):
        for kind in KINDS:
            if found[kind] is None:
                raise NumericalError(
                    f"Stage 'ranks', corrected: with the errors of a {kind} in {group[0]} alone, part {group[1] + 1} of the depth, what the model predicts "
                    "is not finite. Set ranks.measured.dtype to float32, or use allocator 'fisher'."
                )
    return dict(zip(groups, measured, strict=True))


def measure_group(
    folder: Path, plain: Softened, sites: Sequence[tuple[Site, Sequence[int]]], bits: int, draw: Drawing
) -> None:
    """Unit of work: the divergence by every kind of errors of some sites, together; null if not finite."""
    model, _, _, table = softened_model(plain)
    found = divergences(model, table, {site.layers[0].name: draw(site, ranks, bits) for site, ranks in sites})
    (folder / MEASURED).write_text(json.dumps({kind: finite(value) for kind, value in found.items()}), encoding="utf-8")


@torch.inference_mode()
def divergences(
    model: nn.Module, table: torch.Tensor, errors: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """KL(p ‖ p̂) in nats a token by KINDS over the first SEQUENCES of a table [S, T], p̂ with the errors of that kind, which are given by layer."""
    sequences, totals = table[:SEQUENCES], dict.fromkeys(KINDS, 0.0)
    by_kind = {kind: {name: torch.from_numpy(own[kind]).float() for name, own in errors.items()} for kind in KINDS}
    for ids in sequences.split(1):
        ids = ids.to(next(model.parameters()).device)
        dense = model(input_ids=ids, use_cache=False).logits
        for kind, own in by_kind.items():
            with with_errors(model, own):
                totals[kind] += float(divergence(dense, model(input_ids=ids, use_cache=False).logits).mean())
    return {kind: total / len(sequences) for kind, total in totals.items()}


@contextmanager
def with_errors(model: nn.Module, errors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a layer named in `errors` gives y + x Eᵀ, whether its weight is in memory now or only when it runs."""

    def add(error: torch.Tensor) -> Callable[..., torch.Tensor]:
        def after(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + nn.functional.linear(inputs[0], error.to(inputs[0]))

        return after

    with removed(model.get_submodule(name).register_forward_hook(add(error)) for name, error in errors.items()):
        yield
