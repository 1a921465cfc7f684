"""The blocks of a compressed model refined in turn: units of stage `factorize`, each of which reads what the one before wrote.

<unit>/layers/<layer>/model.safetensors   the block's low-rank layers
<unit>/rest/model.safetensors             its other tensors (norms, biases, layers that stay dense), if it has any
<unit>/dense, <unit>/compressed           (until the next block is done) x [S, T, h] of either network after the block, a sequence an array
<unit>/refinement.json                    the block, and what `refine_block` says of it
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fisherfold.export.expert_tensors import Stack
from fisherfold.export.free_factors import free_factors, pivot_again
from fisherfold.export.refinement import Batch, Sequences, left_alone, refine_block
from fisherfold.export.trained_experts import put_experts, take_experts
from fisherfold.network.blocks import BlockCall, find_blocks
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import StaysLoaded, load_model
from fisherfold.network.weights_on_call import held
from fisherfold.run.checkpoint import StoredTensor, read_tensors, write_tensors
from fisherfold.run.determinism import computing_threads
from fisherfold.run.engine import Unit
from fisherfold.run.errors import InputError
from fisherfold.run.group_writer import GroupWriter, group_file
from fisherfold.run.params import RefineParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import read_array
from fisherfold.run.tables import in_batches, read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.runtime.modeling_fisherfold import replace_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("calibration", "tuning")
NETWORKS = (DENSE, COMPRESSED) = ("dense", "compressed")


@dataclass(frozen=True)
class LowRank:
    """A layer as it was factorized: where its tensors are, and its entry in the checkpoint's configuration."""

    folder: Path
    entry: dict[str, Any]
    bias: str | None


def refine(
    scratch: Scratch,
    workspace: Workspace,
    layers: Mapping[str, LowRank],
    stacks: Sequence[Stack],
    params: RefineParams,
) -> dict[str, Path]:
    """Refine every block; return the folder of each block's unit, by the block's name. None, where blocks cannot be run by themselves."""
    try:
        names = _block_names(workspace.model)
        return _refined(scratch, workspace, names, layers, stacks, params) if names else {}
    finally:
        _dense.cache_clear()


def _block_names(model: Path) -> list[str]:
    try:
        return list(find_blocks(_dense(model)))
    except InputError as error:
        announce("factorize", f"blocks are not refined: {error}")
        return []


def _refined(
    scratch: Scratch,
    workspace: Workspace,
    names: list[str],
    layers: Mapping[str, LowRank],
    stacks: Sequence[Stack],
    params: RefineParams,
) -> dict[str, Path]:
    units: dict[str, Unit] = {}
    before: str | None = None
    for name in names:
        own = {layer: found for layer, found in layers.items() if layer.startswith(f"{name}.")}
        experts = tuple(stack for stack in stacks if stack.name.startswith(f"{name}."))
        unit = f"refined.{name}"
        source = scratch.units / before if before else None
        units[unit] = Unit(refine_unit, (workspace, name, own, experts, source, params), (before,) if before else ())
        before = unit
    done: list[str] = []
    for unit in scratch.run("refining blocks", units):
        for earlier in done[-1:]:
            for network in NETWORKS:  # the next block alone has read it
                scratch.drop(earlier, group_file(Path(network)).name)
        done.append(unit)
    return {name: scratch.units / f"refined.{name}" for name in names}


def refine_unit(
    folder: Path,
    workspace: Workspace,
    name: str,
    layers: dict[str, LowRank],
    stacks: tuple[Stack, ...],
    before: Path | None,
    params: RefineParams,
) -> None:
    """Unit of work: one block, its low-rank layers and its stacks of experts. A block without any stays the dense model's: its hidden states are
    handed on, and nothing is trained.
    """
    model = _dense(workspace.model)
    dense = model.get_submodule(name)
    with computing_threads(params.threads), held(dense):
        compressed = compress_block(model, name, layers, stacks)
        embedding = input_embedding(model)
        ids = {part: read_sequences(workspace.table(part), len(embedding)).to(embedding.device) for part in PARTS}
        call = BlockCall(model, dense, ids["calibration"][:1])
        entered = Entered(model, dense, ids, before)
        write_left(folder, DENSE, lambda x: call(dense, x), entered, params.batch_size)
        pivoted = free_factors(compressed)
        training, held_out = ((pairs(folder, part, entered), len(ids[part])) for part in PARTS)
        if layers or stacks:
            found = refine_block(compressed, call, training, held_out, params)
        else:
            found = left_alone(compressed, call, held_out, params)
        pivot_again(compressed, pivoted, trained=found.accepted)
        write_left(folder, COMPRESSED, lambda x: call(compressed, x), entered, params.batch_size)
        write_block(folder, compressed, name, layers, dense, stacks)
        (folder / "refinement.json").write_text(
            json.dumps({"block": name, **asdict(found)}, sort_keys=True) + "\n", encoding="utf-8"
        )


