"""Token throughput of the compressed model against the dense one, and how near it comes to what its size allows.

    python benchmarks/throughput.py                          # every ratio, dtype and way of use; uniform ranks
    python benchmarks/throughput.py --project FOLDER         # ranks of `fisher` from that project's spectra
    python benchmarks/throughput.py --quick                  # ratio 0.4, prefill of one sequence and decoding
    python benchmarks/throughput.py --round-to 1             # ranks as they come, not multiples of 32
    python benchmarks/throughput.py --storage pivoted_outputs    # instead of the side whose order is shorter (see ranks.storage)
    python benchmarks/throughput.py --shapes llama-7b --blocks 2 --ratios 0.4,0.6 --uses 'prefill 1,decode 1' --repeats 3    # larger layers

The model has the shapes of SmolLM2-135M (or of another file in data/shapes, or the project's) and random weights, for time depends on shapes alone. Prefill is a pass
over 512 tokens that returns the last logits; decoding adds tokens one by one to a cache of 128. Dense, pivoted and plain factors of
the same ranks take turns, the pivoted ones twice: as `import fisherfold.runtime` runs them (`fast_cpu`), and by the layers of the
checkpoint's own file; medians.

speedup = dense time / compressed time. bound = 1 / (1 − f + f s), Amdahl's law with f the targeted layers' share of the dense time
and s the share of their numbers that is stored. `products` is the bound with the measured time of the bare matrix products
(the layer's own F.linear calls without order, sum or bias, in the same pass) in the place of f s: what the matrix kernels make of s.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from figures import at_least
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from fisherfold.allocators.allocation import ALLOCATORS, allocate, pose
from fisherfold.allocators.cost import PIVOTED_SIDES, choose_storage
from fisherfold.network.layers import LinearLayer, find_layers
from fisherfold.network.sites import find_sites
from fisherfold.run.params import RanksParams
from fisherfold.run.workspace import Workspace
from fisherfold.runtime import fast_cpu
from fisherfold.runtime import modeling_fisherfold as own_file
from flows.planning.shapes import find_config
from stages.ranks import read_spectra

TARGET = 0.9  # of the bound, at ratios 0.4 and 0.6
PREFILL, CONTEXT, DECODED = 512, 128, 8
ALLOCATION = {
    # glibc hands large buffers back to the system and faults them in anew at every pass, which costs every model the more the
    # more buffers it has: let it keep them, for all alike.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=None)
    parser.add_argument("--shapes", default="smollm2-135m-instruct", help="a file in data/shapes")
    parser.add_argument("--blocks", type=int, default=None, help="decoder blocks, instead of all of them")
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--uses", default=",".join(USES))
    parser.add_argument("--round-to", type=int, default=32)
    parser.add_argument("--storage", choices=tuple(PIVOTED_SIDES), default="pivoted", help="ranks.storage")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="all cores if not given")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.ratios, options.uses, options.repeats = "0.4", "prefill 1,decode 1", 5
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    cells = []
    print(f"{'dtype':9} {'ratio':>5} {'use':10} {'dense':>9} {'share':>6} {'stored':>6} {'bound':>6}", end="")
    print(f" {'pivoted':>8} {'own file':>8} {'plain':>6} {'of bound':>8} {'products':>8} {'of these':>8}")
    for dtype in options.dtypes.split(","):
        dense = dense_model(read_config(options), getattr(torch, dtype))
        layers = find_layers(dense)
        for ratio in map(float, options.ratios.split(",")):
            plan = plan_layers(layers, options.project, ratio, options.round_to, options.storage)
            models = {
                "dense": dense,
                "pivoted": compressed_model(dense, plan, options.storage),
                "own file": compressed_model(dense, plan, options.storage, own_file.replace_layers),
                "plain": compressed_model(dense, plan, "factors"),
            }
            for use in options.uses.split(","):
                cells.append({"dtype": dtype, "ratio": ratio, "use": use} | measure(models, plan, use, options.repeats))
                print_cell(cells[-1])
    report(cells)


def read_config(options: argparse.Namespace) -> PreTrainedConfig:
    """Of the project's model, or of the shapes asked for."""
    workspace = Workspace(options.project or Path())
    config = find_config(workspace, str(workspace.model.resolve()) if options.project else options.shapes)
    if options.blocks:
        config.num_hidden_layers = options.blocks
    return config


