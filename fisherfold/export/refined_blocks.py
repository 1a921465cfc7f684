"""The blocks of a compressed model refined in turn: a unit of stage `factorize`.

<unit>/<block>/layers/<layer>/model.safetensors   the block's low-rank layers
<unit>/<block>/rest/model.safetensors             its other tensors (norms, biases, layers that stay dense), if it has any
<unit>/<block>/dense, <unit>/<block>/compressed   (until the next block is done, and only of much text) hidden states after the block
<unit>/<block>/refinement.json                    the block, and what `refine_block` says of it

A block that is done becomes durable within minutes (``fisherfold.run.savepoints``). After a kill, hidden states that were in memory are made again by the blocks that are
done, forward alone: the same bits.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fisherfold.export.expert_tensors import Stack
from fisherfold.export.free_factors import free_factors, pivot_again
from fisherfold.export.hidden_states import (
    COMPRESSED,
    DENSE,
    HELD,
    NETWORKS,
    Batches,
    HeldStates,
    LeftStates,
    States,
    StoredStates,
)
from fisherfold.export.refinement import Batch, Sequences, left_alone, refine_block
from fisherfold.export.trained_experts import put_experts, take_experts
from fisherfold.export.training_text import block_text
from fisherfold.network.blocks import BlockCall, find_blocks
from fisherfold.network.kept_state import KEEPS, keeps_state
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import StaysLoaded, load_model
from fisherfold.network.rounded_products import rounded_products
from fisherfold.network.weights_on_call import held
from fisherfold.run.checkpoint import StoredTensor, read_tensors, write_tensors
from fisherfold.run.determinism import multiplying
from fisherfold.run.errors import InputError
from fisherfold.run.params import RefineParams
from fisherfold.run.progress import announce, track_lines
from fisherfold.run.savepoints import SavepointPlace, Savepoints
from fisherfold.run.scratch import Scratch
from fisherfold.run.side_by_side import Apply, at_once, piece_count, side_by_side
from fisherfold.run.tables import in_batches, read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.runtime.modeling_fisherfold import replace_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING, HELD_OUT = "training", "tuning"
RECORD = "refinement.json"


@dataclass(frozen=True)
class LowRank:
    """A layer as it was factorized: where its tensors are, and its entry in the checkpoint's configuration."""

    folder: Path
    entry: dict[str, Any]
    bias: str | None


@dataclass(frozen=True)
class Step:
    """A decoder block of the dense model by name, and what of it is low-rank: layers by name, and stacks of experts."""

    block: str
    layers: Mapping[str, LowRank]
    stacks: tuple[Stack, ...]

    @classmethod
    def of(cls, block: str, layers: Mapping[str, LowRank], stacks: Sequence[Stack]) -> "Step":
        """Those that lie in the block."""
        own = {name: found for name, found in layers.items() if name.startswith(f"{block}.")}
        return cls(block, own, tuple(stack for stack in stacks if stack.name.startswith(f"{block}.")))


def refine(
    scratch: Scratch,
    workspace: Workspace,
    layers: Mapping[str, LowRank],
    stacks: Sequence[Stack],
    params: RefineParams,
) -> dict[str, Path]:
    """Refine every block; return the folder of each, by the block's name. None, where blocks cannot be run by themselves."""
    try:
        names = block_names(workspace)
        if not names:
            return {}
        steps = tuple(Step.of(name, layers, stacks) for name in names)
        unit = (scratch.savepoints("refined"), workspace, steps, params)
        folder = scratch.map("refining", refine_unit, {"refined": unit})["refined"]
        return {name: folder / name for name in names}
    finally:
        _dense.cache_clear()


def block_names(workspace: Workspace) -> list[str]:
    """Of the blocks to be refined; none, and a line that says why, where they cannot be."""
    model = _dense(workspace.model)
    try:
        blocks = find_blocks(model)
    except InputError as error:
        announce("factorize", f"blocks are not refined: {error}")
        return []
    if keeps_state(model, read_sequences(workspace.table(HELD_OUT), len(input_embedding(model)))[:1]):
        announce("factorize", f"blocks are not refined: {type(model).__name__} {KEEPS}")
        return []
    return list(blocks)


