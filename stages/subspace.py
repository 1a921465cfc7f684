"""Stage `subspace`: every layer's weight as components, ordered by what each costs under the chosen metric.

Reads the dense model, the statistics of stage `capture` and the factors of stage `kronecker`; writes bases/ with
<layer>/left [n, r] and <layer>/right [r, m] in float32, r = min(n, m), spectra.parquet (σ of every component, long format,
model order), diagnostics.parquet (one row a layer), subspace.json and layers.json.

Layers that read one input may share the right factor (`subspace.share_inputs`, and always with metric `fasc`): then they are one site,
named after the first of them, with one <site>/right [r, m] and one row in the tables, r = min(m, Σ n).

So are the experts of a stack under `subspace.experts.shared` (METHOD: MoBE, arXiv 2508.05257, from these statistics): [Σ n_e, m] with B_e on the
diagonal of the output metric and the A_e weighed by tr B_e.

Experts with few tokens borrow from the others of their stack, see ``fisherfold.subspaces.expert_pool``.

A layer whose metric is zero (an expert that no token was routed to, an input that is always zero) cannot be compressed on
evidence. It has no rows in the spectra and no basis; diagnostics.parquet and subspace.json give the reason under `dense`, and the layer
stays dense.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisherfold.linalg.triangular_root import weighting_root
from fisherfold.linalg.weighted_svd import BlockRoot, Damping, Metric, Root, WeightedSVD, weighted_svd
from fisherfold.network.layers import LinearLayer, by_group, write_layers
from fisherfold.network.models import decomposing_device, read_weight
from fisherfold.network.sites import bundles
from fisherfold.run.errors import NumericalError, ParameterError
from fisherfold.run.files import verify_output
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import SubspaceParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import gather_groups
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces import fasc  # noqa: F401  this enters its metric
from fisherfold.subspaces.expert_pool import few_tokens, pool_experts
from fisherfold.subspaces.metrics import METRICS, Decomposition, MetricSources, OwnDecomposition
from fisherfold.subspaces.shrinkage import SHRINKAGES, read_sampling

SPECTRA = pa.schema([("module", pa.string()), ("component", pa.int32()), ("sigma", pa.float64())])
DIAGNOSTICS = pa.schema(
    [
        ("module", pa.string()),
        ("input_condition", pa.float64()),
        ("output_condition", pa.float64()),
        ("input_damping", pa.float64()),
        ("output_damping", pa.float64()),
        ("dense", pa.string()),
    ]
)
"""Condition numbers are those of the damped metrics, infinite for a singular one; `dense` says why a layer has no basis."""


def run(workspace: Workspace, params: SubspaceParams) -> None:
    """Decompose every layer under the chosen metric, one group of layers that share their input at a time.

    Raises:
        ParameterError: the metric is unknown, or needs what an earlier stage was not asked for.
        NumericalError: a layer's weight or metric is not finite, a decomposition does not converge, or no layer has a metric.
        CorruptArtifact: the output of an earlier stage is not whole.
        NotEnoughDisk: the bases would not fit.
    """
    shared = shares_inputs(params)
    if params.experts.shared and isinstance(METRICS.lookup(params.metric), OwnDecomposition):
        raise ParameterError(
            f"subspace.experts.shared wants a metric on weights, and {params.metric!r} is none. Use subspace.metric = 'kfac'."
        )
    with Scratch(workspace, "subspace", params, _inputs(workspace)) as scratch:
        if scratch.republish():
            return
        capture, kronecker = workspace.out("capture"), workspace.out("kronecker")
        layers = Statistics(capture).layers
        groups = decomposed_groups(layers, params)
        one_site = {name: shared or (bool(group[0].stack) and params.experts.shared) for name, group in groups.items()}
        scratch.require_disk(sum(_basis_bytes(group, one_site[name]) for name, group in groups.items()))
        pieces = bundles(group[0] for group in groups.values())
        units = {
            name: (workspace.model, capture, kronecker, [groups[first.name] for first in some], params)
            for name, some in pieces.items()
        }
        folders = scratch.map("decomposing layers", decompose_groups, units)
        rows = _gather_rows(folders.values(), layers)
        dense = {row["module"]: row["dense"] for row in rows if row["dense"]}
        if all(row["dense"] for row in rows):
            raise NumericalError(
                f"The calibration says nothing about any layer: {next(iter(dense.values()))}. See that the corpus is text, and not special tokens "
                "alone, and that the model is trained; capture.labels: data takes the text's own labels."
            )
        few = few_tokens(Statistics(capture), params.experts)
        for module, reason in dense.items():
            if module not in few:
                announce("subspace", f"{module} stays dense: {reason}")
        with scratch.publish() as out:
            gather_groups(out / "bases", [folder / "bases" for folder in folders.values()])
            pq.write_table(_spectra(rows), out / "spectra.parquet")
            pq.write_table(pa.Table.from_pylist(rows, DIAGNOSTICS), out / "diagnostics.parquet")
            methods = {row["module"]: row["method"] for row in rows if "method" in row}
            facts = {**params.model_dump(), "dense": dense, "shared": shared, "methods": methods}
            facts |= {"few_tokens": few} if few else {}
            (out / "subspace.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            write_layers(out, layers)


def _inputs(workspace: Workspace) -> dict[str, str]:
    """Digests of what the result depends on; the gradients of `capture` are not read here."""
    capture = workspace.out("capture")
    return {
        "model": verify_output(workspace.out("prepare"), "model/"),
        "statistics": verify_output(capture, "statistics."),
        "layers": verify_output(capture, "layers.json"),
        "facts": verify_output(capture, "capture.json"),
        "kronecker": verify_output(workspace.out("kronecker")),
    }


def _basis_bytes(group: Sequence[LinearLayer], shared: bool) -> int:
    sizes = [(layer.outputs, layer.inputs) for layer in group]
    sizes = [(sum(n for n, _ in sizes), group[0].inputs)] if shared else sizes
    return sum(4 * min(n, m) * (n + m) for n, m in sizes)


def decomposed_groups(layers: Sequence[LinearLayer], params: SubspaceParams) -> dict[str, list[LinearLayer]]:
    """Layers that are decomposed together, by the first: those of one input, and all experts of a stack that share a right factor."""
    found: dict[str, list[LinearLayer]] = {}
    for name, group in by_group(layers).items():
        stack = group[0].stack if params.experts.shared else None
        found.setdefault(stack or name, []).extend(group)
    return {group[0].name: group for group in found.values()}


def decomposition(params: SubspaceParams) -> Decomposition:
    """How the layers of a group are decomposed: the metric's own way, or a weighted SVD of each layer or of the stacked ones."""
    metric = METRICS.lookup(params.metric)
    if isinstance(metric, OwnDecomposition):
        return metric.decompose
    return weighted_stack if params.share_inputs else weighted_layers


