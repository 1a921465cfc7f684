"""What engine `ray` costs beside `inline`, and what a second worker saves.

    python benchmarks/engine.py           # about ten minutes on two cores
    python benchmarks/engine.py --quick   # without the whole runs, three minutes

A unit's cost: units that do nothing, on two workers that are there already, against the same units inline.

A run's cost: `fisherfold run --engine ray` beside `dvc repro`, which knows neither Prefect nor Ray, in a project like the demo but for
its numbers (30 blocks, hence as many layers; a hidden size of 16, so that hardly anything is computed). The difference is what Prefect
and Ray add, starts of processes included. Layers so small share a unit (`Scratch.map`) where the demo has one a block: SPARED units, each
counted with the most that one may cost. --compute is what the demo's own run takes inline.

A second worker: stage `capture` with one thread a unit, on a Ray of one core and on one of two, in turn; random weights in the shapes
of SmolLM2-135M, six blocks and a small vocabulary, on sequences of 1,024 tokens, four a shard. Everything from the stage's begin to its end counts
(workers start and load the model), except that Ray has started.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from figures import at_least, at_most
from pydantic import BaseModel
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fisherfold.network.layers import find_layers, write_layers
from fisherfold.network.models import load_model
from fisherfold.run.params import CaptureParams, PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import write_sequences
from fisherfold.run.workspace import Workspace
from flows.api import prefect_api
from flows.cluster.ray_cluster import HERE
from flows.engine_choice import run_on_engine
from flows.settings import Settings
from stages import capture

ROOT = Path(__file__).parents[1]
PER_UNIT, SHARE, START, SPEEDUP = 0.1, 0.10, 20.0, 1.7  # targets: s, of the compute time, s, times
SPARED = 58 + 29  # of stages kronecker and factorize: the demo has 60 and 30 (`fisherfold plan`), this project 2 and 1
COMPUTE = 530.0  # seconds of the demo run inline on two cores (tests/support/demo_run.json)
VOCABULARY, LENGTH = 512, 1024


class NoParams(BaseModel):
    pass


def llama(folder: Path, hidden: int, intermediate: int, blocks: int, heads: int, shared: int) -> None:
    """A random model of the Llama architecture with a tokenizer of words w3, w4, …."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@contextmanager
def local_ray(cores: int) -> Iterator[None]:
    """A Ray of this host with so many cores, which stages of this process join."""
    import ray

    HERE["num_cpus"] = cores
    try:
        yield
    finally:
        HERE.pop("num_cpus")
        if ray.is_initialized():
            ray.shutdown()


def nothing(folder: Path) -> None:
    (folder / "nothing").touch()


def measure_unit(units: int) -> float:
    """Seconds that a unit costs more on Ray than inline, in a stream of units on two warm workers."""
    seconds = {}
    for engine in ("inline", "ray"):
        with tempfile.TemporaryDirectory() as folder:

            def stage(folder: str = folder, engine: str = engine) -> None:
                with Scratch(Workspace(Path(folder)), "report", NoParams(), {}) as scratch:
                    scratch.map("warming up", nothing_of_benchmark(), {f"warm-{i}": () for i in range(16)})
                    start = time.monotonic()
                    scratch.map("units", nothing_of_benchmark(), {f"unit-{i}": () for i in range(units)})
                    seconds[engine] = time.monotonic() - start

            with local_ray(2):
                run_on_engine("report", stage, Settings(engine=engine, num_cpus=1), None)
    return (seconds["ray"] - seconds["inline"]) / units


def nothing_of_benchmark():
    """`nothing`, from a module that workers can import."""
    import engine

    return engine.nothing


def measure_capture(workspace: Workspace, cores: int, params: CaptureParams) -> float:
    """Seconds of stage `capture` on a Ray of so many cores."""
    for folder in ("capture", "capture.partial"):  # the latter also holds the finished output
        shutil.rmtree(workspace.artifacts / folder, ignore_errors=True)
    seconds = []

    def stage() -> None:
        start = time.monotonic()
        capture.run(workspace, params)
        seconds.append(time.monotonic() - start)

    with local_ray(cores):
        run_on_engine("capture", stage, Settings(engine="ray", num_cpus=1), params.threads)
    return seconds[0]


