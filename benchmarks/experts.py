"""Factorized experts against dropped ones, on a small mixture that is trained here for some minutes.

    python benchmarks/experts.py --project FOLDER      # keeps the trained model and the stages' outputs there, and goes on from them
    python benchmarks/experts.py --quick               # 40 steps of training: shows that it runs, and no more

The mixture is Qwen3-MoE's architecture, four blocks of ten experts of which a token goes to two, trained from random numbers on the
lead texts of `wikipedia-leads` with a tokenizer of 2048 pieces made from them. It knows little, but its router and its experts were
trained together. Dropped experts are those of least Fisher mass, the Σ σ² of `down_proj` (what the loss rises by if it becomes zero), the
same number in every block, their rows taken out of the router (as REAP does, which scores experts by router weights and norms of outputs). The
factorized models remove as many numbers, from all layers by one budget (fisher) or the same share of every layer (uniform).
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

import fisherfold.runtime  # noqa: F401  it loads compressed checkpoints
from fisherfold.inputs.corpora import find_corpus, read_articles
from fisherfold.network.layers import read_layers
from fisherfold.run.params import Params
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from stages import capture, factorize, kronecker, prepare, ranks, subspace

HERE = Path(__file__).resolve().parents[1]
CORPUS = "wikipedia-leads"
PIECES, LENGTH, BATCH, RATE = 2048, 128, 16, 3e-3
EXPERTS, CHOSEN = 10, 2
SHARES = (0.2, 0.4)
TARGET = 0.8  # perplexity of the factorized model over that with experts dropped
HELD_OUT = 1000  # last articles, which training does not see and the stages draw from
PARAMS = {
    "prepare": {
        "model": "mixture",
        "corpus": "held-out.txt",
        "questions": None,
        "self_written": 0.0,
        "held_out_prompts": 0,
        "sequence_length": LENGTH,
        "calibration_sequences": 128,
        "tuning_sequences": 8,
        "evaluation_sequences": 96,
    },
    "capture": {"knowledge_questions": 0, "tokens_per_sequence": 0, "batch_size": 8, "sequences_per_shard": 32},
    "kronecker": {"diagnostics": "none", "dependence_draws": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=600, help="of training, of 2048 tokens")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.project or Path(temporary)).resolve()
        if not (folder / "mixture" / "config.json").exists():
            make_mixture(folder, 40 if options.quick else options.steps)
        report(compare(Workspace(folder), Params.model_validate(PARAMS)))


def make_mixture(folder: Path, steps: int) -> None:
    """Train the mixture and write it to ``folder/mixture``, and the articles that it has not seen to ``folder/held-out.txt``."""
    texts = [article.text for article in read_articles(find_corpus(Workspace(HERE), CORPUS))]
    seen, held_out = texts[:-HELD_OUT], texts[-HELD_OUT:]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "held-out.txt").write_text(
        "\n\n".join(" ".join(text.split()) for text in held_out) + "\n", encoding="utf-8"
    )
    tokenizer = make_tokenizer(seen)
    model = train(empty_mixture(), torch.tensor(tokenizer("\n".join(seen[:6000])).input_ids), steps)
    model.save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")


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


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int) -> PreTrainedModel:
    """AdamW with a cosine, on windows at random places; the router by its balancing loss, too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(steps):
        places = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        ids = tokens[places + torch.arange(LENGTH)]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


