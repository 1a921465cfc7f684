"""What each part of the recipe brings: the shipped parameters with one of them changed at a time, over several draws.

    python benchmarks/ablation.py                                       # every axis, draws 0, 1 and 2: a day on two cores
    python benchmarks/ablation.py --axes refinement,heal --seeds 0
    python benchmarks/ablation.py --axes metric --values "svd_llm|every"
    python benchmarks/ablation.py --set preset=fast --set prepare.corpus=MINE.txt --ratio 0.4

A sweep of the project (flows/sweep.py): what arms have in common is computed once, what is finished stays, the project's own outputs do not change.
Columns: perplexity by that of the dense model on the worst source that calibration never saw; divergence on the dense model's own held-out answers, in nats a
token; empty answers; points of knowledge lost; and behind × the first two by those that the shipped parameters have in the same draw, since draws differ by
more than most parts bring. Each is the mean over draws and, behind ±, half of what they differ by.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherfold.run.params import load_params
from fisherfold.run.workspace import Workspace
from flows.sweep import Cell, sweep
from flows.tables import print_table

Axes = dict[str, dict[str, tuple[str, ...]]]

AXES: Axes = {
    "draw": {
        "64 sequences": ("prepare.calibration_sequences=64",),
        "1024 sequences": ("prepare.calibration_sequences=1024",),
    },
    "mix": {
        "the corpus alone": ("prepare.self_written=0", "prepare.free_text=0"),
        "no conversations": ("prepare.self_written=0",),
        "no free text": ("prepare.free_text=0",),
        "nine tenths self-written": ("prepare.self_written=0.9",),
    },
    "labels": {"of the text": ("capture.labels=data",)},
    "metric": {
        "svd": ("subspace.metric=svd",),
        "asvd": ("subspace.metric=asvd",),
        "svd_llm": ("subspace.metric=svd_llm",),
        "gfwsvd, every token": ("subspace.metric=gfwsvd", "kronecker.estimator=every_token"),
    },
    "allocation": {
        "uniform": ("ranks.allocator=uniform",),
        "corrected": ("ranks.allocator=corrected",),
        "fermigrad": ("ranks.allocator=fermigrad",),
    },
    "gauge": {"plain factors": ("ranks.storage=factors",)},
    "inputs": {"shared": ("subspace.share_inputs=true",)},
    "refinement": {"none": ("factorize.refine.passes=0",), "one pass": ("factorize.refine.passes=1",)},
    "heal": {
        "none": ("factorize.heal.passes=0",),
        "one pass over the calibration": ("factorize.heal.passes=1", "prepare.training_sequences=0"),
        "over 2048 sequences": ("factorize.heal.passes=1", "prepare.training_sequences=4096"),
    },
}
"""By axis, by what is another than shipped: its parameters."""
SHIPPED = "as shipped"


def points_lost(row: dict) -> float | None:
    asked = row.get("knowledge_accuracy_dense")  # without questions there is none
    return None if asked is None else 100 * (asked - row["knowledge_accuracy"])


Column = Callable[[dict], float | None]
COLUMNS: dict[str, Column] = {
    "unseen, × dense": lambda row: row["times_dense"],
    "own answers, nats": lambda row: row.get("own_answers_kl"),
    "empty": lambda row: row.get("empty_answers"),
    "points lost": points_lost,
}


RELATIVE = ("unseen, × dense", "own answers, nats")
"""Columns that are also given by what is shipped."""


@dataclass(frozen=True)
class Arm(Cell):
    """The shipped parameters but `settings`, one draw of the texts."""

    axis: str = SHIPPED
    value: str = ""
    settings: tuple[str, ...] = ()

    def overrides(self, others: Sequence[str] = ()) -> list[str]:
        """Parameters as ``--set`` takes them."""
        return [*super().overrides(others), *self.settings]

    def __str__(self) -> str:
        words = f"{self.axis} {self.value} {self.ratio:g} draw {self.seed}".split()
        return "-".join("".join(filter(str.isalnum, word)) for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--axes", default=",".join(AXES), help=", ".join(AXES))
    parser.add_argument("--values", default="", help="regular expression of those to measure, of these axes")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--seeds", default="0,1,2", help="draws")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all arms")
    options = parser.parse_args()
    workspace = Workspace(options.project.resolve())
    seeds = [int(seed) for seed in options.seeds.split(",")]
    axes = {
        axis: {value: settings for value, settings in AXES[axis].items() if re.search(options.values, value)}
        for axis in options.axes.split(",")
    }
    rows = sweep(workspace, list(arms(workspace, axes, options.ratio, seeds)), options.set)
    columns = [*COLUMNS, *(f"× {name.partition(',')[0]}" for name in RELATIVE)]
    print_table(["axis", "value", *columns], list(table(rows)), right=columns)


def arms(workspace: Workspace, axes: Axes, ratio: float, seeds: Iterable[int]) -> Iterable[Arm]:
    """What is shipped, and each value of each axis, in every draw; draw by draw, since a draw has most in common."""
    params = load_params(workspace.root / "params.yaml")
    shipped = (params.subspace.metric, params.ranks.allocator, ratio)
    for seed in seeds:
        yield Arm(*shipped, seed)
        yield from (Arm(*shipped, seed, axis, *arm) for axis, values in axes.items() for arm in values.items())


def table(rows: Sequence[dict]) -> Iterable[list[str]]:
    """A line an arm, over its draws: `COLUMNS`, then `RELATIVE` by what is shipped in the same draw."""
    shipped = {row["seed"]: row for row in rows if row["axis"] == SHIPPED}
    for axis, value in dict.fromkeys((row["axis"], row["value"]) for row in rows):
        drawn = [row for row in rows if (row["axis"], row["value"]) == (axis, value)]
        figures = [[column(row) for row in drawn] for column in COLUMNS.values()]
        changes = [[_change(COLUMNS[name], row, shipped[row["seed"]]) for row in drawn] for name in RELATIVE]
        yield [axis, value, *map(_spread, (*figures, *changes))]


def _change(column: Column, row: dict, shipped: dict) -> float | None:
    found, base = column(row), column(shipped)
    return None if found is None or base is None else found / base


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{sum(known) / len(known):.3f}" + (f" ± {(max(known) - min(known)) / 2:.3f}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
