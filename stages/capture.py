"""Stage `capture`: the statistics of every linear layer over the calibration sequences, for every method at once.

One forward and backward pass per sequence gives, for every linear layer and in float32,

    Σ x xᵀ, Σ |x|                      over tokens, once for layers that read the same tensor
    Σ g gᵀ, g = Σ_c W_cᵀ d_c           over tokens, where several layers c read the same tensor (its cost: see below)
    Σ d dᵀ                             over tokens
    Σ G, Σ rows G∘G, Σ columns G∘G     over sequences, G = Σ_t d xᵀ the sequence's gradient (capture.gradients: sums)
    G ~ U Vᵀ of rank k, or G itself    per sequence (capture.gradients: sketch, exact)
    x and d                            at t positions of each sequence, drawn by capture.seed

and questions.parquet: what some knowledge questions ask of every layer, see ``fisherfold.statistics.knowledge``.

A unit is a leaf: capture.leaves runs of shards (times slices of the layers, if capture.layers_per_pass bounds the sums in memory). It adds
its sequences to sums that stay in memory, and makes them durable once a minute or so. Leaves may be in work side by side; their sums are
added along a fixed tree. So neither memory nor the disk for sums grows with the sequences, and the bits depend neither on where
leaves are computed nor on how often they were interrupted.

Σ g gᵀ is the one quantity of FASC (METHODS: S_gg) that the others do not give: it holds the cross terms of q, k and v. As [m, m] of
the shared input it is a quarter of those cross terms (gate with up alone are [n, n]), and the backward pass makes g anyway.

Shapes: x [m] and d [n] at one token, G [n, m], U [n, k], V [m, k]; S sequences of T tokens, N tokens in all.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.network.layers import LAYERS_FILE, LinearLayer, input_embedding, write_layers
from fisherfold.network.models import DTYPES
from fisherfold.run.engine import Unit, current_engine
from fisherfold.run.errors import NumericalError
from fisherfold.run.files import digest_file, verify_output
from fisherfold.run.group_writer import group_file
from fisherfold.run.objects import store_url
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import gather_groups
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.kept import gradient_shapes, numbers_bytes, token_shapes
from fisherfold.statistics.knowledge import ANSWERS, TABLE, measure_questions
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.leaf import FACTS_FILE, capture_leaf, shard_group
from fisherfold.statistics.shard import layer_slices, loaded_model
from fisherfold.statistics.stored_sums import SUMS, sum_shapes
from fisherfold.statistics.tree_sum import Leaf, add_leaves, cut_leaves, portions


def run(workspace: Workspace, params: CaptureParams) -> None:
    """Capture the statistics of the prepared model on the calibration table.

    Raises:
        InputError: the table's vocabulary is not the model's, the model has no linear layers, or it does not fit
            the devices.
        NumericalError: a sequence's loss or gradient is not finite and capture.skip_nonfinite is off, or no
            sequence is finite.
        NotEnoughDisk: see `disk_bytes`.
        CorruptArtifact: the output of stage `prepare` is not whole.
    """
    table = workspace.table("calibration")
    questions = workspace.table("questions") if params.knowledge_questions else None
    questions = questions if questions and questions.exists() else None
    inputs = {
        "model": verify_output(workspace.out("prepare"), "model/"),
        "layers": verify_output(workspace.out("prepare"), LAYERS_FILE),
        "calibration": digest_file(table),
    }
    inputs |= {"questions": digest_file(questions)} if questions else {}
    with Scratch(workspace, "capture", params, inputs) as scratch:
        if scratch.republish():
            return
        try:
            _capture(scratch, workspace.model, table, questions, params)
        finally:
            loaded_model.cache_clear()


def _capture(scratch: Scratch, model_folder: Path, table: Path, questions: Path | None, params: CaptureParams) -> None:
    model, layers = loaded_model(model_folder, params.dtype)
    sequences, length = read_sequences(table, len(input_embedding(model))).shape
    shards = -(-sequences // params.sequences_per_shard)
    leaves, slices = cut_leaves(shards, params.leaves), layer_slices(layers, params.layers_per_pass)
    scratch.require_disk(disk_bytes(layers, params, sequences, current_engine().slots))
    announce(
        "capture",
        f"{len(layers)} layers, {sequences} sequences of {length} tokens, {shards} shards, {len(leaves)} leaves",
    )
    parts = [SlicePart(scratch, index, leaves, portions(sums_bytes(part, params))) for index, part in enumerate(slices)]
    source = (model_folder, table, params)
    units = {name: unit for part in parts for name, unit in part.units(source).items()}
    for name in scratch.run("leaves and their sums", units):
        for part in parts:
            part.drop_added(name)
    answers = {"questions": (model_folder, questions, params)} if questions else {}
    asked = scratch.map("knowledge questions" if answers else None, measure_questions, answers)
    _publish(scratch, layers, params, length, parts, asked.get("questions"))


class SlicePart:
    """The units of one slice of the layers: its leaves, and what adds up their sums.

    Args:
        scratch: of the stage.
        index: number of the slice.
        leaves: into which the shards are cut.
        portions: units that add up, if there is more than one leaf.
    """

    def __init__(self, scratch: Scratch, index: int, leaves: Sequence[Leaf], portions: int) -> None:
        self.scratch, self.index = scratch, index
        self.leaves = {f"pass-{index:03d}.leaf-{leaf.first:05d}-{leaf.last:05d}": leaf for leaf in leaves}
        self.sums = [f"pass-{index:03d}.sum-{number:05d}" for number in range(portions)] if len(leaves) > 1 else []

    def units(self, source: tuple[Path, Path, CaptureParams]) -> dict[str, Unit]:
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
                self.scratch.drop(leaf, group_file(Path(SUMS)).name)

    def whole(self) -> list[Path]:
        """The groups that hold the sums over all leaves."""
        return [self.scratch.units / name / SUMS for name in self.sums or self.leaves]

    def facts(self) -> list[dict]:
        """leaf.json of every leaf."""
        return [
            json.loads((self.scratch.units / name / FACTS_FILE).read_text(encoding="utf-8")) for name in self.leaves
        ]

    def kept(self, shard: int) -> Path:
        """The group of what is kept of the sequences of one shard."""
        name = next(name for name, leaf in self.leaves.items() if leaf.first <= shard <= leaf.last)
        return shard_group(self.scratch.units / name, shard)


def disk_bytes(layers: Sequence[LinearLayer], params: CaptureParams, sequences: int, at_once: int = 1) -> int:
    """Bytes that the stage holds at most: all that is kept of sequences, all sums, and savepoints of leaves in work.

    W = `at_once` units are in work at a time, L leaves of each slice of the layers.

        4 S Σ_layers [k (n + m) + 2]     sketches; 4 S Σ_layers [n m + 1] for exact gradients, 4 S Σ_layers 1 for sums alone
        S t [b (Σ_groups m + Σ_layers n) + 4]     tokens of b bytes a number, and their positions
        2 P [Σ_groups (m² + m) + Σ_layers (n² + n)],   P = 1 + W (+ L, if L > 1)     half of each symmetric sum; `sums_bytes`

    Of a group of several layers m² + m counts twice; with gradients 4 P Σ_layers (n m + n + m) comes to it. Of several slices, P counts
    for the largest and 1 for the others. With shared storage, S is that of W shards.
    """
    form = GRADIENT_FORMS.lookup(params.gradients)
    of_sequence = numbers_bytes(gradient_shapes(layers, form, params.sketch_rank)) if form else 0
    sums = [sums_bytes(part, params) for part in layer_slices(layers, params.layers_per_pass)]
    leaves = len(cut_leaves(-(-sequences // params.sequences_per_shard), params.leaves))
    here = min(sequences, at_once * params.sequences_per_shard) if store_url() else sequences
    more = at_once + (leaves if leaves > 1 else 0)
    return here * (of_sequence + _token_bytes(layers, params)) + sum(sums) + more * max(sums)


def sums_bytes(layers: Sequence[LinearLayer], params: CaptureParams) -> int:
    """Bytes of all sums of some layers."""
    return numbers_bytes(sum_shapes(layers, params.gradients != "none"))


def _token_bytes(layers: Sequence[LinearLayer], params: CaptureParams) -> int:
    shapes = token_shapes(layers, params.tokens_per_sequence)
    return numbers_bytes(shapes) * DTYPES[params.token_dtype].itemsize // 4 + 4 * params.tokens_per_sequence


def _publish(
    scratch: Scratch,
    layers: Sequence[LinearLayer],
    params: CaptureParams,
    length: int,
    parts: Sequence[SlicePart],
    asked: Path | None,
) -> None:
    """Publish the sums of every slice of layers and what is kept of every shard, by links."""
    facts, shards = _gather_facts(params, length, parts)
    with scratch.publish() as out:
        write_layers(out, layers)
        (out / "capture.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        gather_groups(out / SUMS, [group for part in parts for group in part.whole()])
        for shard in shards:
            gather_groups(shard_group(out, shard), [part.kept(shard) for part in parts])
        rows = pq.read_table(asked / TABLE).to_pylist() if asked else []
        if rows and params.gradients != "none":
            _add_text_mass(Statistics(out), rows)
        pq.write_table(pa.Table.from_pylist(rows, ANSWERS), out / TABLE)


def _add_text_mass(statistics: Statistics, rows: list[dict]) -> None:
    """Mean ‖G_s‖_F² of every layer over the calibration sequences."""
    layers = {layer.name: layer for layer in statistics.layers}
    for row in rows:
        squares = statistics.fisher_inputs(layers[row["module"]])
        row["text_mass"] = squares.double().sum().item() / statistics.sequences


def _gather_facts(params: CaptureParams, length: int, parts: Sequence[SlicePart]) -> tuple[dict, list[int]]:
    """capture.json, and the numbers of the shards of which anything is kept."""
    found = [part.facts() for part in parts]
    by_slice = [[shard for leaf in leaves for shard in leaf["shards"]] for leaves in found]
    first = by_slice[0]
    _check_agreement(by_slice)
    losses = [loss for shard in first for loss in shard["losses"]]
    skipped = [sequence for shard in first for sequence in shard["skipped"]]
    unreached = [name for leaves in found for name in _in_all([leaf["unreached"] for leaf in leaves])]
    if not losses:
        raise NumericalError(f"Stage 'capture': none of {len(skipped)} sequences is finite, the first at {skipped[0]}.")
    for what, names in (
        ("skipped sequences that are not finite", skipped),
        ("layers that no gradient came to", unreached),
    ):
        if names:
            announce("capture", f"{len(names)} {what}: {names}")
    keeps = params.gradients != "none" or params.tokens_per_sequence > 0
    shards = [number for number, shard in enumerate(first) if shard["losses"] and keeps]
    facts = {
        "sequences": len(losses),
        "tokens": len(losses) * length,
        "sequence_length": length,
        "gradients": params.gradients,
        "labels": params.labels,
        "seed": params.seed,
        "sketch_rank": params.sketch_rank,
        "tokens_per_sequence": min(params.tokens_per_sequence, length),
        "skipped": skipped,
        "unreached": unreached,
        "shards": [f"shard-{number:05d}" for number in shards],
        "loss": sum(losses) / len(losses),
    }
    return facts, shards


def _in_all(lists: Sequence[list[str]]) -> list[str]:
    return [name for name in lists[0] if all(name in names for names in lists)]


def _check_agreement(by_slice: list[list[dict]]) -> None:
    """Refuse if slices of layers left out different sequences: their sums would not be of the same data."""
    skipped = [[sequence["sequence"] for shard in shards for sequence in shard["skipped"]] for shards in by_slice]
    if any(sequences != skipped[0] for sequences in skipped):
        raise NumericalError(
            f"Stage 'capture': passes over different layers left out different sequences ({skipped}). "
            "Set capture.layers_per_pass to null, so that all layers are seen in one pass."
        )
