"""Stage `ranks`: how many components each layer keeps, and in which format, under one budget of stored numbers.

Reads the spectra of stage `subspace`; writes ranks.parquet (one row a layer, model order) and budget.json.
"""

import fnmatch
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages import fermi_descent, measured_allocation, zero_sum  # noqa: F401  these enter their allocators
from stages.allocation import ALLOCATORS, Allocation, Limits, allocate, pose
from stages.cost import DENSE, Choice, choose_storage
from stages.errors import CorruptArtifact, NumericalError, ParameterError
from stages.layers import LinearLayer, read_layers
from stages.params import RanksParams
from stages.progress import announce
from stages.scratch import Scratch
from stages.workspace import Workspace, digest_file, verify_output

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
        "tuning": digest_file(workspace.table("tuning")),
        "capture": verify_output(workspace.out("capture")),
        "subspace": verify_output(subspace),
    }
    with Scratch(workspace, "ranks", params, inputs) as scratch:
        if scratch.republish():
            return
        layers = read_layers(subspace)
        facts = json.loads((subspace / "subspace.json").read_text())
        dense = frozenset(facts.get("dense", {}))  # layers that the metric says nothing about
        spectra = read_spectra(subspace / "spectra.parquet", layers, dense)
        limits = Limits(params.round_to, params.floor, params.ceiling, select_modules(layers, params.exclude) | dense)
        task = replace(pose(layers, spectra, params, limits), workspace=workspace, scratch=scratch)
        ranks = allocate(task, allocator)
        choices = [choose_storage(layer, int(rank), params.storage) for layer, rank in zip(layers, ranks)]
        _describe(layers, choices)
        with scratch.publish() as out:
            pq.write_table(_table(layers, choices, facts["metric"], params.allocator), out / "ranks.parquet")
            for name, extra in task.tables.items():
                pq.write_table(extra, out / f"{name}.parquet")
            budget = _budget(task, choices, params.ratio)
            (out / "budget.json").write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
            shutil.copyfile(subspace / "layers.json", out / "layers.json")


def read_spectra(path: Path, layers: Sequence[LinearLayer], dense: frozenset[str] = frozenset()) -> list[np.ndarray]:
    """σ of every layer, float64 [min(n, m)], from the long table (module, component, sigma); zeros for those in `dense`.

    Raises:
        CorruptArtifact: the table is not readable, or a layer has too few or too many components.
        NumericalError: a value is not finite; names the module and the component.
    """
    try:
        table = pq.read_table(path, columns=["module", "component", "sigma"])
    except (OSError, pa.ArrowException) as error:
        raise CorruptArtifact(f"{path} is not readable ({error}). {CURE}") from None
    names = table["module"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1])) if len(names) else []
    rows = {names[start]: slice(start, end) for start, end in zip(starts, [*starts[1:], len(names)])}
    component, sigma = table["component"].to_numpy(), table["sigma"].to_numpy()
    spectra = []
    for layer in layers:
        own = rows.get(layer.name, slice(0, 0))
        full = min(layer.outputs, layer.inputs)
        spectra.append(np.zeros(full) if layer.name in dense else _checked(layer, component[own], sigma[own], path))
    return spectra


def _checked(layer: LinearLayer, component: np.ndarray, sigma: np.ndarray, path: Path) -> np.ndarray:
    full = min(layer.outputs, layer.inputs)
    if not np.array_equal(component, np.arange(full)):
        raise CorruptArtifact(
            f"{path}, module {layer.name!r}: expected components 0 … {full - 1}, found {len(component)} rows. {CURE}"
        )
    broken = np.flatnonzero(~np.isfinite(sigma))
    if len(broken):
        raise NumericalError(
            f"Stage 'ranks', module {layer.name!r}: component {broken[0]} of its spectrum is {sigma[broken[0]]}, so its weight or "
            "metric is not finite. Look for the module in artifacts/subspace/diagnostics.parquet, and raise subspace.input_damping "
            "and subspace.output_damping."
        )
    return sigma


def select_modules(layers: Sequence[LinearLayer], patterns: Sequence[str]) -> frozenset[str]:
    """Names of the layers that match one of `patterns` (shell wildcards, case matters).

    Raises:
        ParameterError: a pattern matches no layer.
    """
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ParameterError(
                f"ranks.exclude: {pattern!r} matches none of the {len(names)} targeted modules, such as {names[0]!r}."
            )
    return frozenset(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _describe(layers: Sequence[LinearLayer], choices: Sequence[Choice]) -> None:
    """Say what is unusual: layers left dense and layers dropped whole."""
    dense = sum(choice.storage == DENSE for choice in choices)
    dropped = [layer.name for layer, choice in zip(layers, choices) if choice.rank == 0]
    announce("ranks", f"{len(layers)} layers, {dense} of them dense")
    if dropped:
        announce("ranks", f"rank 0, so the layer's product is dropped: {', '.join(dropped)}")


def _table(layers: Sequence[LinearLayer], choices: Sequence[Choice], metric: str, allocator: str) -> pa.Table:
    rows = [
        {
            "module": layer.name,
            "n": layer.outputs,
            "m": layer.inputs,
            "rank": choice.rank,
            "stored_parameters": choice.numbers,
            "dense_parameters": layer.outputs * layer.inputs,
            "method": metric,
            "allocator": allocator,
            "storage": choice.storage,
        }
        for layer, choice in zip(layers, choices)
    ]
    return pa.Table.from_pylist(rows, schema=RANKS)


def _budget(task: Allocation, choices: Sequence[Choice], ratio: float) -> dict:
    """The contract of budget.json; the predicted loss increase is ½ Σ of the dropped σ², in the unit of the metric."""
    dropped = [float(np.square(sigma[choice.rank :]).sum()) for sigma, choice in zip(task.spectra, choices)]
    return {
        "ratio": ratio,
        "targeted_parameters_dense": int(task.dense_numbers.sum()),
        "budget": task.budget,
        "stored_parameters": sum(choice.numbers for choice in choices),
        "predicted_loss_increase": 0.5 * float(np.sum(dropped)),
    }
