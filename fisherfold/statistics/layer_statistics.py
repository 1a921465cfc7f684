"""Reading what stage `capture` published: one array at a time, so memory is that of one layer.

Shapes: n outputs, m inputs, N tokens, S sequences, t sampled tokens of each, k sketch rank; x [m] a layer's input and d [n] its output's gradient
at a token, G_s [n, m] its gradient for a sequence. All arrays are float32 on the CPU.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fisherfold.network.layers import LinearLayer, read_layers
from fisherfold.run.errors import CorruptArtifact, InputError
from fisherfold.run.store import read_array, read_in_turn
from fisherfold.statistics.stored_sums import SUMS, restored

FACTS_FILE = "capture.json"
SHARD_NAME = re.compile(r"shard-\d{5,}")


class Statistics:
    """The statistics of every layer of a model.

    Attributes:
        folder: the published output of stage `capture`.
        layers: in model order.
        facts: capture.json.

    Raises:
        CorruptArtifact: the folder is not whole; when reading, that an array is missing or fails its checksum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layers = read_layers(folder)
        try:
            self.facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptArtifact(
                f"{folder / FACTS_FILE} is not readable ({error}). Run stage 'capture' again."
            ) from None

    @property
    def tokens(self) -> int:
        """N."""
        return self.facts["tokens"]

    def tokens_seen(self, layer: LinearLayer) -> int:
        """How many of the N tokens came to a layer: all, but for an expert."""
        return int(self._read(layer.name, "routed").item()) if layer.stack else self.tokens

    @property
    def sequences(self) -> int:
        """S."""
        return self.facts["sequences"]

    @property
    def draws(self) -> int:
        """Of every token's label; each draw gives another d."""
        return self.facts.get("draws", 1)

    @property
    def has_gradients(self) -> bool:
        """Whether the mean of the sequences' gradients, their squares and their norms were captured."""
        return self.facts["gradients"] != "none"

    @property
    def has_sequence_gradients(self) -> bool:
        """Whether the gradient of every sequence was captured, too."""
        return self.facts["gradients"] not in ("none", "sums")

    @property
    def has_tokens(self) -> bool:
        """Whether inputs and output gradients of sampled tokens were captured."""
        return self.facts.get("tokens_per_sequence", 0) > 0

    def input_gram(self, layer: LinearLayer) -> torch.Tensor:
        """Σ_t x xᵀ [m, m]."""
        return self._read(layer.group, "input_gram")

    def input_covariance(self, layer: LinearLayer) -> torch.Tensor:
        """E[x xᵀ] [m, m], about zero and not about the mean."""
        return self.input_gram(layer) / self.tokens

    def input_magnitude(self, layer: LinearLayer) -> torch.Tensor:
        """E[|x|] [m]."""
        return self._read(layer.group, "input_abs") / self.tokens

    def gradient_gram(self, layer: LinearLayer) -> torch.Tensor:
        """Σ_t g gᵀ [m, m] of a group of several layers, g = Σ_c W_cᵀ d_c over them; the mean over draws of labels."""
        return self._read(layer.group, "gradient_gram") / self.draws

    def output_gram(self, layer: LinearLayer) -> torch.Tensor:
        """Σ_t d dᵀ [n, n], the mean over draws of labels."""
        return self._read(layer.name, "output_gram") / self.draws

    def output_covariance(self, layer: LinearLayer) -> torch.Tensor:
        """E[d dᵀ] [n, n], about zero and not about the mean."""
        return self.output_gram(layer) / self.tokens

    def gradient_sum(self, layer: LinearLayer) -> torch.Tensor:
        """Σ_s G_s [n, m]."""
        return self._read(layer.name, "gradient_sum", of_gradients=True)

    def fisher_inputs(self, layer: LinearLayer) -> torch.Tensor:
        """Σ_s Σ_rows G_s∘G_s [m]."""
        return self._read(layer.name, "fisher_inputs", of_gradients=True)

    def fisher_outputs(self, layer: LinearLayer) -> torch.Tensor:
        """Σ_s Σ_columns G_s∘G_s [n]."""
        return self._read(layer.name, "fisher_outputs", of_gradients=True)

    def gradient_shards(self, layer: LinearLayer) -> Iterator[tuple[torch.Tensor, ...]]:
        """The gradients of each shard of S' sequences: (left [S', n, k], right [S', m, k]), or (gradient [S', n, m],)."""
        self._require_gradients("the gradients of each sequence", ("sketch", "exact"))
        kinds = ("gradient",) if self.facts["gradients"] == "exact" else ("left", "right")
        yield from read_in_turn(self._shards(), [f"{layer.name}/{kind}" for kind in kinds])

    def token_shards(self, layer: LinearLayer) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The sampled tokens of each shard of S' sequences: x [S', t, m], d [S', t, n] and their positions [S', t].

        Positions ascend. A token that the layer did not see (of an expert) has x = 0 and d = 0.
        """
        if not self.has_tokens:
            raise InputError(
                f"{self.folder} holds no tokens: capture.tokens_per_sequence is 0. Set it to 16, say; more is more precise."
            )
        for x, d, positions in read_in_turn(self._shards(), [f"{layer.group}/x", f"{layer.name}/d", "positions"]):
            yield x.float(), d.float(), positions.long()

    def gradient_norms(self, layer: LinearLayer) -> torch.Tensor:
        """‖G_s‖² [S]."""
        self._require_gradients("the norms of gradients")
        return torch.cat([read_array(shard, f"{layer.name}/norm") for shard in self._shards()])

    def energy_kept(self, layer: LinearLayer) -> torch.Tensor:
        """The share of ‖G_s‖² [S] that the sketch of each sequence keeps; 1 where gradients are exact."""
        if self.facts["gradients"] == "exact":
            return torch.ones(self.sequences)
        self._require_gradients("sketches", ("sketch",))
        return torch.cat([read_array(shard, f"{layer.name}/kept") for shard in self._shards()])

    def _shards(self) -> list[Path]:
        shards = self.facts["shards"]
        if bad := [shard for shard in shards if not SHARD_NAME.fullmatch(shard)]:
            raise CorruptArtifact(f"{self.folder / FACTS_FILE} lists {bad[0]!r}, which is not the name of a shard.")
        return [self.folder / "gradients" / shard for shard in shards]

    def _read(self, name: str, kind: str, of_gradients: bool = False) -> torch.Tensor:
        if of_gradients:
            self._require_gradients(kind)
        return restored(kind, read_array(self.folder / SUMS, f"{name}/{kind}"))

    def _require_gradients(self, what: str, forms: Sequence[str] = ("sums", "sketch", "exact")) -> None:
        if self.facts["gradients"] not in forms:
            raise InputError(
                f"{self.folder} holds no {what}: capture.gradients is {self.facts['gradients']!r}. Set it to "
                f"{' or '.join(map(repr, forms))}."
            )
