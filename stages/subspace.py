"""Stage `subspace`: every layer's weight as components, ordered by what each costs under the chosen metric.

Reads the dense model, the statistics of stage `capture` and the factors of stage `kronecker`; writes bases/ with
<layer>/left [n, r] and <layer>/right [r, m] in float32, r = min(n, m), spectra.parquet (σ of every component, long format,
model order), diagnostics.parquet (one row a layer), subspace.json and layers.json.

A layer whose metric is zero (an expert that no token was routed to, an input that is always zero) cannot be compressed on
evidence. It has no rows in the spectra and no basis; diagnostics.parquet and subspace.json give the reason under `dense`, and the layer
stays dense.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages.errors import NumericalError
from stages.layers import LinearLayer, write_layers
from stages.metrics import METRICS, MetricSources
from stages.models import decomposing_device, read_weight
from stages.params import SubspaceParams
from stages.progress import announce
from stages.scratch import Scratch
from stages.statistics import Statistics
from stages.store import gather_groups, write_arrays
from stages.weighted_svd import Metric, MetricRoot, WeightedSVD, metric_root, weighted_svd
from stages.workspace import Workspace, verify_output

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
        NumericalError: a layer's weight or metric is not finite, or a decomposition does not converge.
        CorruptArtifact: the output of an earlier stage is not whole.
        NotEnoughDisk: the bases would not fit.
    """
    METRICS.lookup(params.metric)
    with Scratch(workspace, "subspace", params, _inputs(workspace)) as scratch:
        if scratch.republish():
            return
        capture, kronecker = workspace.out("capture"), workspace.out("kronecker")
        layers = Statistics(capture).layers
        scratch.require_disk(sum(_basis_bytes(layer) for layer in layers))
        units = {
            group: (workspace.model, capture, kronecker, members, params) for group, members in grouped(layers).items()
        }
        folders = scratch.map("decomposing layers", decompose_group, units)
        rows = _gather_rows(folders.values(), layers)
        dense = {row["module"]: row["dense"] for row in rows if row["dense"]}
        for module, reason in dense.items():
            announce("subspace", f"{module} stays dense: {reason}")
        with scratch.publish() as out:
            gather_groups(out / "bases", [folder / "bases" for folder in folders.values()])
            pq.write_table(_spectra(rows), out / "spectra.parquet")
            pq.write_table(pa.Table.from_pylist(rows, DIAGNOSTICS), out / "diagnostics.parquet")
            facts = {**params.model_dump(), "dense": dense}
            (out / "subspace.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
            write_layers(out, layers)


def _inputs(workspace: Workspace) -> dict[str, str]:
    """Digests of what the result depends on; the gradients of `capture` are not read here."""
    capture = workspace.out("capture")
    return {
        "model": verify_output(workspace.out("prepare"), "model/"),
        "statistics": verify_output(capture, "statistics/"),
        "layers": verify_output(capture, "layers.json"),
        "facts": verify_output(capture, "capture.json"),
        "kronecker": verify_output(workspace.out("kronecker")),
    }


def _basis_bytes(layer: LinearLayer) -> int:
    return 4 * min(layer.outputs, layer.inputs) * (layer.outputs + layer.inputs)


def grouped(layers: Iterable[LinearLayer]) -> dict[str, list[LinearLayer]]:
    """Layers by the group that shares an input, in model order."""
    groups: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups


def decompose_group(
    folder: Path, model: Path, capture: Path, kronecker: Path, layers: Sequence[LinearLayer], params: SubspaceParams
) -> None:
    """Unit of work: the components of the layers of one group, one layer in memory at a time.

    The root of the input metric is kept from one layer to the next, as most metrics share it in a group.
    """
    rows: list[dict] = []
    sources = MetricSources(Statistics(capture), kronecker, params)
    write_arrays(folder / "bases", _decomposed(model, sources, layers, rows))
    (folder / "rows.json").write_text(json.dumps(rows, sort_keys=True))


def _decomposed(
    model: Path, sources: MetricSources, layers: Sequence[LinearLayer], rows: list[dict]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The arrays of each layer's basis, as soon as it is found; `rows` gets the facts of each layer."""
    params, metric, root = sources.params, None, None
    for layer in layers:
        A, B = METRICS.lookup(params.metric)(sources, layer)
        reason = _unusable(A, B)
        if reason:
            rows.append({"module": layer.name, "sigma": [], "dense": reason})
            continue
        if root is None or not _same(A, metric):
            metric, root = A, _root(A, params.input_damping, layer, "input")
        output_root = _root(B, params.output_damping, layer, "output")
        basis = _decompose(read_weight(model, layer), root, output_root, layer)
        yield f"{layer.name}/left", basis.left.float()
        yield f"{layer.name}/right", basis.right.float()
        rows.append(_row(layer, basis, root, output_root))


def _unusable(A: Metric, B: Metric) -> str | None:
    """Why a metric says nothing about a layer, or None if it does."""
    if A is not None and not A.any():
        return "its input metric is zero: no calibration token gave it an input or a gradient"
    if B is not None and not B.any():
        return "its output metric is zero: no calibration token gave it a gradient"
    return None


def _same(metric: Metric, other: Metric) -> bool:
    return metric is other if metric is None or other is None else torch.equal(metric, other)


def _root(metric: Metric, damping: float, layer: LinearLayer, side: str) -> MetricRoot:
    name = f"Stage 'subspace', module {layer.name!r}: the {side} metric"
    try:
        return metric_root(None if metric is None else metric.to(decomposing_device()), damping, name)
    except NumericalError as error:
        raise NumericalError(
            f"{error}. Run stage 'capture' again; if it persists, raise subspace.{side}_damping."
        ) from None


def _decompose(
    weight: torch.Tensor, input_root: MetricRoot, output_root: MetricRoot, layer: LinearLayer
) -> WeightedSVD:
    try:
        return weighted_svd(weight.to(decomposing_device()), input_root, output_root)
    except NumericalError as error:
        raise NumericalError(f"Stage 'subspace', module {layer.name!r}: {error}.") from None


def _row(layer: LinearLayer, basis: WeightedSVD, input_root: MetricRoot, output_root: MetricRoot) -> dict:
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
    rows = {row["module"]: row for folder in folders for row in json.loads((folder / "rows.json").read_text())}
    return [rows[layer.name] for layer in layers]


def _spectra(rows: Sequence[dict]) -> pa.Table:
    columns = {
        "module": [row["module"] for row in rows for _ in row["sigma"]],
        "component": [component for row in rows for component in range(len(row["sigma"]))],
        "sigma": [sigma for row in rows for sigma in row["sigma"]],
    }
    return pa.table(columns, schema=SPECTRA)
