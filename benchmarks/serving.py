"""Requests a second of the compressed model against the dense one in vLLM, all in one run.

    python benchmarks/serving.py --vllm PYTHON                         # PYTHON: an interpreter that has vLLM; ratios 0.2 and 0.4
    python benchmarks/serving.py --vllm PYTHON --project FOLDER        # ranks of `fisher` from that project's spectra
    python benchmarks/serving.py --vllm PYTHON --storage pivoted --round-to 1      # as factorize.target=transformers stores it
    python benchmarks/serving.py --vllm PYTHON --requests 8 --prompt 256 --tokens 64
    python benchmarks/serving.py --vllm PYTHON --bench                 # by vLLM's own `vllm bench throughput`, on the clock
    python benchmarks/serving.py --models FOLDER --empty --shapes llama-7b --dtype bfloat16      # written alone, for a machine that has vLLM alone

The models have the shapes of SmolLM2-135M (or of another file in data/shapes, or the project's) and random weights, for time depends on shapes
alone; storage and ranks are those of factorize.target=vllm. Each is loaded in turn by the same process, warmed up, and given all requests at once; the
median of some times counts. The dense model takes its turn twice as vLLM's own code runs it, and once in the Transformers backend, which runs the compressed
ones. On a machine with a GPU, vLLM takes that, and the clock is compared; on a CPU the processor's seconds are, which other work moves less. With --bench the best of
some turns counts. With --compiled vLLM compiles the models and records their kernels, as it does by itself; else they run as they are written (eager).
With --empty the models are written without weights and vLLM makes them up; so the orders of pivoted layers stay those of their places.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from figures import at_least
from throughput import compressed_model, dense_model, kind_of, plan_layers, read_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fisherfold.export.architecture import dense_architecture, write_code, write_config
from fisherfold.run.checkpoint import StoredTensor, write_tensors
from fisherfold.run.targets import TARGETS
from fisherfold.runtime import modeling_fisherfold
from flows.planning.shapes import shapes_of

SUITS = {keys[-1]: value for keys, value in TARGETS["vllm"].values.items()}
DENSE, AGAIN, SAME = "dense", "dense again", "dense, same backend"
WORDS = 1000
NOISE = 0.03  # of a repetition on an idle machine
SETTINGS = ("dtype", "repeats", "requests", "prompt", "tokens", "compiled", "empty")
"""What the scripts in the interpreter that has vLLM are told."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, one after another
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="an interpreter that has vLLM; without one the models are written alone")
    parser.add_argument("--models", type=Path, help="a folder in which they stay")
    parser.add_argument("--empty", action="store_true", help="without weights, which vLLM then makes up")
    parser.add_argument("--compiled", action="store_true", help="in vLLM's compiled mode")
    parser.add_argument("--project", type=Path, default=None)
    parser.add_argument("--shapes", default="smollm2-135m-instruct", help="a file in data/shapes")
    parser.add_argument("--blocks", type=int, default=None, help="decoder blocks, instead of all of them")
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--storage", default=SUITS["storage"], help="ranks.storage")
    parser.add_argument("--round-to", type=int, default=SUITS["round_to"], help="ranks.round_to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a request")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--bench", action="store_true", help="measure with `vllm bench throughput`")
    options = parser.parse_args()
    if not (options.vllm or options.models):
        parser.error("name an interpreter that has vLLM, or a folder for the models")
    with tempfile.TemporaryDirectory() as root:
        folders = write_models(options.models or Path(root), options)
        if not options.vllm:
            return print(*in_backends(folders))
        found = dict(zip(folders, in_vllm(folders, options), strict=True))
    if options.bench:
        print_bench(found, options)
    else:
        print_times(found, options)


