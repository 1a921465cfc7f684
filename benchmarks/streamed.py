"""Memory and time of stage `capture` with one decoder block in memory (capture.placement: streamed), beside the whole model; memory of `kronecker` after it.

    python benchmarks/streamed.py                    # random llamas of 0.4 billion parameters, 12 and 24 blocks; some twenty minutes on one core
    python benchmarks/streamed.py --quick            # of 40 million; a minute
    python benchmarks/streamed.py --size 1.5         # 1.5 billion in 24 blocks, streamed alone: 6 GB of weights and 11 GB of sums on the disk
    python benchmarks/streamed.py --size "1.5 deep"  # in 32 narrower ones (of TinyLlama's widths): 8 GB of sums
    python benchmarks/streamed.py --ahead            # what reading the next block ahead saves, on files that the system has not in memory
    python benchmarks/streamed.py --project .        # time on the prepared model of a project, on a few of its sequences

The weights are drawn tensor by tensor and written in shards, so that no model is whole in memory while it is made. Every capture is a process of its
own: 4 sequences of 256 tokens, float32, one thread; its peak of resident memory is the kernel's (VmHWM), mapped files included.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import init_empty_weights
from figures import at_most, peak_bytes
from transformers import AutoConfig, AutoModelForCausalLM

from fisherfold.network.layers import describe_layers, linear_modules, write_layers
from fisherfold.network.weights_on_call import read_on_call
from fisherfold.run.checkpoint import StoredTensor, write_tensors
from fisherfold.run.determinism import STREAMED, WHOLE, computing_threads, placed, seeded_generator
from fisherfold.run.params import CaptureParams, KroneckerParams, Params, PrepareParams
from fisherfold.run.read_ahead import ReadAhead
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import read_table, write_sequences
from fisherfold.run.workspace import Workspace
from flows.planning.plan import plan_stage, read_hardware
from flows.planning.shapes import find_shapes
from stages import capture, kronecker

SEQUENCES, LENGTH, VOCABULARY = 4, 256, 32000
SHARD_BYTES = 2**30
SIZES = {
    "0.04": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "12 blocks": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4},
    "24 blocks": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 4},
    "0.2": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8},
    "0.4": {"hidden_size": 1024, "intermediate_size": 3840, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8},
    "1.5": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1.5 deep": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
TARGETS = {"0.4": 1.5e9, "1.5": 2.5e9, "1.5 deep": 2.5e9}  # bytes
ALONE = ("1.5", "1.5 deep")  # too large to be whole in the memory of a small machine
SLOWER, PLANNED = 1.6, 1.15
ROUNDS = 3  # of passes from the disk
LOOK = 0.05  # seconds between two looks at the disk
STAGES = {"capture": capture, "kronecker": kronecker}
ROOT = Path(__file__).parents[1]
GROUPS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def write_random(folder: Path, size: dict[str, int]) -> int:
    """A random llama in shards, and its layers beside it; the number of its parameters."""
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, tie_word_embeddings=True, **size)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    tensors = {name: drawn(name, tuple(p.shape)) for name, p in model.named_parameters()}
    folder.mkdir()
    write_tensors(folder, tensors, SHARD_BYTES)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    modules = linear_modules(model)
    inputs = {name: [object_read(name)] for name in modules}
    write_layers(folder.parent, describe_layers(modules, inputs))
    return sum(tensor.numbers for tensor in tensors.values())


def drawn(name: str, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor that is drawn when it is written: one for norms, else of deviation 1/√m."""

    def draw() -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.randn(shape, generator=seeded_generator(0, name)) * shape[1] ** -0.5

    return StoredTensor(shape, torch.float32, draw)


READ: dict[str, torch.Tensor] = {}


def object_read(name: str) -> torch.Tensor:
    """One and the same tensor for the layers of a block that read one input."""
    block, _, own = name.rpartition(".")
    first = next((group[0] for group in GROUPS if own in group), own)
    return READ.setdefault(f"{block}.{first}", torch.empty(0))


def make_workspace(root: Path, size: str) -> Workspace:
    """As stage `prepare` leaves it."""
    workspace = Workspace(root)
    with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
        parameters = write_random(out / "model", SIZES[size])
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    write_sequences(workspace.table("calibration"), ids.numpy(), [[str(s)] for s in range(SEQUENCES)], VOCABULARY)
    print(f"random llama of {parameters / 1e9:.2f} B parameters, {4 * parameters / 1e9:.2f} GB in float32")
    return workspace


def copy_project(project: Path, root: Path, sequences: int) -> Workspace:
    """The prepared model of a project, by links, with its first calibration sequences."""
    shutil.copytree(project / "artifacts" / "prepare", root / "artifacts" / "prepare", copy_function=link)
    workspace, table = Workspace(root), Workspace(project).table("calibration")
    rows = read_table(table).slice(0, sequences)
    ids = torch.tensor(rows["input_ids"].to_pylist())
    vocabulary = json.loads((project / "artifacts/prepare/prepare.json").read_text(encoding="utf-8"))["data"][
        "vocabulary"
    ]
    write_sequences(workspace.table("calibration"), ids.numpy(), rows["articles"].to_pylist(), vocabulary)
    return workspace


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def run_stage(root: Path, placement: str, stage: str) -> None:
    """A stage in this process, and print seconds and the peak of resident bytes, that of the imports too."""
    imports = peak_bytes()
    own = {
        "capture": CaptureParams(threads=1, placement=placement, knowledge_questions=0),
        "kronecker": KroneckerParams(threads=1),
    }
    begin, spent = time.perf_counter(), time.process_time()
    with placed(placement):
        STAGES[stage].run(Workspace(root), own[stage])
    taken = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - spent}
    print(json.dumps({**taken, "peak": peak_bytes(), "imports": imports}))


