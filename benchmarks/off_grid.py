"""The project's model in other coordinates: the same function, other numbers.

The demo models lie on a 4-bit grid (they come from GGUF files), so rounding them to 4 bits would cost nothing. Each layer's inputs and outputs are
changed to x' = P x and y' = S y, weights, metrics and bases with them; `same_function` checks that the logits stay, and the grid is gone.

Llama: the residual stream is rotated by a random orthogonal Q, norm gains folded into the layers that read it (SliceGPT, QuaRot), so P = Qᵀ diag(1/gain) and,
where a layer writes to the stream, S = Qᵀ. The rotated model needs a head of its own.
Gemma 3: its blocks have norms with gains behind the layers that write, so no rotation leaves the function as it is. Every input is scaled by random
factors of up to √2 in either direction instead: those of the stream by the norms' gains, those of o_proj and down_proj by the rows of v_proj and up_proj.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, PreTrainedModel

from fisherfold.linalg.factor_rounding import LayerMetric
from fisherfold.network.models import load_model, read_weight
from fisherfold.network.sites import Site, read_sites
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
WRITE_STREAM = ("o_proj", "down_proj")
MADE_BY = {"o_proj": "v_proj", "down_proj": "up_proj"}


@dataclass(frozen=True)
class Change:
    """An invertible map of a layer's inputs or outputs, and its inverse."""

    map: np.ndarray
    inverse: np.ndarray

    @classmethod
    def scale(cls, factors: np.ndarray) -> "Change":
        return cls(np.diag(factors), np.diag(1 / factors))


@dataclass(frozen=True)
class Layer:
    """A layer in its new coordinates: its weight, metric, and components."""

    site: Site
    W: np.ndarray
    metric: LayerMetric
    left: np.ndarray
    right: np.ndarray


