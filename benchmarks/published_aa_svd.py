"""AA-SVD's published code on the calibration of a project, beside what the project made: the same tokens, the same share removed.

    git clone https://github.com/atulkumarin/AA-SVD && pip install omegaconf
    python benchmarks/published_aa_svd.py --code AA-SVD --ratio 0.4        # in a project that has run stage prepare; 40 minutes of one core
    python benchmarks/published_aa_svd.py --code AA-SVD --ratio 0.4 --blocks 1 --epochs 1

Its own settings, but for batches of 3 sequences instead of 32: as many steps a block (200) with 24 sequences as it has with 256. Objective 4 is
the anchored one, which its `decompose.py` calls AA-SVD; its configuration has 2. It is written for CUDA and bfloat16: here it runs on the
processor in float32, the training's products in bfloat16 where the processor has units for them. Uniform ranks, r (m + n) numbers a layer. A
Gemma 3 goes through its adapter of llama, with sequences no longer than the window of its attention.

Perplexity by that of the dense model on the evaluation sequences of sources that calibration does not contain, or of all if there is none.
"""

import argparse
import math
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import Gemma3ForCausalLM

from fisherfold.network.models import load_model
from fisherfold.run.determinism import computing_threads
from fisherfold.run.workspace import Workspace

EPOCHS = 25  # what its code passes itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="a clone of AA-SVD")
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--ratio", type=float, default=0.2, help="share removed of the decoder's linear layers")
    parser.add_argument("--objective", default="obj4")
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--blocks", type=int, default=None, help="the first so many alone")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    workspace = Workspace(options.project.resolve())
    calibration, evaluation = sequences(workspace)
    with computing_threads(options.threads):
        model = load_model(workspace.model, torch.float32)
        dense = loss(model, evaluation)
        whole = decoder_numbers(model)
        model = compress(model, calibration, options)
        kept = decoder_numbers(model) / whole
        times = math.exp(loss(model.eval(), evaluation) - dense)
    print(f"AA-SVD, {options.objective}, ratio {options.ratio} ({kept:.4f} kept): {times:.3f} × the dense perplexity")


def sequences(workspace: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the calibration [S, T] and of what is evaluated."""
    calibration, rows = (pq.read_table(workspace.table(name)).to_pylist() for name in ("calibration", "evaluation"))
    seen = {row["source"] for row in calibration}
    other = [row for row in rows if row["source"] not in seen] or rows
    return tuple(torch.tensor([row["input_ids"] for row in part]) for part in (calibration, other))


def decoder_numbers(model: nn.Module) -> int:
    """Numbers in the matrices of the decoder blocks."""
    blocks: Any = model.get_submodule("model.layers")
    return sum(p.numel() for p in blocks.parameters() if p.dim() == 2)


@torch.inference_mode()
def loss(model: Any, ids: torch.Tensor) -> float:
    """Mean over tokens of the cross-entropy of the next one."""
    losses = [
        nn.functional.cross_entropy(model(input_ids=one[None], use_cache=False).logits[0, :-1].float(), one[1:])
        for one in ids
    ]
    return float(torch.stack(losses).mean())


def compress(model: Any, calibration: torch.Tensor, options: argparse.Namespace) -> Any:
    """The model with its layers replaced by theirs; their batches in order, as their loader gives them."""
    apply, pipeline, adapter = published(options.code.resolve())
    adapt(pipeline, adapter, options)
    turn_by_kind(model, calibration.shape[1])
    config = OmegaConf.load(options.code / "config" / "compression" / "compress.yaml")
    config.target_param_ratio, config.sub_method = 1 - options.ratio, options.objective
    config.save_path, config.device, config.batch_size = None, "cpu", options.batch
    batches = [{"input_ids": part} for part in calibration.split(options.batch)]
    torch.manual_seed(42)
    return apply(model, config, calibration_dataloader_train=batches, calibration_dataloader_val=None)


def published(code: Path) -> tuple[Any, Any, Any]:
    """Their entry, the module it stands in and their adapter of llama, without the services that they report to."""
    sys.path.insert(0, str(code))
    wandb: Any = types.ModuleType("wandb")
    wandb.run, wandb.log = object(), lambda values: None
    absent = {"wandb": wandb, "bitsandbytes": types.ModuleType("bitsandbytes")}
    sys.modules.update(absent)
    try:
        from aa_svd.compression import apply_compression
        from aa_svd.compression import compress as pipeline
        from aa_svd.compression.adapters import MODEL_ADAPTER_REGISTRY
        from aa_svd.compression.adapters.llama_adapter import LlamaModelAdapter
    finally:
        for name in absent:
            del sys.modules[name]
    MODEL_ADAPTER_REGISTRY[Gemma3ForCausalLM] = LlamaModelAdapter
    return apply_compression, pipeline, LlamaModelAdapter


def adapt(pipeline: Any, adapter: Any, options: argparse.Namespace) -> None:
    """The processor in the place of CUDA, progress, and no pass over the head, which only logs."""
    for name in ("get_layer0_inputs", "get_layer_outputs_with_comparison_metrics"):
        setattr(pipeline, name, on_cpu(getattr(pipeline, name)))
    pipeline.get_head_outputs_with_comparison_metrics = lambda *arguments, **keywords: ([], [])
    finetune, blocks, prefix = adapter.finetune_layer, adapter.get_layers, adapter.get_layer_name_prefix

    def trained(*arguments: Any, **keywords: Any) -> Any:
        torch.set_float32_matmul_precision("medium")
        try:
            return on_cpu(finetune)(*arguments, **(keywords | {"num_steps": options.epochs}))
        finally:
            torch.set_float32_matmul_precision("highest")

    def named(self: Any, index: int) -> Any:
        print(f"block {index}", file=sys.stderr, flush=True)
        return prefix(self, index)

    adapter.finetune_layer, adapter.get_layer_name_prefix = trained, named
    adapter.get_layers = lambda self: blocks(self)[: options.blocks]


def turn_by_kind(model: Any, length: int) -> None:
    """Give every block of a Gemma 3 the positions of its kind of attention: their code calls all with what the first is called with."""
    if not isinstance(model, Gemma3ForCausalLM):
        return
    if length > model.config.sliding_window:
        raise SystemExit(f"Sequences of {length} tokens: at most {model.config.sliding_window}, where all kinds of attention see alike.")
    hidden, positions = torch.zeros(1, length, model.config.hidden_size), torch.arange(length)[None]
    for block, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        turned = model.model.rotary_emb(hidden, positions, kind)
        block.register_forward_pre_hook(
            lambda module, arguments, keywords, turned=turned: (arguments, keywords | {"position_embeddings": turned}),
            with_kwargs=True,
        )


def on_cpu(function: Any) -> Any:
    """The function with `device` set to the processor."""
    return lambda *arguments, **keywords: function(*arguments, **(keywords | {"device": torch.device("cpu")}))


if __name__ == "__main__":
    main()
