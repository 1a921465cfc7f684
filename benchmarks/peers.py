"""Token-wise Kronecker factors against curvlinops (KFAC) and kronfluence: the same model, layers and tokens, in one run.

    pip install -e '.[benchmarks]'
    python benchmarks/peers.py            # 2 blocks of SmolLM2-135M's shapes with random weights, 8 sequences of 256 tokens
    python benchmarks/peers.py --quick    # 1 block, 4 sequences of 128 tokens, under a minute

All three sum x xᵀ and d dᵀ over the same tokens for every linear layer of the decoder, with the data's own labels (the empirical
Fisher), float32, same threads; the factors are compared, so all do the same work (d up to the scale that each library gives its
loss). Ours is what a shard of stage `capture` computes with capture.gradients: none; the second line adds the rank-32 sketches of
every sequence's gradient, and the last the estimator `sequence` on them. curvlinops 3.0 has no KFOC (its nearest Kronecker
product), so nothing stands against that line. Medians of several runs, in turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from curvlinops import KFACLinearOperator
from figures import at_least
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from torch import nn
from torch.utils.data import TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fisherfold.fisher.gradient_blocks import SketchedGradients
from fisherfold.fisher.nearest_kronecker import nearest_kronecker
from fisherfold.fisher.streamed_fisher import fisher_of
from fisherfold.network.layers import find_layers, linear_modules
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.stored_sums import restored

SHAPES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 2048,  # of 49,152: the output layer is no target, and would hide what is compared
    "tie_word_embeddings": True,
}
BATCH, RANK = 2, 32


class Logits(nn.Module):
    """The model as curvlinops wants it: ids [B, T] to logits [B · (T − 1), V], one label shift with `labels_of`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


class NextToken(Task):
    """The loss for kronfluence: the sum over sequences of their mean next-token loss."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: tuple[torch.Tensor], model: nn.Module, sample: bool = False) -> torch.Tensor:
        (ids,) = batch
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels_of(ids), reduction="sum") / (ids.shape[1] - 1)

    def compute_measurement(self, batch: tuple[torch.Tensor], model: nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, 1:].flatten()


def build(blocks: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", num_hidden_layers=blocks, **SHAPES)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def ours(model: PreTrainedModel, ids: torch.Tensor, form: str = "none") -> dict[str, torch.Tensor]:
    model.requires_grad_(False)
    sums = ModelSums(model, find_layers(model), GRADIENT_FORMS.lookup(form), RANK, 0)
    gradients: list[dict] = []
    for batch in ids.split(BATCH):
        sums.add(batch)
        gradients.append(dict(sums.take_gradients()))
    found = {name: restored(name.rpartition("/")[2], values) for name, values in sums.arrays()}
    return found | {"gradients": gradients}


def sequence_pairs(gradients: list[dict]) -> None:
    """Estimator `sequence` on the sketches of every layer."""
    for name in [key.removesuffix("/left") for key in gradients[0] if key.endswith("/left")]:
        left, right = (torch.cat([batch[f"{name}/{side}"] for batch in gradients]) for side in ("left", "right"))
        nearest_kronecker(fisher_of(lambda left=left, right=right: [SketchedGradients(left, right)]))


def curvlinops(model: PreTrainedModel, ids: torch.Tensor) -> KFACLinearOperator:
    weights = [module.weight.requires_grad_(True) for module in linear_modules(model).values()]
    data = [(batch, labels_of(batch)) for batch in ids.split(BATCH)]
    operator = KFACLinearOperator(
        Logits(model),
        nn.CrossEntropyLoss(reduction="sum"),
        weights,
        data,
        check_deterministic=False,
        fisher_type="empirical",
        kfac_approx="expand",
        num_data=len(ids),
    )
    operator.compute_kronecker_factors()
    return operator


def kronfluence(model: PreTrainedModel, ids: torch.Tensor) -> dict:
    names = list(linear_modules(model))
    model.requires_grad_(False)
    for module in linear_modules(model).values():
        module.weight.requires_grad_(True)
    task = NextToken(names)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("peers", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        arguments = FactorArguments(strategy="kfac", use_empirical_fisher=True)
        begin = time.perf_counter()
        analyzer.fit_covariance_matrices(
            "kfac", TensorDataset(ids), per_device_batch_size=BATCH, factor_args=arguments, overwrite_output_dir=True
        )
        return {"seconds": time.perf_counter() - begin, **analyzer.load_covariance_matrices("kfac")}


def clock(contenders: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds and last result of each, run in turn; kronfluence says itself how long it took without setting up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for _ in range(repeats):
        for name, work in contenders.items():
            begin = time.perf_counter()
            result = results[name] = work()
            known = result.get("seconds") if isinstance(result, dict) else None
            seconds[name].append(known or time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}, results


def agreement(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest cosine distance of two factors, each known up to a scale."""
    found, expected = found.double().flatten(), expected.double().flatten()
    return 1 - (found @ expected / (found.norm() * expected.norm())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    blocks, sequences, length, repeats = (1, 4, 128, 2) if quick else (2, 8, 256, 3)
    ids = torch.randint(0, SHAPES["vocab_size"], (sequences, length), generator=torch.Generator().manual_seed(0))
    print(f"{blocks} blocks, {sequences} sequences of {length} tokens, {torch.get_num_threads()} threads", flush=True)
    gradients = ours(build(blocks), ids, "sketch")["gradients"]
    contenders = {
        "ours, token-wise factors": lambda: ours(build(blocks), ids),
        "curvlinops KFAC": lambda: curvlinops(build(blocks), ids),
        "kronfluence kfac": lambda: kronfluence(build(blocks), ids),
        "ours, with a sketch of every gradient": lambda: ours(build(blocks), ids, "sketch"),
        "ours, nearest pairs of those": lambda: sequence_pairs(gradients),
    }
    seconds, results = clock(contenders, repeats)
    for name, value in seconds.items():
        print(f"  {name:42} {value:8.2f} s", flush=True)
    check(results["ours, token-wise factors"], results["kronfluence kfac"])
    for name in ("curvlinops KFAC", "kronfluence kfac"):
        ratio = seconds[name] / seconds["ours, token-wise factors"]
        print(at_least(f"token-wise factors, time of {name} / ours", ratio, "x", 1.0))


def check(sums: dict, matrices: dict) -> None:
    """That kronfluence's factors are ours: the same inputs and gradients were summed."""
    name = "model.layers.0.self_attn.q_proj"
    inputs = agreement(sums[f"{name}/input_gram"], matrices["activation_covariance"][name])
    outputs = agreement(sums[f"{name}/output_gram"], matrices["gradient_covariance"][name])
    print(f"  cosine distance of the factors of {name}: {inputs:.1e} (inputs), {outputs:.1e} (output gradients)")


if __name__ == "__main__":
    main()
