"""A workspace as stages `prepare` and `capture` leave it, made from random tokens of which everything is known."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from fisherfold.network.layers import LinearLayer, write_layers
from fisherfold.run.disk import empty_folder
from fisherfold.run.files import MANIFEST, describe_files
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.stored_sums import stored

LAYERS = (
    LinearLayer("block.q", 5, 6, False, False, "block.q"),
    LinearLayer("block.k", 3, 6, False, False, "block.q"),  # reads what block.q reads
    LinearLayer("block.up", 8, 5, True, True, "block.up"),
    LinearLayer("block.down", 5, 8, False, False, "block.down"),
)


@dataclass
class TinyCapture:
    """Weights W [n, m], inputs x [S, T, m] and output gradients d [S, T, n], all float64, by layer name."""

    workspace: Workspace
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    layers: tuple[LinearLayer, ...] = LAYERS

    def gradient(self, name: str) -> torch.Tensor:
        """G [S, n, m] of every sequence."""
        return self.gradients[name].mT @ self.inputs[name]


def random_tokens(root: Path, sequences: int = 6, tokens: int = 7, seed: int = 0) -> TinyCapture:
    """Draw weights, inputs and output gradients; layers of one group share their input."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()  # exact in float32

    inputs = {layer.group: draw(sequences, tokens, layer.inputs) for layer in LAYERS if layer.group == layer.name}
    return TinyCapture(
        Workspace(root),
        {layer.name: draw(layer.outputs, layer.inputs) for layer in LAYERS},
        {layer.name: inputs[layer.group] for layer in LAYERS},
        {layer.name: 0.01 * draw(sequences, tokens, layer.outputs) for layer in LAYERS},
    )


def publish(tiny: TinyCapture, form: str = "sketch", rank: int = 8, shard: int = 2, tokens_kept: int = 0) -> Workspace:
    """Write the published outputs; a sketch of rank 8 is exact for these layers. Of tokens the first are kept."""
    with _output(tiny.workspace, "prepare") as out:
        weights = {f"{layer.name}.weight": _stored(tiny, layer) for layer in tiny.layers}
        (out / "model").mkdir()
        save_file(weights, out / "model" / "model.safetensors")
    with _output(tiny.workspace, "capture") as out:
        sequences, tokens = next(iter(tiny.inputs.values())).shape[:2]
        shards = _shards(sequences, shard) if form != "none" or tokens_kept else {}
        facts = {"sequences": sequences, "tokens": sequences * tokens, "sequence_length": tokens, "loss": 3.0}
        facts |= {
            "tokens_per_sequence": tokens_kept,
            "gradients": form,
            "sketch_rank": rank,
            "skipped": [],
            "shards": list(shards),
        }
        (out / "capture.json").write_text(json.dumps(facts, sort_keys=True))
        write_layers(out, tiny.layers)
        write_arrays(out / "statistics", _merged(_statistics(tiny, layer, form) for layer in tiny.layers))
        for name, rows in shards.items():
            arrays = [_gradients(tiny.gradient(layer.name)[rows], layer, form, rank) for layer in tiny.layers]
            arrays += [_tokens(tiny, layer, rows, tokens_kept) for layer in tiny.layers if tokens_kept]
            write_arrays(out / "gradients" / name, _merged(arrays))
    return tiny.workspace


@contextmanager
def _output(workspace: Workspace, stage: str) -> Iterator[Path]:
    """The output folder of a stage, published anew with its manifest when the block ends."""
    out = empty_folder(workspace.out(stage))
    yield out
    manifest = {"stage": stage, "fingerprint": "tiny", "files": describe_files(out)}
    (out / MANIFEST).write_text(json.dumps(manifest, sort_keys=True))


def _merged(arrays: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: array for part in arrays for name, array in part.items()}


def _stored(tiny: TinyCapture, layer: LinearLayer) -> torch.Tensor:
    weight = tiny.weights[layer.name].float()
    return (weight.T if layer.transposed else weight).contiguous()


def _shards(sequences: int, size: int) -> dict[str, slice]:
    return {f"shard-{i:05d}": slice(low, low + size) for i, low in enumerate(range(0, sequences, size))}


def _statistics(tiny: TinyCapture, layer: LinearLayer, form: str) -> dict[str, torch.Tensor]:
    x, d, G = tiny.inputs[layer.name].flatten(0, 1), tiny.gradients[layer.name].flatten(0, 1), tiny.gradient(layer.name)
    arrays = {f"{layer.name}/output_gram": d.T @ d, f"{layer.name}/gradient_sum": G.sum(0)}
    if layer.group == layer.name:
        arrays |= {f"{layer.name}/input_gram": x.T @ x, f"{layer.name}/input_abs": x.abs().sum(0)}
        g = input_gradients(tiny, layer.name).flatten(0, 1)
        arrays |= {f"{layer.name}/gradient_gram": g.T @ g}
    if form != "none":
        arrays |= {
            f"{layer.name}/fisher_inputs": (G * G).sum((0, 1)),
            f"{layer.name}/fisher_outputs": (G * G).sum((0, 2)),
        }
    return {name: stored(name.rpartition("/")[2], array.float()) for name, array in arrays.items()}


def input_gradients(tiny: TinyCapture, group: str) -> torch.Tensor:
    """g = Σ_c W_cᵀ d_c [S, T, m] over the layers of a group."""
    return sum(tiny.gradients[layer.name] @ tiny.weights[layer.name] for layer in tiny.layers if layer.group == group)


def _tokens(tiny: TinyCapture, layer: LinearLayer, rows: slice, kept: int) -> dict[str, torch.Tensor]:
    x, d = tiny.inputs[layer.name][rows, :kept].float(), tiny.gradients[layer.name][rows, :kept].float()
    return {
        f"{layer.group}/x": x,
        f"{layer.name}/d": d,
        "positions": torch.arange(kept).expand(len(x), kept).int().contiguous(),
    }


def _gradients(G: torch.Tensor, layer: LinearLayer, form: str, rank: int) -> dict[str, torch.Tensor]:
    norm = G.square().sum((1, 2))
    if form == "none":
        return {}
    if form == "exact":
        return {f"{layer.name}/gradient": G.float(), f"{layer.name}/norm": norm.float()}
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    k = min(rank, layer.outputs, layer.inputs)
    arrays = {
        "left": U[:, :, :k],
        "right": (sigma[:, :k, None] * Vh[:, :k]).mT,
        "norm": norm,
        "kept": sigma[:, :k].square().sum(1) / norm.clamp(min=1e-300),
    }
    return {f"{layer.name}/{name}": array.float() for name, array in arrays.items()}
