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
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch

from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.models import load_model
from fisherfold.run.determinism import computing_threads
from fisherfold.run.params import Params, load_params
from fisherfold.run.tables import read_sequences
from fisherfold.run.times import stage_times
from fisherfold.run.workspace import STAGES, Workspace

ROUNDS, SEQUENCES = 3, 4
CAPTURE, WRITTEN = 2.2, 6e9  # targets: capture by its bare passes, bytes that a run writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    workspace = Workspace(parser.parse_args().project.resolve())
    taken, bare = stage_times(workspace), bare_times(workspace, load_params(workspace.root / "params.yaml"))
    print(f"{'stage':10} {'seconds':>8} {'cpu':>8} {'bare':>8} {'bare cpu':>8} {'GB peak':>8} {'GB written':>10}")
    for stage in [stage for stage in STAGES if stage in taken]:
        own, (clock, cpu) = taken[stage], bare.get(stage, (0.0, 0.0))
        peak, written = own["peak_bytes"] / 1e9, own.get("written_bytes", 0) / 1e9
        print(f"{stage:10} {own['seconds']:8.1f} {own.get('cpu_seconds', 0):8.1f} {clock:8.1f} {cpu:8.1f} {peak:8.2f} {written:10.2f}")  # fmt: skip
    written = sum(own.get("written_bytes", 0) for own in taken.values())
    print_figure("bytes that the run wrote", written, "bytes", WRITTEN)
    if "capture" in taken:
        clock, cpu = bare["capture"]
        print_figure("capture by its bare passes, by the clock", taken["capture"]["seconds"] / clock, "", CAPTURE)
        if spent := taken["capture"].get("cpu_seconds"):
            print_figure("capture by its bare passes, processor time", spent / cpu, "", CAPTURE)


def bare_times(workspace: Workspace, params: Params) -> dict[str, tuple[float, float]]:
    """Seconds by the clock and of the processor of a stage's bare passes."""
    model = load_model(workspace.model, torch.float32)
    ids = read_sequences(workspace.table("calibration"), model.config.vocab_size)[:SEQUENCES]
    threads = {"capture": params.capture, "factorize": params.factorize.refine, "evaluate": params.evaluate}

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    counts = {split: pq.read_metadata(workspace.table(split)).num_rows for split in ("calibration", "evaluation")}
    passes: dict[str, tuple[Callable[[], object], float]] = {
        "capture": (lambda: gradient_pass(model, ids), counts["calibration"]),
        "factorize": (
            lambda: gradient_pass(model, ids),
            counts["calibration"] * params.factorize.refine.passes
            + params.prepare.healing_sequences * params.factorize.heal.passes,
        ),
        "evaluate": (forward, 2 * counts["evaluation"]),
    }
    found = {}
    for stage, (run, count) in passes.items():
        with computing_threads(threads[stage].threads):
            found[stage] = tuple(count / len(ids) * seconds for seconds in median_times(run))
    return found


def median_times(run: Callable[[], object]) -> tuple[float, float]:
    """By the clock and of the processor; the first round is not counted."""
    rounds = []
    for _ in range(ROUNDS + 1):
        clock, cpu = time.perf_counter(), sum(os.times()[:2])
        run()
        rounds.append((time.perf_counter() - clock, sum(os.times()[:2]) - cpu))
    return tuple(statistics.median(column) for column in zip(*rounds[1:]))


def print_figure(figure: str, value: float, unit: str, target: float) -> None:
    print(json.dumps({"figure": figure, "value": value, "unit": unit, "target": target, "holds": value <= target}))


if __name__ == "__main__":
    main()
