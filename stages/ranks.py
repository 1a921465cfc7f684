"""Stage `ranks`: how many components each layer keeps, and in which format, under one budget of stored numbers.

Reads the spectra of stage `subspace`; writes ranks.parquet (one row a layer, model order) and budget.json.
"""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.allocators import (
    corrected,  # noqa: F401  these enter their allocators
    dropped_experts,  # noqa: F401  these enter their allocators
    fermi_descent,  # noqa: F401  these enter their allocators
    measured_allocation,  # noqa: F401  these enter their allocators
    zero_sum,  # noqa: F401  these enter their allocators
)
from fisherfold.allocators.allocation import ALLOCATORS, Allocation, allocate, beyond_reach, pose
from fisherfold.allocators.budget import BUDGETS, Budget
from fisherfold.allocators.cost import DENSE, SIXTEENTHS, Choice, choose_storage
from fisherfold.allocators.dropped_experts import DROPPED
from fisherfold.allocators.expert_classes import into_classes
from fisherfold.allocators.format_price import format_price, price_line
from fisherfold.allocators.limits import Limits, matches
from fisherfold.allocators.loss_weights import WEIGHERS, errors_of
from fisherfold.allocators.rivals import Rival, rivals, rivals_line
from fisherfold.allocators.widths import as_choice, cheapest_loss, options_of
from fisherfold.linalg.factor_rounding import LayerMetric
from fisherfold.linalg.rounding_losses import RoundingUnits, rounding_units
from fisherfold.network.layers import DENSE_FILE, LinearLayer, read_dense_layers, read_layers
from fisherfold.network.models import read_weight
from fisherfold.network.sites import Site, read_facts, read_sites
from fisherfold.run.errors import CorruptArtifact, NumericalError
from fisherfold.run.files import digest_file, verify_output
from fisherfold.run.long_tables import module_rows
from fisherfold.run.params import RanksParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.damped_metrics import DampedMetrics

CURE = "Write it again with `dvc repro --force --single-item subspace`."
RANKS = pa.schema(
    [
        ("module", pa.string()),
        ("n", pa.int64()),
        ("m", pa.int64()),
        ("rank", pa.int64()),
        ("stored_parameters", pa.int64()),
        ("dense_parameters", pa.int64()),
        ("method", pa.string()),
        ("allocator", pa.string()),
        ("storage", pa.string()),
        ("bits", pa.int64()),  # of its numbers, where ranks.widths chose them
        ("site", pa.string()),  # the first of the layers that share this layer's right factor: itself if none does
    ]
)


def run(workspace: Workspace, params: RanksParams) -> None:
    """Allocate ranks with the chosen allocator.

    Raises:
        ParameterError: the allocator is unknown, or no allocation meets the ratio under the limits.
        NumericalError: a spectrum is not finite.
        CorruptArtifact: the output of stage `subspace` is not whole.
    """
    allocator = ALLOCATORS.lookup(params.allocator)
    subspace = workspace.out("subspace")
    inputs = {
        "model": verify_output(workspace.out("prepare"), "model/"),
        "dense_layers": verify_output(workspace.out("prepare"), DENSE_FILE),
        "training": digest_file(workspace.table("training")),
        "tuning": digest_file(workspace.table("tuning")),
        "capture": verify_output(workspace.out("capture")),
        "subspace": verify_output(subspace),
    } | ({"kronecker": verify_output(workspace.out("kronecker"))} if params.widths else {})
    with Scratch(workspace, "ranks", params, inputs) as scratch:
        if scratch.republish():
            return
        facts, sites = read_facts(subspace), read_sites(subspace)
        untargeted = read_dense_layers(workspace.out("prepare"))
        limits = Limits.of(params, facts.get("dense", {}), untargeted)  # the former: the metric says nothing about them
        blind = {site.name for site in sites if matches(site, facts.get("dense", {}))}
        spectra = read_spectra(subspace / "spectra.parquet", sites, blind)
        budget = BUDGETS.lookup(params.budget)(sites, workspace.model)
        task = replace(pose(sites, spectra, params, limits, budget), workspace=workspace, scratch=scratch)
        compared, line = {}, None
        if params.widths:
            choices, loss, simpler = choose_widths(scratch, workspace, task, budget, blind)
            compared = {"rivals": [asdict(rival) for rival in simpler]}
            line = rivals_line(loss, sum(choice.cost for choice in choices), simpler)
        else:
            ranks = into_classes(task, allocate(task, allocator), params.expert_classes)
            choices = [choose_storage(site, int(rank), params.storage, budget.unit) for site, rank in zip(sites, ranks)]
            loss = task.predicted_loss([choice.rank for choice in choices])
            price = format_price(task, limits, budget)
            if price is not None:
                compared = {"format": {"storage": params.storage, "round_to": params.round_to, "price": price}}
                line = price_line(params.storage, params.round_to, price)
        _describe(sites, choices, whole_experts=DROPPED in task.tables)
        if line:
            announce("ranks", line)
        with scratch.publish() as out:
            pq.write_table(
                ranks_table(read_layers(subspace), sites, choices, facts, params.allocator), out / "ranks.parquet"
            )
            for name, extra in task.tables.items():
                pq.write_table(extra, out / f"{name}.parquet")
            (out / "budget.json").write_text(
                json.dumps(
                    compared | _budget(task, choices, loss) | _routing(workspace, read_layers(subspace)),
                    indent=1,
                    sort_keys=True,
                )
                + "\n",
                encoding="utf-8",
            )
            shutil.copyfile(subspace / "layers.json", out / "layers.json")


