"""What the run itself cost, stage by stage, and how fast its model is: figures that stand beside the outputs, where they are known."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from markupsafe import Markup

from fisherfold.page.bars import bar_chart
from fisherfold.page.page import element, figure, megabytes, number, section, table
from fisherfold.page.record import Record
from fisherfold.run.times import gain
from fisherfold.run.workspace import MODELS

HIGHEST = "Memory at most"
PICTURED = ("Time", HIGHEST, "Disk")

USES = {"reading": "reading a text", "answering": "writing an answer"}


def cost_view(record: Record) -> Markup:
    """Time, memory and disk of every stage, as bars and as a table; disk alone where nothing else is known."""
    taken = {name: {stage: found.get(key) for stage, found in record.times.items()} for name, key in TAKEN.items()}
    measures = taken | {"Disk": {stage: float(held) for stage, held in record.bytes.items()}}
    shown = {name: {stage: value for stage, value in own.items() if value} for name, own in measures.items()}
    said = {
        name: {stage: (value, SAID[name](value)) for stage, value in own.items()} for name, own in shown.items() if own
    }
    pictures = [bar_chart(f"{name} by stage", said[name], name, 300) for name in PICTURED if name in said]
    rows = [(stage, *(bars.get(stage, (0, "–"))[1] for bars in said.values())) for stage in record.bytes | record.times]
    if record.times:
        rows.append(("all", *("–" if name == HIGHEST else SAID[name](sum(shown[name].values())) for name in said)))
    return section(
        "What the run took",
        figure(element("div", *pictures, class_="panels"), " ".join(_caption(record)), wide=False),
        table("The same as a table", ("stage", *map(str.lower, said)), rows),
    )


def _caption(record: Record) -> Iterator[str]:
    if record.times:
        yield (
            "Of each stage the time from the start of its process to its end, that of all its threads together, the largest memory of that "
            "process, and what it wrote, temporary files too (work that Ray gave to others is not in it)."
        )
    yield "Disk is what the stage's output holds, which is what DVC caches."


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    return f"{number(seconds / 60)} min" if seconds < 7200 else f"{number(seconds / 3600)} h"


def _bytes(count: float) -> str:
    return megabytes(int(count))


TAKEN = {"Time": "seconds", "Processor time": "cpu_seconds", HIGHEST: "peak_bytes", "Written": "written_bytes"}
"""What ``fisherfold.run.times`` knows of a stage, by its name there."""
SAID: dict[str, Callable[[float], str]] = {
    "Time": duration,
    "Processor time": duration,
    HIGHEST: _bytes,
    "Written": _bytes,
    "Disk": _bytes,
}


def speed_view(record: Record) -> Markup | None:
    """Tokens a second of both models; None where they were not measured here."""
    found = record.speed
    if not found:
        return None
    rows = [(words, *pace_cells(found[use])) for use, words in USES.items() if found.get(use)]
    tokens = found["tokens"]
    where = f"{found['dtype']} on {found['device']}, {found['threads']} threads"
    return section(
        "How fast it is",
        table("Tokens a second, one sequence at a time", ("", *MODELS, "times"), rows),
        element(
            "p",
            f"Measured at the end of stage evaluate, both models in turns ({where}): a pass over {tokens['read']} tokens, and "
            f"{tokens['written']} tokens written after a prompt of {tokens['prompt']}. Small layers gain little: each low-rank layer makes two "
            "products where the dense one makes one. Engines that serve many requests at a time have figures of their own.",
        ),
    )


def pace_cells(pair: Mapping[str, float]) -> tuple[str, str, str]:
    """Dense, compressed, and one by the other."""
    return number(pair["dense"]), number(pair["compressed"]), f"{gain(pair):.2f} ×"


def speed_sentence(found: Mapping[str, Any] | None) -> str:
    """The same in words; empty where nothing was measured."""
    if not found or not found.get("answering"):
        return ""
    pair = found["answering"]
    return (
        f"Here it writes {number(pair['compressed'])} tokens a second, the dense model {number(pair['dense'])} "
        f"({gain(pair):.2f} times)."
    )
