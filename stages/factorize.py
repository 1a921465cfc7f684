"""Stage `factorize`: the compressed model as a Hugging Face folder that carries its own code.

Every site's basis (see ``fisherfold.network.sites``) is cut to its rank and brought into its gauge, one site at a time; then the checkpoint is written one
tensor at a time, so memory is bounded by the largest tensor. Writes model/, on request dense/ (the same weights
multiplied out, in the dense architecture) and model.gguf (those in GGUF), and factorize.json with sizes counted from the saved
tensors.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisherfold.allocators.cost import DENSE
from fisherfold.allocators.dropped_experts import read_dropped
from fisherfold.export.architecture import (
    DenseArchitecture,
    copy_companions,
    dense_architecture,
    write_code,
    write_config,
)
from fisherfold.export.buffers import check_buffers
from fisherfold.export.expert_tensors import Stack, active_parameters, find_stacks, routed_shares
from fisherfold.export.fewer_experts import as_they_are, expert_layers, spread_shares, without_experts
from fisherfold.export.gauges import SHARED_MEMBER, gauge_site, product, right_factor
from fisherfold.export.gguf_export import check_gguf, write_gguf
from fisherfold.export.healing import FACTS, heal_unit, healed
from fisherfold.export.lineage import write_lineage
from fisherfold.export.model_card import compressed_card, dense_card
from fisherfold.export.original_names import original_tensors
from fisherfold.export.packed import as_stored, packed_modules, quantization_config, unpacked_weights, with_packed
from fisherfold.export.refined_blocks import refine
from fisherfold.export.rounded_layers import head_in_few_bits, in_few_bits
from fisherfold.export.sizes import count_sizes
from fisherfold.export.stored_layer import StoredLayer, as_trained, bias_place, replaced, stored_site
from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import DTYPES, read_weight
from fisherfold.network.sites import Site, bundles, read_sites
from fisherfold.run.checkpoint import SHARD_BYTES, StoredTensor, count_bytes, read_tensors, write_tensors
from fisherfold.run.files import digest_file, verify_output
from fisherfold.run.params import FactorizeParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace

REFINEMENT = pa.schema(
    [
        ("block", pa.string()),
        ("held_out_before", pa.float64()),
        ("held_out_after", pa.float64()),
        ("accepted", pa.bool_()),
        ("steps", pa.int64()),
    ]
)
"""Of each block what `refine_block` says; no row without refinement."""


def run(workspace: Workspace, params: FactorizeParams) -> None:
    """Write the compressed checkpoint.

    Raises:
        InputError: the model's architecture is not one of transformers' own, so its code cannot travel with the checkpoint.
        CorruptArtifact: the output of an earlier stage is not whole, or the saved tensors are not what was planned.
        NotEnoughDisk: the checkpoint would not fit.
    """
    inputs = _inputs(workspace, params)
    with Scratch(workspace, "factorize", params, inputs) as scratch:
        if scratch.republish():
            return
        architecture = dense_architecture(workspace.model)
        if params.gguf_export:
            check_gguf(architecture.config, workspace.model)  # before the work, if at all
        sites = read_sites(workspace.out("subspace"))
        plan = {row["module"]: row for row in pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()}
        stored = read_tensors(workspace.model)
        dtype = DTYPES[params.dtype or architecture.dtype]
        dense = {name: tensor.cast(dtype) for name, tensor in stored.items()}
        dropped = read_dropped(workspace.out("ranks"))
        architecture, dense = without_experts(architecture, dense, dropped)
        scratch.require_disk(count_bytes(dense) * (2 + params.dense_export + params.gguf_export))
        layers = [layer for site in sites for layer in site.layers]
        gone = expert_layers(layers, dropped)
        compressed = _factorized(scratch, workspace, [site for site in sites if site.name not in gone], plan, dtype)
        params = as_they_are(params) if dropped else params
        compressed, dense, rows, healing = _trained(scratch, workspace, layers, compressed, dense, params, dtype)
        packed: dict[str, Path] = {}
        if bits := {name: width for name, row in plan.items() if (width := row.get("bits") or params.bits)}:
            compressed, packed = in_few_bits(scratch, workspace, layers, compressed, dense, bits)
        if params.head_bits and (head := architecture.own_head()):
            packed |= head_in_few_bits(scratch, head[0], dense, params.head_bits)
        stacks = find_stacks(layers, compressed)
        with scratch.publish() as out:
            pq.write_table(pa.Table.from_pylist(rows, REFINEMENT), out / "refinement.parquet")
            write_model(out / "model", workspace, architecture, dense, compressed, dtype, stacks=stacks, packed=packed)
            check_buffers(out / "model", dense, architecture)
            facts = count_sizes(out / "model", stored, plan, layers, stacks, gone)
            facts["healing"] = healing
            facts["layers"] = {name: layer.record for name, layer in compressed.items()}
            if any(layer.stack for layer in layers):
                routed = routed_shares(workspace.out("ranks"))
                shares = {"dense": routed, "compressed": spread_shares(routed, layers, gone)}
                facts |= active_parameters(facts, plan, shares)
            (out / "model" / "README.md").write_text(
                compressed_card(workspace, architecture, facts, params), encoding="utf-8"
            )
            write_lineage(out / "model", workspace, inputs)
            (out / "factorize.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if params.dense_export or params.gguf_export:
                whole = dense_tensors(dense | unpacked_weights(packed, dense), compressed, dtype, stacks)
                whole = original_tensors(architecture.empty_model(), whole)
            if params.dense_export:
                write_dense(out / "dense", workspace, architecture, whole, dtype)
                (out / "dense" / "README.md").write_text(
                    dense_card(workspace, architecture, facts, params), encoding="utf-8"
                )
                write_lineage(out / "dense", workspace, inputs)
            if params.gguf_export:
                write_gguf(out / "model.gguf", architecture.config, workspace.model, whole, dtype)


def _factorized(
    scratch: Scratch, workspace: Workspace, sites: Sequence[Site], plan: Mapping[str, dict], dtype: torch.dtype
) -> dict[str, StoredLayer]:
    """Every layer that is planned to be low-rank, by name; a bundle of sites is a unit."""
    low_rank = [site for site in sites if plan[site.name]["storage"] != DENSE]
    bases = workspace.out("subspace") / "bases"
    by_first = {site.layers[0].name: site for site in low_rank}
    pieces = {
        name: [by_first[first.name] for first in some]
        for name, some in bundles(site.layers[0] for site in low_rank).items()
    }
    units = {
        name: (
            bases,
            workspace.model,
            [(site, plan[site.name]["rank"], plan[site.name]["storage"]) for site in some],
            dtype,
        )
        for name, some in pieces.items()
    }
    sizes = {name: sum(site.dense_numbers for site in some) for name, some in pieces.items()}
    folders = scratch.map("factorizing layers", factorize_sites, units, sizes)
    return {
        name: layer
        for unit, some in pieces.items()
        for site in some
        for name, layer in stored_site(site, folders[unit]).items()
    }


def _trained(
    scratch: Scratch,
    workspace: Workspace,
    layers: Sequence[LinearLayer],
    compressed: dict[str, StoredLayer],
    dense: dict[str, StoredTensor],
    params: FactorizeParams,
    dtype: torch.dtype,
) -> tuple[dict[str, StoredLayer], dict[str, StoredTensor], list[dict], dict | None]:
    """Layers and other tensors after what training is asked for; rows of refinement.parquet, and what healing says."""
    rows: list[dict] = []
    refined: dict[str, Path] = {}
    healing = None
    if params.refine.passes:
        refined = refine(scratch, workspace, *as_trained(layers, compressed), params.refine)
        compressed, dense, rows = _apply(refined, compressed, dense, dtype)
    if params.heal.passes and compressed:
        rest = tuple(unit / "rest" for unit in refined.values())
        unit = (scratch.savepoints("healed"), workspace, *as_trained(layers, compressed), rest, params.heal)
        folder = scratch.map("healing", heal_unit, {"healed": unit})["healed"]
        compressed, dense = replaced(compressed, healed(folder, list(compressed)), dense, dtype)
        healing = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return compressed, dense, rows, healing


def _inputs(workspace: Workspace, params: FactorizeParams) -> dict[str, str]:
    tables = ("calibration", "training", "tuning") if params.refine.passes or params.heal.passes else ()
    ranks = verify_output(workspace.out("ranks"))
    rounded = params.bits or any(pq.read_table(workspace.out("ranks") / "ranks.parquet")["bits"].to_pylist())
    metrics = ("capture", "kronecker") if rounded else ()
    of_metrics = {stage: verify_output(workspace.out(stage)) for stage in metrics}
    return (
        of_metrics
        | {table: digest_file(workspace.table(table)) for table in tables}
        | {
            "model": verify_output(workspace.out("prepare"), "model/"),
            "facts": verify_output(workspace.out("prepare"), "prepare.json"),
            "bases": verify_output(workspace.out("subspace"), "bases"),
            "metric": verify_output(workspace.out("subspace"), "subspace.json"),
            "ranks": ranks,
        }
    )


def factorize_sites(
    folder: Path, bases: Path, model: Path, sites: Sequence[tuple[Site, int, str]], dtype: torch.dtype
) -> None:
    """Unit of work: a site, or the sites of some experts, each with its rank and storage."""
    for site, rank, storage in sites:
        factorize_site(folder, bases, model, site, rank, storage, dtype)


def factorize_site(
    folder: Path, bases: Path, model: Path, site: Site, rank: int, storage: str, dtype: torch.dtype
) -> None:
    """Cut a site's basis to `rank`, gauge it, round it to `dtype`, and record what that cost each layer.

    rounding_error = ‖Ŵ − left right‖ / ‖left right‖ (gauge and rounding), reconstruction_error = ‖Ŵ − W‖ / ‖W‖ (truncation
    too), in the Frobenius norm, Ŵ the product of what is stored.
    """
    lefts, right = site.read_basis(bases, rank)
    lefts, right = [left.double().numpy() for left in lefts], right.double().numpy()
    gauged = gauge_site(lefts, right, storage, dtype)
    for layer, left, stored in zip(site.layers, lefts, gauged, strict=True):
        rebuilt = product(
            stored.kind, right_factor(gauged[0].parameters) | stored.parameters, layer.outputs, layer.inputs
        )
        record = {
            "kind": stored.kind,
            "rank": rank,
            "largest_coefficient": stored.largest_coefficient,
            "rounding_error": _relative_error(rebuilt, left @ right),
            "reconstruction_error": _relative_error(rebuilt, read_weight(model, layer).double().numpy()),
        } | ({"source": site.name} if stored.kind == SHARED_MEMBER else {})
        own = folder / layer.name
        own.mkdir()
        write_tensors(own, {name: _as_stored(values, dtype) for name, values in sorted(stored.parameters.items())})
        (own / "layer.json").write_text(json.dumps(record, sort_keys=True) + "\n", encoding="utf-8")


def _relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖found − wanted‖ / ‖wanted‖; the plain norm where `wanted` is zero."""
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def _as_stored(values: np.ndarray, dtype: torch.dtype) -> StoredTensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    kept = torch.int64 if values.dtype == np.int64 else dtype
    return StoredTensor(tuple(tensor.shape), kept, lambda: tensor.to(kept))


