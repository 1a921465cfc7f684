"""Stage `kronecker`: Kronecker factors A ⊗ B of every layer's Fisher matrix, and how well they fit it.

Reads the statistics and gradients of stage `capture`; writes diagnostics.parquet (one row a layer, model order), kronecker.json,
and factors/ with <layer>/A [m, m] and <layer>/B [n, n] in float32 if the estimator computes factors of its own.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import NumericalError, ParameterError
from stages.estimators import ESTIMATORS, Estimate
from stages.layers import LinearLayer
from stages.params import KroneckerParams
from stages.progress import announce
from stages.scratch import Scratch
from stages.statistics import Statistics
from stages.store import gather_groups, write_arrays
from stages.workspace import Workspace, verify_output

NOT_FINITE = (
    "Find the sequence with `dvc repro --force --single-item capture`, which names it, or set capture.skip_nonfinite."
)
DIAGNOSTICS = pa.schema(
    [
        ("module", pa.string()),
        ("estimator", pa.string()),
        ("scale", pa.float64()),
        ("norm", pa.float64()),
        ("fisher_norm", pa.float64()),
        ("residual", pa.float64()),
        ("iterations", pa.int32()),
        ("converged", pa.bool_()),
        ("sequences", pa.int32()),
    ]
)
"""scale: c that makes c · A ⊗ B nearest to the per-sequence Fisher F; norm: ‖c · A ⊗ B‖; residual: ‖F − c · A ⊗ B‖ / ‖F‖.
Null where no gradients were captured, or where all of them are zero."""


def run(workspace: Workspace, params: KroneckerParams) -> None:
    """Estimate the Kronecker factors of every layer with the chosen estimator, one layer in memory at a time.

    Raises:
        ParameterError: the estimator is unknown, or needs gradients that were not captured.
        NumericalError: the gradients or statistics of a layer are not finite.
        CorruptArtifact: the output of stage `capture` is not whole.
        NotEnoughDisk: the factors would not fit.
    """
    estimator = ESTIMATORS.lookup(params.estimator)
    capture = workspace.out("capture")
    with Scratch(workspace, "kronecker", params, {"capture": verify_output(capture)}) as scratch:
        if scratch.republish():
            return
        statistics = Statistics(capture)
        if estimator.needs_gradients and not statistics.has_gradients:
            raise ParameterError(
                f"kronecker.estimator = {params.estimator!r} needs the gradient of every sequence, and capture.gradients is 'none'. "
                "Set capture.gradients to 'sketch' or 'exact', or kronecker.estimator to 'kfac'."
            )
        layers = statistics.layers
        if estimator.makes_factors:
            scratch.require_disk(sum(4 * (layer.outputs**2 + layer.inputs**2) for layer in layers))
        units = {layer.name: (capture, layer, params) for layer in layers}
        folders = scratch.map("estimating Kronecker factors", estimate_layer, units)
        rows = [json.loads((folders[layer.name] / "estimate.json").read_text()) for layer in layers]
        _describe(rows, params)
        with scratch.publish() as out:
            pq.write_table(pa.Table.from_pylist(rows, DIAGNOSTICS), out / "diagnostics.parquet")
            facts = {**params.model_dump(), "factors": estimator.makes_factors}
            (out / "kronecker.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
            if estimator.makes_factors:
                gather_groups(out / "factors", [folders[layer.name] / "factors" for layer in layers])


def estimate_layer(folder: Path, capture: Path, layer: LinearLayer, params: KroneckerParams) -> None:
    """Unit of work: the factors and the diagnostics of one layer."""
    statistics = Statistics(capture)
    try:
        estimate = ESTIMATORS.lookup(params.estimator).estimate(statistics, layer, params)
    except NumericalError as error:
        raise NumericalError(f"Stage 'kronecker', module {layer.name!r}: {error}. {NOT_FINITE}") from error
    row = _row(estimate, layer, params, statistics.sequences)
    if estimate.factors is not None:
        A, B = estimate.factors
        write_arrays(folder / "factors", {f"{layer.name}/A": A.float(), f"{layer.name}/B": B.float()})
    (folder / "estimate.json").write_text(json.dumps(row, sort_keys=True))


def _row(estimate: Estimate, layer: LinearLayer, params: KroneckerParams, sequences: int) -> dict:
    measured = [value for value in (estimate.scale, estimate.norm, estimate.fisher_norm) if value is not None]
    if not all(map(math.isfinite, measured)):
        raise NumericalError(f"Stage 'kronecker', module {layer.name!r}: its Fisher matrix is not finite. {NOT_FINITE}")
    return {
        "module": layer.name,
        "estimator": params.estimator,
        "scale": estimate.scale,
        "norm": estimate.norm,
        "fisher_norm": estimate.fisher_norm,
        "residual": estimate.residual,
        "iterations": estimate.iterations,
        "converged": estimate.converged,
        "sequences": sequences,
    }


def _describe(rows: Sequence[dict], params: KroneckerParams) -> None:
    """Say how well the factors fit, and which layers did not converge."""
    residuals = [row["residual"] for row in rows if row["residual"] is not None]
    if residuals:
        announce("kronecker", f"median residual {median(residuals):.3f} over {len(residuals)} layers")
    unfinished = [row["module"] for row in rows if not row["converged"]]
    if unfinished:
        announce(
            "kronecker",
            f"{len(unfinished)} layers did not reach kronecker.tolerance = {params.tolerance:g} in "
            f"{params.iterations} iterations, the first is {unfinished[0]!r}; raise kronecker.iterations",
        )
