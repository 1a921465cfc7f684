"""The thin SVD by eigenvectors of the smaller Gram matrix against LAPACK's own, on one thread, and which layers of a project take it.

    python benchmarks/decompositions.py                    # a minute
    python benchmarks/decompositions.py --project .        # the share of its layers, by kind, from artifacts/subspace/spectra.parquet

Random matrices whose singular values fall over three orders of magnitude; processor seconds, medians.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from figures import at_most

from fisherfold.linalg.thin_svd import LOST, by_eigenvectors
from fisherfold.run.determinism import computing_threads
from fisherfold.run.workspace import Workspace

SHAPES = ((1536, 576), (1024, 1024), (3840, 1024))
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, help="whose layers are counted instead")
    project = parser.parse_args().project
    if project:
        count_layers(Workspace(project.resolve()))
        return
    with computing_threads(1):
        for rows, columns in SHAPES:
            matrix = falling(rows, columns)
            fast, exact = (
                seconds(route, matrix)
                for route in (by_eigenvectors, lambda m: torch.linalg.svd(m, full_matrices=False))
            )
            print(
                at_most(
                    f"SVD of {rows} x {columns}, by eigenvectors / LAPACK's ({exact:.2f} s)", fast / exact, "x", 1.0
                )
            )


def falling(rows: int, columns: int) -> torch.Tensor:
    """Singular values from 1 down to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(size, columns, dtype=torch.float64, generator=generator) for size in (rows, columns))
    U, V = (torch.linalg.qr(side).Q for side in sides)
    return U * torch.logspace(0, -3, columns, dtype=torch.float64) @ V.T


def seconds(route: Callable[[torch.Tensor], object], matrix: torch.Tensor) -> float:
    """Median of the processor's."""
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        route(matrix)
        times.append(time.process_time() - begin)
    return statistics.median(times)


def count_layers(workspace: Workspace) -> None:
    """A line a kind of layer."""
    table = pq.read_table(workspace.out("subspace") / "spectra.parquet")
    found = defaultdict(list)
    for group in table.group_by("module").aggregate([("sigma", "min"), ("sigma", "max")]).to_pylist():
        found[group["module"].rpartition(".")[2]].append(group["sigma_min"] > LOST * group["sigma_max"])
    for kind, taken in found.items():
        print(f"{kind:12} {sum(taken):4} of {len(taken)} by eigenvectors")


if __name__ == "__main__":
    main()