def _apply(
    refined: Mapping[str, Path],
    compressed: Mapping[str, StoredLayer],
    dense: dict[str, StoredTensor],
    dtype: torch.dtype,
) -> tuple[dict[str, StoredLayer], dict[str, StoredTensor], list[dict]]:
    """Layers and other tensors with those of the refined blocks in place, and the rows of refinement.parquet."""
    tensors, rows, folders = dict(dense), [], dict[str, Path]()
    for folder in refined.values():
        rows.append(json.loads((folder / "refinement.json").read_text(encoding="utf-8")))
        tensors |= {name: t.cast(dtype) for name, t in read_tensors(folder / "rest").items() if name in dense}
        folders |= (
            {own.name: own for own in sorted((folder / "layers").iterdir())} if (folder / "layers").exists() else {}
        )
    layers, tensors = replaced(compressed, folders, tensors, dtype)
    return layers, tensors, rows


def write_model(
    folder: Path,
    workspace: Workspace,
    architecture: DenseArchitecture,
    dense: Mapping[str, StoredTensor],
    compressed: Mapping[str, StoredLayer],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    stacks: Sequence[Stack] = (),
    packed: Mapping[str, Path] = {},
) -> None:
    """The checkpoint with low-rank layers, `packed` being where dense ones in few bits lie: weights, configuration, its own code, and the dense model's other files."""
    folder.mkdir(parents=True)
    tensors = with_packed(compressed_tensors(dense, compressed, dtype, stacks), packed)
    write_tensors(folder, tensors, shard_bytes)
    layers = {name: stored.entry for name, stored in compressed.items() if not stored.layer.stack}
    write_config(folder, architecture, dtype, layers, stacks, quantization_config(packed_modules(tensors)))
    write_code(folder, architecture, mixture=bool(stacks))
    copy_companions(workspace.model, folder)