@StaysLoaded
def _dense(folder: Path) -> "PreTrainedModel":
    """The dense model, loaded once a process: blocks come one after the other."""
    return load_model(folder, torch.float32)


def compress_block(
    model: "PreTrainedModel",
    name: str,
    layers: Mapping[str, LowRank],
    stacks: Sequence[Stack] = (),
    changed: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> nn.Module:
    """A copy of a dense block (or of the model, with the empty name) with its low-rank layers and experts in place; for `changed` see `put_experts`."""
    dense, prefix = model.get_submodule(name), f"{name}." if name else ""
    block = copy.deepcopy(dense)
    put_experts(block, prefix, model, stacks, changed)
    entries = {layer.removeprefix(prefix): dict(found.entry) for layer, found in layers.items()}
    biases = {layer: cast(torch.Tensor, dense.get_submodule(layer).bias) for layer in entries}
    for entry in entries.values():
        if "source" in entry:
            entry["source"] = entry["source"].removeprefix(prefix)
    replace_layers(block, entries)
    for layer, found in layers.items():
        own = layer.removeprefix(prefix)
        tensors = {key: tensor.read().float() if tensor.dtype.is_floating_point else tensor.read()
                   for key, tensor in (read_tensors(found.folder).items() if found.entry["rank"] else ())}  # fmt: skip
        if found.bias:
            tensors.setdefault(found.bias, biases[own].data.float())
        block.get_submodule(own).load_state_dict(tensors, strict=False)
        block.get_submodule(own).to(cast(torch.Tensor, dense.get_submodule(own).weight).device)
    return block.eval().requires_grad_(False)


class Entered:
    """Hidden states before a block: those that the unit before wrote, or the embedding's, which both networks share."""

    def __init__(
        self, model: "PreTrainedModel", block: nn.Module, ids: Mapping[str, torch.Tensor], before: Path | None
    ) -> None:
        self.model, self.block, self.ids, self.before = model, block, ids, before

    def read(self, network: str, part: str, numbers: list[int]) -> torch.Tensor:
        """x [B, T, h] of the sequences of these numbers."""
        if self.before is None:
            return BlockCall(self.model, self.block, self.ids[part][numbers]).entered
        return _read_left(self.before, network, part, numbers).to(self.ids[part].device)


def write_left(
    folder: Path, network: str, run: Callable[[torch.Tensor], torch.Tensor], entered: Entered, size: int
) -> None:
    """Write what a network's block makes of all that enters it, `size` sequences at a time."""
    with torch.no_grad(), GroupWriter(folder / network) as writer:
        for part, ids in entered.ids.items():
            for numbers in in_batches(list(range(len(ids))), size):
                for number, left in zip(numbers, run(entered.read(network, part, numbers)), strict=True):
                    writer.write(f"{part}.{number}", left)


def _read_left(folder: Path, network: str, part: str, numbers: list[int]) -> torch.Tensor:
    return torch.stack([read_array(folder / network, f"{part}.{number}") for number in numbers])


def pairs(folder: Path, part: str, entered: Entered) -> Sequences:
    """x of the compressed network before the block, and y of the dense one after it."""

    def read(numbers: list[int]) -> Batch:
        x = entered.read(COMPRESSED, part, numbers)
        return x, _read_left(folder, DENSE, part, numbers).to(x.device)

    return read


def write_block(
    folder: Path,
    block: nn.Module,
    name: str,
    layers: Mapping[str, LowRank],
    dense: nn.Module,
    stacks: Sequence[Stack],
) -> None:
    """The tensors of a block: each low-rank layer's by itself, and each expert's, then all others."""
    state = {key: value.cpu() for key, value in block.state_dict().items()}
    mixed = take_experts(folder / "layers", state, f"{name}.", dense, stacks)
    write_layers_of(folder, state, f"{name}.", layers)
    rest = {f"{name}.{key}": value for key, value in state.items()} | mixed
    (folder / "rest").mkdir()
    write_tensors(folder / "rest", {key: StoredTensor.of(value) for key, value in sorted(rest.items())})


def write_layers_of(folder: Path, state: dict[str, torch.Tensor], prefix: str, layers: Mapping[str, LowRank]) -> None:
    """Write each low-rank layer's tensors, which are taken out of `state`, whose names lack `prefix`."""
    for layer in layers:
        own = f"{layer.removeprefix(prefix)}."
        tensors = {key.removeprefix(own): state.pop(key) for key in list(state) if key.startswith(own)}
        stored = {key: StoredTensor.of(value) for key, value in tensors.items() if value.numel() and key != "weight"}
        (folder / "layers" / layer).mkdir(parents=True)
        write_tensors(folder / "layers" / layer, stored)
