"""What stage evaluate found, for a model card: a section of its text, and the `model-index` that the hub reads."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fisherfold.evaluation.verdict import verdict
from fisherfold.export.card_templates import RESULTS

PLACE = "<!-- results -->\n"
SAMPLES = 4
LONGEST = 300  # characters of an answer
DIVERGENCE = "KL to the dense model, nats a token"
COUNTS = {"empty_answers": "empty answers", "looping_answers": "answers that repeat themselves to the end"}


def with_results(card: str, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The card of stage factorize with the results in their place and in its front matter.

    Args:
        metrics: metrics.json.
        samples: rows of answers.parquet.
    """
    section = RESULTS.render(
        verdict=verdict(metrics).lines,
        rows=list(_rows(metrics)),
        samples=[
            {**row, **{model: _shown(row[model]) for model in ("dense", "compressed")}} for row in samples[:SAMPLES]
        ],
        prompts=len(samples),
    )
    _, front, text = card.split("---\n", 2)
    name = next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    return f"---\n{front}{_model_index(name, metrics)}---\n{text.replace(PLACE, section)}"


def _shown(answer: str) -> str:
    if not answer.strip():
        return "(empty)"
    return answer if len(answer) <= LONGEST else f"{answer[:LONGEST]} …"


def _rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Rows of the table: text by source, own answers, what both answer, questions."""
    dense, compressed = metrics["dense"], metrics["compressed"]
    for name, source in metrics["by_source"].items():
        seen = "" if not source["calibrated"] else ", a source of the calibration too"
        yield _row(f"perplexity, {name}{seen}", _measured(source, "dense"), _measured(source, "compressed"))
        yield _row(f"divergence from the dense model, nats a token, {name}", "0", _measured(source, "kl_to_dense"))
    if compressed["own_answers_kl"] is not None:
        yield _row("the same on the dense model's own answers", "0", _measured(compressed, "own_answers_kl"))
    for key, label in COUNTS.items():
        if compressed[key] is not None:
            yield _row(f"{label}, of {metrics['answers']['prompts']}", str(dense[key]), str(compressed[key]))
    if compressed["knowledge_accuracy"] is not None:
        pair = (_measured(model, "knowledge_accuracy") for model in (dense, compressed))
        yield _row("multiple-choice questions right, share", *pair)


def _row(label: str, dense: str, compressed: str) -> dict[str, str]:
    return {"label": label, "dense": dense, "compressed": compressed}


def _measured(figures: Mapping[str, Any], name: str) -> str:
    error = figures[f"{name}_error"]
    return f"{figures[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _model_index(name: str, metrics: Mapping[str, Any]) -> str:
    """`model-index` as YAML (JSON is YAML), one result a source, one for the model's own answers, and one for the questions."""
    compressed = metrics["compressed"]
    results = [
        _result(
            source,
            [_metric("perplexity", "Perplexity", found, "compressed"), _metric("kl", DIVERGENCE, found, "kl_to_dense")],
        )
        for source, found in metrics["by_source"].items()
    ]
    if compressed["own_answers_kl"] is not None:
        results.append(
            _result("the dense model's own answers", [_metric("kl", DIVERGENCE, compressed, "own_answers_kl")])
        )
    if compressed["knowledge_accuracy"] is not None:
        accuracy = _metric("accuracy", "Accuracy", compressed, "knowledge_accuracy")
        results.append(_result("multiple-choice questions", [accuracy]))
    return f"model-index: {json.dumps([{'name': name, 'results': results}], ensure_ascii=False)}\n"


def _metric(kind: str, label: str, figures: Mapping[str, Any], key: str) -> dict[str, Any]:
    """One figure with its standard error, where it has one."""
    error = figures[f"{key}_error"]
    errors = {} if error is None else {"args": {"standard_error": error}}
    return {"type": kind, "name": label, "value": figures[key], **errors}


def _result(dataset: str, figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": dataset, "name": f"{dataset}, held out"},
        "metrics": list(figures),
    }
