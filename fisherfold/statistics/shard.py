"""One shard of sequences: run through the model, added to the sums, and what is kept of each sequence written.

Shapes: B sequences of T tokens in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from fisherfold.network.experts import unfold_experts
from fisherfold.network.gradient_pass import GradientPass, gradient_pass
from fisherfold.network.labels import all_draws
from fisherfold.network.layers import LinearLayer, by_group, forward_hooks, linear_modules, read_layers
from fisherfold.network.models import DTYPES, StaysLoaded, load_model
from fisherfold.network.weight_check import check_weights
from fisherfold.run.errors import InputError, NumericalError
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import track_lines
from fisherfold.run.tables import in_batches, read_table
from fisherfold.statistics.gradient_forms import Shapes
from fisherfold.statistics.kept import GradientWriter, kept_dtypes
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.token_sample import sample_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@StaysLoaded
def loaded_model(folder: Path, dtype: str) -> tuple["PreTrainedModel", tuple[LinearLayer, ...]]:
    """The model and its targets, which stage `prepare` found, loaded once a process.

    Raises:
        CorruptArtifact: layers.json is missing or names a layer that the model does not have.
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
    layers = tuple(read_layers(folder.parent))
    if any(layer.stack for layer in layers):
        unfold_experts(model)
    return model, layers


def layer_slices(layers: Sequence[LinearLayer], layers_per_pass: int | None) -> list[list[LinearLayer]]:
    """Layers in slices of at most `layers_per_pass` (all in one, if None); groups stay whole, even a larger one."""
    slices: list[list[LinearLayer]] = [[]]
    for group in by_group(layers).values():
        if slices[-1] and layers_per_pass is not None and len(slices[-1]) + len(group) > layers_per_pass:
            slices.append([])
        slices[-1] += group
    return slices


class NonFiniteBatch(Exception):
    """Some sequences of a batch have a loss or gradient that is not finite; nothing of the sums that they came into can be used.

    Attributes:
        culprits: by the sequence's number in the table, where it was seen first.
    """

    def __init__(self, culprits: dict[int, str]) -> None:
        super().__init__(culprits)
        self.culprits = culprits


class Passing(Protocol):
    """How a batch of sequences is run forward and backward through the layers whose statistics are taken."""

    def run(self, numbers: Sequence[int], ids: torch.Tensor) -> GradientPass:
        """Run the sequences of these numbers in the table, ids [B, T]."""

    def culprits(self, numbers: Sequence[int], ids: torch.Tensor) -> dict[int, str]:
        """Of a batch of which something is not finite: by number, which sequences, and where it shows first."""


@dataclass(frozen=True)
class WholePass:
    """The whole model is run at once, with the labels that the parameters ask for."""

    model: "PreTrainedModel"
    params: CaptureParams

    def run(self, numbers: Sequence[int], ids: torch.Tensor) -> GradientPass:
        """See `Passing`."""
        return gradient_pass(self.model, ids, draws=all_draws(self.params, numbers))

    def culprits(self, numbers: Sequence[int], ids: torch.Tensor) -> dict[int, str]:
        """See `Passing`; each sequence is run alone."""
        seen = {number: first_nonfinite(self.model, sequence[None]) for number, sequence in zip(numbers, ids)}
        return {number: where for number, where in seen.items() if where is not None}


def add_shard(
    sums: ModelSums,
    folder: Path,
    params: CaptureParams,
    sequences: Mapping[int, torch.Tensor],
    shapes: Shapes,
    doing: str,
    passing: Passing,
) -> list[float]:
    """Add sequences [T], by their number in the table; their losses. What is kept of each is written to the group `folder`.

    Args:
        shapes: of what is kept of one sequence; no group is written if there is nothing, or no sequence.

    Raises:
        NonFiniteBatch: see there.
        NumericalError: every sequence is finite, and only a sum overflows.
    """
    writer = None
    size = params.batch_size if not shapes or sums.by_sequence else 1
    if shapes and sequences:
        writer = GradientWriter(folder, shapes, len(sequences), size, kept_dtypes(shapes, params))
    losses: list[float] = []
    batches = in_batches(list(sequences), size)
    for batch in track_lines("capture", doing, batches, len(batches)):
        ids = torch.stack([sequences[number] for number in batch])
        positions = sample_positions(batch, ids.shape[1], params.tokens_per_sequence, params.seed)
        result = sums.watch(ids.shape, positions, partial(passing.run, batch, ids))
        if not (result.finite.all() and sums.finite()):
            raise NonFiniteBatch(_named(passing.culprits(batch, ids)))
        losses += result.losses.tolist()
        if writer:
            writer.after_batch(sums)
    if writer:
        writer.close(sums)
    return losses


def _named(culprits: dict[int, str]) -> dict[int, str]:
    """Culprits, of which there have to be some.

    Raises:
        NumericalError: each sequence alone is finite, so that only a sum overflows.
    """
    if not culprits:
        raise NumericalError(
            "Stage 'capture': a sum of squares overflows float32 though every activation and gradient is finite. "
            "Look at the model's weights, or set capture.dtype: float32 if it is not."
        )
    return culprits


def first_nonfinite(model: "PreTrainedModel", ids: torch.Tensor) -> str | None:
    """Where the pass over one sequence [1, T] first meets a value that is not finite; None if nowhere."""
    found: list[str] = []

    def note(where: str, values: torch.Tensor) -> None:
        if not values.isfinite().all():
            found.append(where)

    def watch(name: str, x: object, output: object) -> None:
        if not (isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor)):  # a router may give several
            return
        note(f"the input of {name}", x.detach())
        if output.requires_grad:
            output.register_hook(lambda d: note(f"the gradient of {name}", d))

    with forward_hooks(linear_modules(model), watch):
        result = gradient_pass(model, ids)
    if not result.finite.all():
        found.append("the loss or the gradient of the embedding")
    return found[0] if found else None


LEAVE_OUT = "Set capture.skip_nonfinite: true to leave such sequences out, or capture.dtype: float32 if it is bfloat16."


def explain(table: Path, culprits: dict[int, str], cure: str = LEAVE_OUT) -> str:
    """The error that these sequences of a table are not finite."""
    articles = read_table(table)["articles"].to_pylist()
    listed = "; ".join(
        f"sequence {s} (articles {', '.join(map(repr, articles[s]))}), first in {where}"
        for s, where in culprits.items()
    )
    return f"Stage 'capture': not finite: {listed}. {cure}"
