"""Time of the pivoted gauge (PivGa) on all 210 layers of the demo model's shapes, and what it loses in float64 and bfloat16.

    python benchmarks/pivga.py            # every layer
    python benchmarks/pivga.py --quick    # one block, times 30

Ranks keep 80 % of each layer's numbers; products are random with power-law spectra. The time is that of the gauge alone, in float64, with the threads of stage factorize.
Rounding to bfloat16 (error feedback) and what plain factors lose by it are shown beside it.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from figures import at_most

from fisherfold.allocators.cost import rank_costs
from fisherfold.linalg.pivoted import pivot_factors
from fisherfold.linalg.rounding import nearest, round_pivoted
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.determinism import computing_threads
from fisherfold.run.params import FactorizeParams
from fisherfold.run.workspace import Workspace
from flows.planning.shapes import find_shapes

MODEL = "smollm2-135m-instruct"  # a file in data/shapes
KEPT = 0.8
TARGET = 10.0


def draw_factors(layer: LinearLayer, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """left [n, r] and right [r, m] at the rank that stores KEPT of nm."""
    n, m = layer.outputs, layer.inputs
    costs = rank_costs(Site(layer.name, (layer,)), "pivoted")
    rank = int(np.searchsorted(costs, KEPT * n * m, side="right")) - 1
    generator = np.random.default_rng(seed)
    root = np.arange(1, rank + 1) ** -0.25
    return generator.standard_normal((n, rank)) * root, root[:, None] * generator.standard_normal((rank, m))


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    shapes = find_shapes(Workspace(Path()), MODEL)
    block = len(shapes.layers) // shapes.blocks
    layers = shapes.layers[:block] if parser.parse_args().quick else shapes.layers
    print(
        f"{'layer':>9} {'rank':>5} {'max |c|':>8} {'seconds':>8} {'float64':>9} {'bfloat16':>9} {'plain':>9} {'rounding, s':>12}"
    )
    total = 0.0
    for number, layer in enumerate(layers):
        left, right = draw_factors(layer, number)
        start = time.perf_counter()
        pivoted = pivot_factors(left, right)
        seconds = time.perf_counter() - start
        total += seconds
        if number >= block:
            continue
        product = left @ right
        start = time.perf_counter()
        rounded = round_pivoted(pivoted, torch.bfloat16)
        rounding = time.perf_counter() - start
        plain = nearest(left, torch.bfloat16) @ nearest(right, torch.bfloat16)
        errors = [relative_error(found, product) for found in (pivoted.product(), rounded.product(), plain)]
        print(
            f"{layer.name.rpartition('.')[2]:>9} {left.shape[1]:5} {pivoted.largest_coefficient:8.2f} {seconds:8.3f} {errors[0]:9.1e} "
            f"{errors[1]:9.1e} {errors[2]:9.1e} {rounding:12.3f}"
        )
    total *= len(shapes.layers) / len(layers)
    print(at_most("PivGa of all 210 layers", total, "s", TARGET))


if __name__ == "__main__":
    with computing_threads(FactorizeParams().threads):
        main()
