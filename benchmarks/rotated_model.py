"""The project's Llama model with its residual stream rotated: the same function, other numbers.

The demo models lie on a 4-bit grid (they come from GGUF files), so rounding them to 4 bits would cost nothing. Their residual stream is
rotated by a random orthogonal Q, norm gains folded into the layers that read it (SliceGPT, QuaRot): the function is the same, which
`same_function` checks, and the grid is gone. The metrics and bases are rotated with the weights. A rotated model needs a head of its own.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from fisherfold.linalg.factor_rounding import LayerMetric
from fisherfold.network.models import load_model, read_weight
from fisherfold.network.sites import Site, read_sites
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics

READ_STREAM = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm"} | {
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
WRITE_STREAM = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Layer:
    """A rotated layer: its weight, metric, and components."""

    site: Site
    W: np.ndarray
    metric: LayerMetric
    left: np.ndarray
    right: np.ndarray


class Rotated:
    """The project's model with its residual stream rotated, layer by layer."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.statistics = Statistics(workspace.out("capture"))
        self.sites = {site.name: site for site in read_sites(workspace.out("subspace"))}
        self.model = load_model(workspace.model, torch.float32)
        self.gains = {
            name: norm.weight.double().numpy() for name, norm in self.model.named_modules() if name.endswith("norm")
        }
        size = self.model.config.hidden_size
        self.Q = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]
        rows = pq.read_table(workspace.out("subspace") / "diagnostics.parquet").to_pylist()
        self.damping = {row["module"]: (row["input_damping"], row["output_damping"]) for row in rows}
        table = pq.read_table(workspace.out("subspace") / "spectra.parquet").to_pandas()
        self.sigma = {name: group["sigma"].to_numpy() for name, group in table.groupby("module", sort=False)}

    @property
    def numbers(self) -> int:
        """Of the dense layers."""
        return sum(site.dense_numbers for site in self.sites.values())

    def weight(self, name: str) -> np.ndarray:
        """W [n, m] of one layer of the rotated model."""
        W = read_weight(self.workspace.model, self.sites[name].layers[0]).double().numpy()
        gain = self._gain(name)
        return self.Q.T @ W if gain is None else W * gain @ self.Q

    def layer(self, name: str) -> Layer:
        """The layer with its damped metric and its basis."""
        site, (of_inputs, of_outputs) = self.sites[name], self.damping[name]
        layer = site.layers[0]
        A = self.statistics.input_covariance(layer).double().numpy()
        B = self.statistics.output_covariance(layer).double().numpy()
        lefts, right = site.read_basis(self.workspace.out("subspace") / "bases")
        left, right = lefts[0].double().numpy(), right.double().numpy()
        gain = self._gain(name)
        if gain is None:
            metric = LayerMetric(damped(A, of_inputs), damped(self.Q.T @ B @ self.Q, of_outputs))
            return Layer(site, self.weight(name), metric, self.Q.T @ left, right)
        A = self.Q.T @ (A / np.outer(gain, gain)) @ self.Q
        metric = LayerMetric(damped(A, of_inputs), damped(B, of_outputs))
        return Layer(site, self.weight(name), metric, left, right * gain @ self.Q)

    def _gain(self, name: str) -> np.ndarray | None:
        """The gain of the norm that a layer reads the stream through; None for one that writes to it."""
        block, _, kind = name.rpartition(".")
        if kind in WRITE_STREAM:
            return None
        return self.gains[f"{block.rpartition('.')[0]}.{READ_STREAM[kind]}"]

    def whole(self) -> PreTrainedModel:
        """The rotated model in memory."""
        model = load_model(self.workspace.model, torch.float32)
        embedding = model.get_input_embeddings().weight.double().numpy()
        head = torch.nn.Linear(*embedding.shape[::-1], bias=False)
        head.weight = parameter(embedding * self.gains["model.norm"] @ self.Q)
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
        model.get_input_embeddings().weight = parameter(embedding @ self.Q)
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.weight = parameter(np.ones(len(module.weight)))
        for name in self.sites:
            model.get_submodule(name).weight = parameter(self.weight(name))
        return model


def parameter(values: np.ndarray) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)).float(), requires_grad=False)


def damped(M: np.ndarray, damping: float) -> np.ndarray:
    """As stage `subspace` damps, here after the rotation: what a norm with a small gain holds down would weigh too much otherwise."""
    return (1 - damping) * M + damping * np.trace(M) / len(M) * np.eye(len(M))


@torch.inference_mode()
def same_function(rotated: Rotated, model: PreTrainedModel) -> float:
    """Largest difference of a logit between the model and the rotated one, over the largest logit."""
    ids = torch.arange(5, 69)[None]
    mine, theirs = rotated.model(ids).logits, model(ids).logits
    difference = float((mine - theirs).abs().max() / mine.abs().max())
    assert difference < 1e-3, f"the rotated model is another one: {difference}"
    return difference
