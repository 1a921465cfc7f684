"""Prefill and decode of a mixture whose experts are factorized, against the dense one, in one process.

    python benchmarks/expert_times.py                # two blocks of 32 experts of which a token goes to 4, widths 1024 and 512: three minutes
    python benchmarks/expert_times.py --round-to 8   # as ranks.round_to

Weights are random; every expert's matrices have the largest ranks that store 0.8 or 0.6 of their numbers, in one class a stack or, with the
ranks of half the experts a little lower, in two. All models run in turn, each right after the dense one; the figures are medians of its time over that
of this dense run, which other work on the machine moves less than either.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from fisherfold.allocators.cost import rank_costs
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.runtime.modeling_fisherfold_experts import replace_experts

EXPERTS, CHOSEN, HIDDEN, INNER, BLOCKS, VOCABULARY = 32, 4, 1024, 512, 2, 1024
KINDS = {"factors": "factors", "pivoted": "pivoted_outputs", "pivoted_inputs": "pivoted_inputs"}
PROMPT, PREFILL, ROUNDS, TOKENS = 32, 256, 11, 41


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round-to", type=int, default=1, help="ranks are multiples of this")
    multiple = parser.parse_args().round_to
    torch.manual_seed(0)
    with torch.no_grad():
        dense = dense_model()
        models = {"dense": dense} | {
            f"{storage}, {ratio:.0%} removed, {classes} class{'es'[: 2 * classes - 2]}": factorized(
                dense, storage, ratio, classes, multiple
            )
            for storage in KINDS
            for ratio in (0.2, 0.4)
            for classes in (1, 2)
        }
        print("| experts | prefill | token | token of 8 sequences |\n|---|---|---|---|")
        for name, row in table(models):
            print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |", flush=True)


def dense_model() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def factorized(dense: PreTrainedModel, storage: str, ratio: float, classes: int, multiple: int) -> PreTrainedModel:
    """The dense model with random factors in the place of its experts."""
    model = copy.deepcopy(dense)
    stacks = {
        name: {
            "classes": [
                {"kind": KINDS[storage], "rank": best_rank(*shape, storage, ratio) // multiple * multiple - 8 * c}
                for c in range(classes)
            ],
            "of": [expert % classes for expert in range(EXPERTS)],
        }
        for name, shape in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items()
    }
    names = [name for name, _ in model.named_modules() if name.endswith("mlp.experts")]
    replace_experts(model, {name: {"layout": "interface", "stacks": stacks} for name in names})
    for name, parameter in model.named_parameters():
        if "_classes" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def best_rank(n: int, m: int, storage: str, ratio: float) -> int:
    """The largest rank that stores at most 1 − ratio of n m numbers."""
    site = Site("expert", (LinearLayer("expert", n, m, False, False, "expert"),))
    return int(np.flatnonzero(rank_costs(site, storage) <= (1 - ratio) * n * m)[-1])


def table(models: dict[str, PreTrainedModel]) -> Iterator[tuple[str, list[float]]]:
    """Times over the dense model's, by model (the dense one's own over the run before, to see the noise): of a prefill, of a token after PROMPT tokens, of one for each of 8 sequences."""
    ids = torch.randint(VOCABULARY, (8, PREFILL))
    works = {
        name: [partial(model, input_ids=ids[:1], use_cache=False), Decode(model, ids[:1]), Decode(model, ids)]
        for name, model in models.items()
    }
    columns = [
        measure({name: own[column] for name, own in works.items()}, rounds)
        for column, rounds in enumerate((ROUNDS, TOKENS, TOKENS))
    ]
    for name in models:
        yield name, [column[name] for column in columns]


class Decode:
    """One token more after a prompt, again and again from the same cache."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self.model, self.next = model, ids[:, PROMPT : PROMPT + 1]
        self.cache = model(input_ids=ids[:, :PROMPT]).past_key_values

    def __call__(self) -> None:
        self.model(input_ids=self.next, past_key_values=self.cache)
        self.cache.crop(-1)


def measure(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of the time over that of the dense model just before, by name; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            before = clock(works["dense"])
            found[name].append(clock(work) / before)
    return {name: statistics.median(ratios[1:]) for name, ratios in found.items()}


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
