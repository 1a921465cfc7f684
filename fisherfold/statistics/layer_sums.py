"""Statistics of linear layers, summed by hooks while a model runs forward and backward.

Shapes: B sequences of T tokens in a batch, x [m] input and d [n] output gradient of a layer at one token,
X [T, m] and D [T, n] those of one sequence, G = D^T X [n, m] the sequence's gradient, k sketch rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch

from fisherfold.network.gradient_pass import GradientPass, gradient_pass
from fisherfold.network.labels import Labels
from fisherfold.network.layers import (
    PROBE_LENGTH,
    LinearLayer,
    by_group,
    forward_hooks,
    input_embedding,
    input_gradient_hooks,
    layer_modules,
)
from fisherfold.run.errors import InputError
from fisherfold.statistics.gradient_forms import GradientForm
from fisherfold.statistics.side_sums import InputSums, OutputSums
from fisherfold.statistics.stored_sums import restored, stored
from fisherfold.statistics.token_sample import TokenSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _told_apart(values: torch.Tensor, sequences: int, length: int) -> bool:
    """Whether values [..., p] of a batch are those of one sequence after the other."""
    axis = values.dim() > 2 and len(values) == sequences
    return axis or sequences == 1 or values.shape[:-1].numel() == sequences * length


@dataclass
class Call:
    """One use of a layer in a pass: its input and, once the backward pass has come to it, its output's gradient.

    Attributes:
        rows: of an expert, which tokens of the batch they are of.
        drawn: whether the backward pass of the first draw of labels has come to it.
    """

    x: torch.Tensor | None
    d: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    drawn: bool = False


class ModelSums:
    """The statistics of some layers of a model, a batch of sequences at a time.

    Sums live on each layer's own device, and a layer's input is held only until the backward pass has come to it. A
    layer that is used several times in a pass counts every time, and its sequence gradient is the sum over uses, as the
    gradient of its weight is. One that is never used stays at zero. Of several draws of labels all add to the sums of d d^T and g g^T; a
    sequence's gradient and its sampled tokens are those of the first.

    Args:
        model: frozen.
        layers: some of its linear layers; of a group, all or none.
        form: entry of `GRADIENT_FORMS`.
        rank: capture.sketch_rank.
        seed: capture.seed.
        token_dtype: in which x and d of sampled tokens are kept; None keeps no tokens.
        probe: runs the layers forward for a few ids [B, T]; None runs the model.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layers: Sequence[LinearLayer],
        form: type[GradientForm] | None,
        rank: int,
        seed: int,
        token_dtype: torch.dtype | None = None,
        probe: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        modules = layer_modules(model, layers)
        self.model = model
        self.modules = modules
        self._probe = probe or self._run_model
        self.outputs: dict[str, OutputSums] = {}
        self.inputs: dict[str, InputSums] = {}
        self.samples: dict[str, TokenSample] = {}
        self.positions: list[torch.Tensor] = []
        self._reached: set[str] = set()  # before the sums were restored
        groups = by_group(layers)
        self.shared = {
            name: [self.modules[layer.name] for layer in group] for name, group in groups.items() if len(group) > 1
        }
        for layer in layers:
            device = cast(torch.device, modules[layer.name].weight.device)
            shapes = form.shapes(layer, rank) if form else {}
            self.outputs[layer.name] = OutputSums(layer, device, form(layer, rank, seed) if form else None, shapes)
            if token_dtype:
                self.samples[f"{layer.name}/d"] = TokenSample(layer.outputs, token_dtype, device)
            if layer.group == layer.name:
                self.inputs[layer.name] = InputSums(layer.inputs, device, layer.name in self.shared)
                if token_dtype:
                    self.samples[f"{layer.name}/x"] = TokenSample(layer.inputs, token_dtype, device)

    def add(
        self, ids: torch.Tensor, positions: torch.Tensor | None = None, draws: Sequence[Labels | None] = (None,)
    ) -> GradientPass:
        """Run token ids [B, T] forward and backward and add what the layers see; see `gradient_pass` and `watch`."""
        return self.watch(ids.shape, positions, lambda: gradient_pass(self.model, ids, draws=draws))

    def watch(self, shape: torch.Size, positions: torch.Tensor | None, run: Callable[[], GradientPass]) -> GradientPass:
        """Add what the layers see while `run` takes B sequences of T tokens forward and backward.

        Args:
            shape: [B, T].
            positions: [B, t], of the tokens to keep, if tokens are kept.

        Raises:
            InputError: gradients or tokens are kept and the tokens of a layer cannot be told apart by sequence.
        """
        self._shape = shape
        self._calls: dict[str, list[Call]] = {name: [] for name in self.modules}
        self._positions = positions
        kept = {name: len(sums.kept["norm"]) for name, sums in self.outputs.items() if sums.form}
        with (
            input_gradient_hooks(self.shared, lambda group, g: self.inputs[group].add_gradient(g)),
            forward_hooks(self.modules, self._on_forward),
        ):
            result = run()
        for name in self.modules:  # layers with a use that no gradient came back to
            self._add_gradients(name)
        for name, before in kept.items():
            if len(self.outputs[name].kept["norm"]) == before:
                self.outputs[name].keep_zeros(shape[0])
        if self.samples and positions is not None:
            self.positions.append(positions.int())
            for sample in self.samples.values():
                sample.end_pass(positions)
        return result

    @cached_property
    def by_sequence(self) -> bool:
        """Whether every layer sees the tokens of a batch in their order, tried on two sequences, or says which it sees, as experts do."""
        ids = torch.arange(2 * PROBE_LENGTH).view(2, -1) % len(input_embedding(self.model))
        seen = {name: hasattr(module, "rows") for name, module in self.modules.items()}

        def look(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
            seen[name] |= _told_apart(x, *ids.shape)

        with forward_hooks(self.modules, look), torch.no_grad():
            self._probe(ids)
        return all(seen.values())

    def _run_model(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids.to(input_embedding(self.model).device), use_cache=False)

    def finite(self) -> bool:
        """Whether all sums of squares are finite, and with them everything that was ever added."""
        sums: tuple[InputSums | OutputSums, ...] = (*self.inputs.values(), *self.outputs.values())
        return all(bool(gram.diagonal().isfinite().all()) for each in sums for gram in each.grams())

    def arrays(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All sums by name, ``<group>/input_gram`` and so on; of symmetric ones the `fold`."""
        for name, kind, values in self._sums():
            yield f"{name}/{kind}", stored(kind, values)

    def restore(self, read: Callable[[str], torch.Tensor], unreached: Sequence[str]) -> None:
        """Go on from the arrays that `read` gives by name, and from what `unreached` said then."""
        for name, kind, values in self._sums():
            values.copy_(restored(kind, read(f"{name}/{kind}"), whole=False))
        self._reached = self.outputs.keys() - set(unreached)

    def _sums(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for parts in (self.inputs, self.outputs):
            for name, sums in parts.items():
                yield from ((name, kind, values) for kind, values in sums.arrays().items())

    def take_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is kept of each sequence since the last call, [S', ...] by name: ``<layer>/left`` and so on."""
        of_layers = {f"{name}/{kind}": kept for name, sums in self.outputs.items() for kind, kept in sums.kept.items()}
        of_tokens = {name: sample.kept for name, sample in self.samples.items()}
        for name, values in {**of_layers, **of_tokens, "positions": self.positions}.items():
            if values:
                yield name, torch.cat(values)
                values.clear()

    def unreached(self) -> list[str]:
        """Layers that no gradient came to."""
        return [name for name, sums in self.outputs.items() if sums.tokens == 0 and name not in self._reached]

    def _on_forward(self, name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        rows = getattr(self.modules[name], "rows", None)
        if name in self.inputs:
            self.inputs[name].add(x.detach())
            if self.samples:
                self._sample(f"{name}/x", self.samples[f"{name}/x"].use(), x.detach(), rows)
        use = self.samples[f"{name}/d"].use() if self.samples else 0
        if output.requires_grad:
            call = Call(x.detach() if self.outputs[name].form else None, rows=rows)
            self._calls[name].append(call)
            output.register_hook(lambda d: self._on_gradient(name, call, use, d))

    def _sample(self, kind: str, use: int, values: torch.Tensor, rows: torch.Tensor | None) -> None:
        assert self._positions is not None
        self.samples[kind].see(use, self._by_sequence(kind, values, rows), self._positions)

    def _on_gradient(self, name: str, call: Call, use: int, d: torch.Tensor) -> None:
        self.outputs[name].add(d, seen_before=call.drawn)
        if call.drawn:
            return
        call.drawn = True
        if self.samples:
            self._sample(f"{name}/d", use, d, call.rows)
        if call.x is not None:
            call.d = d
            if all(each.d is not None for each in self._calls[name]):
                self._add_gradients(name)

    def _add_gradients(self, name: str) -> None:
        """Add each sequence's gradient, over all uses of the layer: D^T X of the uses' tokens one after the other."""
        uses = [
            (self._by_sequence(name, call.d, call.rows), self._by_sequence(name, call.x, call.rows))
            for call in self._calls[name]
            if call.d is not None and call.x is not None
        ]
        for call in self._calls[name]:
            call.x = call.d = None
        self._calls[name].clear()
        if uses:
            D, X = uses[0] if len(uses) == 1 else (torch.cat(parts, 1) for parts in zip(*uses))
            self.outputs[name].add_gradients(D, X)

    def _by_sequence(self, name: str, values: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Values [..., p] of a batch's tokens as [B, T', p]; T' is T but where a layer sees fewer of one sequence's, or other things.

        Those of an expert go to their `places`, with zeros where the others are.
        """
        sequences, length = self._shape
        rows = values.flatten(0, -2)
        if places is not None:
            rows = values = rows.new_zeros(sequences * length, rows.shape[-1]).index_copy(0, places, rows)
        if not _told_apart(values, sequences, length):
            raise InputError(
                f"Stage 'capture': layer {name.partition('/')[0]} sees {len(rows)} of a batch's {sequences * length} tokens, "
                "so they cannot be told apart by sequence. Set capture.batch_size: 1 (or capture.gradients: none and "
                "capture.tokens_per_sequence: 0)."
            )
        return rows.view(sequences, -1, rows.shape[-1])