def refine_unit(
    folder: Path, place: SavepointPlace, workspace: Workspace, steps: Sequence[Step], params: RefineParams
) -> None:
    """Unit of work: all blocks, one after the other.

    Args:
        place: of its savepoints.
        steps: the blocks in their order.
    """
    points = Savepoints(place, folder)
    points.restore()
    model = _dense(workspace.model)
    device = input_embedding(model).device
    vocabulary = len(input_embedding(model))
    text = {
        TRAINING: block_text(workspace, vocabulary),
        HELD_OUT: read_sequences(workspace.table("tuning"), vocabulary),
    }
    ids = {part: found.to(device) for part, found in text.items()}
    with side_by_side(params.threads, piece_count(params.batch_size)) as apply, multiplying(params.products):
        first = BlockCall(model, model.get_submodule(steps[0].block), ids[TRAINING][:1]).entered
        few = len(NETWORKS) * sum(map(len, ids.values())) * first.nbytes <= HELD
        places = (folder, *(folder / step.block for step in steps))
        kept: list[LeftStates] = [HeldStates() if few else StoredStates(place, device) for place in places]
        embedded, left = kept[0], kept[1:]
        stored = [number for number, states in enumerate(left) if isinstance(states, StoredStates) and states.complete]
        begin = max(stored, default=-1) + 1  # what came before has been read by nobody since
        saved = sum((folder / step.block / RECORD).exists() for step in steps)
        for number in track_lines("factorize", "refining block", range(begin, len(steps)), len(steps) - begin):
            if number > saved and points.due():
                with points.save(number):
                    saved = number
            entered: States = left[number - 1] if number else EmbeddedStates(model, steps[0].block, ids, embedded)
            go_through(folder / steps[number].block, model, steps[number], ids, entered, left[number], params, apply)
            entered.drop()
        left[-1].drop()


def go_through(
    folder: Path,
    model: "PreTrainedModel",
    step: Step,
    ids: Mapping[str, torch.Tensor],
    entered: States,
    left: LeftStates,
    params: RefineParams,
    apply: Apply,
) -> None:
    """Hand the hidden states of both networks on through one block, which is refined first if it is not yet."""
    dense = model.get_submodule(step.block)
    size = at_once(params.batch_size)
    with held(dense):
        call = BlockCall(model, dense, ids[TRAINING][:1])
        with rounded_products([dense], params.products):
            left.take(DENSE, through(partial(call, dense), DENSE, entered, ids, size, apply))
        if (folder / RECORD).exists():
            compressed = read_block(folder, model, step)
        else:
            training, held_out = ((pairs(entered, left, part), len(ids[part])) for part in (TRAINING, HELD_OUT))
            compressed = refine_step(folder, model, step, call, training, held_out, params, apply)
        with rounded_products([compressed], params.products):
            left.take(COMPRESSED, through(partial(call, compressed), COMPRESSED, entered, ids, size, apply))


def refine_step(
    folder: Path,
    model: "PreTrainedModel",
    step: Step,
    call: BlockCall,
    training: tuple[Sequences, int],
    held_out: tuple[Sequences, int],
    params: RefineParams,
    apply: Apply,
) -> nn.Module:
    """Refine one block and write it. One without any low-rank layer stays the dense model's, and nothing is trained."""
    compressed = compress_block(model, step.block, step.layers, step.stacks)
    pivoted = free_factors(compressed)
    with rounded_products([compressed], params.products):
        if step.layers or step.stacks:
            found = refine_block(compressed, call, training, held_out, params, apply)
        else:
            found = left_alone(compressed, call, held_out, params, apply)
    pivot_again(compressed, pivoted, trained=found.accepted)
    write_block(folder, compressed, step, model.get_submodule(step.block))
    record = json.dumps({"block": step.block, **asdict(found)}, sort_keys=True)
    (folder / RECORD).write_text(f"{record}\n", encoding="utf-8")
    return compressed


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
                   for key, tensor in read_tensors(found.folder).items()}  # fmt: skip
        if found.bias:
            tensors.setdefault(found.bias, biases[own].data.float())
        block.get_submodule(own).load_state_dict(tensors, strict=False)
        block.get_submodule(own).to(cast(torch.Tensor, dense.get_submodule(own).weight).device)
    return block.eval().requires_grad_(False)


