"""The passes of stage `capture` over one leaf with one decoder block in memory: units that hand hidden states and gradients on through the store.

    embed          ids -> x_0
    forward k      x_k -> x_{k+1} = f_k(x_k)
    head           x_K -> losses, and their gradient with respect to x_K
    backward k     x_k and the gradient at x_{k+1} -> f_k once more, the statistics of its layers, the gradient at x_k

All sequences of a leaf go through a block before the next one is read, so a weight is read twice a leaf. Batches, their order and what is computed of each
are those of ``capture.placement: whole``; so are the bits of all sums.

<unit>/hidden     x_k [T, h] of every sequence, an array by its number in the table
<unit>/gradient   likewise, of every draw of labels
<unit>/losses.json   losses of every shard

Shapes: B sequences of T tokens in a batch, h hidden dimensions.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fisherfold.network.blocks import BlockCall
from fisherfold.network.gradient_pass import GradientPass, loss_gradient
from fisherfold.network.labels import all_draws
from fisherfold.network.layers import LinearLayer, read_layers
from fisherfold.network.separable_blocks import require_blocks
from fisherfold.network.streamed_model import StreamedModel, streamed_model
from fisherfold.run.errors import NumericalError
from fisherfold.run.group_writer import GroupWriter, write_arrays
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import track_lines
from fisherfold.run.store import close_groups, offload_group, read_array
from fisherfold.run.tables import in_batches, read_sequences
from fisherfold.statistics.kept import kept_shapes
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.leaf import FACTS_FILE, shard_group, shard_sequences, zero_sums
from fisherfold.statistics.shard import NonFiniteBatch, add_shard, explain
from fisherfold.statistics.stored_sums import SUMS
from fisherfold.statistics.tree_sum import Leaf

HIDDEN, GRADIENT, LOSSES = "hidden", "gradient", "losses.json"
CURE = "Take such sequences out of the text, or set capture.placement: whole, which can leave them out."


@dataclass(frozen=True)
class LeafSource:
    """What a unit streams.

    Attributes:
        model: folder of the prepared model.
        table: of the sequences.
        params: of the stage.
        leaf: which shards.
    """

    model: Path
    table: Path
    params: CaptureParams
    leaf: Leaf

    def opened(self) -> StreamedModel:
        """The model's skeleton."""
        return streamed_model(self.model, self.params.dtype)

    def shards(self) -> dict[int, dict[int, torch.Tensor]]:
        """Ids [T] of every sequence by its number, by shard."""
        ids = read_sequences(self.table, self.opened().vocabulary)
        numbers = range(self.leaf.first, self.leaf.last + 1)
        return {shard: {s: ids[s] for s in shard_sequences(shard, len(ids), self.params)} for shard in numbers}

    def batches(self, doing: str) -> Iterator[tuple[int, Sequence[int], torch.Tensor]]:
        """(shard, numbers, ids [B, T]) of every batch."""
        shards = self.shards()
        cut = [(shard, part) for shard, ids in shards.items() for part in in_batches(list(ids), self.params.batch_size)]
        for shard, numbers in track_lines("capture", doing, cut, len(cut)):
            yield shard, numbers, torch.stack([shards[shard][number] for number in numbers])


@dataclass(frozen=True)
class BackwardPart:
    """The layers of one block whose statistics one backward unit takes.

    Attributes:
        block: its number.
        layers: some of its layers, perhaps none.
        first: whether the unit writes the sampled positions, which are those of all layers.
        hands_down: whether it writes the gradient for the block before.
    """

    block: int
    layers: tuple[LinearLayer, ...]
    first: bool
    hands_down: bool


def try_blocks(folder: Path, model: Path, dtype: str) -> None:
    """Unit of work: see `require_blocks`."""
    streamed = streamed_model(model, dtype)
    require_blocks(streamed, read_layers(model.parent))
    (folder / "blocks.json").write_text(json.dumps(streamed.names), encoding="utf-8")


