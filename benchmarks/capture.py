"""Time of the capture against a bare activation-gradient pass, and its memory against the number of sequences.

    python benchmarks/capture.py                          # random weights in the shapes of SmolLM2-135M; five minutes on two cores
    python benchmarks/capture.py --quick                  # a third of its blocks and vocabulary, under a minute
    python benchmarks/capture.py --mixture                # random weights of a mixture: 16 experts of which a token goes to 4
    python benchmarks/capture.py --model FOLDER           # a model of yours (--dtype bfloat16)
    python benchmarks/capture.py --model FOLDER --times   # without the memory

The layers are those that stage prepare would take. The bare pass runs the same code without hooks: frozen weights, one label shift, the same loss and gradient
of the logits; that of a mixture runs experts as transformers does.
All three run in turn on the same batch in this process; the first round is not counted and ratios are of medians.

Memory is the peak of a process that runs the whole stage with sketches, on a model of a few such blocks.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import at_most, peak_bytes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fisherfold.network.experts import expert_modules, unfold_experts
from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import find_layers, write_layers
from fisherfold.network.models import DTYPES, load_model
from fisherfold.network.targets import find_targets
from fisherfold.run.params import CaptureParams, PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import write_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.layer_sums import ModelSums
from stages import capture

BATCH, LENGTH, RANK = 4, 256, 32
TOKENWISE, SKETCHED, GROWTH = 1.8, 2.6, 1.05  # targets
MIXTURE = 2.2  # instead of TOKENWISE, for a mixture of experts
FEW, MANY = 32, 256  # sequences


SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "dense": ("llama", {"intermediate_size": 1536}),
    "mixture": (
        "qwen3_moe",
        {"moe_intermediate_size": 384, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4},
    ),
}
"""By kind the architecture, and what is its own: SmolLM2-135M's MLP of 1536, or 16 experts of 384, of which a token goes to 4."""


def random_model(kind: str, blocks: int, vocabulary: int) -> PreTrainedModel:
    """Of one of `SHAPES`, SmolLM2-135M's widths otherwise: 576, 9 query heads on 3 of keys and values."""
    torch.manual_seed(0)
    architecture, own = SHAPES[kind]
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocabulary,
        hidden_size=576,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **own,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def measure_times(model: PreTrainedModel, rounds: int) -> dict[str, float]:
    """Median seconds of the bare pass, with token-wise sums, and with sketches too."""
    measured = copy.deepcopy(model)
    unfold_experts(measured)
    layers = find_targets(measured, torch.randint(model.config.vocab_size, (1, 32))).layers
    tokenwise, sketched = (
        ModelSums(measured, layers, GRADIENT_FORMS.lookup(form), RANK, 0) for form in ("none", "sketch")
    )

    def capture_batch(ids: torch.Tensor) -> None:
        sketched.add(ids)
        for _ in sketched.take_gradients():
            pass

    works = {"bare": lambda ids: gradient_pass(model, ids), "token-wise": tokenwise.add, "sketch": capture_batch}
    times: dict[str, list[float]] = {name: [] for name in works}
    for seed in range(rounds + 1):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=generator)
        for name, work in works.items():
            times[name].append(clock(work, ids))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def clock(work: Callable[[torch.Tensor], object], ids: torch.Tensor) -> float:
    begin = time.perf_counter()
    work(ids)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure_memory(kind: str, sequences: int, blocks: int, length: int, repeats: int) -> float:
    """Median of the peak bytes of new processes that capture so many sequences; single ones differ by 5 %."""
    arguments = [sys.executable, __file__, "--stage", f"{kind},{sequences},{blocks},{length}"]
    runs = [subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True) for _ in range(repeats)]
    return statistics.median(int(run.stdout.split()[-1]) for run in runs)


def run_stage(kind: str, sequences: int, blocks: int, length: int) -> None:
    """Run the stage in a workspace made for it, and print this process's peak of resident bytes."""
    with tempfile.TemporaryDirectory() as root:
        workspace = Workspace(Path(root))
        with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
            model = random_model(kind, blocks, 512)
            model.save_pretrained(out / "model", save_original_format=False)
            unfold_experts(model)
            write_layers(out, find_layers(model))
            del model
        ids = torch.randint(512, (sequences, length), generator=torch.Generator().manual_seed(0))
        write_sequences(workspace.table("calibration"), ids.numpy(), [[str(s)] for s in range(sequences)], 512)
        capture.run(workspace, CaptureParams(sequences_per_shard=16, gradients="sketch", sketch_rank=RANK))
    print(peak_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer rounds")
    parser.add_argument("--model", type=Path, help="folder of a model; default: random weights")
    parser.add_argument("--mixture", action="store_true", help="random weights of a mixture of experts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, help="counted rounds")
    parser.add_argument("--times", action="store_true", help="no memory")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        kind, *sizes = arguments.stage.split(",")
        run_stage(kind, *map(int, sizes))
        return
    kind = "mixture" if arguments.mixture else "dense"
    if arguments.model:
        model = load_model(arguments.model, DTYPES[arguments.dtype])
    else:
        sizes = (3 if arguments.mixture else 10, 16384) if arguments.quick else (8 if arguments.mixture else 30, 49152)
        model = random_model(kind, *sizes).to(DTYPES[arguments.dtype])
    times = measure_times(model, arguments.rounds or (3 if arguments.quick else 5))
    print(f"{BATCH} sequences of {LENGTH} tokens, {arguments.dtype}, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        print(
            f"    {name:12s} {seconds:8.3f} s   {BATCH * LENGTH / seconds:7.0f} tokens/s   {seconds / times['bare']:.2f} x bare"
        )
    target = MIXTURE if any(expert_modules(model)) else TOKENWISE
    print(at_most("capture time / bare pass, token-wise statistics", times["token-wise"] / times["bare"], "x", target))
    if not arguments.times:
        few, many = (
            measure_memory(kind, count, *((1, 16, 1) if arguments.quick else (4, 64, 3))) for count in (FEW, MANY)
        )
        print(f"peak memory of the stage: {few / 2**20:.0f} MiB for {FEW} sequences, {many / 2**20:.0f} MiB for {MANY}")
        print(at_most(f"capture peak memory, {MANY} / {FEW} sequences", many / few, "x", GROWTH))
    print(
        at_most(
            f"capture time / bare pass, with sketches of rank {RANK}", times["sketch"] / times["bare"], "x", SKETCHED
        )
    )


if __name__ == "__main__":
    main()