def dense_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def plan_layers(
    layers: list[LinearLayer], project: Path | None, ratio: float, round_to: int, storage: str
) -> dict[str, tuple[LinearLayer, int, int]]:
    """(layer, rank, stored numbers) of every layer that is not dense: `fisher` on the project's spectra, else uniform."""
    name = "fisher" if project else "uniform"
    sites = find_sites(layers, shared=False)
    none = [torch.zeros(site.full_rank).numpy() for site in sites]
    spectra = read_spectra(project / "artifacts/subspace/spectra.parquet", sites) if project else none
    params = RanksParams(ratio=ratio, allocator=name, round_to=round_to, storage=storage)
    ranks = allocate(pose(sites, spectra, params), ALLOCATORS.lookup(name))
    choices = [choose_storage(site, int(rank), storage) for site, rank in zip(sites, ranks)]
    return {layer.name: (layer, choice.rank, sum(choice.numbers)) for layer, choice in zip(layers, choices)}


def compressed_model(
    dense: PreTrainedModel, plan: Mapping[str, tuple], storage: str, replace_layers: Callable = fast_cpu.replace_layers
) -> PreTrainedModel:
    """A copy of the dense model (untouched weights shared) with random layers of the planned ranks."""
    torch.manual_seed(0)
    model = copy.deepcopy(dense, {id(weight): weight for weight in dense.parameters()})
    layers = {
        name: {"kind": kind_of(layer.outputs, layer.inputs, rank, storage), "rank": rank}
        for name, (layer, rank, numbers) in plan.items()
        if numbers < layer.dense_numbers
    }
    replace_layers(model, layers)
    for name in layers:
        new = model.get_submodule(name)
        if hasattr(new, "order"):
            new.order = torch.randperm(len(new.order))
    return model.to(dense.dtype).eval()


def kind_of(n: int, m: int, rank: int, storage: str) -> str:
    """The runtime's name of a layer stored like this."""
    if not rank:
        return "zero"
    if storage == "factors":
        return storage
    return f"pivoted_{PIVOTED_SIDES[storage] or ('outputs' if n <= m else 'inputs')}"


def prefill(batch: int) -> Callable[[PreTrainedModel], Callable[[], None]]:
    def prepare(model: PreTrainedModel) -> Callable[[], None]:
        ids = torch.randint(0, model.config.vocab_size, (batch, PREFILL), generator=torch.Generator().manual_seed(0))
        return lambda: model(ids, use_cache=True, logits_to_keep=torch.tensor([PREFILL - 1]))

    return prepare