def embed(folder: Path, source: LeafSource) -> None:
    """Unit of work: what reaches the first block."""
    streamed = source.opened()
    with torch.no_grad(), streamed.surroundings(embedding=True), GroupWriter(folder / HIDDEN) as writer:
        for _, numbers, ids in source.batches("embedding, batch"):
            _write(writer, numbers, _finite(source, "the embedding", numbers, streamed.enter(ids)))


def forward(folder: Path, source: LeafSource, block: int, before: Path) -> None:
    """Unit of work: one block forward.

    Raises:
        NumericalError: what leaves it is not finite.
    """
    streamed = source.opened()
    where = f"the output of {streamed.names[block]}"
    with streamed.block(block) as module, GroupWriter(folder / HIDDEN) as writer:
        run = BlockRun(streamed, block, module)
        for _, numbers, _ in source.batches(f"block {block} forward, batch"):
            _, left = run.with_graph(_read(before / HIDDEN, numbers, streamed.device))
            _write(writer, numbers, _finite(source, where, numbers, left.detach()))
    close_groups()


def head(folder: Path, source: LeafSource, before: Path) -> None:
    """Unit of work: losses, and the gradient that the last block is sent.

    Raises:
        NumericalError: a loss is not finite.
    """
    streamed, params = source.opened(), source.params
    losses: dict[int, list[float]] = {}
    with streamed.surroundings(head=True), GroupWriter(folder / GRADIENT) as writer:
        for shard, numbers, ids in source.batches("losses, batch"):
            left = _read(before / HIDDEN, numbers, streamed.device).requires_grad_()
            with torch.enable_grad():
                logits = streamed.leave(left.clone())
            for draw, labels in enumerate(all_draws(params, numbers)):
                found, gradient = loss_gradient(logits.detach(), ids.to(logits.device), labels=labels)
                logits.backward(gradient, retain_graph=draw + 1 < params.draws)
                _write(writer, numbers, taken(left), draw)
            losses.setdefault(shard, []).extend(_finite(source, "the loss", numbers, found[:, None]).flatten().tolist())
    (folder / LOSSES).write_text(json.dumps([losses[shard] for shard in sorted(losses)]), encoding="utf-8")
    close_groups()