class OffGrid(ABC):
    """The project's model in other coordinates, layer by layer.

    Attributes:
        norms: the norm that a layer reads the stream through, by the layer's own name.
        offset: what a norm adds to its weight before it multiplies.
    """

    norms: dict[str, str]
    offset = 0.0

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.statistics = Statistics(workspace.out("capture"))
        self.sites = {site.name: site for site in read_sites(workspace.out("subspace"))}
        self.model = load_model(workspace.model, torch.float32)
        self.random = np.random.default_rng(0)
        self.gains = {
            name: norm.weight.double().numpy() + self.offset
            for name, norm in self.model.named_modules()
            if name.endswith("norm")
        }
        rows = pq.read_table(workspace.out("subspace") / "diagnostics.parquet").to_pylist()
        self.damping = {row["module"]: (row["input_damping"], row["output_damping"]) for row in rows}
        table = pq.read_table(workspace.out("subspace") / "spectra.parquet").to_pandas()
        self.sigma = {name: group["sigma"].to_numpy() for name, group in table.groupby("module", sort=False)}

    @abstractmethod
    def inputs(self, name: str) -> Change:
        """P of a layer [m, m]."""

    @abstractmethod
    def outputs(self, name: str) -> Change | None:
        """S of a layer [n, n]; None: they stay."""

    @abstractmethod
    def whole(self) -> PreTrainedModel:
        """The model in memory."""

    @property
    def numbers(self) -> int:
        """Of the dense layers."""
        return sum(site.dense_numbers for site in self.sites.values())

    def norm_of(self, name: str) -> str:
        """The norm that a layer reads the stream through."""
        return f"{block_of(name)}.{self.norms[own_name(name)]}"

    def weight(self, name: str) -> np.ndarray:
        """W [n, m] of one layer."""
        W = read_weight(self.workspace.model, self.sites[name].layers[0]).double().numpy() @ self.inputs(name).inverse
        outputs = self.outputs(name)
        return outputs.map @ W if outputs else W

    def layer(self, name: str) -> Layer:
        """The layer with its damped metric and its basis."""
        site, (of_inputs, of_outputs) = self.sites[name], self.damping[name]
        layer, inputs, outputs = site.layers[0], self.inputs(name), self.outputs(name)
        A = inputs.map @ self.statistics.input_covariance(layer).double().numpy() @ inputs.map.T
        B = self.statistics.output_covariance(layer).double().numpy()
        lefts, right = site.read_basis(self.workspace.out("subspace") / "bases")
        left, right = lefts[0].double().numpy(), right.double().numpy() @ inputs.inverse
        if outputs:
            B, left = outputs.inverse.T @ B @ outputs.inverse, outputs.map @ left
        return Layer(site, self.weight(name), LayerMetric(damped(A, of_inputs), damped(B, of_outputs)), left, right)

    def layers_in(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the layers' weights in place."""
        for name in self.sites:
            model.get_submodule(name).weight = parameter(self.weight(name))
        return model


class Rotated(OffGrid):
    """A Llama with its residual stream rotated."""

    norms = dict.fromkeys(QKV, "input_layernorm") | dict.fromkeys(GATED, "post_attention_layernorm")

    @cached_property
    def Q(self) -> np.ndarray:
        size = self.model.config.hidden_size
        return np.linalg.qr(self.random.standard_normal((size, size)))[0]

    def inputs(self, name: str) -> Change:
        if own_name(name) in WRITE_STREAM:
            return Change.scale(np.ones(self.sites[name].inputs))
        gain = self.gains[self.norm_of(name)]
        return Change(self.Q.T / gain, gain[:, None] * self.Q)

    def outputs(self, name: str) -> Change | None:
        return Change(self.Q.T, self.Q) if own_name(name) in WRITE_STREAM else None

    def whole(self) -> PreTrainedModel:
        model = load_model(self.workspace.model, torch.float32)
        embedding = model.get_input_embeddings().weight.double().numpy()
        head = torch.nn.Linear(*embedding.shape[::-1], bias=False)
        head.weight = parameter(embedding * self.gains["model.norm"] @ self.Q)
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
        model.get_input_embeddings().weight = parameter(embedding @ self.Q)
        for name, gain in self.gains.items():
            model.get_submodule(name).weight = parameter(np.ones(len(gain)))
        return self.layers_in(model)


class Scaled(OffGrid):
    """A Gemma 3 with every layer's inputs scaled."""

    norms = dict.fromkeys(QKV, "input_layernorm") | dict.fromkeys(GATED, "pre_feedforward_layernorm")
    offset = 1.0

    @cached_property
    def factors(self) -> dict[str, np.ndarray]:
        """Of every norm that a layer reads through, and of every layer that makes another's inputs."""
        sizes = {self.norm_of(name): self.sites[name].inputs for name in self.sites if own_name(name) in self.norms}
        sizes |= {name: self.sites[name].layers[0].outputs for name in self.sites if own_name(name) in MADE_BY.values()}
        return {name: 2 ** self.random.uniform(-0.5, 0.5, size) for name, size in sizes.items()}

    def inputs(self, name: str) -> Change:
        if own_name(name) in self.norms:
            return Change.scale(self.factors[self.norm_of(name)])
        maker = name.replace(own_name(name), MADE_BY[own_name(name)])
        heads = self.factors[maker].reshape(-1, self.head if maker.endswith("v_proj") else 1)
        return Change.scale(np.repeat(heads, self.sites[name].inputs // heads.size, axis=0).ravel())

    @property
    def head(self) -> int:
        return self.model.config.head_dim

    def outputs(self, name: str) -> Change | None:
        return Change.scale(self.factors[name]) if name in self.factors else None

    def whole(self) -> PreTrainedModel:
        model = load_model(self.workspace.model, torch.float32)
        for name in self.factors.keys() & self.gains.keys():
            model.get_submodule(name).weight = parameter(self.gains[name] * self.factors[name] - self.offset)
        return self.layers_in(model)


KINDS = {"llama": Rotated, "gemma3_text": Scaled}


def off_grid(workspace: Workspace) -> OffGrid:
    """The project's model in the coordinates that its architecture allows."""
    return KINDS[AutoConfig.from_pretrained(workspace.model).model_type](workspace)


def own_name(name: str) -> str:
    return name.rpartition(".")[2]


def block_of(name: str) -> str:
    """model.layers.0 of model.layers.0.mlp.up_proj."""
    return name.rsplit(".", 2)[0]


def parameter(values: np.ndarray) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)).float(), requires_grad=False)


def damped(M: np.ndarray, damping: float) -> np.ndarray:
    """As stage `subspace` damps, here in the new coordinates: what a norm with a small gain holds down would weigh too much otherwise."""
    return (1 - damping) * M + damping * np.trace(M) / len(M) * np.eye(len(M))


@torch.inference_mode()
def same_function(other: OffGrid, model: PreTrainedModel) -> float:
    """Largest difference of a logit between the project's model and the other one, over the largest logit."""
    ids = torch.arange(5, 69)[None]
    mine, theirs = other.model(ids).logits, model(ids).logits
    difference = float((mine - theirs).abs().max() / mine.abs().max())
    assert difference < 1e-3, f"the model in other coordinates is another one: {difference}"
    return difference
