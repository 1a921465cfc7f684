"""A workspace as the stages up to `subspace` leave it: a tiny model and the plain SVD of its layers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny import VOCABULARY, random_ids, save_tiny

from stages.cost import choose_storage
from stages.layers import LinearLayer, find_layers, read_layers, write_layers
from stages.models import load_model, read_weight
from stages.params import CaptureParams, PrepareParams, RanksParams, SubspaceParams
from stages.ranks import RANKS
from stages.scratch import Scratch
from stages.store import write_arrays
from stages.tables import write_sequences
from stages.workspace import Workspace

FACTS = {"name": "/somewhere/tiny", "origin": "local", "licence": None, "digest": "0" * 64}


def subspace_workspace(
    root: Path, family: str = "llama", seed: int = 0, dense: dict[str, str] | None = None
) -> Workspace:
    """`dense` names layers that the metric says nothing about, which have no basis."""
    workspace = Workspace(root)
    with Scratch(workspace, "prepare", PrepareParams(), {"seed": str(seed)}) as scratch, scratch.publish() as out:
        save_tiny(out / "model", family, seed)
        (out / "prepare.json").write_text(json.dumps({"model": FACTS}))
    write_sequences(workspace.table("tuning"), random_ids(2, 12).numpy(), [["a"], ["b"]], VOCABULARY)
    layers = find_layers(load_model(workspace.model, torch.float32))
    publish_subspace(workspace, layers, dense or {})
    return workspace


def publish_subspace(workspace: Workspace, layers: list[LinearLayer], dense: dict[str, str]) -> None:
    rows, arrays = [], {}
    with Scratch(workspace, "capture", CaptureParams(), {}) as scratch, scratch.publish() as out:
        write_layers(out, layers)  # all that is looked at of it here
    with Scratch(workspace, "subspace", SubspaceParams(), {}) as scratch, scratch.publish() as out:
        for layer in layers:
            if layer.name in dense:
                continue
            left, sigma, right = torch.linalg.svd(read_weight(workspace.model, layer).double(), full_matrices=False)
            root = sigma.sqrt()
            arrays |= {
                f"{layer.name}/left": (left * root).float(),
                f"{layer.name}/right": (root[:, None] * right).float(),
            }
            rows += [{"module": layer.name, "component": i, "sigma": value} for i, value in enumerate(sigma.tolist())]
        write_arrays(out / "bases", arrays)
        schema = pa.schema([("module", pa.string()), ("component", pa.int32()), ("sigma", pa.float64())])
        pq.write_table(pa.Table.from_pylist(rows, schema), out / "spectra.parquet")
        (out / "subspace.json").write_text(json.dumps({"metric": "svd", "input_damping": 0.01, "dense": dense}))
        write_layers(out, layers)


def publish_ranks(workspace: Workspace, ranks: dict[str, int], storage: str = "pivoted", ratio: float = 0.5) -> None:
    """What stage `ranks` would publish for these ranks; layers not named stay dense."""
    layers = read_layers(workspace.out("subspace"))
    rows = []
    for layer in layers:
        choice = choose_storage(layer, ranks.get(layer.name, min(layer.outputs, layer.inputs)), storage)
        rows.append(
            {
                "module": layer.name,
                "n": layer.outputs,
                "m": layer.inputs,
                "rank": choice.rank,
                "stored_parameters": choice.numbers,
                "dense_parameters": layer.outputs * layer.inputs,
                "method": "svd",
                "allocator": "by hand",
                "storage": choice.storage,
            }
        )
    with (
        Scratch(workspace, "ranks", RanksParams(), {"ranks": json.dumps([storage, ranks])}) as scratch,
        scratch.publish() as out,
    ):
        pq.write_table(pa.Table.from_pylist(rows, RANKS), out / "ranks.parquet")
        (out / "budget.json").write_text(json.dumps({"ratio": ratio}))
        write_layers(out, layers)


def mixed_ranks(workspace: Workspace) -> dict[str, int]:
    """Ranks that bring every kind of layer into the model: dense, dropped, plain and pivoted on either side."""
    layers = read_layers(workspace.out("subspace"))
    return {layer.name: rank for layer, rank in zip(layers, np.resize([6, 2, 5, 7, 6, 0, 9], len(layers) - 1).tolist())}


def truncated_weight(workspace: Workspace, layer: LinearLayer, rank: int) -> torch.Tensor:
    """The best rank-`rank` approximation of a layer's weight, float64 [n, m]."""
    left, sigma, right = torch.linalg.svd(read_weight(workspace.model, layer).double(), full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]
