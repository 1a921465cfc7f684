"""The end of a run: what was lost and gained, a verdict, where the results lie, and what to do next. Eighty columns."""

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherfold.evaluation.verdict import verdict
from fisherfold.run.params import Params
from fisherfold.run.progress import millions
from fisherfold.run.targets import TARGETS
from fisherfold.run.times import gain, speed
from fisherfold.run.workspace import Workspace
from flows.history import note_run, read_metrics, read_runs
from flows.report_page import shown_page
from flows.time_left import in_words

WIDTH = 80
LABEL = 13  # columns of a label


def tell_outcome(workspace: Workspace, params: Params, stages: Sequence[str], seconds: float) -> None:
    """Print the block of a run that went well, and remember what it gave. Of stages that were not asked for there is nothing to tell."""
    metrics = read_metrics(workspace) if "evaluate" in stages else None
    if metrics:
        note_run(workspace, params, metrics, seconds, speed(workspace))
    print("\n".join(outcome_lines(workspace, params, stages, metrics, seconds)))


def outcome_lines(
    workspace: Workspace, params: Params, stages: Sequence[str], metrics: Mapping[str, Any] | None, seconds: float
) -> Iterator[str]:
    """The lines of the block."""
    yield ""
    measured = [*figures(metrics), *paces(speed(workspace))] if metrics else []
    told = [*measured, *_format_cost(workspace, stages), ("took", in_words(seconds))]
    rows = [*told, *_places(workspace, stages)]
    for label, text in rows:
        yield f"  {label:<{LABEL}}{text}"
    if metrics:
        judged = verdict(metrics)
        yield ""
        for line in judged.lines:
            hanging = "    " if line.startswith("-") else "  "
            yield from textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent=hanging)
        yield ""
        for label, words in next_commands(judged.level, workspace, params, stages, len(read_runs(workspace)) > 1):
            yield f"  {label:<{LABEL}}{words}"


def _format_cost(workspace: Workspace, stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What ranks.storage and ranks.round_to, which suit an engine, cost."""
    path = workspace.out("ranks") / "budget.json"
    budget = json.loads(path.read_text(encoding="utf-8")) if "ranks" in stages and path.exists() else {}
    if found := budget.get("format"):
        text = f"{found['storage']} in multiples of {found['round_to']}: predicted loss {found['price']:+.1%}"
        yield "format", text


def _places(workspace: Workspace, stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Where results lie that somebody would look at."""
    places = {"factorize": ("model", workspace.out("factorize") / "model"), "report": ("report", shown_page(workspace))}
    for stage, (label, path) in places.items():
        if stage in stages:
            yield label, _typed(path)


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
    yield "layers", _change(size, "targeted_parameters", millions) + " in the targeted layers"


def paces(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Tokens a second of both models, where they were measured; see `fisherfold.evaluation.speed`."""
    for label, use in (("reads", "reading"), ("answers", "answering")):
        if pair := (found or {}).get(use):
            change = f"{paced(pair['dense'])} → {paced(pair['compressed'])} tokens a second"
            yield label, f"{change} ({gain(pair):.2f} times)"


def paced(tokens: float) -> str:
    """Tokens a second for people: three digits, no exponent."""
    return f"{tokens:.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _change(size: Mapping[str, int], what: str, shown: Callable[[float], str]) -> str:
    before, after = size[f"{what}_dense"], size[f"{what}_compressed"]
    return f"{shown(before)} → {shown(after)} ({100 * (1 - after / before):.1f} % less)"


def in_bytes(number: float) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def next_commands(
    level: str, workspace: Workspace, params: Params, stages: Sequence[str], again: bool
) -> Iterator[tuple[str, str]]:
    """What somebody would do next, as commands to paste; `again`: this was not the first run."""
    close = level == "close"
    other = more(params.ranks.ratio) if close else less(params.ranks.ratio)
    target = TARGETS[params.factorize.target]
    yield "talk to it", "fisherfold chat"
    yield "serve it", target.serve(_typed(workspace.out("factorize") / target.serves))
    if "report" in stages:
        yield "look at it", "fisherfold report"
    yield "remove more" if close else "remove less", f"fisherfold run --set ranks.ratio={other:g}"
    if again:
        yield "compare", "fisherfold compare"


def less(ratio: float) -> float:
    """Half the ratio, in steps of a hundredth."""
    return max(0.01, round(ratio / 2, 2))


def more(ratio: float) -> float:
    """A tenth more, and half of what is left at most."""
    return round(min(ratio + 0.1, ratio + (1 - ratio) / 2), 2)


def _typed(path: Path) -> str:
    """A path as somebody would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
