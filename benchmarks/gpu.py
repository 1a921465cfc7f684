"""Capture and inference on a CUDA device, in the shapes of LLaMA-7B with random weights; one JSON.

    sh benchmarks/gpu.sh                          # the tests marked gpu, then this
    python benchmarks/gpu.py --blocks 4 --repeats 5
    sh benchmarks/gpu.sh --compile                # models through torch.compile, too: half a minute more for each of 72

capture: seconds of a bare gradient pass and of one that sums every layer's statistics (bfloat16 network, float32 sums), and their ratio.
inference: seconds of dense, pivoted and plain layers of the same uniform ranks, each pass replayed as a CUDA graph so that kernels are
timed and not Python; `speedup` is dense over compressed. A use is (sequences, tokens); one token is a decoding step without its cache,
which no layer of ours touches. Medians; runs take turns.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from capture import clock
from throughput import compressed_model, dense_model, plan_layers
from transformers import PreTrainedModel

from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import find_layers
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.layer_sums import ModelSums
from flows.planning.shapes import find_config

USES = {"decode 1": (1, 1), "decode 32": (32, 1), "prefill 512": (1, 512), "prefill 8 x 512": (8, 512)}
CAPTURED = (2, 1024)  # sequences and tokens of a pass of the capture
WARM = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-7b", help="a file in data/shapes")
    parser.add_argument("--blocks", type=int, default=8, help="decoder blocks: those of a model do the same work each")
    parser.add_argument("--compile", action="store_true", help="torch.compile before the CUDA graph is taken")
    parser.add_argument("--ratios", default="0.2,0.4,0.6")
    parser.add_argument("--multiples", default="32,128", help="of the ranks")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "this machine has no CUDA device; the code alone is tried by --device cpu --shapes smollm2-135m-instruct --blocks 1"
        )
    config = find_config(Workspace(Path()), options.shapes)
    config.num_hidden_layers = options.blocks
    with torch.device(options.device):  # a billion random numbers take minutes on a processor
        dense = dense_model(config, torch.bfloat16).requires_grad_(False)
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    found = {
        "device": name,
        "torch": torch.__version__,
        "shapes": options.shapes,
        "blocks": options.blocks,
        "compiled": options.compile,
    }
    found["capture"] = capture_times(dense, options.repeats)
    print(json.dumps(found), flush=True)
    with torch.no_grad():
        found["inference"] = inference_times(dense, options)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def capture_times(model: PreTrainedModel, repeats: int) -> dict[str, float]:
    """Median seconds of the bare pass and with token-wise sums, and their ratio."""
    ids = torch.randint(model.config.vocab_size, CAPTURED, generator=torch.Generator().manual_seed(0))
    sums = ModelSums(model, find_layers(model), GRADIENT_FORMS.lookup("none"), 1, 0)
    works = {"bare": lambda ids: gradient_pass(model, ids), "sums": sums.add}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            times[name].append(clock(work, ids))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    return seconds | {"ratio": seconds["sums"] / seconds["bare"]}


def inference_times(dense: PreTrainedModel, options: argparse.Namespace) -> list[dict]:
    """One row a ratio, multiple of the ranks and use."""
    rows = []
    for ratio in map(float, options.ratios.split(",")):
        for multiple in map(int, options.multiples.split(",")):
            plan = plan_layers(find_layers(dense), None, ratio, multiple, "pivoted")
            with torch.device(options.device):
                models = {"dense": dense} | {
                    name: compressed_model(dense, plan, storage)
                    for name, storage in (("pivoted", "pivoted"), ("plain", "factors"))
                }
            for use, shape in USES.items():
                ids = torch.randint(dense.config.vocab_size, shape).to(options.device)
                row = {"ratio": ratio, "multiple": multiple, "use": use}
                rows.append(
                    row
                    | compare(
                        {name: replayed(model, ids, options.compile) for name, model in models.items()}, options.repeats
                    )
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def replayed(model: PreTrainedModel, ids: torch.Tensor, compiled: bool) -> Callable[[], object]:
    """A pass over `ids`, compiled if asked, as a CUDA graph; as it is on other devices."""
    torch.compiler.reset()  # else layers of other ranks count as recompilations of these, of which eight are allowed
    network = torch.compile(model.model, dynamic=False) if compiled else model.model

    def run() -> object:
        return network(input_ids=ids, use_cache=False).last_hidden_state

    if not ids.is_cuda:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compare(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds by name, and how many times as fast as dense."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(1e3 * clock(lambda _, run=run: run(), torch.empty(0)))
    milliseconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    return milliseconds | {
        f"speedup {name}": milliseconds["dense"] / ms for name, ms in milliseconds.items() if name != "dense"
    }


if __name__ == "__main__":
    main()
