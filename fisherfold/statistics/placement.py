"""Where the model is while stage `capture` measures it, chosen by ``capture.placement``: the units of the stage, and the disk that they hold.

Shapes: n outputs and m inputs of a layer, k sketch rank; S sequences, t sampled tokens of each.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fisherfold.network.labels import count_draws
from fisherfold.network.layers import LinearLayer, input_embedding
from fisherfold.network.models import DTYPES
from fisherfold.run.engine import Unit, current_engine
from fisherfold.run.errors import InputError
from fisherfold.run.group_writer import group_file
from fisherfold.run.objects import store_url
from fisherfold.run.params import CaptureParams
from fisherfold.run.registry import Registry
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import read_sequences
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.kept import gradient_shapes, numbers_bytes, token_shapes
from fisherfold.statistics.leaf import FACTS_FILE, capture_leaf, shard_group
from fisherfold.statistics.shard import layer_slices, loaded_model
from fisherfold.statistics.stored_sums import SUMS, sum_shapes
from fisherfold.statistics.tree_sum import Leaf, add_leaves, cut_leaves, portions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CaptureSource(NamedTuple):
    """What the stage measures: the folder of the prepared model, the table of sequences, and how."""

    model: Path
    table: Path
    params: CaptureParams


class Part(ABC):
    """The statistics of some layers, over all sequences, and where they are once its units are done.

    Attributes:
        leaves: by the name of the unit that takes them.
    """

    def __init__(self, scratch: Scratch, leaves: Mapping[str, Leaf]) -> None:
        self.scratch, self.leaves = scratch, dict(leaves)

    @abstractmethod
    def whole(self) -> list[Path]:
        """The groups that hold the sums over all leaves."""

    def facts(self) -> list[dict[str, Any]]:
        """leaf.json of every leaf."""
        return [
            json.loads((self.scratch.units / name / FACTS_FILE).read_text(encoding="utf-8")) for name in self.leaves
        ]

    def kept(self, shard: int) -> Path:
        """The group of what is kept of the sequences of one shard."""
        name = next(name for name, leaf in self.leaves.items() if leaf.first <= shard <= leaf.last)
        return shard_group(self.scratch.units / name, shard)

    def drop(self, name: str) -> None:
        """Free the disk of the sums that one of the part's units has written."""
        self.scratch.drop(name, group_file(Path(SUMS)).name)


class SlicePart(Part):
    """One slice of the layers: its leaves, and what adds up their sums.

    Args:
        scratch: of the stage.
        index: number of the slice.
        leaves: into which the shards are cut.
        portions: units that add up, if there is more than one leaf.
    """

    def __init__(self, scratch: Scratch, index: int, leaves: Sequence[Leaf], portions: int) -> None:
        super().__init__(scratch, {f"pass-{index:03d}.leaf-{leaf.first:05d}-{leaf.last:05d}": leaf for leaf in leaves})
        self.index = index
        self.sums = [f"pass-{index:03d}.sum-{number:05d}" for number in range(portions)] if len(leaves) > 1 else []

    def units(self, source: CaptureSource) -> dict[str, Unit]:
        """All of them, leaves first."""
        made = {
            name: Unit(capture_leaf, (self.scratch.savepoints(name), *source, leaf, self.index))
            for name, leaf in self.leaves.items()
        }
        folders = tuple(self.scratch.units / name for name in self.leaves)
        for number, name in enumerate(self.sums):
            made[name] = Unit(add_leaves, (SUMS, folders, number, len(self.sums)), tuple(self.leaves))
        return made

    def drop_added(self, name: str) -> None:
        """Free the disk of the leaves' sums when the last of the units that add them up, perhaps `name`, is done."""
        if name in self.sums and all(map(self.scratch.done, self.sums)):
            for leaf in self.leaves:
                self.drop(leaf)

    def whole(self) -> list[Path]:
        return [self.scratch.units / name / SUMS for name in self.sums or self.leaves]


