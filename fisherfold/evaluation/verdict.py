"""What the figures of stage `evaluate` mean for somebody who wants to use the compressed model: one word, and why.

    close      nobody should notice the difference on most uses
    changed    worse in ways that can be seen: to be tried on one's own task first
    damaged    something is broken; not to be used as it is

The worst finding decides, since one failure is enough: a model with a fine perplexity that answers nothing is of no use. Each
finding is a figure against two bounds, up to the first of which it is close and beyond the second damaged. Where the bounds come from:

- Own answers, 0.15 and 0.35 nats a token. On the demo model 0.41 went with 7 of 19 short questions still answered, 0.31 with 14.
- Perplexity on a source, by that of the dense model, 1.15 and 1.5. Llama-3-8B has 1.03 in 4 bits, which nobody notices, and 1.57
  in 2 bits, which everybody does. Sources that calibration did not draw from decide where there are any: the others flatter.
- Empty answers: one more than the dense model has is a change, more than 5 % of the prompts damage.
- Looping answers: 10 % and 25 % of the prompts more than the dense model has, and more than twice the standard error of such a
  difference of counts: small models loop by themselves.
- Knowledge: 1.5 and 10 points less, and more than twice the standard error of the paired difference.
- A layer of nothing but zeros is damage whatever the figures say.

Greedy agreement is no finding: of two good models one near tie makes two answers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

LEVELS = ("close", "changed", "damaged")
HEADLINES = {
    "close": "On most uses nobody should notice a difference from the dense model.",
    "changed": "Worse than the dense model in ways that can be seen: try it on your own task before you use it.",
    "damaged": "Not to be used as it is. Remove less (ranks.ratio), or calibrate on text of the kind that the model is used for.",
}
UNKNOWN_ANSWERS = "How it answers is not known: there are no prompts to ask both models."
SEEN_ALONE = "All text it was measured on is of sources that it was calibrated on, which flatters it."


class Bounds(NamedTuple):
    """Up to `close` a figure is close, beyond `damaged` it is damaged."""

    close: float
    damaged: float


OWN_ANSWERS = Bounds(0.15, 0.35)
PERPLEXITY = Bounds(1.15, 1.5)
EMPTY = Bounds(0.0, 0.05)
LOOPING = Bounds(0.1, 0.25)
KNOWLEDGE = Bounds(0.015, 0.1)
NOTICED = 2.0  # standard errors that a difference of counts must have before it is one


class Finding(NamedTuple):
    """One thing that was found: how bad it is, and what to say of it."""

    level: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        level: one of LEVELS.
        sentences: what the level means, then every finding, the worst first, then what is not known.
    """

    level: str
    sentences: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """For a terminal or Markdown: the headline, and an item for each further sentence."""
        headline, *reasons = self.sentences
        return [f"Verdict: {self.level}. {headline}", *(f"- {reason}" for reason in reasons)]


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Judge the content of metrics.json; a figure that is missing or null is no finding."""
    findings = [finding for judge in JUDGES for finding in judge(metrics)]
    level = max((finding.level for finding in findings), key=LEVELS.index, default="close")
    ordered = sorted(findings, key=lambda finding: -LEVELS.index(finding.level))  # stable: as measured within a level
    gaps = tuple(_gaps(metrics))
    return Verdict(level, (HEADLINES[level], *(finding.sentence for finding in ordered), *gaps))


def _level(value: float, bounds: Bounds) -> str:
    if math.isnan(value) or value > bounds.damaged:
        return "damaged"
    return "changed" if value > bounds.close else "close"


def _judge_layers(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    count = metrics["compressed"].get("zero_layers") or 0
    if count:
        layers = "1 layer holds" if count == 1 else f"{count} layers hold"
        yield Finding(
            "damaged", f"{layers} nothing but zeros where the dense model has weights (evaluation.json names them)."
        )


def _judge_empty(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    counts = _counts(metrics, "empty_answers")
    if counts:
        dense, compressed, prompts = counts
        level = _level((compressed - dense) / prompts, EMPTY)
        level = "changed" if level == "close" and compressed else level  # '' is never fine
        yield Finding(level, f"{compressed} of {prompts} answers are empty; of the dense model's, {dense}.")


def _judge_looping(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    counts = _counts(metrics, "looping_answers")
    if counts:
        dense, compressed, prompts = counts
        more = (compressed - dense) / prompts
        variance = sum(count / prompts * (1 - count / prompts) / prompts for count in (dense, compressed))
        level = _level(more, LOOPING) if more > NOTICED * math.sqrt(variance) else "close"
        yield Finding(
            level, f"{compressed} of {prompts} answers repeat themselves to the end; of the dense model's, {dense}."
        )


def _judge_own_answers(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    value = metrics["compressed"].get("own_answers_kl")
    if value is not None:
        yield Finding(
            _level(value, OWN_ANSWERS),
            f"On the dense model's own answers it diverges by {value:.3f} nats a token "
            f"(close up to {OWN_ANSWERS.close:g}, damaged beyond {OWN_ANSWERS.damaged:g}).",
        )


def _judge_perplexity(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    for worst, ratio in worst_source(metrics):
        yield Finding(
            _level(ratio, PERPLEXITY),
            f"Perplexity on {worst} is {ratio:.2f} times the dense model's "
            f"(close up to {PERPLEXITY.close:g}, damaged beyond {PERPLEXITY.damaged:g}).",
        )


def worst_source(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The worst of the sources that decide, and its perplexity by the dense model's; without sources, all text; without either, nothing."""
    ratios = {name: _ratio(source) for name, source in _deciding_sources(metrics).items()}
    if not ratios:
        whole = {model: metrics[model].get("perplexity") for model in ("dense", "compressed")}
        ratios = {"the evaluation text": _ratio(whole)} if None not in whole.values() else {}
    return sorted(ratios.items(), key=lambda item: (math.isnan(item[1]), item[1]))[-1:]


def _judge_knowledge(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    dense, compressed = (metrics[model].get("knowledge_accuracy") for model in ("dense", "compressed"))
    if dense is None or compressed is None:
        return
    lost, error = dense - compressed, metrics["compressed"].get("knowledge_change_error") or 0.0
    level = _level(lost, KNOWLEDGE) if lost > NOTICED * error else "close"
    yield Finding(
        level,
        f"Of the knowledge questions it answers {100 * compressed:.1f} % right, the dense model {100 * dense:.1f} %.",
    )


JUDGES = (_judge_layers, _judge_empty, _judge_own_answers, _judge_perplexity, _judge_knowledge, _judge_looping)


def _counts(metrics: Mapping[str, Any], name: str) -> tuple[int, int, int] | None:
    """Answers of a kind, of the dense and the compressed model, and prompts; None where no prompt was asked."""
    prompts = (metrics.get("answers") or {}).get("prompts")
    dense, compressed = (metrics[model].get(name) for model in ("dense", "compressed"))
    return None if not prompts or dense is None or compressed is None else (dense, compressed, prompts)


def _deciding_sources(metrics: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Sources that calibration did not draw from; all of them where it drew from each."""
    sources = metrics.get("by_source") or {}
    return {name: source for name, source in sources.items() if not source.get("calibrated")} or sources


def _ratio(perplexity: Mapping[str, Any]) -> float:
    return perplexity["compressed"] / perplexity["dense"]


def _gaps(metrics: Mapping[str, Any]) -> Iterator[str]:
    sources = metrics.get("by_source") or {}
    if sources and all(source.get("calibrated") for source in sources.values()):
        yield SEEN_ALONE
    if not (metrics.get("answers") or {}).get("prompts"):
        yield UNKNOWN_ANSWERS
