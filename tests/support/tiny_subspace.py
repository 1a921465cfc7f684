"""A workspace as the stages up to `subspace` leave it: a tiny model and the plain SVD of its layers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny import FACTS, FAMILIES, VOCABULARY, random_ids, tiny_model, tiny_tokenizer
from tiny_families import tiny_family
from transformers import PreTrainedModel

from fisherfold.allocators.cost import choose_storage
from fisherfold.network.layers import LinearLayer, find_layers, read_layers, write_dense_layers, write_layers
from fisherfold.network.models import load_model, read_weight
from fisherfold.network.sites import Site, find_sites, read_sites
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import CaptureParams, PrepareParams, RanksParams, SubspaceParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import write_sequences
from fisherfold.run.workspace import Workspace
from stages.ranks import ranks_table


def subspace_workspace(
    root: Path,
    family: str = "llama",
    seed: int = 0,
    dense: dict[str, str] | None = None,
    shared: bool = False,
    metric: str = "svd",
    model: PreTrainedModel | None = None,
    experts: bool = True,
) -> Workspace:
    """`dense` names sites that the metric says nothing about, which have no basis; `shared`: layers of a group are one site; `model`: instead of the
    family's; without `experts` those of a mixture stay dense.
    """
    workspace = Workspace(root)
    with Scratch(workspace, "prepare", PrepareParams(), {"seed": str(seed)}) as scratch, scratch.publish() as out:
        make = tiny_model if family in FAMILIES else tiny_family
        (model or make(family, seed)).save_pretrained(
            out / "model", save_original_format=False
        )  # as stage prepare does
        tiny_tokenizer().save_pretrained(out / "model")
        write_dense_layers(out, {})
        (out / "prepare.json").write_text(json.dumps({"model": FACTS}))
    write_sequences(workspace.table("tuning"), random_ids(2, 12).numpy(), [["a"], ["b"]], VOCABULARY)
    write_sequences(workspace.table("training"), random_ids(0, 12).numpy(), [], VOCABULARY)
    found = find_layers(load_model(workspace.model, torch.float32))
    layers = [layer for layer in found if experts or not layer.stack]
    write_layers(workspace.out("prepare"), layers)
    publish_subspace(workspace, layers, dense or {}, shared, metric)
    return workspace


def publish_subspace(
    workspace: Workspace, layers: list[LinearLayer], dense: dict[str, str], shared: bool, metric: str
) -> None:
    rows, arrays = [], {}
    with Scratch(workspace, "capture", CaptureParams(), {}) as scratch, scratch.publish() as out:
        write_layers(out, layers)  # all that is looked at of it here
    with (
        Scratch(workspace, "subspace", SubspaceParams(), {"shared": str(shared)}) as scratch,
        scratch.publish() as out,
    ):
        for site in find_sites(layers, shared):
            if site.name in dense:
                continue
            left, sigma, right = torch.linalg.svd(stacked_weight(workspace, site), full_matrices=False)
            root = sigma.sqrt()
            lefts = (left * root).float().split([layer.outputs for layer in site.layers])
            arrays |= {f"{layer.name}/left": part for layer, part in zip(site.layers, lefts, strict=True)}
            arrays[f"{site.name}/right"] = (root[:, None] * right).float()
            rows += [{"module": site.name, "component": i, "sigma": value} for i, value in enumerate(sigma.tolist())]
        write_arrays(out / "bases", arrays)
        damped = [
            {"module": row["module"], "input_damping": 0.0, "output_damping": 0.0}
            for row in rows
            if not row["component"]
        ]
        pq.write_table(pa.Table.from_pylist(damped), out / "diagnostics.parquet")
        schema = pa.schema([("module", pa.string()), ("component", pa.int32()), ("sigma", pa.float64())])
        pq.write_table(pa.Table.from_pylist(rows, schema), out / "spectra.parquet")
        facts = {"metric": metric, "input_damping": 0.01, "dense": dense, "shared": shared}
        (out / "subspace.json").write_text(json.dumps(facts))
        write_layers(out, layers)


def stacked_weight(workspace: Workspace, site: Site) -> torch.Tensor:
    """The weights of a site's layers, one under the other, float64 [Σ n, m]."""
    return torch.cat([read_weight(workspace.model, layer).double() for layer in site.layers])


def publish_ranks(workspace: Workspace, ranks: dict[str, int], storage: str = "pivoted", ratio: float = 0.5) -> None:
    """What stage `ranks` would publish for these ranks of sites; those not named stay dense."""
    layers, sites = read_layers(workspace.out("subspace")), read_sites(workspace.out("subspace"))
    choices = [choose_storage(site, ranks.get(site.name, site.full_rank), storage) for site in sites]
    table = ranks_table(layers, sites, choices, {"metric": "svd"}, "by hand")
    with (
        Scratch(workspace, "ranks", RanksParams(), {"ranks": json.dumps([storage, ranks])}) as scratch,
        scratch.publish() as out,
    ):
        pq.write_table(table, out / "ranks.parquet")
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