class Placement(ABC):
    """The units of stage `capture`.

    Attributes:
        layers: whose statistics are taken.
        parts: of these layers.
        sequences, length: S and T of the table.
        params: of the stage, the draws of labels counted.
        holds_model: whether the whole model is in memory.
    """

    holds_model: bool
    layers: Sequence[LinearLayer]
    parts: Sequence[Part]

    def __init__(self, scratch: Scratch, source: CaptureSource, model: "PreTrainedModel") -> None:
        if fault := self.fault(source.params):
            raise InputError(f"Stage 'capture': {fault}")
        self.sequences, self.length = read_sequences(source.table, len(input_embedding(model))).shape
        self.params = count_draws(source.params, self.sequences * self.length)
        self.scratch, self.source = scratch, source._replace(params=self.params)
        self.leaves = cut_leaves(-(-self.sequences // self.params.sequences_per_shard), self.params.leaves)

    @staticmethod
    def fault(params: CaptureParams) -> str | None:
        """What of the other parameters the placement cannot do, and what to set; None if it can do all."""
        return None

    @staticmethod
    def require(model: Path, layers: Sequence[LinearLayer], dtype: str) -> None:
        """Refuse a prepared model that cannot be placed so.

        Raises:
            InputError: says why.
        """
        return

    @abstractmethod
    def units(self) -> dict[str, Unit]:
        """All units, in the order of one worker."""

    @abstractmethod
    def free(self, name: str) -> None:
        """Free the disk of what nobody reads any more now that a unit is done."""

    @abstractmethod
    def disk(self) -> int:
        """Bytes that the stage holds at most."""


PLACEMENTS: Registry[type[Placement]] = Registry("capture.placement")
"""By capture.placement: a class, made from the stage's scratch folder and its source."""


@PLACEMENTS.register("whole")
class Whole(Placement):
    """The whole model is on the device (or, with FISHERFOLD_DEVICE=auto, spread over the node's) and runs forward and backward at once."""

    holds_model = True

    def __init__(self, scratch: Scratch, source: CaptureSource) -> None:
        model, self.layers = loaded_model(source.model, source.params.dtype)
        super().__init__(scratch, source, model)
        slices = layer_slices(self.layers, self.params.layers_per_pass)
        self.parts: list[SlicePart] = [
            SlicePart(scratch, index, self.leaves, portions(sums_bytes(part, self.params)))
            for index, part in enumerate(slices)
        ]

    def units(self) -> dict[str, Unit]:
        return {name: unit for part in self.parts for name, unit in part.units(self.source).items()}

    def free(self, name: str) -> None:
        for part in self.parts:
            part.drop_added(name)

    def disk(self) -> int:
        return disk_bytes(self.layers, self.params, self.sequences, current_engine().slots)


def disk_bytes(layers: Sequence[LinearLayer], params: CaptureParams, sequences: int, at_once: int = 1) -> int:
    """Bytes that the stage holds at most with the whole model: all that is kept of sequences, all sums, and savepoints of leaves in work.

    W = `at_once` units are in work at a time, L leaves of each slice of the layers.

        4 S Σ_layers [k (n + m) + 2]     sketches; 4 S Σ_layers [n m + 1] for exact gradients, 4 S Σ_layers 1 for sums alone
        S t [b (Σ_groups m + Σ_layers n) + 4]     tokens of b bytes a number, and their positions
        2 P [Σ_groups (m² + m) + Σ_layers (n² + n)],   P = 1 + W (+ L, if L > 1)     half of each symmetric sum; `sums_bytes`

    Of a group of several layers m² + m counts twice; with gradients 4 P Σ_layers (n m + n + m) comes to it. Of several slices, P counts
    for the largest and 1 for the others. With shared storage, S is that of W shards.
    """
    sums = [sums_bytes(part, params) for part in layer_slices(layers, params.layers_per_pass)]
    leaves = len(cut_leaves(-(-sequences // params.sequences_per_shard), params.leaves))
    more = at_once + (leaves if leaves > 1 else 0)
    return kept_on_disk(layers, params, sequences, at_once) + sum(sums) + more * max(sums)


def kept_on_disk(layers: Sequence[LinearLayer], params: CaptureParams, sequences: int, at_once: int) -> int:
    """Bytes of all that is kept of sequences; see `disk_bytes`."""
    form = GRADIENT_FORMS.lookup(params.gradients)
    of_sequence = numbers_bytes(gradient_shapes(layers, form, params.sketch_rank)) if form else 0
    here = min(sequences, at_once * params.sequences_per_shard) if store_url() else sequences
    return here * (of_sequence + _token_bytes(layers, params))


def sums_bytes(layers: Sequence[LinearLayer], params: CaptureParams) -> int:
    """Bytes of all sums of some layers."""
    return numbers_bytes(sum_shapes(layers, params.gradients != "none"))


def _token_bytes(layers: Sequence[LinearLayer], params: CaptureParams) -> int:
    shapes = token_shapes(layers, params.tokens_per_sequence)
    return numbers_bytes(shapes) * DTYPES[params.token_dtype].itemsize // 4 + 4 * params.tokens_per_sequence
