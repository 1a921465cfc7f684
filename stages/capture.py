"""Stage `capture`: the statistics of every linear layer over the calibration sequences, for every method at once.

One forward and backward pass per sequence gives, for every linear layer and in float32,

    Σ x xᵀ, Σ |x|                      over tokens, once for layers that read the same tensor
    Σ g gᵀ, g = Σ_c W_cᵀ d_c           over tokens, where several layers c read the same tensor (its cost: see below)
    Σ d dᵀ                             over tokens
    Σ G, Σ rows G∘G, Σ columns G∘G     over sequences, G = Σ_t d xᵀ the sequence's gradient
    G ~ U Vᵀ of rank k, or G itself    per sequence
    x and d                            at t positions of each sequence, drawn by capture.seed

and questions.parquet: what some knowledge questions ask of every layer, see ``fisherfold.statistics.knowledge``.

A unit is a shard of sequences (times a slice of the layers, if capture.layers_per_pass bounds the sums in memory). Its sums
are leaves of a fixed tree of sums, added up as soon as both terms are there, so neither memory nor the disk for sums grows
with the sequences, and the bits depend neither on how many shards are in work at once nor on which of them ends first.

Σ g gᵀ is the one quantity of FASC (METHODS: S_gg) that the others do not give: it holds the cross terms of q, k and v. As [m, m] of
the shared input it is a quarter of those cross terms (gate with up alone are [n, n]), and the backward pass makes g anyway.

Shapes: x [m] and d [n] at one token, G [n, m], U [n, k], V [m, k]; S sequences of T tokens, N tokens in all.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.network.layers import LinearLayer, by_group, write_layers
from fisherfold.network.models import DTYPES
from fisherfold.run.engine import Unit, current_engine
from fisherfold.run.errors import NumericalError
from fisherfold.run.files import digest_file, verify_output
from fisherfold.run.objects import store_url
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import gather_groups, group_file, read_array
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.knowledge import ANSWERS, TABLE, ask
from fisherfold.statistics.layer_sums import GRADIENT_FORMS
from fisherfold.statistics.shard import (
    FACTS_FILE,
    capture_shard,
    gradient_shapes,
    layer_slices,
    loaded_model,
    numbers_bytes,
    token_shapes,
    vocabulary,
)
from fisherfold.statistics.tree_sum import Part, Step, add_parts, parts_at_once, summation_tree


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
    inputs = {"model": verify_output(workspace.out("prepare"), "model/"), "calibration": digest_file(table)}
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
    sequences, length = read_sequences(table, vocabulary(model)).shape
    shards = -(-sequences // params.sequences_per_shard)
    slices = layer_slices(layers, params.layers_per_pass)
    at_once = current_engine().slots
    scratch.require_disk(disk_bytes(layers, params, sequences, at_once))
    announce("capture", f"{len(layers)} layers, {sequences} sequences of {length} tokens, {shards} shards")
    steps = [(index, step) for index in range(len(slices)) for step in summation_tree(shards, at_once)]
    source = (model_folder, table, params)
    units = {_unit_name(index, step.part): _unit(scratch.units, index, step, source) for index, step in steps}
    terms = {_unit_name(index, step.part): [_unit_name(index, term) for term in step.terms] for index, step in steps}
    for name in scratch.run("shards and their sums", units):
        for term in terms[name]:  # now part of this sum
            scratch.drop(term, group_file(Path("statistics")).name)
    answers = {"questions": (model_folder, questions, params)} if questions else {}
    asked = scratch.map("knowledge questions" if answers else None, ask, answers)
    roots = [(index, steps[-1][1].part) for index in range(len(slices))]
    _publish(scratch, layers, params, length, roots, asked.get("questions"))


def _unit(folder: Path, index: int, step: Step, source: tuple[Path, Path, CaptureParams]) -> Unit:
    """One step of the tree of one slice of layers: capture a shard, or add two parts."""
    after = tuple(_unit_name(index, part) for part in step.after)
    if not step.terms:
        return Unit(capture_shard, (*source, step.part.first, index), after)
    return Unit(add_statistics, tuple(folder / _unit_name(index, term) for term in step.terms), after)


def _unit_name(index: int, part: Part) -> str:
    shards = f"shard-{part.first:05d}" if part.shards == 1 else f"sum-{part.first:05d}-{part.last:05d}"
    return f"pass-{index:03d}.{shards}"


def add_statistics(folder: Path, left: Path, right: Path) -> None:
    """Unit of work: the sums of two parts, added."""
    add_parts(folder / "statistics", left / "statistics", right / "statistics")


def disk_bytes(layers: Sequence[LinearLayer], params: CaptureParams, sequences: int, at_once: int = 1) -> int:
    """Bytes that the stage holds at most: all gradients, and parts of the sums until they are added up.

    W = `at_once` units are in work at a time.

        4 S Σ_layers [k (n + m) + 2]     sketches; 4 S Σ_layers [n m + 1] for exact gradients
        S t [b (Σ_groups m + Σ_layers n) + 4]     tokens of b bytes a number, and their positions
        4 P [Σ_groups (m² + m) + Σ_layers (n² + n m + n + m)],   P = ⌊log₂ shards⌋ + 2 W (1 for one shard)

    m² twice for a group of several layers, n m + n + m only if gradients are captured. Of several slices of layers, P counts for the
    largest and 1 for the others while they are captured, and everything is there twice when they are joined. With shared storage,
    S is that of W shards and only the sums are joined here.
    """
    form = GRADIENT_FORMS.lookup(params.gradients)
    of_sequence = numbers_bytes(gradient_shapes(layers, form, params.sketch_rank)) if form else 0
    sums = [
        4 * sum(_group_numbers(group, form is not None) for group in by_group(part).values())
        for part in layer_slices(layers, params.layers_per_pass)
    ]
    parts = parts_at_once(-(-sequences // params.sequences_per_shard), at_once)
    here = min(sequences, at_once * params.sequences_per_shard) if store_url() else sequences
    gradients = here * (of_sequence + _token_bytes(layers, params))
    joined = sum(sums) + (0 if store_url() else gradients)
    return gradients + sum(sums) + max((parts - 1) * max(sums), joined if len(sums) > 1 else 0)


def _token_bytes(layers: Sequence[LinearLayer], params: CaptureParams) -> int:
    shapes = token_shapes(layers, params.tokens_per_sequence)
    return numbers_bytes(shapes) * DTYPES[params.token_dtype].itemsize // 4 + 4 * params.tokens_per_sequence


def _group_numbers(group: Sequence[LinearLayer], gradients: bool) -> int:
    m = group[0].inputs
    of_input = m * m * (2 if len(group) > 1 else 1) + m
    outputs = [layer.outputs for layer in group]
    return of_input + sum(n * n + (n * m + n + m if gradients else 0) for n in outputs)


def _publish(
    scratch: Scratch,
    layers: Sequence[LinearLayer],
    params: CaptureParams,
    length: int,
    roots: list[tuple[int, Part]],
    asked: Path | None,
) -> None:
    """Publish the sums of every slice of layers and the gradients of every shard, by links."""
    facts, shards = _gather_facts(scratch, params, length, roots)
    with scratch.publish() as out:
        write_layers(out, layers)
        (out / "capture.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        gather_groups(out / "statistics", [scratch.units / _unit_name(*root) / "statistics" for root in roots])
        for name, part in shards.items():
            units = [scratch.units / _unit_name(index, part) for index, _ in roots]
            gather_groups(out / "gradients" / name, [unit / "gradients" for unit in units])
        rows = pq.read_table(asked / TABLE).to_pylist() if asked else []
        for row in rows:
            row["text_mass"] = _text_mass(out, row["module"], facts)
        pq.write_table(pa.Table.from_pylist(rows, ANSWERS), out / TABLE)


def _text_mass(out: Path, module: str, facts: dict) -> float | None:
    """Mean ‖G_s‖_F² of a layer over the calibration sequences."""
    if facts["gradients"] == "none":
        return None
    return read_array(out / "statistics", f"{module}/fisher_inputs").double().sum().item() / facts["sequences"]


def _gather_facts(
    scratch: Scratch, params: CaptureParams, length: int, roots: list[tuple[int, Part]]
) -> tuple[dict, dict[str, Part]]:
    """capture.json, and the shards that have gradients by the name they are published under."""
    whole = roots[0][1]
    parts = [Part(shard, shard) for shard in range(whole.shards)]
    by_slice = [[_shard_facts(scratch, index, part) for part in parts] for index, _ in roots]
    first = by_slice[0]
    _check_agreement(by_slice)
    losses = [loss for shard in first for loss in shard["losses"]]
    skipped = [sequence for shard in first for sequence in shard["skipped"]]
    unreached = [name for shards in by_slice for name in _in_all([shard["unreached"] for shard in shards])]
    if not losses:
        raise NumericalError(f"Stage 'capture': none of {len(skipped)} sequences is finite, the first at {skipped[0]}.")
    for what, names in (
        ("skipped sequences that are not finite", skipped),
        ("layers that no gradient came to", unreached),
    ):
        if names:
            announce("capture", f"{len(names)} {what}: {names}")
    keeps = params.gradients != "none" or params.tokens_per_sequence > 0
    kept = [part for part, shard in zip(parts, first) if shard["losses"] and keeps]
    shards = {f"shard-{part.first:05d}": part for part in kept}
    facts = {
        "sequences": len(losses),
        "tokens": len(losses) * length,
        "sequence_length": length,
        "gradients": params.gradients,
        "sketch_rank": params.sketch_rank,
        "tokens_per_sequence": min(params.tokens_per_sequence, length),
        "skipped": skipped,
        "unreached": unreached,
        "shards": list(shards),
        "loss": sum(losses) / len(losses),
    }
    return facts, shards


def _shard_facts(scratch: Scratch, index: int, part: Part) -> dict:
    return json.loads((scratch.units / _unit_name(index, part) / FACTS_FILE).read_text(encoding="utf-8"))


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
