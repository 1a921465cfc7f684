"""Stage `kronecker`: Kronecker factors A ⊗ B of every layer's Fisher matrix, and how well they fit it.

Reads the statistics, gradients and tokens of stage `capture`; writes, in model order, diagnostics.parquet (one row a layer),
comparison.parquet (one row a layer and estimator), kronecker.json, and, if the estimator computes factors of its own, factors/ with
<layer>/A [m, m] and <layer>/B [n, n] in float32.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisherfold.fisher.estimators import ESTIMATORS, CapturedLayer, Estimate
from fisherfold.fisher.fisher_diagnostics import LEVELS, describe_estimate, describe_layer
from fisherfold.fisher.token_pass import TokenPass, part_bounds, pass_part, slices
from fisherfold.linalg.leading_pairs import SOLVERS
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import bundles
from fisherfold.network.weight_check import zero_weights
from fisherfold.run.errors import NumericalError, ParameterError
from fisherfold.run.files import digest_file, verify_output
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import KroneckerParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import gather_groups
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.dependence import DEPENDENCE, TABLE, dependence_rows
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.shard import loaded_model

ESTIMATES = "estimates.json"
NOT_FINITE = (
    "Find the sequence with `dvc repro --force --single-item capture`, which names it, or set capture.skip_nonfinite."
)
NEEDED = {
    "has_sequence_gradients": "the gradient of every sequence, and capture.gradients is 'none' or 'sums'. Set capture.gradients to 'sketch' or 'exact'",
    "has_tokens": "single tokens, and capture.tokens_per_sequence is 0. Set it to 16, say",
}
FINITE = ("fisher_norm", "norm", "scale", "input_variance", "output_variance", "input_rank", "output_rank")
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
        ("sigma_ratio", pa.float64()),
        ("effective_sequences", pa.float64()),
        ("effective_tokens", pa.float64()),
    ]
)
"""scale: c that makes c · A ⊗ B nearest to the per-sequence Fisher F; norm: ‖c · A ⊗ B‖; residual: ‖F − c · A ⊗ B‖ / ‖F‖;
sigma_ratio: σ₁/σ₂ of the rearranged F, large if F is nearly a Kronecker product; effective_sequences, effective_tokens: how many of them
carry Σ ‖G‖², see `sampling.effective_count`. Null where no gradients or tokens were captured, where all of them are zero, and where
kronecker.diagnostics leaves it out."""
COMPARISON = pa.schema(
    [
        ("module", pa.string()),
        ("estimator", pa.string()),
        ("scale", pa.float64()),
        ("norm", pa.float64()),
        ("residual", pa.float64()),
        ("iterations", pa.int32()),
        ("converged", pa.bool_()),
        ("input_samples", pa.int64()),
        ("output_samples", pa.int64()),
        ("input_variance", pa.float64()),
        ("output_variance", pa.float64()),
        ("input_rank", pa.float64()),
        ("output_rank", pa.float64()),
        ("input_condition", pa.float64()),
        ("output_condition", pa.float64()),
        ("sampling_error", pa.float64()),
    ]
)
"""Of each estimator compared: its fit to the same F, and of each side the nominal samples, the relative sampling variance
(`sampling.relative_variance`), the effective rank tr² / ‖·‖² and the condition number before damping; sampling_error: see
`sampling.halves_error`."""


def run(workspace: Workspace, params: KroneckerParams) -> None:
    """Estimate the Kronecker factors of every layer with the chosen estimator, one layer in memory at a time.

    Raises:
        ParameterError: the estimator is unknown, or needs gradients that were not captured.
        NumericalError: the gradients or statistics of a layer are not finite, or those of all layers are zero.
        CorruptArtifact: the output of stage `capture` is not whole.
        NotEnoughDisk: the factors would not fit.
    """
    estimator = ESTIMATORS.lookup(params.estimator)
    SOLVERS.lookup(params.method)
    capture = workspace.out("capture")
    inputs = {"capture": verify_output(capture), "model": verify_output(workspace.out("prepare"), "model/")}
    if estimator.passes:
        inputs["calibration"] = digest_file(workspace.table("calibration"))
    with Scratch(workspace, "kronecker", params, inputs) as scratch:
        if scratch.republish():
            return
        statistics = Statistics(capture)
        _require(statistics, params)
        layers = statistics.layers
        if estimator.makes_factors:
            numbers = sum(layer.outputs**2 + layer.inputs**2 for layer in layers)
            scratch.require_disk(4 * numbers)
        passed = _pass_tokens(scratch, workspace, statistics, params) if estimator.passes else {}
        pieces = bundles(layers)
        units = {
            name: (capture, some, params, {layer.name: passed.get(layer.name, ()) for layer in some})
            for name, some in pieces.items()
        }
        sizes = {name: sum(layer.dense_numbers for layer in some) for name, some in pieces.items()}
        folders = scratch.map("estimating Kronecker factors", estimate_layers, units, sizes)
        found = _in_order(folders.values(), layers)
        rows = [entry["diagnostics"] for entry in found]
        comparison = [row for entry in found for row in entry["comparison"]]
        _check_reached(comparison, workspace.model)
        _describe(rows, params)
        _warn_of_few(comparison, layers, statistics, params)
        dependence = dependence_rows(scratch, workspace, params)
        with scratch.publish() as out:
            if dependence is not None:
                pq.write_table(pa.Table.from_pylist(dependence, DEPENDENCE), out / TABLE)
            pq.write_table(pa.Table.from_pylist(rows, DIAGNOSTICS), out / "diagnostics.parquet")
            pq.write_table(pa.Table.from_pylist(comparison, COMPARISON), out / "comparison.parquet")
            facts = {**params.model_dump(), "factors": estimator.makes_factors}
            (out / "kronecker.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if estimator.makes_factors:
                gather_groups(out / "factors", [folder / "factors" for folder in folders.values()])


def _in_order(folders: Iterable[Path], layers: Sequence[LinearLayer]) -> list[dict]:
    """What units found, in the order of the layers."""
    parts = [json.loads((folder / ESTIMATES).read_text(encoding="utf-8")) for folder in folders]
    found = {entry["diagnostics"]["module"]: entry for part in parts for entry in part}
    return [found[layer.name] for layer in layers]


def _pass_tokens(
    scratch: Scratch, workspace: Workspace, statistics: Statistics, params: KroneckerParams
) -> dict[str, tuple[Path, ...]]:
    """The folders of the last pass's sums by layer; see `token_pass`."""
    sequences = statistics.sequences + len(statistics.facts["skipped"])
    bounds = part_bounds(sequences, params.token_pass.batch_size)
    numbers = sum(layer.outputs**2 + layer.inputs**2 for layer in statistics.layers)
    scratch.require_disk(4 * numbers * (1 + params.token_pass.passes * len(bounds)))
    found: dict[str, tuple[Path, ...]] = {}
    for index, layers in enumerate(slices(statistics, params)):
        before: tuple[Path, ...] = ()
        for number in range(params.token_pass.passes):
            source = TokenPass(workspace.model, workspace.table("calibration"), statistics.folder, params, before)
            units = {
                f"pass-{number}.slice-{index:03d}.part-{part}": (source, layers, *ends)
                for part, ends in enumerate(bounds)
            }
            before = tuple(scratch.map(f"token pass {number + 1}", pass_part, units).values())
        found |= {layer.name: before for layer in layers}
    loaded_model.cache_clear()
    return found


