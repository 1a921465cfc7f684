"""One shard of sequences: the unit of work of stage `capture`.

Shapes: S sequences of T tokens in the shard, k sketch rank, n outputs and m inputs of a layer.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import LinearLayer, by_group, find_layers, forward_hooks, linear_modules
from fisherfold.network.models import DTYPES, load_model
from fisherfold.network.weight_check import check_weights
from fisherfold.run.errors import InputError, NumericalError
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import track_lines
from fisherfold.run.store import GroupWriter, RowWriter, offload_group, write_arrays
from fisherfold.run.tables import read_sequences, read_table
from fisherfold.statistics.layer_sums import GRADIENT_FORMS, GradientForm, ModelSums, Shapes
from fisherfold.statistics.token_sample import sample_positions

HELD_BYTES = 256 * 2**20  # of sequences' gradients in memory before they are written
FACTS_FILE = "shard.json"


@lru_cache(maxsize=1)
def loaded_model(folder: Path, dtype: str) -> tuple[PreTrainedModel, tuple[LinearLayer, ...]]:
    """The model and its layers, loaded once a process.

    Raises:
        InputError: some weights did not fit the devices and were left on the disk.
        NumericalError: a weight is not finite or beyond all measure; see `check_weights`.
    """
    model = load_model(folder, DTYPES[dtype])
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "Stage 'capture': the model does not fit the memory of the chosen devices, and gradients cannot flow through "
            "weights that were left on the disk. Set capture.dtype: bfloat16, or give it more devices."
        )
    check_weights(model)
    return model, tuple(find_layers(model))


def vocabulary(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return model.get_input_embeddings().weight.shape[0]


def layer_slices(layers: Sequence[LinearLayer], layers_per_pass: int | None) -> list[list[LinearLayer]]:
    """Layers in slices of at most `layers_per_pass` (all in one, if None); groups stay whole, even a larger one."""
    slices: list[list[LinearLayer]] = [[]]
    for group in by_group(layers).values():
        if slices[-1] and layers_per_pass is not None and len(slices[-1]) + len(group) > layers_per_pass:
            slices.append([])
        slices[-1] += group
    return slices


def capture_shard(folder: Path, model_folder: Path, table: Path, params: CaptureParams, shard: int, part: int) -> None:
    """Unit of work: sums over the sequences of one shard and their gradients, for one slice of the layers.

    Writes statistics/, gradients/ (with the sampled tokens; to shared storage if that is set) and shard.json: the losses, the
    sequences left out and the layers that no gradient came to. The first slice writes the sampled positions, which are those of all.

    Raises:
        StoreError: shared storage is set and cannot be used.
        NumericalError: a sequence's loss or gradient is not finite, and capture.skip_nonfinite is off.
        InputError: the table does not fit the model, see `read_sequences`; or see `ModelSums.add`.
    """
    model, layers = loaded_model(model_folder, params.dtype)
    layers = layer_slices(layers, params.layers_per_pass)[part]
    first = shard * params.sequences_per_shard
    ids = read_sequences(table, vocabulary(model))[first : first + params.sequences_per_shard]
    shapes = kept_shapes(layers, params, ids.shape[1], with_positions=part == 0)
    left_out: dict[int, str] = {}
    while True:
        kept = [s for s in range(len(ids)) if s not in left_out]
        numbered = {first + s: ids[s] for s in kept}
        try:
            sums, losses = _sum_up(
                folder / "gradients", model, layers, params, numbered, shapes, f"shard {shard}, batch"
            )
            break
        except NonFiniteBatch as batch:
            found = {kept[position]: where for position, where in batch.culprits.items()}
        left_out |= found  # then once more without them: what they touched cannot be cleaned
        if not params.skip_nonfinite:
            raise NumericalError(_explain(table, {first + s: where for s, where in found.items()}))
    write_arrays(folder / "statistics", sums.arrays())
    offload_group(folder / "gradients")
    skipped = [{"sequence": first + s, "where": left_out[s]} for s in sorted(left_out)]
    facts = {"losses": losses, "skipped": skipped, "unreached": sums.unreached()}
    (folder / FACTS_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


class NonFiniteBatch(Exception):
    """Some sequences of a batch have a loss or gradient that is not finite.

    Attributes:
        culprits: by position of the sequence, where it was seen first.
    """

    def __init__(self, culprits: dict[int, str]) -> None:
        super().__init__(culprits)
        self.culprits = culprits


def _sum_up(
    folder: Path,
    model: PreTrainedModel,
    layers: list[LinearLayer],
    params: CaptureParams,
    sequences: Mapping[int, torch.Tensor],
    shapes: Shapes,
    doing: str,
) -> tuple[ModelSums, list[float]]:
    """Sums over sequences [T], by their number in the table, and their losses; what is kept of each is written to `folder`.

    Raises:
        NonFiniteBatch: nothing of this can be used.
    """
    form = GRADIENT_FORMS.lookup(params.gradients)
    token_dtype = DTYPES[params.token_dtype] if params.tokens_per_sequence else None
    sums = ModelSums(model, layers, form, params.sketch_rank, params.seed, token_dtype)
    writer = None
    if shapes and sequences:
        writer = GradientWriter(folder, shapes, len(sequences), params.batch_size, kept_dtypes(shapes, params))
    losses: list[float] = []
    numbers = list(sequences)
    batches = [numbers[low : low + params.batch_size] for low in range(0, len(numbers), params.batch_size)]
    for batch in track_lines("capture", doing, batches, len(batches)):
        ids = torch.stack([sequences[number] for number in batch])
        positions = sample_positions(batch, ids.shape[1], params.tokens_per_sequence, params.seed)
        losses += _add_batch(sums, ids, positions, len(losses))
        if writer:
            writer.after_batch(sums)
    if writer:
        writer.close(sums)
    return sums, losses


def _add_batch(sums: ModelSums, ids: torch.Tensor, positions: torch.Tensor, place: int) -> list[float]:
    """The losses of a batch [B, T] whose first sequence has this place in the shard, after adding it."""
    result = sums.add(ids, positions)
    if not (result.finite.all() and sums.finite()):
        raise NonFiniteBatch({place + s: where for s, where in _culprits(sums.model, ids).items()})
    return result.losses.tolist()


class GradientWriter:
    """Writes sequences' gradients and tokens as arrays [S, ...] of one group, at most about HELD_BYTES of them in memory.

    Args:
        folder: the group; made anew.
        shapes: of what is kept of one sequence, by name; one number per sequence is held to the end. What `ModelSums` has
            besides is left out.
        sequences: S.
        batch_size: sequences of a batch.
        dtypes: of what is not float32.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Shapes,
        sequences: int,
        batch_size: int,
        dtypes: Mapping[str, torch.dtype] = {},
    ) -> None:
        self._group = GroupWriter(folder)
        self._batches_held = batches_held(shapes, sequences, batch_size)
        whole = {name: (sequences, *shape) for name, shape in shapes.items() if shape}
        self._rows = RowWriter(self._group, whole, rows_per_chunk(shapes, sequences, batch_size), dtypes)
        self._shapes = shapes
        self._scalars: dict[str, list[torch.Tensor]] = {name: [] for name, shape in shapes.items() if not shape}
        self._batches = 0

    def after_batch(self, sums: ModelSums) -> None:
        """Write what `sums` holds if that is enough."""
        self._batches += 1
        if self._batches % self._batches_held == 0:
            self._write(sums)

    def close(self, sums: ModelSums) -> None:
        """Write all that is left."""
        self._write(sums)
        for name, parts in self._scalars.items():
            self._group.write(name, torch.cat(parts))
        self._group.close()

    def _write(self, sums: ModelSums) -> None:
        for name, rows in sums.take_gradients():
            if name in self._scalars:
                self._scalars[name].append(rows)
            elif name in self._shapes:
                self._rows.append(name, rows)


