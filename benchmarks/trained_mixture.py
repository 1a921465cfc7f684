"""A small mixture of experts trained from random numbers for some minutes, router and experts together.

    python benchmarks/trained_mixture.py --to mixture      # goes on from the last savepoint

Qwen3-MoE's architecture, four blocks of ten experts of which a token goes to two, on the lead texts of `wikipedia-leads` with a tokenizer of
2048 pieces made from them. It knows little, but no expert is another's copy.
"""

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from fisherfold.inputs.corpora import find_corpus, read_articles
from fisherfold.run.workspace import Workspace

HERE = Path(__file__).resolve().parents[1]
CORPUS = "wikipedia-leads"
HELD_OUT = 1000  # last articles, which no mixture's training sees
PIECES, LENGTH, BATCH, RATE = 2048, 128, 16, 3e-3
EXPERTS, CHOSEN = 10, 2
STEPS, SAVED = 300, 25  # steps of training; between savepoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder of the mixture")
    parser.add_argument("--steps", type=int, default=STEPS, help="of 2048 tokens")
    options = parser.parse_args()
    make(options.to, options.steps)


def articles() -> tuple[list[str], list[str]]:
    """Texts for training, and those that it does not see."""
    texts = [article.text for article in read_articles(find_corpus(Workspace(HERE), CORPUS))]
    return texts[:-HELD_OUT], texts[-HELD_OUT:]


def make(folder: Path, steps: int = STEPS) -> None:
    """Train the mixture and write it to `folder`."""
    if (folder / "config.json").exists():
        return
    seen, _ = articles()
    tokenizer = make_tokenizer(seen)
    tokens = torch.tensor(tokenizer("\n".join(seen[:6000])).input_ids)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = train(empty_mixture(), tokens, steps, folder.with_name(f"{folder.name}.training"))
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of PIECES pieces."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=PIECES, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def empty_mixture() -> PreTrainedModel:
    """The architecture with random numbers."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=PIECES,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, place: Path) -> PreTrainedModel:
    """AdamW with a cosine, on windows at random places; the router by its balancing loss, too. The state is kept in the file `place`."""
    model.set_experts_implementation("eager")  # on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    generator, start, first = torch.Generator().manual_seed(0), time.perf_counter(), 0
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if place.exists():
        state = torch.load(place)
        first = state["step"]
        generator.set_state(state["generator"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(first, steps):
        places = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        ids = tokens[places + torch.arange(LENGTH)]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % SAVED == 0:
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save(saved | {"step": step + 1, "generator": generator.get_state()}, place.with_suffix(".partial"))
            place.with_suffix(".partial").rename(place)
            print(f"step {step:5}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


if __name__ == "__main__":
    main()
