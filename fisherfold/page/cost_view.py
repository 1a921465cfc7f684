"""What the run itself cost, stage by stage, and how fast its model is: figures that stand beside the outputs, where they are known."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from fisherfold.page.bars import bar_chart
from fisherfold.page.page import element, figure, megabytes, number, section, table
from fisherfold.page.record import Record
from fisherfold.run.times import gain
from fisherfold.run.workspace import MODELS

USES = {"reading": "reading a text", "answering": "writing an answer"}


def cost_view(record: Record) -> Markup:
    """Time, memory and disk of every stage, as bars and as a table; disk alone where nothing else is known."""
    measures = {
        "Time": {stage: (taken["seconds"], duration(taken["seconds"])) for stage, taken in record.times.items()},
        "Memory at most": {
            stage: (taken["peak_bytes"], megabytes(int(taken["peak_bytes"]))) for stage, taken in record.times.items()
        },
        "Disk": {stage: (float(held), megabytes(held)) for stage, held in record.bytes.items()},
    }
    shown = {name: bars for name, bars in measures.items() if bars}
    pictures = [bar_chart(f"{name} by stage", bars, name, 300) for name, bars in shown.items()]
    stages = list(record.bytes | record.times)
    rows = [(stage, *(bars.get(stage, (0, "–"))[1] for bars in shown.values())) for stage in stages]
    if record.times:
        whole = sum(taken["seconds"] for taken in record.times.values())
        rows.append(("all", duration(whole), *["–"] * (len(shown) - 2), megabytes(sum(record.bytes.values()))))
    return section(
        "What the run took",
        figure(element("div", *pictures, class_="panels"), " ".join(_caption(record)), wide=False),
        table("The same as a table", ("stage", *map(str.lower, shown)), rows),
    )


def _caption(record: Record) -> Iterator[str]:
    if record.times:
        yield (
            "Of each stage the time from the start of its process to its end, and the largest memory of that process "
            "(work that Ray gave to others is not in it)."
        )
    yield "Disk is what the stage's output holds, which is what DVC caches."


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    return f"{number(seconds / 60)} min" if seconds < 7200 else f"{number(seconds / 3600)} h"


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
