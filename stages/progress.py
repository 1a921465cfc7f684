"""Progress for people: a live bar in a terminal, one plain line at a time anywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")
PLAIN_INTERVAL = 10.0  # seconds between plain lines

_console = Console(stderr=True, highlight=False)


def announce(stage: str, message: str) -> None:
    """Print one line that says what a stage is doing."""
    line = Text.assemble((stage, "bold"), ": ", message)
    _console.print(line, soft_wrap=True)


def track(stage: str, doing: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """Yield `items` and show how many of `total` are done and the time left.

    `items` may be a generator that does the work as it goes: the count rises when the next item is asked for.
    """
    if _console.is_terminal:
        yield from _track_live(stage, doing, items, total)
    else:
        yield from track_lines(stage, doing, items, total)


def _track_live(stage: str, doing: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    columns = (
        TextColumn("[bold]{task.fields[stage]}[/bold] {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console) as progress:
        bar = progress.add_task(doing, total=total, stage=stage)
        for item in items:
            yield item
            progress.advance(bar)


def track_lines(stage: str, doing: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """Like `track`, always in plain lines: for work inside an item that a live bar counts already."""
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= PLAIN_INTERVAL:
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            print(f"{stage}: {doing} {done}/{total}, {left} left", file=sys.stderr, flush=True)
            last = now
