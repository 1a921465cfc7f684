"""The end of a run: what was lost and gained, a verdict, where the results lie, and what to do next. Eighty columns."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fisherfold.evaluation.verdict import verdict
from fisherfold.run.params import Params
from fisherfold.run.workspace import Workspace

WIDTH = 80
LABEL = 13  # columns of a label


def print_outcome(workspace: Workspace, params: Params, seconds: float) -> None:
    """Print the block, as far as the run has come: without stage evaluate there is nothing to tell but paths."""
    for line in outcome_lines(workspace, params, seconds):
        print(line)


def outcome_lines(workspace: Workspace, params: Params, seconds: float) -> Iterator[str]:
    """The lines of the block."""
    from flows.time_left import in_words

    path = workspace.out("evaluate") / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    yield ""
    if metrics:
        for label, text in figures(metrics):
            yield f"  {label:<{LABEL}}{text}"
    yield f"  {'took':<{LABEL}}{in_words(seconds)}"
    for label, place in (
        ("model", workspace.out("factorize") / "model"),
        ("report", workspace.out("report") / "index.html"),
    ):
        if place.exists():
            yield f"  {label:<{LABEL}}{_shown(place)}"
    if metrics:
        judged = verdict(metrics)
        yield ""
        for line in judged.lines:
            yield from textwrap.wrap(
                line, WIDTH, initial_indent="  ", subsequent_indent="    " if line.startswith("-") else "  "
            )
        yield ""
        for label, words in next_commands(judged.level, params, workspace):
            yield f"  {label:<{LABEL}}{words}"


def figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of every figure that was measured: dense → compressed."""
    dense, compressed, size = metrics["dense"], metrics["compressed"], metrics["size"]
    ratio = compressed["perplexity"] / dense["perplexity"]
    yield "perplexity", f"{dense['perplexity']:.4g} → {compressed['perplexity']:.4g} ({ratio:.2f} times)"
    if (own := compressed.get("own_answers_kl")) is not None:
        yield "own answers", f"{own:.3f} nats a token away from the dense model's"
    if dense.get("knowledge_accuracy") is not None:
        known = [f"{100 * model['knowledge_accuracy']:.1f} %" for model in (dense, compressed)]
        yield "knowledge", f"{known[0]} → {known[1]} of the questions right"
    yield "size", _change(size, "model_bytes", in_bytes)
    yield "layers", _change(size, "targeted_parameters", in_millions) + " in the targeted layers"


def _change(size: Mapping[str, int], what: str, shown: Any) -> str:
    before, after = size[f"{what}_dense"], size[f"{what}_compressed"]
    return f"{shown(before)} → {shown(after)} ({100 * (1 - after / before):.1f} % less)"


def in_bytes(number: float) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def in_millions(number: float) -> str:
    """Numbers, in millions or billions."""
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.4g} M"


def next_commands(level: str, params: Params, workspace: Workspace) -> Iterator[tuple[str, str]]:
    """What somebody would do next, as commands to paste."""
    other = less(params.ranks.ratio) if level == "damaged" else more(params.ranks.ratio)
    yield "talk to it", f"fisherfold chat {_shown(workspace.out('factorize') / 'model')}"
    yield "look at it", "fisherfold report"
    yield "remove less" if level == "damaged" else "remove more", f"fisherfold run --set ranks.ratio={other:g}"


def less(ratio: float) -> float:
    """Half the ratio, in steps of a hundredth."""
    return max(0.01, round(ratio / 2, 2))


def more(ratio: float) -> float:
    """A tenth more, and half of what is left at most."""
    return round(min(ratio + 0.1, ratio + (1 - ratio) / 2), 2)


def _shown(path: Path) -> str:
    """A path as somebody would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