def compressed_tensors(
    dense: Mapping[str, StoredTensor],
    compressed: Mapping[str, StoredLayer],
    dtype: torch.dtype,
    stacks: Sequence[Stack] = (),
) -> dict[str, StoredTensor]:
    """The checkpoint's tensors: of every layer in `compressed` its own instead of the dense weight, its bias moved along."""
    tensors = dict(dense)
    for stack in stacks:
        tensors |= stack.tensors(tensors.pop(stack.name), dtype)
    linear = {name: stored for name, stored in compressed.items() if not stored.layer.stack}
    for name, stored in linear.items():
        del tensors[f"{name}.weight"]
        if stored.layer.bias:
            tensors[f"{name}.{bias_place(stored)}"] = tensors.pop(f"{name}.bias")
        tensors |= {f"{name}.{parameter}": as_stored(parameter, t, dtype) for parameter, t in stored.factors.items()}
    if linear:  # see FisherfoldForCausalLM: makes the dense model's class refuse this checkpoint
        shape = 0, dense[f"{min(linear)}.weight"].shape[1]
        tensors[f"{min(linear)}.weight"] = StoredTensor(shape, dtype, lambda: torch.empty(shape, dtype=dtype))
    if stacks:
        tensors[min(stack.name for stack in stacks)] = StoredTensor((0,), dtype, lambda: torch.empty(0, dtype=dtype))
    return dict(sorted(tensors.items()))