def _require(statistics: Statistics, params: KroneckerParams) -> None:
    """Refuse an estimator that the capture holds no data for."""
    reads = ESTIMATORS.lookup(params.estimator).reads
    if params.clip is not None and ESTIMATORS.lookup(params.estimator).passes:
        reads = "has_tokens"  # whose median norm is what it clips at
    if reads is not None and not getattr(statistics, reads):
        raise ParameterError(f"kronecker.estimator = {params.estimator!r} needs {NEEDED[reads]}, or choose 'kfac'.")


def estimate_layers(
    folder: Path,
    capture: Path,
    layers: Sequence[LinearLayer],
    params: KroneckerParams,
    token_sums: Mapping[str, tuple[Path, ...]],
) -> None:
    """Unit of work: the factors and the diagnostics of a layer, or of some experts; `token_sums` has those of each."""
    found: list[dict] = []
    arrays = _factors(capture, layers, params, token_sums, found)
    if ESTIMATORS.lookup(params.estimator).makes_factors:
        write_arrays(folder / "factors", arrays)
    else:
        deque(arrays, maxlen=0)
    (folder / ESTIMATES).write_text(json.dumps(found, sort_keys=True), encoding="utf-8")


def _factors(
    capture: Path,
    layers: Sequence[LinearLayer],
    params: KroneckerParams,
    token_sums: Mapping[str, tuple[Path, ...]],
    found: list[dict],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors of each layer, one layer in memory at a time; `found` gets its diagnostics."""
    for layer in layers:
        captured = CapturedLayer(Statistics(capture), layer, params, token_sums=token_sums[layer.name])
        estimate, facts = _estimate(captured)
        found.append(facts)
        if estimate is not None:
            yield f"{layer.name}/A", estimate.A.float()
            yield f"{layer.name}/B", estimate.B.float()


def _estimate(captured: CapturedLayer) -> tuple[Estimate | None, dict]:
    """The chosen estimate of one layer, if it makes factors of its own, and the diagnostics."""
    layer, params = captured.layer, captured.params
    rows, kept = [], None
    try:
        for name in LEVELS.lookup(params.diagnostics).compared(captured):
            estimator = ESTIMATORS.lookup(name)
            estimate = estimator.estimate(captured)
            rows.append({"module": layer.name, **describe_estimate(captured, name, estimate)})
            if name == params.estimator and estimator.makes_factors:
                kept = estimate
        about = describe_layer(captured)
    except (NumericalError, torch.linalg.LinAlgError) as error:
        raise NumericalError(f"Stage 'kronecker', module {layer.name!r}: {error}. {NOT_FINITE}") from error
    _check_finite([about, *rows], layer)
    chosen = next(row for row in rows if row["estimator"] == params.estimator)
    facts = {
        key: chosen[key] for key in ("module", "estimator", "scale", "norm", "residual", "iterations", "converged")
    }
    diagnostics = {**facts, **about, "sequences": captured.statistics.sequences}
    return kept, {"diagnostics": diagnostics, "comparison": rows}


def _check_finite(rows: Sequence[dict], layer: LinearLayer) -> None:
    values = [row[key] for row in rows for key in FINITE if row.get(key) is not None]
    if not all(map(math.isfinite, values)):
        raise NumericalError(f"Stage 'kronecker', module {layer.name!r}: its Fisher matrix is not finite. {NOT_FINITE}")


def _check_reached(comparison: Sequence[dict], model: Path) -> None:
    """Refuse a capture in which no layer has a gradient that is not zero: nothing would be left to compress."""
    if any(row["output_rank"] for row in comparison):
        return
    zeros = list(islice(zero_weights(model), 3))
    cause = (
        f"every number of {', '.join(map(repr, zeros))} is zero, so the loss depends on no layer. The checkpoint is damaged or unfinished: fetch it again"
        if zeros
        else "if capture.dtype is bfloat16 they may underflow: set it to float32. Else see that the model predicts the calibration text at all"
    )
    raise NumericalError(
        f"Stage 'kronecker': the output gradients of all {len(comparison)} layers, from {comparison[0]['module']!r} to "
        f"{comparison[-1]['module']!r}, are zero on the whole calibration text. In the prepared model, {cause}."
    )


def _describe(rows: Sequence[dict], params: KroneckerParams) -> None:
    """Say how well the factors fit, which layers did not converge and which have no Fisher."""
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
    silent = [row["module"] for row in rows if row["fisher_norm"] == 0]
    if silent:
        announce("kronecker", f"{len(silent)} layers have no gradient on the calibration text: {silent}")


def _warn_of_few(
    rows: Sequence[dict], layers: Sequence[LinearLayer], statistics: Statistics, params: KroneckerParams
) -> None:
    """Say which layers have factors of fewer samples than their rank, and how many sequences would do."""
    needed = {layer.name: min(layer.outputs, layer.inputs) for layer in layers}
    few = [
        (row["module"], row["input_samples"], needed[row["module"]])
        for row in rows
        if row["estimator"] == params.estimator and row["input_samples"] < needed[row["module"]]
    ]
    if few:
        module, samples, rank = max(few, key=lambda entry: entry[2] / max(1, entry[1]))
        enough = math.ceil(statistics.sequences * rank / max(1, samples))
        announce(
            "kronecker",
            f"{len(few)} layers have factors of fewer samples than their rank (the worst is {module!r}: {samples} samples, rank {rank}), "
            f"so damping alone orders their last components; {enough} sequences instead of {statistics.sequences} would do",
        )
