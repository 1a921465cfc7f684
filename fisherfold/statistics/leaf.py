"""One leaf of the sums over the calibration sequences: the unit of work of stage `capture`.

A leaf is a run of shards that are added one after the other to sums that stay in memory. From time to time the sums become
durable (see ``fisherfold.run.savepoints``); the state is exact, so an interrupted leaf ends with the same bits.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fisherfold.network.layers import LinearLayer, input_embedding
from fisherfold.network.models import DTYPES
from fisherfold.run.errors import NumericalError
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import CaptureParams
from fisherfold.run.savepoints import SavepointPlace, Savepoints
from fisherfold.run.store import close_groups, offload_group, read_array
from fisherfold.run.tables import read_sequences
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS, Shapes
from fisherfold.statistics.kept import kept_shapes
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.shard import (
    NonFiniteBatch,
    Passing,
    WholePass,
    add_shard,
    explain,
    layer_slices,
    loaded_model,
)
from fisherfold.statistics.stored_sums import SUMS
from fisherfold.statistics.tree_sum import Leaf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTS_FILE = "leaf.json"


@dataclass
class LeafState:
    """How far a leaf has come.

    Attributes:
        sums: over its first shards.
        shards: losses and left out sequences of each of them.
        saved: how many of them are durable.
    """

    sums: ModelSums
    shards: list[dict[str, Any]] = field(default_factory=list)
    saved: int = 0


def capture_leaf(
    folder: Path, place: SavepointPlace, model_folder: Path, table: Path, params: CaptureParams, leaf: Leaf, part: int
) -> None:
    """Unit of work: sums over the sequences of one leaf, and what is kept of each sequence, for one slice of the layers.

    Writes statistics/, gradients/shard-… (with the sampled tokens; to shared storage if that is set) and leaf.json: by shard the
    losses and the sequences left out, and the layers that no gradient came to. The first slice writes the sampled positions,
    which are those of all.

    Raises:
        StoreError: shared storage is set and cannot be used.
        NumericalError: a sequence's loss or gradient is not finite, and capture.skip_nonfinite is off.
        InputError: the table does not fit the model, see `read_sequences`; or see `ModelSums.add`.
    """
    model, targets = loaded_model(model_folder, params.dtype)
    layers = layer_slices(targets, params.layers_per_pass)[part]
    ids = read_sequences(table, len(input_embedding(model)))
    shapes = kept_shapes(layers, params, ids.shape[1], with_positions=part == 0)
    points, left_out, passing = Savepoints(place, folder), dict[int, str](), WholePass(model, params)
    new_sums = partial(zero_sums, model, layers, params)
    state = _resume(points, new_sums())
    while len(state.shards) < leaf.shards:
        shard = leaf.first + len(state.shards)
        numbers = shard_sequences(shard, len(ids), params)
        if points.due() or left_out.keys() & set(numbers):
            _save(points, state)
        try:
            sequences = {s: ids[s] for s in numbers}
            state.shards.append(_add(folder, state.sums, params, shard, sequences, shapes, left_out, passing))
        except NonFiniteBatch as batch:
            if not params.skip_nonfinite:
                raise NumericalError(explain(table, batch.culprits)) from None
            left_out |= batch.culprits  # then once more without them, from sums that they have not touched
            state = _resume(points, new_sums())
    write_arrays(folder / SUMS, state.sums.arrays())
    facts = {"shards": state.shards, "unreached": state.sums.unreached()}
    (folder / FACTS_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def zero_sums(
    model: "PreTrainedModel",
    layers: Sequence[LinearLayer],
    params: CaptureParams,
    probe: Callable[[torch.Tensor], object] | None = None,
) -> ModelSums:
    """Sums over nothing yet, of what the parameters ask for."""
    form, dtype = GRADIENT_FORMS.lookup(params.gradients), DTYPES[params.token_dtype]
    kept = dtype if params.tokens_per_sequence else None
    return ModelSums(model, layers, form, params.sketch_rank, params.seed, kept, probe)


def shard_sequences(shard: int, sequences: int, params: CaptureParams) -> range:
    """Numbers of the sequences of one shard, of so many in the table."""
    first = shard * params.sequences_per_shard
    return range(first, min(first + params.sequences_per_shard, sequences))


def shard_group(folder: Path, shard: int) -> Path:
    """Where a leaf keeps the gradients and tokens of one shard."""
    return folder / "gradients" / f"shard-{shard:05d}"


def _add(
    folder: Path,
    sums: ModelSums,
    params: CaptureParams,
    shard: int,
    sequences: Mapping[int, torch.Tensor],
    shapes: Shapes,
    left_out: Mapping[int, str],
    passing: Passing,
) -> dict[str, Any]:
    """Add one shard without the sequences that are left out; its facts."""
    kept = {number: ids for number, ids in sequences.items() if number not in left_out}
    losses = add_shard(sums, shard_group(folder, shard), params, kept, shapes, f"shard {shard}, batch", passing)
    offload_group(shard_group(folder, shard))
    skipped = [{"sequence": number, "where": left_out[number]} for number in sequences if number in left_out]
    return {"losses": losses, "skipped": skipped}


def _save(points: Savepoints, state: LeafState) -> None:
    """Make the sums durable, if anything was added since they were."""
    if len(state.shards) == state.saved:
        return
    with points.save(len(state.shards)) as folder:
        write_arrays(folder / SUMS, state.sums.arrays())
        facts = {"shards": state.shards, "unreached": state.sums.unreached()}
        (folder / FACTS_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
    state.saved = len(state.shards)


def _resume(points: Savepoints, sums: ModelSums) -> LeafState:
    """The newest durable state of the leaf, in sums that are still zero."""
    folder = points.restore()
    if folder is None:
        return LeafState(sums)
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    sums.restore(partial(read_array, folder / SUMS), facts["unreached"])
    close_groups()  # the file may go, and would hold its disk
    return LeafState(sums, facts["shards"], len(facts["shards"]))