def print_times(found: dict[str, list[float]], options: argparse.Namespace) -> None:
    """A line a model, from seconds on the clock and of the processor."""
    used = 0 if torch.cuda.is_available() else 1
    dense = min(found[name][used] for name in (DENSE, AGAIN))
    print(f"{'model':20} {'requests/s':>10} {'tokens/s':>9} {'processor s':>11} {'× dense':>8}")
    for name, (clock, processor) in found.items():
        rate = options.requests / clock
        print(f"{name:20} {rate:10.3f} {rate * options.tokens:9.1f} {processor:11.1f} {dense / found[name][used]:8.2f}")
    for ratio in options.ratios.split(","):
        print(at_least(f"requests a second over dense, ratio {ratio}", dense / found[ratio][used], "", 1.0, NOISE))


def print_bench(found: dict[str, float], options: argparse.Namespace) -> None:
    """A line a model."""
    dense = max(found[name] for name in (DENSE, AGAIN))
    for name, rate in found.items():
        print(f"{name:20} {rate:10.3f} requests/s {rate / dense:8.2f} × dense")
    for ratio in options.ratios.split(","):
        print(
            at_least(f"vllm bench, requests a second over dense, ratio {ratio}", found[ratio] / dense, "", 1.0, NOISE)
        )


def write_models(root: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Folders of the dense model, of one model a ratio, and of the dense model again, by what it is loaded as."""
    config, device = read_config(options), torch.device("meta" if options.empty else "cpu")
    layers = list(shapes_of(options.shapes, config).layers)
    with device:
        dense = dense_model(config, getattr(torch, options.dtype))
    (dense.config if options.empty else dense).save_pretrained(root / DENSE)
    folders = {DENSE: root / DENSE}
    for ratio in options.ratios.split(","):
        plan = plan_layers(layers, options.project, float(ratio), options.round_to, options.storage)
        with device:
            model = compressed_model(dense, plan, options.storage, modeling_fisherfold.replace_layers)
        stored = {
            name: {"kind": kind_of(layer.outputs, layer.inputs, rank, options.storage), "rank": rank}
            for name, (layer, rank, numbers) in plan.items()
            if numbers < layer.dense_numbers
        }
        folders[ratio] = root / ratio
        write_compressed(folders[ratio], model, stored)
    for folder in folders.values():
        write_words(folder)
    return folders | {AGAIN: root / DENSE, SAME: root / DENSE}


def write_words(folder: Path) -> None:
    """A tokenizer that has a word for each of the first tokens: `vllm bench` makes its prompts of words."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )


def write_compressed(folder: Path, model: PreTrainedModel, layers: dict[str, dict]) -> None:
    """A checkpoint folder as stage factorize writes it, of a model in memory; without weights if it has none."""
    folder.mkdir()
    architecture = dense_architecture(folder.with_name(DENSE))
    state = {name: values for name, values in model.state_dict().items() if name not in model.all_tied_weights_keys}
    tensors = {
        name: StoredTensor(tuple(values.shape), values.dtype, lambda values=values: values.contiguous())
        for name, values in sorted(state.items())
        if not values.is_meta
    }
    if tensors:
        write_tensors(folder, tensors)
    write_config(folder, architecture, model.dtype, layers)
    write_code(folder, architecture)


def in_backends(folders: dict[str, Path]) -> list[str]:
    """Each folder with the code that is to run it: vLLM's own where it has some, or the Transformers backend."""
    return [f"{'transformers' if name == SAME else 'auto'}:{folder}" for name, folder in folders.items()]


def in_vllm(folders: dict[str, Path], options: argparse.Namespace) -> list:
    """What a script beside this one prints in the interpreter that has vLLM: of each model in turn its seconds, on the clock and of the
    processor, or with --bench the most requests a second.
    """
    script = Path(__file__).with_name("vllm_throughput.py" if options.bench else "vllm_requests.py")
    settings = {name: getattr(options, name) for name in SETTINGS}
    command = [options.vllm, "-I", script, json.dumps(settings), *in_backends(folders)]
    process = subprocess.run(
        command, env=os.environ | ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
