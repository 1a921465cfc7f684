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

import stages.fermi_descent
import stages.measured_allocation  # noqa: F401  both enter their allocators
from stages.allocation import ALLOCATORS, Allocation, Limits, pose
from stages.cost import DENSE, Choice, choose_storage
from stages.errors import CorruptArtifact, NumericalError, ParameterError
from stages.layers import LinearLayer, read_layers
from stages.params import RanksParams
from stages.progress import announce
from stages.scratch import Scratch
from stages.workspace import Workspace, verify_output

INPUTS = ("layers.json", "spectra.parquet", "subspace.json")
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
    allocate = ALLOCATORS.lookup(params.allocator)
    subspace = workspace.out("subspace")
    inputs = {name: verify_output(subspace, name) for name in INPUTS}
    with Scratch(workspace, "ranks", params, inputs) as scratch:
        if scratch.republish():
            return
        layers = read_layers(subspace)
        spectra = read_spectra(subspace / "spectra.parquet", layers)
        limits = Limits(params.round_to, params.floor, params.ceiling, select_modules(layers, params.exclude))
        task = replace(pose(layers, spectra, params, limits), workspace=workspace, scratch=scratch)
        ranks = allocate(task)
        choices = [choose_storage(layer, int(rank), params.storage) for layer, rank in zip(layers, ranks)]
        _describe(layers, choices)
        with scratch.publish() as out:
            metric = json.loads((subspace / "subspace.json").read_text())["metric"]
            pq.write_table(_table(layers, choices, metric, params.allocator), out / "ranks.parquet")
            for name, extra in task.tables.items():
                pq.write_table(extra, out / f"{name}.parquet")
            budget = _budget(task, choices, params.ratio)
            (out / "budget.json").write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
            shutil.copyfile(subspace / "layers.json", out / "layers.json")


def read_spectra(path: Path, layers: Sequence[LinearLayer]) -> list[np.ndarray]:
    """σ of every layer, float64 [min(n, m)], from the long table (module, component, sigma).

    Raises:
        CorruptArtifact: a layer has too few or too many components.
        NumericalError: a value is not finite; names the module and the component.
    """
    table = pq.read_table(path)
    names = table["module"].to_numpy(zero_copy_only=False)
    sigma, component = table["sigma"].to_numpy(), table["component"].to_numpy()
    starts = np.flatnonzero(np.concatenate(([True], names[1:] != names[:-1]))) if len(names) else np.empty(0, int)
    rows = {names[start]: slice(start, end) for start, end in zip(starts, [*starts[1:], len(names)])}
    return [_spectrum(layer, sigma[rows.get(layer.name, slice(0, 0))], component[rows.get(layer.name, slice(0, 0))], path) for layer in layers]


def _spectrum(layer: LinearLayer, sigma: np.ndarray, component: np.ndarray, path: Path) -> np.ndarray:
    full = min(layer.outputs, layer.inputs)
    if not np.array_equal(component, np.arange(full)):
        raise CorruptArtifact(
            f"{path}, module {layer.name!r}: expected components 0 … {full - 1}, found {len(component)} rows. Write it again with "
            "`dvc repro --force --single-item subspace`."
        )
    broken = np.flatnonzero(~np.isfinite(sigma))
    if len(broken):
        raise NumericalError(
            f"Stage 'ranks', module {layer.name!r}: component {broken[0]} of its spectrum is {sigma[broken[0]]}. Its statistics or "
            "weight are not finite: raise subspace.input_damping and subspace.output_damping, or look for the module in capture's diagnostics."
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
            raise ParameterError(f"ranks.exclude: {pattern!r} matches none of the {len(names)} targeted modules, such as {names[0]!r}.")
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