def choose_widths(
    scratch: Scratch, workspace: Workspace, task: Allocation, budget: Budget, blind: Collection[str]
) -> tuple[list[Choice], float, list[Rival]]:
    """Rank and bits of every site in one knapsack, half the loss that they predict, and simpler plans; see ``fisherfold.allocators.widths``.

    A site in `blind`, about which the metric says nothing, keeps its numbers as they are.

    Raises:
        ParameterError: not even the cheapest options fit.
    """
    params, outs = task.params, [workspace.out(stage) for stage in ("capture", "kronecker", "subspace")]
    seen = {site.name: (site, sigma) for site, sigma in zip(task.sites, task.spectra) if site.name not in blind}
    units = {name: (workspace.model, outs, site, sigma.tolist()) for name, (site, sigma) in seen.items()}
    folders = scratch.map("predicting losses of rounding", predict_rounding, units)
    losses = [
        read_units(folders[site.name], sigma) if site.name in folders else None
        for site, sigma in zip(task.sites, task.spectra)
    ]
    weights = WEIGHERS.lookup(params.allocator)(task, losses, DrawnErrors(workspace.model, tuple(outs)))
    unrounded = 8 * budget.unit.weight
    options = []
    for site, sigma, allowed, own, weight in zip(task.sites, task.spectra, task.allowed, losses, weights):
        widths = (unrounded, *params.widths) if own else (unrounded,)
        own = own or RoundingUnits(0.0, np.zeros_like(sigma), sigma)
        options.append(options_of(site, sigma, own, widths, np.flatnonzero(allowed), params.storage, weight))
    sixteenths = task.budget * SIXTEENTHS
    least = -(-sum(min(option.cost for option in own) for own in options) // SIXTEENTHS)
    if least > task.budget:
        raise beyond_reach(params.ratio, least, task.budget, budget)
    chosen = cheapest_loss(options, sixteenths)
    loss = 0.5 * sum(option.loss for option in chosen)
    return [as_choice(site, option) for site, option in zip(task.sites, chosen)], loss, rivals(options, sixteenths)


def predict_rounding(folder: Path, model: Path, outs: Sequence[Path], site: Site, sigma: Sequence[float]) -> None:
    """Unit of work: what rounding a site's factors, or its weight, will cost."""
    W, left, right, metric = _decomposed(model, outs, site)
    found = rounding_units(W, left, right, np.array(sigma), metric.inputs, metric.outputs)
    text = json.dumps({"dense": found.dense, "components": found.components.tolist()})
    (folder / "units.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class DrawnErrors:
    """What two cuts and a rounding change in the weight of one site, the latter drawn; see ``fisherfold.allocators.loss_weights``.

    Attributes:
        model: the prepared one.
        outs: of stages capture, kronecker and subspace.
    """

    model: Path
    outs: tuple[Path, ...]

    def __call__(self, site: Site, ranks: Sequence[int], bits: int) -> dict[str, np.ndarray]:
        """E [n, m] by KINDS."""
        W, left, right, metric = _decomposed(self.model, self.outs, site)
        return errors_of(site.name, W, left, right, ranks, bits, metric)


def _decomposed(
    model: Path, outs: Sequence[Path], site: Site
) -> tuple[np.ndarray, np.ndarray, np.ndarray, LayerMetric]:
    """W [n, m] of a site with one layer, its basis left [n, k] and right [k, m], and its metric, in float64."""
    (layer,) = site.layers
    (left,), right = site.read_basis(outs[-1] / "bases")
    W = read_weight(model, layer).double().numpy()
    return W, left.double().numpy(), right.double().numpy(), DampedMetrics(*outs).of(layer)


def read_units(folder: Path, sigma: np.ndarray) -> RoundingUnits:
    """What `predict_rounding` wrote."""
    found = json.loads((folder / "units.json").read_text(encoding="utf-8"))
    return RoundingUnits(found["dense"], np.array(found["components"]), sigma)


def read_spectra(path: Path, sites: Sequence[Site], blind: Collection[str] = ()) -> list[np.ndarray]:
    """σ of every site, float64 [k], from the long table (module, component, sigma); zeros for those named in `blind`.

    Raises:
        CorruptArtifact: the table is not readable, or a site has too few or too many components.
        NumericalError: a value is not finite; names the module and the component.
    """
    try:
        table = pq.read_table(path, columns=["module", "component", "sigma"])
    except (OSError, pa.ArrowException) as error:
        raise CorruptArtifact(f"{path} is not readable ({error}). {CURE}") from None
    rows = module_rows(table)
    component, sigma = table["component"].to_numpy(), table["sigma"].to_numpy()
    spectra = []
    for site in sites:
        own = rows.get(site.name, slice(0, 0))
        spectra.append(
            np.zeros(site.full_rank) if site.name in blind else _checked(site, component[own], sigma[own], path)
        )
    return spectra


def _checked(site: Site, component: np.ndarray, sigma: np.ndarray, path: Path) -> np.ndarray:
    if not np.array_equal(component, np.arange(site.full_rank)):
        raise CorruptArtifact(
            f"{path}, module {site.name!r}: expected components 0 … {site.full_rank - 1}, found {len(component)} rows. {CURE}"
        )
    broken = np.flatnonzero(~np.isfinite(sigma))
    if len(broken):
        raise NumericalError(
            f"Stage 'ranks', module {site.name!r}: component {broken[0]} of its spectrum is {sigma[broken[0]]}, so its weight or "
            "metric is not finite. Look for the module in artifacts/subspace/diagnostics.parquet, and raise subspace.input_damping "
            "and subspace.output_damping."
        )
    return sigma


def _describe(sites: Sequence[Site], choices: Sequence[Choice], whole_experts: bool) -> None:
    """Say what is unusual: sites left dense and, unless the allocator has said it of `whole_experts`, sites dropped whole."""
    dense = sum(len(site.layers) for site, choice in zip(sites, choices) if choice.storage == DENSE)
    dropped = [layer.name for site, choice in zip(sites, choices) if choice.rank == 0 for layer in site.layers]
    announce("ranks", f"{sum(len(site.layers) for site in sites)} layers, {dense} of them dense{_widths_of(choices)}")
    if dropped and not whole_experts:
        announce("ranks", f"rank 0, so the layer's product is dropped: {', '.join(dropped)}")


def _widths_of(choices: Sequence[Choice]) -> str:
    """How many sites have numbers of how few bits."""
    counts = Counter(choice.bits for choice in choices if choice.bits)
    return "".join(f", {count} in {bits} bits" for bits, count in sorted(counts.items()))


def ranks_table(
    layers: Sequence[LinearLayer], sites: Sequence[Site], choices: Sequence[Choice], facts: dict, allocator: str
) -> pa.Table:
    """One row a layer, in model order."""
    rows = {
        layer.name: {
            "module": layer.name,
            "n": layer.outputs,
            "m": layer.inputs,
            "rank": min(layer.outputs, layer.inputs) if choice.storage == DENSE else choice.rank,
            "stored_parameters": numbers,
            "dense_parameters": layer.dense_numbers,
            "method": facts.get("methods", {}).get(site.name, facts["metric"]),
            "allocator": allocator,
            "storage": choice.storage,
            "bits": choice.bits,
            "site": site.name,
        }
        for site, choice in zip(sites, choices)
        for layer, numbers in zip(site.layers, choice.numbers)
    }
    return pa.Table.from_pylist([rows[layer.name] for layer in layers], schema=RANKS)


def _routing(workspace: Workspace, layers: Sequence[LinearLayer]) -> dict:
    """Of a mixture, which share of the calibration tokens came to each expert."""
    experts = [layer for layer in layers if layer.stack]
    if not experts:
        return {}
    statistics = Statistics(workspace.out("capture"))
    return {"routed": {layer.name: statistics.tokens_seen(layer) / statistics.tokens for layer in experts}}


def _budget(task: Allocation, choices: Sequence[Choice], loss: float) -> dict:
    """The contract of budget.json. `budget` and `spent` are of the targeted layers, in the unit of ranks.budget."""
    return {
        "ratio": task.params.ratio,
        "unit": task.params.budget,
        "targeted_parameters_dense": sum(site.dense_numbers for site in task.sites),
        "budget": task.budget,
        "spent": sum(choice.cost for choice in choices),
        "stored_parameters": sum(sum(choice.numbers) for choice in choices),
        "predicted_loss_increase": loss,
    }
