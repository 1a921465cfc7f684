"""Time of the allocator `fisher` on 210 layers, the shapes of the demo model, over ratios and storages.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --quick             # one ratio
    python benchmarks/allocation.py --project FOLDER    # instead: what multiples cost, by that project's spectra

`ranks.round_to` gives ranks that are multiples of a number; the predicted loss is Σ σ² over what is cut, relative to that of ranks
as they come.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from figures import at_most

from fisherfold.allocators.allocation import ALLOCATORS, allocate, pose
from fisherfold.network.sites import find_sites, read_sites
from fisherfold.run.params import RanksParams
from fisherfold.run.workspace import Workspace
from flows.planning.shapes import find_shapes
from stages.ranks import read_spectra

MODEL = "smollm2-135m-instruct"  # a file in data/shapes
TARGET = 1.0
MULTIPLES = (1, 8, 16, 32)


def draw_task(ratio: float, storage: str):
    """210 layers with power-law spectra of different steepness and scale."""
    generator = np.random.default_rng(0)
    layers = find_shapes(Workspace(Path()), MODEL).layers
    sizes = [min(layer.outputs, layer.inputs) for layer in layers]
    spectra = [generator.lognormal() * np.arange(1, size + 1) ** -generator.uniform(0.2, 1.0) for size in sizes]
    return pose(find_sites(layers, shared=False), spectra, RanksParams(ratio=ratio, storage=storage))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--project", type=Path, default=None)
    options = parser.parse_args()
    if options.project:
        compare_multiples(Workspace(options.project))
    else:
        time_allocator((0.4,) if options.quick else (0.1, 0.2, 0.4, 0.6, 0.8))


def compare_multiples(workspace: Workspace) -> None:
    """Print the predicted loss by ratio and `ranks.round_to`."""
    sites = read_sites(workspace.out("subspace"))
    spectra = read_spectra(workspace.out("subspace") / "spectra.parquet", sites)
    print(f"{'ratio':>5}", *(f"{multiple:>7}" for multiple in MULTIPLES))
    for ratio in (0.2, 0.4, 0.6):
        losses = []
        for multiple in MULTIPLES:
            task = pose(sites, spectra, RanksParams(ratio=ratio, round_to=multiple))
            losses.append(task.predicted_loss(allocate(task, ALLOCATORS.lookup("fisher"))))
        print(f"{ratio:5}", *(f"{loss / losses[0]:7.4f}" for loss in losses))


def time_allocator(ratios: Sequence[float]) -> None:
    """Print the seconds by ratio and storage, and the figure."""
    print(f"{'ratio':>5} {'storage':>8} {'seconds':>8} {'unspent':>8}")
    worst = 0.0
    for ratio in ratios:
        for storage in ("factors", "pivoted"):
            task = draw_task(ratio, storage)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                ranks = ALLOCATORS.lookup("fisher")(task)
                times.append(time.perf_counter() - start)
            unspent = task.budget - int(task.costs[np.arange(len(ranks)), ranks].sum())
            worst = max(worst, statistics.median(times))
            print(f"{ratio:5} {storage:>8} {statistics.median(times):8.3f} {unspent:8}")
    print(at_most("fisher allocation of 210 layers, slowest", worst, "s", TARGET))


if __name__ == "__main__":
    main()
