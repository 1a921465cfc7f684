"""``capture.placement: streamed``: one decoder block in memory, forward block by block, then backward, each step a unit.

A leaf goes through all blocks before the next leaf begins (two are in work where there are several workers), and goes on from the sums of the one
before. So sums are of the same order of addition as with the whole model in one leaf, however many leaves there are.

Shapes: S' sequences of T tokens in a leaf, h hidden dimensions, K blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherfold.network.layers import LinearLayer, read_layers
from fisherfold.network.models import DTYPES
from fisherfold.network.separable_blocks import require_blocks, require_inside
from fisherfold.network.streamed_model import streamed_model
from fisherfold.run.engine import Unit, current_engine
from fisherfold.run.group_writer import group_file
from fisherfold.run.params import CaptureParams
from fisherfold.run.scratch import Scratch
from fisherfold.statistics.placement import PLACEMENTS, CaptureSource, Part, Placement, kept_on_disk, sums_bytes
from fisherfold.statistics.shard import layer_slices
from fisherfold.statistics.stored_sums import SUMS
from fisherfold.statistics.streamed_pass import (
    GRADIENT,
    HIDDEN,
    BackwardPart,
    LeafSource,
    backward,
    embed,
    forward,
    head,
    try_blocks,
)
from fisherfold.statistics.tree_sum import Leaf

LEAVES_IN_WORK = 2  # with several workers: one forward while the one before goes backward
BLOCKS = "blocks"


class StreamedPart(Part):
    """Layers of one block. Each leaf's sums go on from those of the leaf before, so the last has them all."""

    def __init__(
        self, scratch: Scratch, leaves: Sequence[Leaf], block: int, layers: Sequence[LinearLayer], index: int
    ) -> None:
        super().__init__(scratch, {f"pass-{index:03d}.{_tag(leaf)}": leaf for leaf in leaves})
        self.block, self.layers, self.index = block, tuple(layers), index
        self.names = list(self.leaves)

    def whole(self) -> list[Path]:
        return [self.scratch.units / self.names[-1] / SUMS]


def _tag(leaf: Leaf) -> str:
    return f"leaf-{leaf.first:05d}-{leaf.last:05d}"


