"""Tokens a second of the rows of benchmarks/bytes.py: prefill of 512 tokens and decoding, each against the dense model in the same engine.

    python benchmarks/bytes_speed.py --project . --folder FOLDER

Two engines, since none here runs every row in the numbers it is kept in. transformers multiplies in float32: compressed-tensors unpacks a layer at
its first call, so few bits change no product there, and a row differs from dense by its ranks alone. llama.cpp multiplies by its own
packed numbers; its files are those that benchmarks/bytes.py left in the folder. All take turns in one run; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from throughput import CONTEXT, DECODED, PREFILL, compressed_model, decode, dense_model, prefill
from transformers import AutoConfig, PreTrainedModel

from fisherfold.network.layers import find_layers
from fisherfold.run.workspace import Workspace

USES = {"prefill": PREFILL, "decode": DECODED}
SPREAD = 7919  # steps through the vocabulary, for tokens that differ


def runs_of_torch(model: PreTrainedModel) -> dict[str, Callable[[], float]]:
    """Seconds of one prefill, and of DECODED steps."""
    return {"prefill": timed(prefill(1)(model)), "decode": timed(decode(model))}


def runs_of_llama_cpp(path: Path, threads: int) -> dict[str, Callable[[], float]]:
    """The same by llama.cpp."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=1024, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    tokens = [place * SPREAD % model.n_vocab() for place in range(PREFILL)]

    def read() -> float:
        model.reset()
        return timed(lambda: model.eval(tokens))()

    def write() -> float:
        model.reset()
        model.eval(tokens[:CONTEXT])
        return timed(lambda: [model.eval([token]) for token in tokens[CONTEXT : CONTEXT + DECODED]])()

    return {"prefill": read, "decode": write}


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def planned(dense: PreTrainedModel, row: dict, storage: str) -> PreTrainedModel:
    """A model with random layers of the row's ranks; the dense one if it cuts none."""
    layers = {layer.name: layer for layer in find_layers(dense)}
    plan = {}
    for name, (rank, *_) in row["layers"].items():
        n, m = layers[name].outputs, layers[name].inputs
        plan[name] = layers[name], rank, n * m if rank == min(n, m) else rank * (n + m - rank)
    return compressed_model(dense, plan, storage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--folder", type=Path, required=True, help="of benchmarks/bytes.py")
    parser.add_argument("--rows", default="ours-q4_k_m,ours-q2_k,ours-3.5-all,rank-9.6", help="those that cut ranks")
    parser.add_argument("--storage", default="pivoted")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    dense = dense_model(AutoConfig.from_pretrained(Workspace(options.project.resolve()).model), torch.float32)
    engines = {"transformers": {"dense": runs_of_torch(dense)}, "llama.cpp": {}}
    for name in options.rows.split(","):
        row = json.loads((options.folder / f"{name}.json").read_text(encoding="utf-8"))
        engines["transformers"][name] = runs_of_torch(planned(dense, row, options.storage))
    for path in sorted(options.folder.glob("*.gguf")):
        name = "dense" if path.stem == "whole" else path.stem
        engines["llama.cpp"][name] = runs_of_llama_cpp(path, torch.get_num_threads())
    print(f"{'engine':14} {'row':20} " + " ".join(f"{use:>10} {'over dense':>10}" for use in USES))
    for engine, models in engines.items():
        for runs in models.values():
            [run() for run in runs.values()]  # warms up
        seconds = {name: {use: [] for use in USES} for name in models}
        for _ in range(options.repeats):
            for name, runs in models.items():
                for use, run in runs.items():
                    seconds[name][use].append(run())
        for name, own in seconds.items():
            speed = {use: USES[use] / statistics.median(own[use]) for use in USES}
            over = {use: statistics.median(seconds["dense"][use]) / statistics.median(own[use]) for use in USES}
            print(
                f"{engine:14} {name:20} " + " ".join(f"{speed[use]:8.1f}/s {over[use]:10.2f}" for use in USES),
                flush=True,
            )


if __name__ == "__main__":
    main()
