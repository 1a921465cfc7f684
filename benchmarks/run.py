"""What a whole run took, stage by stage, beside the bare passes of the model that it cannot do without.

    python benchmarks/run.py                      # of the run that lies in this project
    python benchmarks/run.py --project FOLDER     # of another

Time, processor time, memory and bytes written are those that the stages noted (artifacts/times.json). The bare passes are timed here, with
the stage's threads, on a few of the project's own sequences, and multiplied by how many of them the stage runs:

    prepare     nothing: writing is one token after the other, so it is compared with no pass
    capture     a forward and backward pass for the gradients of activations alone, of every calibration sequence
    factorize   the same again for each pass of refinement and of healing: their products are those of a dense pass or fewer
    evaluate    a forward pass of both models over every evaluation sequence

On a machine that does other work compare processor time: of a stage and of its bare passes (`cpu`), which other processes stretch alike.

Beside it what `fisherfold plan` says of each stage on two cores: seconds, with which processor time by the stage's threads is compared, and bytes
of its output.
"""

import flows  # noqa: F401  before torch, which reads then how threads wait: as those of the stages do

# isort: split
import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from figures import at_most
from planned import against_plan, planned_stages, published_bytes

from fisherfold.export.refinement import passes_over
from fisherfold.export.training_text import text_sizes
from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.models import load_model
from fisherfold.run.determinism import computing_threads
from fisherfold.run.params import Params, load_params
from fisherfold.run.tables import read_sequences
from fisherfold.run.times import stage_times
from fisherfold.run.workspace import STAGES, Workspace

ROUNDS, SEQUENCES = 3, 2
CAPTURE, WRITTEN = 2.2, 6e9  # targets: capture by its bare passes, bytes that a run writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    workspace = Workspace(parser.parse_args().project.resolve())
    params = load_params(workspace.root / "params.yaml")
    taken, plans = stage_times(workspace), planned_stages(workspace, params)
    stages = [stage for stage in STAGES if stage in taken]
    outputs = {stage: published_bytes(workspace, stage) for stage in stages}
    alone = {stage: taken[stage]["cpu_seconds"] / threads_of(params, stage) for stage in stages if taken[stage].get("cpu_seconds")}  # fmt: skip
    print("\n".join(against_plan(plans, outputs, alone)), flush=True)
    bare = bare_times(workspace, params)
    print(
        "seconds, processor seconds, and those of bare passes; GB in memory, written, of the output, and of that planned"
    )
    print(f"{'stage':10} {'clock':>8} {'cpu':>8} {'bare':>8} {'cpu':>8} {'planned':>8} {'memory':>7} {'written':>7} {'output':>7} {'planned':>7}")  # fmt: skip
    for stage in stages:
        own, plan = taken[stage], plans[stage]
        seconds = (own["seconds"], own.get("cpu_seconds", 0.0), *bare.get(stage, (0.0, 0.0)), plan.seconds or 0.0)
        sizes = (own["peak_bytes"], own.get("written_bytes", 0), outputs[stage], plan.published)
        print(f"{stage:10} " + " ".join(f"{each:8.1f}" for each in seconds) + " " + " ".join(f"{each / 1e9:7.2f}" for each in sizes))  # fmt: skip
    print(at_most("bytes that the run wrote", sum(own.get("written_bytes", 0) for own in taken.values()), "bytes", WRITTEN))  # fmt: skip
    if "capture" in taken:
        clock, cpu = bare["capture"]
        print(at_most("capture by its bare passes, by the clock", taken["capture"]["seconds"] / clock, "", CAPTURE))
        if spent := taken["capture"].get("cpu_seconds"):
            print(at_most("capture by its bare passes, processor time", spent / cpu, "", CAPTURE))


def threads_of(params: Params, stage: str) -> int:
    """Of a stage; of `factorize` those of refinement, if it refines."""
    if stage == "factorize" and params.factorize.refine.passes:
        return params.factorize.refine.threads
    return getattr(getattr(params, stage), "threads", 1) or 1


def bare_times(workspace: Workspace, params: Params) -> dict[str, tuple[float, float]]:
    """Seconds by the clock and of the processor of a stage's bare passes."""
    model = load_model(workspace.model, torch.float32)
    ids = read_sequences(workspace.table("calibration"), model.config.vocab_size)[:SEQUENCES]
    threads = {"capture": params.capture, "factorize": params.factorize.refine, "evaluate": params.evaluate}

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    def backward() -> None:
        gradient_pass(model, ids)

    splits = ("calibration", "training", "evaluation")
    counts = {split: pq.read_metadata(workspace.table(split)).num_rows for split in splits}
    refined, healed = text_sizes(counts["calibration"], counts["training"])
    refining = passes_over(refined, params.factorize.refine)
    trained = refined * refining + healed * params.factorize.heal.passes
    passes: dict[str, tuple[Callable[[], object], float]] = {
        "capture": (backward, counts["calibration"]),
        "factorize": (backward, trained),
        "evaluate": (forward, 2 * counts["evaluation"]),
    }
    timed: dict[tuple[object, int], tuple[float, float]] = {}
    for stage, (run, _) in passes.items():
        if (run, threads[stage].threads) not in timed:
            with computing_threads(threads[stage].threads):
                timed[run, threads[stage].threads] = median_times(run)
    return {
        stage: tuple(count / len(ids) * seconds for seconds in timed[run, threads[stage].threads])
        for stage, (run, count) in passes.items()
    }


def median_times(run: Callable[[], object]) -> tuple[float, float]:
    """By the clock and of the processor; the first round is not counted."""
    rounds = []
    for _ in range(ROUNDS + 1):
        clock, cpu = time.perf_counter(), sum(os.times()[:2])
        run()
        rounds.append((time.perf_counter() - clock, sum(os.times()[:2]) - cpu))
    return tuple(statistics.median(column) for column in zip(*rounds[1:]))


if __name__ == "__main__":
    main()