class EmbeddedStates:
    """What enters the first block, of both networks: the embeddings, kept as the dense network's.

    Args:
        model: asked for them one sequence after the other.
        block: the first, by name.
        ids: of the tables.
        kept: where they are kept.
    """

    def __init__(self, model: "PreTrainedModel", block: str, ids: Mapping[str, torch.Tensor], kept: LeftStates) -> None:
        self._kept, first = kept, model.get_submodule(block)
        kept.take(
            DENSE,
            (
                (part, [number], BlockCall(model, first, sequences[number : number + 1]).entered)
                for part, sequences in ids.items()
                for number in range(len(sequences))
            ),
        )

    def read(self, network: str, part: str, numbers: list[int]) -> torch.Tensor:
        """See `States`."""
        return self._kept.read(DENSE, part, numbers)

    def drop(self) -> None:
        """See `States`."""
        self._kept.drop()


def through(
    block: Callable[[torch.Tensor], torch.Tensor],
    network: str,
    entered: States,
    ids: Mapping[str, torch.Tensor],
    size: int,
    apply: Apply,
) -> Batches:
    """What a network's block makes of all that enters it, `size` sequences a piece."""

    def left(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return block(x)

    for part, sequences in ids.items():
        pieces = in_batches(list(range(len(sequences))), size)
        found = apply(left, (entered.read(network, part, numbers) for numbers in pieces))
        for numbers, x in zip(pieces, found, strict=True):
            yield part, numbers, x


def pairs(entered: States, left: States, part: str) -> Sequences:
    """x of the compressed network before the block, and y of the dense one after it."""

    def read(numbers: list[int]) -> Batch:
        return entered.read(COMPRESSED, part, numbers), left.read(DENSE, part, numbers)

    return read


def write_block(folder: Path, block: nn.Module, step: Step, dense: nn.Module) -> None:
    """The tensors of a block: each low-rank layer's by itself, and each expert's, then all others."""
    prefix = f"{step.block}."
    state = {key: value.cpu() for key, value in block.state_dict().items()}
    mixed = take_experts(folder / "layers", state, prefix, dense, step.stacks)
    write_layers_of(folder, state, prefix, step.layers)
    rest = {f"{prefix}{key}": value for key, value in state.items()} | mixed
    (folder / "rest").mkdir(parents=True)
    write_tensors(folder / "rest", {key: StoredTensor.of(value) for key, value in sorted(rest.items())})


def read_block(folder: Path, model: "PreTrainedModel", step: Step) -> nn.Module:
    """The block that `write_block` wrote."""
    layers = {name: replace(found, folder=folder / "layers" / name) for name, found in step.layers.items()}
    stacks = [stack.moved(folder / "layers") for stack in step.stacks]
    rest = read_tensors(folder / "rest")
    block = compress_block(model, step.block, layers, stacks, rest)
    put_rest(block, f"{step.block}.", rest, stacks)
    return block


def put_rest(block: nn.Module, prefix: str, rest: Mapping[str, StoredTensor], stacks: Sequence[Stack]) -> None:
    """Set the tensors of a block (or model) that are neither low-rank nor experts to those of `rest`, which have the dense model's names."""
    own = sorted(rest.keys() - {stack.name for stack in stacks})
    block.load_state_dict({name.removeprefix(prefix): rest[name].read() for name in own}, strict=False)


def write_layers_of(folder: Path, state: dict[str, torch.Tensor], prefix: str, layers: Mapping[str, LowRank]) -> None:
    """Write each low-rank layer's tensors, which are taken out of `state`, whose names lack `prefix`."""
    for layer in layers:
        own = f"{layer.removeprefix(prefix)}."
        tensors = {key.removeprefix(own): state.pop(key) for key in list(state) if key.startswith(own)}
        stored = {key: StoredTensor.of(value) for key, value in tensors.items() if value.numel() and key != "weight"}
        (folder / "layers" / layer).mkdir(parents=True)
        write_tensors(folder / "layers" / layer, stored)