def backward(
    folder: Path,
    source: LeafSource,
    part: BackwardPart,
    entered: Path,
    behind: Path,
    scored: Path,
    earlier: Path | None,
) -> None:
    """Unit of work: one block once more and backward, with the statistics of some of its layers.

    Args:
        entered: the unit that wrote what reaches the block.
        behind: the unit that wrote the gradient of what leaves it.
        scored: the unit of the head.
        earlier: this unit of the leaf before, whose sums are gone on from.

    Raises:
        NumericalError: a gradient is not finite.
    """
    streamed, params = source.opened(), source.params
    losses = json.loads((scored / LOSSES).read_text(encoding="utf-8"))
    with streamed.block(part.block) as module:
        run = BlockRun(streamed, part.block, module)
        sums = zero_sums(streamed.model, part.layers, params, run.probe)
        if earlier is not None:
            _go_on(sums, earlier)
        writer = GroupWriter(folder / GRADIENT) if part.hands_down else None
        passing = BlockPass(run, entered / HIDDEN, behind / GRADIENT, writer, params.draws)
        doing = f"block {part.block} backward, shard"
        try:
            for shard, ids in source.shards().items():
                shapes = kept_shapes(part.layers, params, len(next(iter(ids.values()))), part.first)
                add_shard(sums, shard_group(folder, shard), params, ids, shapes, f"{doing} {shard}, batch", passing)
                offload_group(shard_group(folder, shard))
        except NonFiniteBatch as batch:
            raise NumericalError(explain(source.table, batch.culprits, CURE)) from None
        if writer:
            writer.close()
        write_arrays(folder / SUMS, sums.arrays())
    shards = [{"losses": each, "skipped": []} for each in losses]
    facts = {"shards": shards, "unreached": sums.unreached()}
    (folder / FACTS_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
    close_groups()


def _go_on(sums: ModelSums, earlier: Path) -> None:
    """Restore the sums of the leaf before."""
    unreached = json.loads((earlier / FACTS_FILE).read_text(encoding="utf-8"))["unreached"]
    sums.restore(partial(read_array, earlier / SUMS), unreached)


class BlockRun:
    """A block that is in memory, run by itself."""

    def __init__(self, streamed: StreamedModel, number: int, module: nn.Module) -> None:
        self.name, self._streamed, self._number, self._module = streamed.names[number], streamed, number, module
        self._calls: dict[tuple[int, int], BlockCall] = {}

    def with_graph(self, entered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, h] as a leaf of autograd, and what the block makes of it.

        Forward units, too, run it so: kernels that are chosen by whether a gradient is wanted would give other bits.
        """
        leaf = entered.requires_grad_()
        with torch.enable_grad():
            return leaf, self._run(leaf.clone())  # some blocks add to their input in place

    def probe(self, ids: torch.Tensor) -> None:
        """Run as many tokens as `ids` has; any will do."""
        numbers = torch.arange(ids.numel() * self._streamed.width, device=self._streamed.device)
        self._run(numbers.sin().to(self._streamed.dtype).view(*ids.shape, -1))

    def _run(self, entered: torch.Tensor) -> torch.Tensor:
        size = (entered.shape[0], entered.shape[1])
        if size not in self._calls:
            with self._streamed.surroundings():
                self._calls[size] = self._streamed.call(self._number, *size)
        return self._calls[size](self._module, entered)


class BlockPass:
    """A block is run once more on what reached it, and backward from the gradient of what left it; see `Passing`.

    Args:
        run: the block.
        entered, behind: groups of x and of gradients.
        writer: of the gradient at x, if the block before needs it.
        draws: of labels, each with a gradient of its own.
    """

    def __init__(self, run: BlockRun, entered: Path, behind: Path, writer: GroupWriter | None, draws: int) -> None:
        self._block, self._entered, self._behind, self._writer, self._draws = run, entered, behind, writer, draws
        self._finite = torch.ones(0, dtype=torch.bool)

    def run(self, numbers: Sequence[int], ids: torch.Tensor) -> GradientPass:
        """See `Passing`; the losses are the head's."""
        device = self._block._streamed.device
        entered, left = self._block.with_graph(_read(self._entered, numbers, device))
        self._finite = torch.ones(len(numbers), dtype=torch.bool)
        for draw in range(self._draws):
            left.backward(_read(self._behind, numbers, device, draw), retain_graph=draw + 1 < self._draws)
            handed_down = taken(entered)
            if self._writer:
                _write(self._writer, numbers, handed_down, draw)
            self._finite &= handed_down.flatten(1).isfinite().all(1).cpu()
        return GradientPass(torch.zeros(len(numbers)), self._finite)

    def culprits(self, numbers: Sequence[int], ids: torch.Tensor) -> dict[int, str]:
        """See `Passing`."""
        where = f"the gradient that {self._block.name} hands down"
        return {number: where for number, good in zip(numbers, self._finite.tolist()) if not good}


def taken(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient that came to a leaf of autograd, which has none after."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def array_name(number: int, draw: int = 0) -> str:
    """Under which a sequence's hidden states are stored, and their gradient under one draw of labels."""
    return f"{number}.{draw}" if draw else str(number)


def _read(group: Path, numbers: Sequence[int], device: torch.device, draw: int = 0) -> torch.Tensor:
    return torch.stack([read_array(group, array_name(number, draw)) for number in numbers]).to(device)


def _write(writer: GroupWriter, numbers: Sequence[int], values: torch.Tensor, draw: int = 0) -> None:
    for number, own in zip(numbers, values):
        writer.write(array_name(number, draw), own)


def _finite(source: LeafSource, where: str, numbers: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Values [B, ...], all of them finite.

    Raises:
        NumericalError: names the sequences.
    """
    good = values.flatten(1).isfinite().all(1).tolist()
    culprits = {number: where for number, fine in zip(numbers, good) if not fine}
    if culprits:
        raise NumericalError(explain(source.table, culprits, CURE))
    return values
