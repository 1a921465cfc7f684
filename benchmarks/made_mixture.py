"""A mixture of experts made from a dense Llama model, since no small pretrained one is to be had without a hub.

    python benchmarks/made_mixture.py --model artifacts/prepare/model --to mixture                    # two minutes a block; goes on from what is done
    python benchmarks/made_mixture.py --model artifacts/prepare/model --to mixture --begin split      # half a minute a block

Some blocks' feed-forwards become mixtures of five experts (so that a fifth of them is one) of which a token goes to two (architecture
ernie4_5_moe, whose attention is Llama's with another order of the rows of q and k). Experts begin as

- copies: the whole feed-forward each, with noise of half the weights' deviation added, in every seventh block. They stay alike where training has
  no say, and the noise has no low rank: others stand in for a dropped expert more easily than in a mixture that was trained for long;
- split: a fifth each of the feed-forward's neurons, those whose gates are alike (balanced k-means, as MoEfication and LLaMA-MoE), besides the
  sixteenth of them that writes most, which all have, in every fourth block. No expert holds what another does.

Then router and experts of each block are trained by themselves to give what the dense feed-forward gave, on text of `wikipedia-leads`, with the
usual loss for an even load.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeConfig, PreTrainedModel

from fisherfold.inputs.corpora import find_corpus, read_articles
from fisherfold.run.workspace import Workspace

HERE = Path(__file__).resolve().parents[1]
CORPUS = "wikipedia-leads"
EXPERTS, CHOSEN = 5, 2
NOISE = 0.5  # of the deviation of a matrix
COMMON = 16  # of so many neurons one is in every expert
LLOYD = 10  # rounds of k-means
SEQUENCES, LENGTH = 96, 256  # of text for training
STEPS, BATCH = 120, 512  # tokens a step
RATE, BALANCE = 1e-3, 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama model")
    parser.add_argument("--to", type=Path, required=True, help="folder of the mixture")
    parser.add_argument("--begin", choices=BEGINNINGS, default="copies")
    options = parser.parse_args()
    make(options.model, options.to, options.begin)


def make(source: Path, folder: Path, begin: str = "copies", steps: int = STEPS, sequences: int = SEQUENCES) -> None:
    """Write the mixture to `folder`; blocks that are trained lie in `folder`.blocks until it is whole."""
    if (folder / "config.json").exists():
        return
    dense = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    beginning = BEGINNINGS[begin]
    mixture = with_mixtures(dense, beginning)
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
            begin_experts(mixture.get_submodule(name), dense.get_submodule(name), inputs[name], beginning)
            train(mixture.get_submodule(name), dense.get_submodule(name), inputs[name], steps, name)
            save_file(mixture.get_submodule(name).state_dict(), parts / f"{name}.safetensors")
    for name in names:
        mixture.get_submodule(name).load_state_dict(load_file(parts / f"{name}.safetensors"))
    mixture.save_pretrained(folder, save_original_format=False)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def with_mixtures(dense: PreTrainedModel, beginning: "Beginning") -> PreTrainedModel:
    """The mixture before experts have begun: every other tensor is the dense model's."""
    torch.manual_seed(0)
    config = dense.config
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    mixture = AutoModelForCausalLM.from_config(
        Ernie4_5_MoeConfig(
            **{key: getattr(config, key) for key in kept},
            moe_intermediate_size=beginning.width(config.intermediate_size),
            moe_num_experts=EXPERTS,
            moe_k=CHOSEN,
            moe_num_shared_experts=0,
            moe_layer_start_index=0,
            moe_layer_interval=beginning.every,
        )
    ).requires_grad_(False)
    state, own = dense.state_dict(), mixture.state_dict()
    for name in own:
        if name in state:
            own[name] = interleaved(state[name], config) if "q_proj" in name or "k_proj" in name else state[name]
    mixture.load_state_dict(own)
    return mixture.eval()


@torch.no_grad()
def begin_experts(block: nn.Module, dense: nn.Module, x: torch.Tensor, beginning: "Beginning") -> None:
    """Fill the experts and the router of a block."""
    torch.manual_seed(0)
    experts = list(beginning.experts(dense, x))
    block.experts.gate_up_proj.copy_(torch.stack([torch.cat((gate, up)) for gate, up, _ in experts]))
    block.experts.down_proj.copy_(torch.stack([down for *_, down in experts]))
    block.gate.weight.copy_(torch.randn_like(block.gate.weight) / x.shape[1] ** 0.5)


Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def copies(dense: nn.Module, x: torch.Tensor) -> Iterator[Matrices]:
    """Gate, up and down of each expert: those of the dense feed-forward with noise."""
    gate, up, down = (own.weight for own in (dense.gate_proj, dense.up_proj, dense.down_proj))
    for _ in range(EXPERTS):
        yield noisy(gate), noisy(up), noisy(down)


def noisy(weight: torch.Tensor) -> torch.Tensor:
    return weight + NOISE * weight.std() * torch.randn_like(weight)


def split(dense: nn.Module, x: torch.Tensor) -> Iterator[Matrices]:
    """Gate, up and down of each expert: rows and columns of its neurons.

    What all experts have counts once, since the weights of a token's experts sum to one; of the others a token meets CHOSEN / EXPERTS, at
    about 1 / CHOSEN, so their columns are multiplied by CHOSEN.
    """
    gate, up, down = (own.weight for own in (dense.gate_proj, dense.up_proj, dense.down_proj))
    some = x[:: max(1, len(x) // 4096)]
    written = (dense.act_fn(some @ gate.T) * (some @ up.T)).square().mean(0) * down.square().sum(0)
    order = written.argsort(descending=True)
    common, others = order[: len(order) // COMMON], order[len(order) // COMMON :]
    for own in balanced(nn.functional.normalize(gate[others], dim=1), EXPERTS):
        chosen = others[own]
        rows = torch.cat((common, chosen))
        yield gate[rows], up[rows], torch.cat((down[:, common], CHOSEN * down[:, chosen]), dim=1)


def balanced(points: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Indices of `points` [N, m] in clusters of N / count each: Lloyd's rounds, each of which assigns all at the least cost in all."""
    centres = points[torch.randperm(len(points))[:count]]
    for _ in range(LLOYD):
        cost = torch.cdist(points, centres).square().repeat_interleave(len(points) // count, dim=1)
        of = torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) // (len(points) // count)
        centres = torch.stack([points[of == own].mean(0) for own in range(count)])
    return [torch.nonzero(of == own)[:, 0] for own in range(count)]


@dataclass(frozen=True)
class Beginning:
    """How experts begin.

    Attributes:
        experts: the matrices of each, of a dense feed-forward and what it reads [N, h].
        width: neurons of an expert, of those of the dense feed-forward.
        every: of so many blocks one becomes a mixture.
    """

    experts: Callable[[nn.Module, torch.Tensor], Iterator[Matrices]]
    width: Callable[[int], int]
    every: int


BEGINNINGS = {
    "copies": Beginning(copies, lambda inner: inner, 7),
    "split": Beginning(split, lambda inner: inner // COMMON + (inner - inner // COMMON) // EXPERTS, 4),
}


def interleaved(weight: torch.Tensor, config) -> torch.Tensor:
    """The rows of q or k as this architecture turns them: what Llama has in two halves of a head alternates."""
    halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


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