def compare(workspace: Workspace, params: Params) -> list[dict]:
    """Rows of the table: the dense model, and by share dropped experts and factorized layers."""
    for stage in (prepare, capture, kronecker, subspace):
        stage.run(workspace, getattr(params, stage.__name__.rpartition(".")[2]))
    layers = read_layers(workspace.out("prepare"))
    in_experts = sum(layer.dense_numbers for layer in layers if layer.stack)
    dense = AutoModelForCausalLM.from_pretrained(workspace.model)
    rows = [{"model": "dense", "share": 0.0, **measure(dense, workspace)}]
    for share in SHARES:
        kept = kept_experts(workspace, share)
        rows.append({"model": "dropped", "share": share, **measure(drop_experts(dense, kept), workspace)})
        ratio = share * in_experts / sum(layer.dense_numbers for layer in layers)
        for allocator in ("fisher", "uniform"):
            changed = params.ranks.model_copy(update={"ratio": ratio, "allocator": allocator})
            ranks.run(workspace, changed)
            factorize.run(workspace, params.factorize)
            compressed = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "model")
            rows.append({"model": allocator, "share": share, **measure(compressed, workspace)})
    return rows


def kept_experts(workspace: Workspace, share: float) -> dict[str, list[int]]:
    """By module of experts, those of most Fisher mass."""
    table = pq.read_table(workspace.out("subspace") / "spectra.parquet").to_pylist()
    mass: dict[str, dict[int, float]] = {}
    for row in table:
        stack, _, expert = row["module"].rpartition(".")
        if stack.endswith("experts.down_proj"):
            own = mass.setdefault(stack.rpartition(".")[0], dict.fromkeys(range(EXPERTS), 0.0))
            own[int(expert)] += row["sigma"] ** 2
    count = EXPERTS - round(share * EXPERTS)
    return {name: sorted(sorted(own, key=lambda e: -own[e])[:count]) for name, own in mass.items()}


def drop_experts(dense: PreTrainedModel, kept: dict[str, list[int]]) -> PreTrainedModel:
    """The mixture of the experts that are kept: an ordinary, smaller model of the same architecture."""
    state = dict(dense.state_dict())
    for name, experts in kept.items():
        for own in (f"{name}.gate_up_proj", f"{name}.down_proj", f"{name.rpartition('.')[0]}.gate.weight"):
            state[own] = state[own][experts]
    config = type(dense.config).from_dict(dense.config.to_dict() | {"num_experts": len(next(iter(kept.values())))})
    small = AutoModelForCausalLM.from_config(config)
    small.load_state_dict(state)
    return small.eval()


@torch.no_grad()
def measure(model: PreTrainedModel, workspace: Workspace) -> dict:
    """Perplexity on the evaluation sequences, parameters, and milliseconds of a prefill and of a token."""
    ids = read_sequences(workspace.table("evaluation"), PIECES)
    losses = [model(input_ids=some, labels=some, use_cache=False).loss.item() for some in ids.split(8)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = ids.flatten()[None, :512]
    cache = model(input_ids=text[:, :64]).past_key_values
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "parameters": parameters,
        "prefill": fastest(lambda: model(input_ids=text, use_cache=False)),
        "token": fastest(lambda: model(input_ids=text[:, :1], past_key_values=cache)),
    }


def fastest(run) -> float:
    """Milliseconds, the median of nine."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[4]


def lines(rows: list[dict]) -> Iterator[str]:
    yield f"{'share':>5} {'model':8} {'perplexity':>10} {'× dense':>8} {'parameters':>10} {'prefill ms':>10} {'token ms':>9}"
    for row in rows:
        yield (
            f"{row['share']:5.1f} {row['model']:8} {row['perplexity']:10.2f} {row['perplexity'] / rows[0]['perplexity']:8.3f} "
            f"{row['parameters']:10} {row['prefill']:10.1f} {row['token']:9.2f}"
        )


def report(rows: list[dict]) -> None:
    print(*lines(rows), sep="\n")
    found = {(row["model"], row["share"]): row["perplexity"] for row in rows}
    worst = max(found["fisher", share] / found["dropped", share] for share in SHARES)
    uniform = all(found["fisher", share] <= found["uniform", share] for share in SHARES)
    figure = "perplexity of factorized experts over that with the same share dropped, worst"
    print(
        json.dumps(
            {"figure": figure, "value": worst, "unit": "ratio", "target": TARGET, "holds": worst <= TARGET and uniform}
        )
    )


if __name__ == "__main__":
    main()