def decode(model: PreTrainedModel) -> Callable[[], None]:
    """DECODED steps of one token on a cache of CONTEXT tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    model(ids, past_key_values=cache)

    def run() -> None:
        for step in range(DECODED):
            model(ids[:, step : step + 1], past_key_values=cache)
        cache.crop(-DECODED)

    return run


USES: dict[str, tuple[int, Callable]] = {
    "prefill 1": (PREFILL, prefill(1)),
    "prefill 8": (8 * PREFILL, prefill(8)),
    "decode 1": (DECODED, decode),
}
"""Tokens of one run, and how to make a run of a model."""


def measure(models: Mapping[str, PreTrainedModel], plan: Mapping[str, tuple], use: str, repeats: int) -> dict:
    """Medians of one cell. Runs take turns; the time inside layers is taken in extra runs, which the others do not see."""
    tokens, prepare = USES[use]
    runs = {name: prepare(model) for name, model in models.items()}
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    inside = {"dense": [], "products": []}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
        with timed_layers(models["dense"], plan, dense_product) as spent:
            inside["dense"].append(timed(runs["dense"]) and sum(spent))
        with timed_layers(models["pivoted"], plan, bare_products) as spent:
            inside["products"].append(timed(runs["pivoted"]) and sum(spent))
    time_of = {name: statistics.median(values) for name, values in seconds.items()}
    share = statistics.median(inside["dense"]) / time_of["dense"]
    stored = sum(numbers for _, _, numbers in plan.values()) / sum(l.dense_numbers for l, _, _ in plan.values())
    products = statistics.median(inside["products"]) / statistics.median(inside["dense"])
    speedup = {name: time_of["dense"] / value for name, value in time_of.items()}
    return {
        "tokens": tokens / time_of["dense"],
        "share": share,
        "stored": stored,
        "bound": 1 / (1 - share + share * stored),
        "products": 1 / (1 - share + share * products),
        "pivoted": speedup["pivoted"],
        "own file": speedup["own file"],
        "plain": speedup["plain"],
    }


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def timed_layers(model: PreTrainedModel, plan: Mapping[str, tuple], product: Callable):
    """Replace the forward pass of the planned layers by `product(module)`, and collect the seconds that it takes."""
    spent: list[float] = []

    def listening(module: nn.Module) -> Callable:
        compute = product(module)

        def forward(x: torch.Tensor) -> torch.Tensor:
            start = time.perf_counter()
            y = compute(x)
            spent.append(time.perf_counter() - start)
            return y

        return forward

    modules = [model.get_submodule(name) for name in plan]
    for module in modules:
        module.forward = listening(module)
    try:
        yield spent
    finally:
        for module in modules:
            del module.forward


def dense_product(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.linear(x, module.weight, module.bias)


def bare_products(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The two products of a pivoted layer on inputs that lie ready; their result is not used, the output is not the layer's."""
    if isinstance(module, nn.Linear):
        return dense_product(module)
    if isinstance(module, own_file.ZeroLinear):
        return type(module).forward.__get__(module)
    up, down = module.up.weight, module.down.weight
    n = len(module.order) if isinstance(module, own_file.PivotedOutputLinear) else len(up)
    outputs: dict[tuple, torch.Tensor] = {}  # of the right shape, whose making is not to be timed

    def compute(x: torch.Tensor) -> torch.Tensor:
        F.linear(F.linear(x.flatten(0, -2)[:, : down.shape[1]], down), up)
        shape = *x.shape[:-1], n
        return outputs[shape] if shape in outputs else outputs.setdefault(shape, torch.zeros(shape, dtype=x.dtype))

    return compute


def print_cell(cell: dict) -> None:
    print(
        f"{cell['dtype']:9} {cell['ratio']:5} {cell['use']:10} {cell['tokens']:7.0f}/s {cell['share']:6.2f} {cell['stored']:6.2f} "
        f"{cell['bound']:6.2f} {cell['pivoted']:8.2f} {cell['own file']:8.2f} {cell['plain']:6.2f} {cell['pivoted'] / cell['bound']:8.2f} "
        f"{cell['products']:8.2f} {cell['pivoted'] / cell['products']:8.2f}",
        flush=True,
    )


def report(cells: list[dict]) -> None:
    """The three figures; the bound's of those cells that have a target."""
    targeted = [cell for cell in cells if cell["ratio"] >= 0.4] or cells
    fast = min(cell["pivoted"] / cell["own file"] for cell in cells)
    print(at_least("fast_cpu over the checkpoint's own file, least", fast, "", 1.0, 0.02))
    pivoted = min(cell["pivoted"] / cell["plain"] for cell in cells)
    print(at_least("pivoted over plain factors, least", pivoted, "", 1.0, 0.02))
    least = min(cell["pivoted"] / cell["bound"] for cell in targeted)
    print(at_least("speedup over Amdahl's bound, least", least, "", TARGET))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATION.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATION})
    main()