def batches_held(shapes: Shapes, sequences: int, batch_size: int) -> int:
    """Batches whose gradients are held before they are written: equal parts of a shard of at most about HELD_BYTES each."""
    batches = -(-sequences // batch_size)
    parts = -(-batches // max(1, HELD_BYTES // (batch_size * numbers_bytes(shapes))))
    return -(-batches // parts)


def rows_per_chunk(shapes: Shapes, sequences: int, batch_size: int) -> int:
    """Sequences in one chunk of a shard's gradients; the last chunk is stored in full, however few are left for it."""
    return min(sequences, batches_held(shapes, sequences, batch_size) * batch_size)


def gradient_shapes(layers: Sequence[LinearLayer], form: type[GradientForm], rank: int) -> Shapes:
    """Shapes of everything that is kept of one sequence, by name."""
    return {
        f"{layer.name}/{kind}": shape
        for layer in layers
        for kind, shape in {**form.shapes(layer, rank), "norm": ()}.items()
    }


def token_shapes(layers: Sequence[LinearLayer], tokens: int) -> Shapes:
    """Shapes of the sampled tokens of one sequence, by name, without their positions [t]."""
    if not tokens:
        return {}
    inputs = {f"{layer.name}/x": (tokens, layer.inputs) for layer in layers if layer.group == layer.name}
    return inputs | {f"{layer.name}/d": (tokens, layer.outputs) for layer in layers}


def kept_shapes(layers: Sequence[LinearLayer], params: CaptureParams, length: int, with_positions: bool) -> Shapes:
    """Shapes of everything that is kept of one sequence of T = `length` tokens, by name."""
    form = GRADIENT_FORMS.lookup(params.gradients)
    tokens = min(params.tokens_per_sequence, length)
    shapes = gradient_shapes(layers, form, params.sketch_rank) if form else {}
    positions = {"positions": (tokens,)} if tokens and with_positions else {}
    return shapes | token_shapes(layers, tokens) | positions


def kept_dtypes(shapes: Shapes, params: CaptureParams) -> dict[str, torch.dtype]:
    """Dtypes of what is not float32, by name."""
    tokens = {name: DTYPES[params.token_dtype] for name in shapes if name.endswith(("/x", "/d"))}
    return tokens | {"positions": torch.int32}


def numbers_bytes(shapes: Shapes) -> int:
    """Bytes of float32 arrays of these shapes."""
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def _culprits(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, str]:
    """Which sequences of a batch [B, T] are not finite, and where that shows first; each is run alone.

    Raises:
        NumericalError: each alone is finite, so that only a sum overflows.
    """
    seen = {position: first_nonfinite(model, sequence[None]) for position, sequence in enumerate(ids)}
    culprits = {position: where for position, where in seen.items() if where is not None}
    if not culprits:
        raise NumericalError(
            "Stage 'capture': a sum of squares overflows float32 though every activation and gradient is finite. "
            "Look at the model's weights, or set capture.dtype: float32 if it is not."
        )
    return culprits


def first_nonfinite(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """Where the pass over one sequence [1, T] first meets a value that is not finite; None if nowhere."""
    found: list[str] = []

    def note(where: str, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            found.append(where)

    def watch(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        note(f"the input of {name}", x.detach())
        if output.requires_grad:
            output.register_hook(lambda d: note(f"the gradient of {name}", d))

    with forward_hooks(linear_modules(model), watch):
        result = gradient_pass(model, ids)
    if not result.finite.all():
        found.append("the loss or the gradient of the embedding")
    return found[0] if found else None


def _explain(table: Path, culprits: dict[int, str]) -> str:
    articles = read_table(table)["articles"].to_pylist()
    listed = "; ".join(
        f"sequence {s} (articles {', '.join(map(repr, articles[s]))}), first in {where}"
        for s, where in culprits.items()
    )
    return (
        f"Stage 'capture': not finite: {listed}. Set capture.skip_nonfinite: true to leave such sequences out, "
        "or capture.dtype: float32 if it is bfloat16."
    )
