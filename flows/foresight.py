"""What later stages would refuse of the model and the layers that stage `prepare` has found, refused there.

Stage `prepare` itself depends on its own parameters alone, so that no other invalidates its output; what is looked at here changes nothing
of it. `fisherfold stage prepare` asks, and whatever knows a prepared model may.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params
from fisherfold.run.progress import announce
from fisherfold.run.targets import TARGETS

if TYPE_CHECKING:
    from fisherfold.network.layers import LinearLayer

DEFAULT_TARGET = Params().factorize.target
LITTLE = 0.1  # of a whole model


def foresee(params: Params, model: Path, found: Path) -> None:
    """Look ahead, for the model in one folder with layers.json, dense_layers.json and coverage.json in another.

    Tells what the engine that is to serve the result costs, and warns where little is removed.

    Raises:
        ParameterError, InputError: see `refuse`.
    """
    refuse(params, model, found)
    for line in target_costs(params, found):
        announce("prepare", line)
    coverage = json.loads((found / "coverage.json").read_text(encoding="utf-8"))
    share = removed_share(params, coverage)
    if share < LITTLE:
        announce(
            "prepare",
            f"warning: ranks.ratio = {params.ranks.ratio} removes {share:.1%} of the whole model, for no more than "
            f"{coverage['targeted_parameters'] / coverage['model_parameters']:.0%} of its parameters are in layers that are compressed. "
            "Raise it, or choose another model.",
        )


def refuse(params: Params, model: Path, found: Path) -> None:
    """Refuse what a later stage would refuse.

    Raises:
        ParameterError: no allocation meets the budget, a limit's pattern matches nothing, or factorize.bits does not fit a layer, or head_bits the head.
        InputError: the model cannot be written as GGUF, which `factorize.gguf_export` asks for, not run by the engine of `factorize.target`, or
            not be placed as `capture.placement` says.
    """
    from fisherfold.export.served import CHECKS
    from fisherfold.network.layers import read_dense_layers, read_layers

    layers = read_layers(found)
    CHECKS[params.factorize.target](params.factorize, model, layers)
    if params.factorize.gguf_export:
        from fisherfold.export.gguf_export import check_gguf

        check_gguf(json.loads((model / "config.json").read_text(encoding="utf-8")), model)
    if params.factorize.bits or params.ranks.widths:
        check_groups(layers)
    if params.factorize.head_bits:
        check_head(model)
    check_budget(params, model, layers, read_dense_layers(found))
    check_placement(params, model, layers)


def check_placement(params: Params, model: Path, layers: Sequence["LinearLayer"]) -> None:
    """Refuse a model that stage capture cannot run as `capture.placement` says.

    Raises:
        InputError: says why.
    """
    from fisherfold.statistics.streamed_placement import PLACEMENTS

    PLACEMENTS.lookup(params.capture.placement).require(model, layers, params.capture.dtype)


def check_groups(layers: Sequence["LinearLayer"]) -> None:
    """Refuse layers whose numbers do not come in whole groups, or that the format of few bits has no place for.

    Raises:
        ParameterError: names the first.
    """
    from fisherfold.linalg.group_grid import GROUP

    for layer in layers:
        uneven = f"has {layer.inputs} inputs, which groups of {GROUP} do not divide" if layer.inputs % GROUP else None
        if (
            reason := uneven
            or ("is one of a stack of experts" if layer.stack else None)
            or ("is stored transposed (Conv1D)" if layer.transposed else None)
        ):
            raise ParameterError(
                f"Numbers of few bits: {layer.name!r} {reason}. Set factorize.bits = null and ranks.widths = [], or leave such layers out of what is "
                "compressed (prepare.experts = 'dense')."
            )


def check_head(model: Path) -> None:
    """Refuse to round a head that the format of few bits has no place for.

    Raises:
        ParameterError: it is tied to the input embedding, or its rows are no whole groups.
    """
    from fisherfold.export.architecture import dense_architecture
    from fisherfold.linalg.group_grid import GROUP

    head = dense_architecture(model).own_head()
    if head is None:
        raise ParameterError(
            "factorize.head_bits: the output embedding of this model is its input embedding, which transformers cannot read in few bits. Set factorize.head_bits = null."
        )
    name, module = head
    inputs = module.weight.shape[1]
    if inputs % GROUP:
        raise ParameterError(
            f"factorize.head_bits: {name!r} has {inputs} inputs, which groups of {GROUP} do not divide. Set factorize.head_bits = null."
        )


def target_costs(params: Params, found: Path) -> Iterator[str]:
    """What an engine other than transformers itself costs, and that it is not here."""
    name, target = params.factorize.target, TARGETS[params.factorize.target]
    if name == DEFAULT_TARGET:
        return
    kept, most = _kept_ranks(params, found)
    if kept < most:
        yield (
            f"factorize.target = {name}: {params.ranks.storage} in ranks of multiples of {params.ranks.round_to} keep {kept:.0%} of the full "
            f"ranks at ranks.ratio = {params.ranks.ratio:g}, where pivoted ones of any rank keep {most:.0%}"
        )
    if target.costs:
        yield f"factorize.target = {name}: {target.costs}"
    if not shutil.which(target.program):
        yield f"{target.program} is not installed here; the machine that serves the model needs it ({target.install})"


def _kept_ranks(params: Params, found: Path) -> tuple[float, float]:
    """The share of the full ranks that uniform ranks keep as they are to be stored, and at most."""
    from fisherfold.export.served import kept_rank_share
    from fisherfold.network.layers import read_layers
    from fisherfold.network.sites import find_sites

    sites, ranks = find_sites(read_layers(found), shared=False), params.ranks
    return kept_rank_share(sites, ranks.storage, ranks.round_to, ranks.ratio), kept_rank_share(
        sites, "pivoted", 1, ranks.ratio
    )


def check_budget(params: Params, model: Path, layers: Sequence["LinearLayer"], dense: dict[str, str]) -> None:
    """Refuse a ratio that no allocation meets, and limits that match no module.

    Raises:
        ParameterError: names the nearest ratio, or the pattern.
    """
    from fisherfold.allocators.allocation import pose
    from fisherfold.allocators.budget import BUDGETS
    from fisherfold.allocators.limits import Limits
    from fisherfold.network.sites import find_sites
    from stages.subspace import shares_inputs

    sites = find_sites(layers, shares_inputs(params.subspace), params.subspace.experts.shared)
    limits = Limits.of(params.ranks, (), dense)
    budget = BUDGETS.lookup(params.ranks.budget)(sites, model)
    pose(sites, [np.zeros(site.full_rank) for site in sites], params.ranks, limits, budget)


def removed_share(params: Params, coverage: dict) -> float:
    """The share of the whole model's parameters that `ranks.ratio` removes."""
    if params.ranks.budget != "parameters":  # counts the whole model
        return params.ranks.ratio
    return params.ranks.ratio * coverage["targeted_parameters"] / coverage["model_parameters"]