def shares_inputs(params: SubspaceParams) -> bool:
    """Whether layers that read one input share their right factor."""
    return decomposition(params) is not weighted_layers


def decompose_groups(
    folder: Path,
    model: Path,
    capture: Path,
    kronecker: Path,
    groups: Sequence[Sequence[LinearLayer]],
    params: SubspaceParams,
) -> None:
    """Unit of work: the components of the layers of one group, or of some experts, which are groups of their own."""
    rows: list[dict] = []
    statistics, groups = pool_experts(Statistics(capture), groups, params.experts, rows)
    sources = MetricSources(statistics, kronecker, params)
    decompose = weighted_stack if groups[0][0].stack and params.experts.shared else decomposition(params)
    write_arrays(folder / "bases", (array for layers in groups for array in decompose(sources, model, layers, rows)))
    (folder / "rows.json").write_text(json.dumps(rows, sort_keys=True), encoding="utf-8")


def weighted_layers(
    sources: MetricSources, model: Path, layers: Sequence[LinearLayer], rows: list[dict]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The arrays of each layer's basis, as soon as it is found; `rows` gets the facts of each layer.

    One layer is in memory at a time. The root of the input metric is kept from one to the next, as most metrics share it in a group.
    """
    params, metric, root = sources.params, None, None
    for layer in layers:
        A, B = METRICS.lookup(params.metric)(sources, layer)
        reason = _unusable(A, B)
        if reason:
            rows.append({"module": layer.name, "sigma": [], "dense": reason})
            continue
        input_damping, output_damping = _dampings(sources, layer)
        if root is None or not _same(A, metric):
            metric, root = A, _root(A, input_damping, layer, "input")
        output_root = _root(B, output_damping, layer, "output")
        del B
        basis = _decompose(read_weight(model, layer), root, output_root, layer)
        yield f"{layer.name}/left", basis.left.float()
        yield f"{layer.name}/right", basis.right.float()
        rows.append(_row(layer, basis, root, output_root))


def weighted_stack(
    sources: MetricSources, model: Path, layers: Sequence[LinearLayer], rows: list[dict]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weighted SVD of a group's layers stacked, [Σ n_c, m], with B_c on the diagonal of the output metric."""
    params, site = sources.params, layers[0]
    found = stacked_metric([METRICS.lookup(params.metric)(sources, layer) for layer in layers], layers)
    if found is None:
        reason = "the metrics of its layers are zero: no calibration token gave them an input or a gradient"
        rows.append({"module": site.name, "sigma": [], "dense": reason})
        return
    A, blocks = found
    dampings = [_dampings(sources, layer) for layer in layers]
    input_root = _root(A, dampings[0][0], site, "input")
    roots = [_root(B, damping, layer, "output") for layer, B, (_, damping) in zip(layers, blocks, dampings)]
    output_root = BlockRoot(tuple(roots), tuple(layer.outputs for layer in layers))
    basis = _decompose(torch.cat([read_weight(model, layer) for layer in layers]), input_root, output_root, site)
    yield f"{site.name}/right", basis.right.float()
    for layer, left in zip(layers, basis.left.split([layer.outputs for layer in layers])):
        yield f"{layer.name}/left", left.float()
    rows.append(_row(site, basis, input_root, output_root))


def stacked_metric(
    metrics: Sequence[tuple[Metric, Metric]], layers: Sequence[LinearLayer]
) -> tuple[Metric, list[Metric]] | None:
    """One A for the stacked layers and the blocks B_c of their output metric; None if no layer's metric says anything.

        A = Σ_c tr(B_c) A_c / Σ_c tr(B_c),   each pair scaled before to mean diag A_c = 1

    Layers that have the same A keep it; how the size of A_c ⊗ B_c is split between the two does not matter.
    """
    levels = [1.0 if A is None else A.diagonal().mean().item() if A.ndim == 2 else A.mean().item() for A, _ in metrics]
    blocks = [
        level * (torch.ones(layer.outputs) if B is None else B) for (_, B), level, layer in zip(metrics, levels, layers)
    ]
    weights = [(B.trace() if B.ndim == 2 else B.sum()).item() for B in blocks]
    if sum(weights) <= 0:
        return None
    if all(A is None for A, _ in metrics):
        return None, blocks
    seen = [(A / level, weight) for (A, _), level, weight in zip(metrics, levels, weights) if level > 0]
    return sum(A * (weight / sum(weights)) for A, weight in seen), blocks


def _dampings(sources: MetricSources, layer: LinearLayer) -> tuple[Damping, Damping]:
    """δ of both sides, or the rule that finds it from the eigenvalues and what is known of their sampling.

    An input metric that several layers share goes by the sampling of the first.
    """
    asked = sources.params.input_damping, sources.params.output_damping
    if not any(isinstance(damping, str) for damping in asked):
        return asked
    sampling = read_sampling(sources.kronecker, sources.params.metric, layer.name)
    return tuple(
        partial(SHRINKAGES.lookup(damping), sampling=known) if isinstance(damping, str) else damping
        for damping, known in zip(asked, sampling)
    )


def _unusable(A: Metric, B: Metric) -> str | None:
    """Why a metric says nothing about a layer, or None if it does."""
    if A is not None and not A.any():
        return "its input metric is zero: no calibration token gave it an input or a gradient"
    if B is not None and not B.any():
        return "its output metric is zero: no calibration token gave it a gradient"
    return None


def _same(metric: Metric, other: Metric) -> bool:
    return metric is other if metric is None or other is None else torch.equal(metric, other)


def _root(metric: Metric, damping: Damping, layer: LinearLayer, side: str) -> Root:
    name = f"Stage 'subspace', module {layer.name!r}: the {side} metric"
    try:
        return weighting_root(None if metric is None else metric.to(decomposing_device()), damping, name)
    except NumericalError as error:
        raise NumericalError(
            f"{error}. Run stage 'capture' again; if it persists, raise subspace.{side}_damping."
        ) from None


def _decompose(weight: torch.Tensor, input_root: Root, output_root: Root, layer: LinearLayer) -> WeightedSVD:
    try:
        return weighted_svd(weight.to(decomposing_device()), input_root, output_root)
    except NumericalError as error:
        raise NumericalError(f"Stage 'subspace', module {layer.name!r}: {error}.") from None


def _row(layer: LinearLayer, basis: WeightedSVD, input_root: Root, output_root: Root) -> dict:
    return {
        "module": layer.name,
        "sigma": basis.sigma.tolist(),
        "input_condition": input_root.condition,
        "output_condition": output_root.condition,
        "input_damping": input_root.damping,
        "output_damping": output_root.damping,
        "dense": None,
    }


def _gather_rows(folders: Iterable[Path], layers: Sequence[LinearLayer]) -> list[dict]:
    """The rows of all units in model order."""
    rows = {
        row["module"]: row
        for folder in folders
        for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    }
    return [rows[layer.name] for layer in layers if layer.name in rows]


def _spectra(rows: Sequence[dict]) -> pa.Table:
    columns = {
        "module": [row["module"] for row in rows for _ in row["sigma"]],
        "component": [component for row in rows for component in range(len(row["sigma"]))],
        "sigma": [sigma for row in rows for sigma in row["sigma"]],
    }
    return pa.table(columns, schema=SPECTRA)
