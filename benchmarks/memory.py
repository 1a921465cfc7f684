"""Peak resident memory of every stage with one decoder block in memory (capture.placement: streamed): a random model through the whole pipeline.

    python benchmarks/memory.py                    # a llama of 0.4 billion parameters, 1.6 GB; an hour on one core, most of it decompositions
    python benchmarks/memory.py --quick            # of 40 million; two minutes
    python benchmarks/memory.py --size 1.5 --until kronecker      # 6 GB of weights
    python benchmarks/memory.py --depths             # 12 and 24 blocks of one width, each stage three times; twenty minutes
    python benchmarks/memory.py --allocator fermigrad

A chat model with a tokenizer of words, texts and prompts of random words, as many as a stage needs to do all that it does by default: targets are tried,
half of the calibration is written by the model itself, blocks are refined, both models are compared on text, on answers and on questions. Every stage is
a process of its own, float32, one thread; the peak is the kernel's (VmHWM), mapped files and imports included. What is
finished in --scratch is not computed again, and keeps its figure. The model as it came is removed once it is prepared. At the end stands how far
`fisherfold plan` was off: bytes of outputs, and time, of which processor time by two is compared, as the plan is of two cores.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from figures import at_most, peak_bytes
from planned import against_plan, planned_stages, published_bytes
from streamed import LENGTH, SEQUENCES, SIZES, TARGETS, VOCABULARY, write_random
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fisherfold.run.determinism import STREAMED, WHOLE, placed
from fisherfold.run.params import Params, check_params
from fisherfold.run.workspace import STAGES, Workspace

ARTICLES, WORDS, PROMPTS = 60, 400, 48
TEMPLATE = "{% for message in messages %}w3 {{ message.content }} {% endfor %}w4"
BLOCK = {"threads": 1}
CORES = 2  # of the plan
DEPTHS, GROWTH = ["12 blocks", "24 blocks"], 1.05
DEPTH_ROUNDS = 3  # what a process holds at most differs by a tenth from time to time


def parameters(allocator: str, placement: str) -> Params:
    """What is shipped, on few sequences and short answers."""
    return check_params(
        {
            "prepare": BLOCK | {
                "model": "dense", "corpus": "corpus.txt", "unseen": None, "questions": "questions.jsonl", "prompts": "prompts.txt",
                "question_count": 4, "held_out_prompts": 4, "answer_tokens": 16, "sequence_length": LENGTH,
                "calibration_sequences": SEQUENCES, "tuning_sequences": 2, "training_sequences": 0, "evaluation_sequences": 4,
            },
            "capture": BLOCK | {"placement": placement, "knowledge_questions": 2},
            "kronecker": BLOCK,
            "subspace": BLOCK,
            "ranks": BLOCK | {"allocator": allocator, "fermigrad": {"steps": 2}},
            "factorize": BLOCK | {"refine": BLOCK, "heal": {"passes": 0}},
            "evaluate": BLOCK | {"answer_tokens": 8},
        },
        "benchmarks/memory.py",
    )  # fmt: skip


def make_project(root: Path, size: str) -> int:
    """A model, texts, prompts and questions; the model's number of parameters."""
    root.mkdir(parents=True)
    count = write_random(root / "dense", SIZES[size])
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)
    saved.save_pretrained(root / "dense")
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(5, VOCABULARY)}" for _ in range(length))

    (root / "corpus.txt").write_text("\n\n".join(text(WORDS) for _ in range(ARTICLES)), encoding="utf-8")
    (root / "prompts.txt").write_text("\n".join(text(6) for _ in range(PROMPTS)), encoding="utf-8")
    questions = [{"question": text(5), "choices": [text(2) for _ in range(4)], "answer": 0, "article": f"q{i}"} for i in range(8)]  # fmt: skip
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    return count


def run_stage(root: Path, stage: str, allocator: str, placement: str) -> None:
    """One stage in this process; prints seconds and the peak of resident bytes."""
    params = parameters(allocator, placement)
    begin = time.perf_counter()
    with placed(placement):
        import_module(f"stages.{stage}").run(Workspace(root), getattr(params, stage))
    print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": sum(os.times()[:2]), "peak": peak_bytes()}))


def measure(root: Path, stage: str, options: argparse.Namespace) -> dict[str, float]:
    """A stage in processes of its own, unless it was measured here before; of several the one that held least."""
    kept = root / f"{stage}.measured.json"
    if not kept.exists():
        arguments = [sys.executable, __file__, "--stage", stage, "--root", str(root)]
        arguments += ["--allocator", options.allocator, "--placement", options.placement]
        lines = []
        for _ in range(DEPTH_ROUNDS if options.depths else 1):
            for left in (root / "artifacts").glob(f"{stage}*"):
                shutil.rmtree(left)
            run = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
            lines.append(run.stdout.splitlines()[-1])
        kept.write_text(min(lines, key=lambda line: json.loads(line)["peak"]), encoding="utf-8")
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    print(f"    {stage:9s} {found['seconds']:7.1f} s   peak {found['peak'] / 1e9:5.2f} GB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--size", choices=list(SIZES), default="0.4", help="billions of parameters")
    parser.add_argument(
        "--depths", action="store_true", help="12 and 24 blocks of one width instead, and how memory grows"
    )
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    parser.add_argument("--allocator", default="fisher", help="ranks.allocator")
    parser.add_argument("--placement", choices=(WHOLE, STREAMED), default=STREAMED, help="whole: for comparison")
    parser.add_argument("--scratch", type=Path, help="folder for model and outputs, kept; default: one of the system's")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.root, arguments.stage, arguments.allocator, arguments.placement)
        return
    sizes = DEPTHS if arguments.depths else ["0.04" if arguments.quick else arguments.size]
    with tempfile.TemporaryDirectory() as folder:
        roots = [(arguments.scratch or Path(folder)) / size for size in sizes]
        peaks = [run_pipeline(root, size, arguments) for root, size in zip(roots, sizes)]
    if arguments.depths:
        grown = {stage: peak / peaks[0][stage] for stage, peak in peaks[1].items()}
        worst = max(grown, key=lambda stage: grown[stage])
        name = f"peak memory of 24 blocks by that of 12, the most of {len(grown)} stages ({worst})"
        print(at_most(name, grown[worst], "x", GROWTH))


def run_pipeline(root: Path, size: str, options: argparse.Namespace) -> dict[str, float]:
    """Run the stages and print their figures; the peaks by stage."""
    if not (root / "questions.jsonl").exists():
        count = make_project(root, size)
        print(f"random llama of {count / 1e9:.2f} B parameters, {4 * count / 1e9:.2f} GB in float32", flush=True)
    found = {}
    for stage in STAGES[: STAGES.index(options.until) + 1]:
        found[stage] = measure(root, stage, options)
        shutil.rmtree(root / "dense", ignore_errors=True)
    peaks = {stage: own["peak"] for stage, own in found.items()}
    worst = max(peaks, key=lambda stage: peaks[stage])
    name = f"peak memory, {size} B parameters, {options.placement}, the largest of {len(peaks)} stages ({worst})"
    print(at_most(name, peaks[worst] / 1e9, "GB", TARGETS.get(size, TARGETS["0.4"]) / 1e9))
    workspace = Workspace(root)
    plans = planned_stages(workspace, parameters(options.allocator, options.placement))
    outputs = {stage: published_bytes(workspace, stage) for stage in found}
    alone = {stage: own["cpu"] / CORES for stage, own in found.items()}
    print("\n".join(against_plan(plans, outputs, alone)), flush=True)
    return peaks


if __name__ == "__main__":
    main()
