"""`fisherfold compare A B`: which parameters differ, and what that changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fisherfold.evaluation.verdict import verdict
from fisherfold.run.progress import millions
from flows.outcome import in_bytes
from flows.tables import print_table

MEASURES = {
    "perplexity": ("compressed", "perplexity", "{:.4g}"),
    "by that of the dense": ("ratio", "perplexity", "{:.3f}"),
    "KL to the dense, nats": ("compressed", "kl_to_dense", "{:.4g}"),
    "own answers, KL, nats": ("compressed", "own_answers_kl", "{:.4g}"),
    "knowledge, right": ("compressed", "knowledge_accuracy", "{:.1%}"),
    "empty answers": ("compressed", "empty_answers", "{}"),
    "targeted parameters": ("size", "targeted_parameters_compressed", None),
    "bytes of the model": ("size", "model_bytes_compressed", None),
    "reads, tokens a second": ("speed", "reading", "{:.1f}"),
    "answers, tokens a second": ("speed", "answering", "{:.1f}"),
}
"""What is compared: where it stands in metrics.json, or in what a run remembers of speed, and how it is shown."""


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two runs as ``{"runs": …, "parameters": {key: [a, b]}, "measures": {name: [a, b]}, "verdicts": [a, b]}``; what neither
    has is left out."""
    runs = (first, second)
    flat = [dict(_flat(run.get("params") or {})) for run in runs]
    known = all("params" in run for run in runs)
    names = dict.fromkeys([*flat[0], *flat[1]]) if known else {}
    pairs = {name: [_measure(run, *where[:2]) for run in runs] for name, where in MEASURES.items()}
    return {
        "runs": [run["run"] for run in runs],
        "parameters": {
            name: [each.get(name) for each in flat] for name in names if flat[0].get(name) != flat[1].get(name)
        },
        "measures": {name: pair for name, pair in pairs.items() if pair != [None, None]},
        "verdicts": [verdict(run["metrics"]).level for run in runs],
    }


def _measure(run: Mapping[str, Any], part: str, key: str) -> float | None:
    metrics = run["metrics"]
    if part == "speed":
        pace = (run.get("speed") or {}).get(key) or {}
        return pace.get("compressed")
    if part == "ratio":
        pair = [metrics[model].get(key) for model in ("compressed", "dense")]
        return None if None in pair else pair[0] / pair[1]
    return metrics[part].get(key)


def _flat(params: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(params, Mapping) and params:
        for key, value in params.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, params


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print it as a table, the parameters first."""
    runs: Sequence[object] = found["runs"]
    rows = [(name, *(str(value) for value in pair)) for name, pair in found["parameters"].items()]
    rows += [(name, *(_shown(name, value) for value in pair)) for name, pair in found["measures"].items()]
    rows.append(("verdict", *found["verdicts"]))
    print_table(("", *(f"run {run}" if isinstance(run, int) else str(run) for run in runs)), rows)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    pattern = MEASURES[name][2]
    if pattern:
        return pattern.format(value)
    return in_bytes(value) if "bytes" in name else millions(value)