def capture_workspace(folder: Path, sequences: int) -> Workspace:
    workspace = Workspace(folder)
    with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
        llama(out / "model", 576, 1536, 6, 9, 3)
        write_layers(out, find_layers(load_model(out / "model", torch.float32)))
    ids = torch.randint(3, VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    write_sequences(workspace.table("calibration"), ids.numpy(), [[str(i)] for i in range(sequences)], VOCABULARY)
    return workspace


def measure_speedup(sequences: int) -> tuple[float, float]:
    """Seconds of the capture with one worker and with two."""
    params = CaptureParams(threads=1, sequences_per_shard=4, leaves=4)
    with tempfile.TemporaryDirectory() as folder:
        workspace = capture_workspace(Path(folder), sequences)
        return tuple(measure_capture(workspace, cores, params) for cores in (1, 2))


def small_project(folder: Path) -> Path:
    """A project with as many layers, shards and questions as the demo, and hardly any numbers."""
    for name in ("fisherfold", "stages", "flows", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "prepared"))
    for name in ("dvc.yaml", "params.yaml", ".dvc/config", ".dvcignore", ".gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q", folder], check=True)
    llama(folder / "model", 16, 24, 30, 2, 1)
    drawn = random.Random(0)
    articles = [" ".join(f"w{drawn.randrange(3, VOCABULARY)}" for _ in range(40)) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n\n".join(articles) + "\n", encoding="utf-8")
    questions = [
        {
            "question": f"w{i + 3}",
            "choices": [f"w{40 * c + i + 5}" for c in range(4)],
            "answer": i % 4,
            "article": f"q{i}",
        }
        for i in range(200)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n", encoding="utf-8")
    yaml = YAML()
    document = yaml.load(folder / "params.yaml")
    own = {"model": "model", "corpus": "corpus.txt", "questions": "questions.jsonl", "sequence_length": 16}
    document["prepare"].update(own)
    document["capture"]["sketch_rank"] = 4
    yaml.dump(document, folder / "params.yaml")
    return folder


ALONE = [sys.executable, "-m", "dvc", "repro"]
ON_RAY = [sys.executable, "-m", "fisherfold", "run", "--engine", "ray"]


def measure_run(words: list[str]) -> float:
    """Seconds of a whole run of such a project."""
    with tempfile.TemporaryDirectory() as name:
        folder = small_project(Path(name))
        commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": commands}
        start = time.monotonic()
        subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no whole runs, a third of the sequences")
    parser.add_argument("--only", choices=("unit", "run", "workers"), help="one of the three figures")
    parser.add_argument("--compute", type=float, default=COMPUTE, help="seconds of the demo's inline run")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    os.environ["PREFECT_HOME"] = tempfile.mkdtemp()
    lines = []
    if arguments.only in (None, "unit", "workers"):
        with prefect_api("127.0.0.1"):
            if arguments.only != "workers":
                cost = measure_unit(100 if arguments.quick else 300)
                print(f"a unit costs {1e3 * cost:.0f} ms more on Ray than inline")
                lines.append(at_most("cost of a unit on Ray", 1e3 * cost, "ms", 1e3 * PER_UNIT))
            if arguments.only != "unit":
                one, two = measure_speedup(16 if arguments.quick else 64)
                print(f"capture on one worker of one core: {one:.1f} s; on two: {two:.1f} s")
                lines.append(at_least("speed of two workers / one", one / two, "times", SPEEDUP))
    if arguments.only == "run" or not (arguments.only or arguments.quick):
        alone, on_ray = measure_run(ALONE), measure_run(ON_RAY)
        added = on_ray - alone + SPARED * PER_UNIT
        print(f"a run of the demo's units: `dvc repro` {alone:.1f} s, on Ray {on_ray:.1f} s; {SPARED} units more")
        share = max(0.0, added - START) / arguments.compute
        print(f"beyond a start of {START:g} s, that is {100 * share:.1f} % of the demo's {arguments.compute:g} s")
        lines.append(at_most("what Prefect and Ray add to the demo run, beyond 20 s", share, "share", SHARE))
    shutil.rmtree(os.environ["PREFECT_HOME"], ignore_errors=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
