"""Progress for people: a live bar in a terminal, one plain line at a time anywhere else.

For a process that watches, the same counts go to the file that FISHERFOLD_PROGRESS names, one line of JSON each:
``{"stage": "capture", "doing": "shards", "done": 3, "total": 11, "left": 41.2}``, `left` in seconds or null; before them
``{"stage": "capture", "begins": true}``.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from datetime import timedelta
from io import StringIO
from typing import Any, TypeVar

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
WATCHED = "FISHERFOLD_PROGRESS"  # environment variable: the file for a process that watches

_console = Console(stderr=True, highlight=False)


def be_quiet(quiet: bool = True) -> None:
    """Whether this process keeps its announcements to itself from now on."""
    _console.quiet = quiet


def is_quiet() -> bool:
    """Whether it does."""
    return _console.quiet


def begin(stage: str) -> None:
    """Tell a process that watches that the stage itself runs, and is not restored from what it computed before."""
    if path := os.environ.get(WATCHED):
        _write(path, {"stage": stage, "begins": True})


def announce(stage: str, message: str) -> None:
    """Print one line that says what a stage is doing."""
    line = Text.assemble((stage, "bold"), ": ", message)
    _console.print(line, soft_wrap=True)


def track(stage: str, doing: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """Yield `items` and show how many of `total` are done and the time left.

    `items` may be a generator that does the work as it goes: the count rises when the next item is asked for.
    """
    if _console.is_terminal:
        yield from _track_live(stage, doing, _recorded(stage, doing, items, total), total)
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
    """Like `track`, always in plain lines: for work inside an item that a live bar counts already. One item is told when it begins."""
    if total == 1 and not is_quiet():
        print(f"{stage}: {doing}", file=sys.stderr, flush=True)
    start = last = time.monotonic()
    for done, item in enumerate(_recorded(stage, doing, items, total), start=1):
        yield item
        now = time.monotonic()
        if total > 1 and not is_quiet() and (done == total or now - last >= PLAIN_INTERVAL):
            left = timedelta(seconds=round((now - start) / done * (total - done)))
            print(f"{stage}: {doing} {done}/{total}, {left} left", file=sys.stderr, flush=True)
            last = now


_counting = False


def _recorded(stage: str, doing: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """Yield `items` and record the count where a watching process reads it; a count inside another is not recorded."""
    global _counting
    path = os.environ.get(WATCHED)
    if path is None or _counting:
        yield from items
        return
    _counting = True
    start, done = time.monotonic(), 0
    try:
        _record(path, stage, doing, 0, total, None)
        for item in items:
            yield item
            done += 1
            _record(path, stage, doing, done, total, (time.monotonic() - start) / done * (total - done))
    finally:
        _counting = False


def _record(path: str, stage: str, doing: str, done: int, total: int, left: float | None) -> None:
    _write(path, {"stage": stage, "doing": doing, "done": done, "total": total, "left": left})


def _write(path: str, entry: dict[str, Any]) -> None:
    with suppress(OSError), open(path, "a", encoding="utf-8") as file:  # whoever watches may be gone
        file.write(json.dumps(entry) + "\n")


def millions(numbers: float) -> str:
    """A count of parameters for reading, in millions or billions."""
    return f"{numbers / 1e6:.4g} M" if numbers < 1e9 else f"{numbers / 1e9:.3g} B"


@contextmanager
def without_foreign_bars() -> Iterator[None]:
    """Keep a bar that a library always draws out of logs; people at a terminal may see it."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
        yield
