"""A step of refinement against the same step as torch takes it by itself: the batch at once, in float32, on all threads.

    python benchmarks/training.py --project .              # after stage ranks; half a minute

One decoder block of the project's model with low-rank layers of the project's ranks (random numbers), two sequences of its training text a step; one row a
way of computing: milliseconds a step, medians, and by those of the first row.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import torch
from figures import at_most
from torch import nn

from fisherfold.allocators.cost import DENSE
from fisherfold.export.refinement import Batch, adamw, batches_of, descend, relative_error
from fisherfold.network.blocks import BlockCall, list_blocks
from fisherfold.network.models import load_model
from fisherfold.network.rounded_products import rounded_products
from fisherfold.run.side_by_side import side_by_side
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.runtime.modeling_fisherfold import LowRankLinear

SEQUENCES, SIZE, RATE = 48, 2, 4e-4
TARGET = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    workspace = Workspace(options.project.resolve())
    model = load_model(workspace.model, torch.float32)
    names = list(list_blocks(model))
    name = names[len(names) // 2]
    dense = model.get_submodule(name)
    ids = read_sequences(workspace.table("calibration"), model.get_input_embeddings().num_embeddings)[:SEQUENCES]
    call, block = BlockCall(model, dense, ids[:1]), low_rank(workspace, dense, name)
    with torch.no_grad():
        x = BlockCall(model, model.get_submodule(names[0]), ids).entered
        y = torch.cat([call(dense, some) for some in x.split(SIZE)])
    bare = 0.0
    for pieces, products in ((1, "float32"), (SIZE, "float32"), (SIZE, "bfloat16")):
        found = milliseconds(copy.deepcopy(block), call, (x, y), options.threads, pieces, products)
        bare = bare or found
        way = f"step of {pieces} {'piece' if pieces == 1 else 'pieces'}, products in {products}"
        print(at_most(f"{way} ({found:.0f} ms) / batch at once in float32", found / bare, "x", TARGET), flush=True)


def low_rank(workspace: Workspace, dense: nn.Module, name: str) -> nn.Module:
    """A copy of the block with plain factors of the project's ranks."""
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    block = copy.deepcopy(dense)
    for row in rows:
        if row["module"].startswith(f"{name}.") and row["storage"] != DENSE and row["rank"]:
            own = row["module"].removeprefix(f"{name}.")
            biased = block.get_submodule(own).bias is not None
            block.set_submodule(own, LowRankLinear(row["n"], row["m"], row["rank"], biased))
    return block.requires_grad_(False)


def milliseconds(block: nn.Module, call: BlockCall, batch: Batch, threads: int, pieces: int, products: str) -> float:
    """Median of a step of `descend`."""
    x, y = batch
    begun: list[float] = []

    def steps() -> Iterator[tuple[list[Batch], float]]:
        for numbers in batches_of(len(x), 1, SIZE):
            begun.append(time.perf_counter())
            parts = zip(x[numbers].split(SIZE // pieces), y[numbers].split(SIZE // pieces), strict=True)
            yield list(parts), 1.0

    def loss(piece: Batch) -> torch.Tensor:
        return relative_error(call(block, piece[0]), piece[1])

    trained = [p for p in block.parameters() if p.is_floating_point()]
    with side_by_side(threads, pieces) as apply, rounded_products([block], products):
        descend(adamw(trained, RATE), loss, steps(), apply)
    return 1e3 * statistics.median(after - before for before, after in pairwise(begun))


if __name__ == "__main__":
    main()