def measure(workspace: Workspace, placement: str, stage: str = "capture") -> dict[str, float]:
    """One stage in a process of its own; of a capture also what it held on the disk at most."""
    if stage == "capture":
        for left in workspace.artifacts.glob("capture*"):
            shutil.rmtree(left)
    arguments = [sys.executable, __file__, "--stage", stage, "--placement", placement, "--root", str(workspace.root)]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    disk = 0
    while run.poll() is None:
        disk = max(disk, stored_bytes(workspace))
        time.sleep(LOOK)
    if run.returncode or run.stdout is None:
        raise subprocess.CalledProcessError(run.returncode, arguments)
    found = json.loads(run.stdout.read().splitlines()[-1]) | {"disk": disk}
    print(
        f"    {stage:9s} {placement:9s} {found['seconds']:7.1f} s ({found['cpu']:.1f} s of the processor)   peak {found['peak'] / 1e9:5.2f} GB (imports {found['imports'] / 1e9:.2f} GB), "
        f"{disk / 1e9:.3f} GB on disk"
    )
    return found


def stored_bytes(workspace: Workspace) -> int:
    """What stage capture holds on disk now, links counted once."""
    found: dict[int, int] = {}
    for folder, _, files in os.walk(workspace.artifacts):  # which passes over folders that go meanwhile
        for name in files if "capture" in folder else ():
            with suppress(FileNotFoundError):
                state = (Path(folder) / name).stat()
                found[state.st_ino] = state.st_size if name.endswith(".zip") else 0
    return sum(found.values())


def ahead_times(root: Path, size: str) -> Iterator[str]:
    """A forward pass over all sequences by a model that reads on call, from files that are not in memory: with reading ahead, and without; in turn.

    Beside its seconds stands how often it waited for the disk (major page faults), which other work on the machine does not change.
    """
    write_random(root / "model", SIZES[size])
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    found: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    reached = ReadAhead.reached
    with computing_threads(1), torch.inference_mode():
        for _ in range(ROUNDS):
            for ahead, passes in found.items():
                ReadAhead.reached = reached if ahead else lambda self, tensor: None
                model = read_on_call(root / "model", torch.float32)
                forget_files(root / "model")
                begin, waited = time.perf_counter(), waits()
                model(input_ids=ids, use_cache=False)
                passes.append((time.perf_counter() - begin, waits() - waited))
    print(f"    seconds and waits with reading ahead {found[True]}, without {found[False]}")
    for what, column in (("seconds", 0), ("waits for the disk", 1)):
        with_it, without = (statistics.median(each[column] for each in found[ahead]) for ahead in (True, False))
        yield at_most(f"{what} of a pass of {size} from the disk, reading ahead / not", with_it / without, "x", 1.0)


def waits() -> int:
    """Of this process, for pages that were not in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def forget_files(folder: Path) -> None:
    """Take the weights out of the system's page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def planned_bytes(workspace: Workspace, placement: str) -> float:
    """What `fisherfold plan` says that it holds at most."""
    params = Params(
        prepare=PrepareParams(calibration_sequences=SEQUENCES, sequence_length=LENGTH),
        capture=CaptureParams(threads=1, placement=placement, knowledge_questions=0),
    )
    shapes = find_shapes(workspace, str(workspace.model))
    return plan_stage("capture", shapes, params, read_hardware(Workspace(ROOT), "cpu"), 1).disk


def figures(size: str, root: Path) -> Iterator[str]:
    """Of one random model."""
    workspace = make_workspace(root / size, size)
    streamed = measure(workspace, STREAMED)
    planned = planned_bytes(workspace, STREAMED)
    ratio = max(planned, streamed["disk"]) / min(planned, streamed["disk"])
    yield at_most(f"bytes on disk against the plan ({planned / 1e9:.3f} GB), {size} B parameters", ratio, "x", PLANNED)
    if size in TARGETS:
        held = max(streamed["peak"], measure(workspace, STREAMED, "kronecker")["peak"])
        yield at_most(
            f"peak memory of capture and kronecker, {size} B parameters", held / 1e9, "GB", TARGETS[size] / 1e9
        )
    if size not in ALONE:
        whole = measure(workspace, WHOLE)
        yield at_most(
            f"streamed / whole time, {size} B parameters", streamed["seconds"] / whole["seconds"], "x", SLOWER
        )
        yield at_most(
            f"streamed / whole processor time, {size} B parameters", streamed["cpu"] / whole["cpu"], "x", SLOWER
        )
    shutil.rmtree(workspace.root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument(
        "--size", choices=list(SIZES), action="append", help="billions of parameters; default: 0.2 and 0.4"
    )
    parser.add_argument("--ahead", action="store_true", help="measure reading ahead instead")
    parser.add_argument("--project", type=Path, help="measure time on a project's prepared model instead")
    parser.add_argument("--sequences", type=int, default=8, help="of a project's calibration table")
    parser.add_argument("--scratch", type=Path, help="folder for models and outputs; default: the system's")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--placement", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.root, arguments.placement, arguments.stage)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        if arguments.project:
            workspace = copy_project(arguments.project, Path(folder) / "w", arguments.sequences)
            streamed, whole = (measure(workspace, placement) for placement in (STREAMED, WHOLE))
            for what, key in (("time", "seconds"), ("processor time", "cpu")):
                print(at_most(f"streamed / whole {what}", streamed[key] / whole[key], "x", SLOWER))
            return
        if arguments.ahead:
            print("\n".join(ahead_times(Path(folder), arguments.size[0] if arguments.size else "0.2")))
            return
        for size in ["0.04"] if arguments.quick else arguments.size or ["0.2", "0.4"]:
            print("\n".join(figures(size, Path(folder))))


if __name__ == "__main__":
    main()
