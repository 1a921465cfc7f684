"""Stage `capture`: the statistics of every linear layer over the calibration sequences, for every method at once.

One forward and backward pass per sequence gives, for every linear layer and in float32,

    Σ x xᵀ, Σ |x|                      over tokens, once for layers that read the same tensor
    Σ g gᵀ, g = Σ_c W_cᵀ d_c           over tokens, where several layers c read the same tensor (its cost: see below)
    Σ d dᵀ                             over tokens
    Σ G, Σ rows G∘G, Σ columns G∘G     over sequences, G = Σ_t d xᵀ the sequence's gradient (capture.gradients: sums)
    G ~ U Vᵀ of rank k, or G itself    per sequence (capture.gradients: sketch, exact)
    x and d                            at t positions of each sequence, drawn by capture.seed

(capture.placement: streamed makes the same sums with one decoder block in memory, see ``fisherfold.statistics.streamed_pass``) and
questions.parquet: what some knowledge questions ask of every layer, see ``fisherfold.statistics.knowledge``.

A unit is a leaf: capture.leaves runs of shards (times slices of the layers, if capture.layers_per_pass bounds the sums in memory). It adds
its sequences to sums that stay in memory, and makes them durable every few minutes. Leaves may be in work side by side; their sums are
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

from fisherfold.network.layers import LAYERS_FILE, write_layers
from fisherfold.run.errors import NumericalError
from fisherfold.run.files import digest_file, verify_output
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import gather_groups
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.knowledge import ANSWERS, TABLE, measure_questions
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.leaf import shard_group
from fisherfold.statistics.placement import PLACEMENTS, CaptureSource, Part, Placement
from fisherfold.statistics.shard import loaded_model
from fisherfold.statistics.stored_sums import SUMS
from fisherfold.statistics.streamed_placement import streamed_model


def run(workspace: Workspace, params: CaptureParams) -> None:
    """Capture the statistics of the prepared model on the calibration table.

    Raises:
        InputError: the table's vocabulary is not the model's, the model has no linear layers, or it does not fit
            the devices.
        NumericalError: a sequence's loss or gradient is not finite and capture.skip_nonfinite is off, or no
            sequence is finite.
        NotEnoughDisk: see `Placement.disk`.
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
            streamed_model.cache_clear()


def _capture(scratch: Scratch, model_folder: Path, table: Path, questions: Path | None, params: CaptureParams) -> None:
    placement = PLACEMENTS.lookup(params.placement)(scratch, CaptureSource(model_folder, table, params))
    scratch.require_disk(placement.disk())
    announce(
        "capture",
        f"{len(placement.layers)} layers, {placement.sequences} sequences of {placement.length} tokens, "
        f"{placement.leaves[-1].last + 1} shards, {len(placement.leaves)} leaves",
    )
    for name in scratch.run("leaves and their sums", placement.units()):
        placement.free(name)
    answers = {"questions": (model_folder, questions, params)} if questions else {}
    asked = scratch.map("knowledge questions" if answers else None, measure_questions, answers)
    _publish(scratch, placement, asked.get("questions"))


def _publish(scratch: Scratch, placement: Placement, asked: Path | None) -> None:
    """Publish the sums of every part of the layers and what is kept of every shard, by links."""
    parts, params = placement.parts, placement.params
    facts, shards = _gather_facts(params, placement.length, parts)
    with scratch.publish() as out:
        write_layers(out, placement.layers)
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


def _gather_facts(params: CaptureParams, length: int, parts: Sequence[Part]) -> tuple[dict, list[int]]:
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
        "draws": params.draws,
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