def write_dense(
    folder: Path,
    workspace: Workspace,
    architecture: DenseArchitecture,
    whole: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> None:
    """The same model with every product multiplied out, in the dense architecture and its own tensors' names, for other tools."""
    folder.mkdir(parents=True)
    write_tensors(folder, whole)
    config = architecture.config | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_companions(workspace.model, folder)


def dense_tensors(
    dense: Mapping[str, StoredTensor],
    compressed: Mapping[str, StoredLayer],
    dtype: torch.dtype,
    stacks: Sequence[Stack] = (),
) -> dict[str, StoredTensor]:
    """The dense model's tensors, with the weight of every layer in `compressed` multiplied out when it is read."""
    rebuilt = {
        f"{name}.weight": StoredTensor(dense[f"{name}.weight"].shape, dtype, partial(_multiply_out, stored, dtype))
        for name, stored in compressed.items()
        if not stored.layer.stack
    }
    experts = {stack.name: stack.multiplied_out(dense[stack.name], dtype) for stack in stacks}
    return dict(sorted({**dense, **rebuilt, **experts}.items()))


def _multiply_out(stored: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight as the dense model stores it: [m, n] in a Conv1D."""
    rebuilt = torch.from_numpy(stored.product()).to(dtype)
    return rebuilt.T if stored.layer.transposed else rebuilt
