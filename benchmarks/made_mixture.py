"""A mixture of experts made from a dense Llama model, since no small pretrained one is to be had without a hub.

    python benchmarks/made_mixture.py --model artifacts/prepare/model --to mixture      # some minutes a block; goes on from what is done

Every seventh block's feed-forward becomes a mixture of five experts (so that a fifth of them is one) of which a token goes to two (architecture ernie4_5_moe, whose attention is
Llama's with another order of the rows of q and k). Each expert begins as a copy with noise of half the weights' deviation added. Then router and
experts of each block are trained by themselves to give what the dense feed-forward gave, on text of `wikipedia-leads`, with the usual loss for an
even load. So the experts are alike where training had no say, more than those of a mixture that was trained for long: the others stand
in for a dropped one more easily than there.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeConfig, PreTrainedModel

from fisherfold.inputs.corpora import find_corpus, read_articles
from fisherfold.run.workspace import Workspace

HERE = Path(__file__).resolve().parents[1]
CORPUS = "wikipedia-leads"
EVERY, EXPERTS, CHOSEN = 7, 5, 2
NOISE = 0.5  # of the deviation of a matrix
SEQUENCES, LENGTH = 96, 256  # of text for training
STEPS, BATCH = 120, 512  # tokens a step
RATE, BALANCE = 1e-3, 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama model")
    parser.add_argument("--to", type=Path, required=True, help="folder of the mixture")
    options = parser.parse_args()
    make(options.model, options.to)


def make(source: Path, folder: Path, steps: int = STEPS, sequences: int = SEQUENCES) -> None:
    """Write the mixture to `folder`; blocks that are trained lie in `folder`.blocks until it is whole."""
    if (folder / "config.json").exists():
        return
    dense = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    mixture = copied(dense)
    parts = folder.with_name(f"{folder.name}.blocks")
    parts.mkdir(parents=True, exist_ok=True)
    names = [name for name, module in mixture.named_modules() if hasattr(module, "experts")]
    missing = [name for name in names if not (parts / f"{name}.safetensors").exists()]
    if missing:
        seen = parts / "inputs.safetensors"
        if not seen.exists():
            ids = text(AutoTokenizer.from_pretrained(source), sequences)
            save_file(inputs_of(dense, names, ids), seen.with_suffix(".partial"))
            seen.with_suffix(".partial").rename(seen)
        inputs = load_file(seen)
        for name in missing:
            train(mixture.get_submodule(name), dense.get_submodule(name), inputs[name], steps, name)
            save_file(mixture.get_submodule(name).state_dict(), parts / f"{name}.safetensors")
    for name in names:
        mixture.get_submodule(name).load_state_dict(load_file(parts / f"{name}.safetensors"))
    mixture.save_pretrained(folder, save_original_format=False)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def copied(dense: PreTrainedModel) -> PreTrainedModel:
    """The mixture before training: the dense model's tensors, each chosen feed-forward once an expert, with noise."""
    torch.manual_seed(0)
    config = dense.config
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    mixture = AutoModelForCausalLM.from_config(
        Ernie4_5_MoeConfig(
            **{key: getattr(config, key) for key in kept},
            moe_intermediate_size=config.intermediate_size,
            moe_num_experts=EXPERTS,
            moe_k=CHOSEN,
            moe_num_shared_experts=0,
            moe_layer_start_index=0,
            moe_layer_interval=EVERY,
        )
    ).requires_grad_(False)
    state, own = dense.state_dict(), mixture.state_dict()
    for name in own:
        if name in state:
            own[name] = interleaved(state[name], config) if "q_proj" in name or "k_proj" in name else state[name]
    for name, module in mixture.named_modules():
        if hasattr(module, "experts"):
            gate, up, down = (state[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            own[f"{name}.experts.gate_up_proj"] = torch.stack(
                [torch.cat((noisy(gate), noisy(up))) for _ in range(EXPERTS)]
            )
            own[f"{name}.experts.down_proj"] = torch.stack([noisy(down) for _ in range(EXPERTS)])
            own[f"{name}.gate.weight"] = torch.randn(EXPERTS, gate.shape[1]) / gate.shape[1] ** 0.5
    mixture.load_state_dict(own)
    return mixture.eval()


def interleaved(weight: torch.Tensor, config) -> torch.Tensor:
    """The rows of q or k as this architecture turns them: what Llama has in two halves of a head alternates."""
    halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def noisy(weight: torch.Tensor) -> torch.Tensor:
    return weight + NOISE * weight.std() * torch.randn_like(weight)


def text(tokenizer, sequences: int) -> torch.Tensor:
    """Token ids [S, T] from the start of the corpus."""
    ids: list[int] = []
    for article in read_articles(find_corpus(Workspace(HERE), CORPUS)):
        ids += tokenizer(article.text).input_ids
        if len(ids) >= sequences * LENGTH:
            break
    return torch.tensor(ids[: sequences * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def inputs_of(dense: PreTrainedModel, names: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the dense feed-forwards read, [tokens, h]."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, own=seen[name]: own.append(arguments[0].flatten(0, 1))
        )
    for number, batch in enumerate(ids.split(4)):
        dense.model(input_ids=batch, use_cache=False)
        if number % 10 == 0:
            print(f"reading, {4 * number} of {len(ids)} sequences", flush=True)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def train(block: nn.Module, dense: nn.Module, x: torch.Tensor, steps: int, name: str) -> None:
    """AdamW on ‖ŷ − y‖² / ‖y‖² of tokens x [N, h], the rate along a cosine."""
    trained = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for step, batch in enumerate(batches(x, steps)):
        wanted = dense(batch).detach()
        error = ((block(batch[None])[0] - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        (error + BALANCE * uneven(block, batch)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 30 == 0 or step == steps - 1:
            print(f"{name}, step {step}: error {error.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    for parameter in trained:
        parameter.requires_grad_(False)


def batches(x: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield x[torch.randint(len(x), (BATCH,), generator=generator)]


def uneven(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """E Σ_e (share of the choices) (mean probability): 1 for an even load (Switch Transformer, arXiv 2101.03961)."""
    logits, _, chosen = block.gate(x)
    used = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
    return EXPERTS * (used * logits.softmax(-1).mean(0)).sum()


if __name__ == "__main__":
    main()