@PLACEMENTS.register("streamed")
class Streamed(Placement):
    """Embedding, every decoder block and head are on the device in their turn.

    Raises:
        InputError: a layer lies outside the decoder blocks.
    """

    holds_model = False

    def __init__(self, scratch: Scratch, source: CaptureSource) -> None:
        streamed = streamed_model(source.model, source.params.dtype)
        super().__init__(scratch, source, streamed.model)
        self.layers, self.width = read_layers(source.model.parent), streamed.width
        self.blocks = len(streamed.names)
        self.parts: list[StreamedPart] = []
        for block, layers in require_inside(streamed, self.layers).items():
            for part in layer_slices(layers, self.params.layers_per_pass):
                self.parts.append(StreamedPart(scratch, self.leaves, block, part, len(self.parts)))
        self.lowest = min(part.block for part in self.parts)
        self._steps = {BLOCKS: Step(try_blocks, (self.source.model, self.params.dtype))}
        for number in range(len(self.leaves)):
            self._steps |= self._forward(number) | self._backward(number)

    @staticmethod
    def fault(params: CaptureParams) -> str | None:
        if params.skip_nonfinite:
            return (
                "a sequence whose gradient breaks in an early block has been added to the sums of the later ones by then, so "
                "capture.placement = 'streamed' cannot leave it out. Set capture.skip_nonfinite: false."
            )
        return None

    @staticmethod
    def require(model: Path, layers: Sequence[LinearLayer], dtype: str) -> None:
        try:
            require_blocks(streamed_model(model, dtype), layers)
        finally:
            streamed_model.cache_clear()

    def units(self) -> dict[str, Unit]:
        return {name: step.unit for name, step in self._steps.items()}

    def free(self, name: str) -> None:
        """Hidden states, gradients and earlier sums go when all units that read them are done."""
        for read in self._steps[name].reads:
            if all(self.scratch.done(other) for other, step in self._steps.items() if read in step.reads):
                writer, file = read
                self.scratch.drop(writer, group_file(Path(file)).name)

    def disk(self) -> int:
        in_work = min(LEAVES_IN_WORK, current_engine().slots, len(self.leaves))
        longest = max(leaf.shards for leaf in self.leaves) * self.params.sequences_per_shard
        boundary = min(longest, self.sequences) * self.length * self.width * DTYPES[self.params.dtype].itemsize
        kept = kept_on_disk(self.layers, self.params, self.sequences, current_engine().slots)
        sums = [sums_bytes(part.layers, self.params) for part in self.parts]
        return kept + streamed_bytes(sums, len(self.leaves), self.blocks, in_work * boundary, self.params.draws)

    def _forward(self, number: int) -> "dict[str, Step]":
        """Embedding, blocks and head for one leaf."""
        source, tag = self._leaf(number), _tag(self.leaves[number])
        after = (BLOCKS, *self._last_units(number - LEAVES_IN_WORK))
        steps = {f"{tag}.embedded": Step(embed, (source,), after=after)}
        for block in range(self.blocks):
            before = self._entered(number, block)
            steps[f"{tag}.forward-{block:03d}"] = Step(forward, (source, block, self._at(before)), ((before, HIDDEN),))
        left = self._entered(number, self.blocks)
        return steps | {f"{tag}.head": Step(head, (source, self._at(left)), ((left, HIDDEN),))}

    def _backward(self, number: int) -> "dict[str, Step]":
        """Blocks from the last to the lowest that has a layer; of one with several parts the first hands the gradient down."""
        steps: dict[str, Step] = {}
        behind, tag = f"{_tag(self.leaves[number])}.head", _tag(self.leaves[number])
        for block in reversed(range(self.lowest, self.blocks)):
            parts = [part for part in self.parts if part.block == block]
            named: dict[str, StreamedPart | None] = {part.names[number]: part for part in parts}
            named = named or {f"{tag}.backward-{block:03d}": None}
            for name, part in named.items():
                steps[name] = self._backward_step(number, block, part, behind, name == next(iter(named)))
            behind = next(iter(named))
        return steps

    def _backward_step(self, number: int, block: int, part: StreamedPart | None, behind: str, first: bool) -> "Step":
        entered, scored = self._entered(number, block), f"{_tag(self.leaves[number])}.head"
        taken = BackwardPart(
            block, part.layers if part else (), part is not None and part.index == 0, first and block > self.lowest
        )
        earlier = part.names[number - 1] if part and number else None
        reads = [(entered, HIDDEN), (behind, GRADIENT)] + ([(earlier, SUMS)] if earlier else [])
        paths = self._at(entered), self._at(behind), self._at(scored), self._at(earlier) if earlier else None
        return Step(backward, (self._leaf(number), taken, *paths), tuple(reads), (scored,))

    def _leaf(self, number: int) -> LeafSource:
        return LeafSource(*self.source, self.leaves[number])

    def _entered(self, number: int, block: int) -> str:
        """The unit that writes what reaches a block."""
        tag = _tag(self.leaves[number])
        return f"{tag}.forward-{block - 1:03d}" if block else f"{tag}.embedded"

    def _last_units(self, number: int) -> list[str]:
        """The units of the lowest block of a leaf, if there is such a leaf."""
        return [part.names[number] for part in self.parts if part.block == self.lowest] if number >= 0 else []

    def _at(self, unit: str) -> Path:
        return self.scratch.units / unit


@dataclass(frozen=True)
class Step:
    """A unit, and which file of which units it reads that nobody needs for good."""

    work: Callable[..., None]
    arguments: tuple[Any, ...]
    reads: tuple[tuple[str, str], ...] = ()
    after: tuple[str, ...] = ()

    @property
    def unit(self) -> Unit:
        return Unit(self.work, self.arguments, tuple(dict.fromkeys([*self.after, *(name for name, _ in self.reads)])))


def streamed_bytes(sums: Sequence[int], leaves: int, blocks: int, boundary: int, draws: int) -> int:
    """Bytes of all sums and of what is handed on: K + 2 D boundaries S' T h, K of them on the way back with two gradients of each of D draws.

    Args:
        sums: of every part of the layers; of several leaves, those that are gone on from are there beside the new ones.
        boundary: bytes of one, of all leaves in work.
    """
    return sum(sums) + (LEAVES_IN_WORK * max(sums) if leaves > 1 else 0) + (blocks + 2 * draws) * boundary
