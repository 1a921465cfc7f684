"""Bases refined for the ranks that were chosen, under a sum of Kronecker pairs (``factorize.alternations``).

Stage `subspace` orders components under one pair A ⊗ B, where the best approximations of all ranks are nested. Under the sum of
kronecker.rank pairs they are not, so this is done when ranks are known, by stage `factorize`, one layer at a time: alternating least squares
(`kronecker_sum`) from the truncated basis. The first pair is damped as stage `subspace` damped it, the others as they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch

from fisherfold.fisher.kronecker_sum import alternate
from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import decomposing_device, read_weight
from fisherfold.run.errors import ParameterError
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import array_names, gather_groups, read_array, write_arrays
from fisherfold.run.workspace import Workspace


def refined_bases(
    scratch: Scratch, workspace: Workspace, layers: Mapping[str, LinearLayer], ranks: Mapping[str, int], sweeps: int
) -> Path:
    """A group of arrays like subspace's bases, with <layer>/left [n, k] and <layer>/right [k, m] refined for rank k.

    Args:
        scratch: of the stage that asks.
        workspace: the project.
        layers: by name.
        ranks: k > 0 of the layers that are to be refined.
        sweeps: alternations at most.

    Raises:
        ParameterError: the bases were not made under pairs of stage `kronecker`, or there is one pair only.
    """
    _require_pairs(workspace)
    table = pq.read_table(workspace.out("subspace") / "diagnostics.parquet").to_pylist()
    dampings = {row["module"]: (row["input_damping"], row["output_damping"]) for row in table}
    folders = workspace.model, workspace.out("subspace") / "bases", workspace.out("kronecker") / "factors"
    units = {f"refined.{name}": (*folders, layers[name], rank, dampings[name], sweeps) for name, rank in ranks.items()}
    done = scratch.map("refining under the sum of pairs", refine_layer, units)
    target = scratch.units / "refined"
    gather_groups(target, [folder / "bases" for folder in done.values()])
    return target


def _require_pairs(workspace: Workspace) -> None:
    subspace = json.loads((workspace.out("subspace") / "subspace.json").read_text())
    kronecker = json.loads((workspace.out("kronecker") / "kronecker.json").read_text())
    if subspace["metric"] != "gfwsvd" or subspace.get("shared") or kronecker["rank"] < 2:
        raise ParameterError(
            "factorize.alternations refines bases under a sum of Kronecker pairs: it wants subspace.metric = 'gfwsvd', "
            "subspace.share_inputs = false and kronecker.rank of 2 or more. Set them, or factorize.alternations = 0."
        )


def refine_layer(
    folder: Path,
    model: Path,
    bases: Path,
    factors: Path,
    layer: LinearLayer,
    rank: int,
    dampings: tuple[float, float],
    sweeps: int,
) -> None:
    """Unit of work: the factors of one layer for its rank."""
    device = decomposing_device()
    left = read_array(bases, f"{layer.name}/left")[:, :rank].to(device).double()
    right = read_array(bases, f"{layer.name}/right", slice(0, rank)).to(device).double()
    weight = read_weight(model, layer).to(device).double()
    left, right = alternate(weight, left, right, read_pairs(factors, layer, dampings, device), sweeps)
    write_arrays(folder / "bases", {f"{layer.name}/left": left.float(), f"{layer.name}/right": right.float()})


def read_pairs(
    factors: Path, layer: LinearLayer, dampings: tuple[float, float], device: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B), (A_2, B_2), … of one layer in float64, the first damped."""
    names = set(array_names(factors))
    suffixes = ["", *(f"_{index}" for index in range(2, len(names) + 1) if f"{layer.name}/A_{index}" in names)]
    pairs = [
        tuple(read_array(factors, f"{layer.name}/{side}{suffix}").to(device).double() for side in ("A", "B"))
        for suffix in suffixes
    ]
    return [tuple(_damped(matrix, damping) for matrix, damping in zip(pairs[0], dampings)), *pairs[1:]]


def _damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """(1 − δ) M + δ mean(diag M) I."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return (1 - damping) * matrix + damping * matrix.diagonal().mean() * identity
