"""Figures with their standard errors from what was measured on two models, `dense` and `compressed`."""

import math
from typing import Any

import numpy as np

from fisherfold.run.workspace import MODELS

COMPARED = (*MODELS, "divergence")
"""Losses of a token: by either model, and from the one to the other."""
LARGEST_LOSS = 700.0  # nats; its exponential is still a float
WORST = 0.01  # share of the tokens


def summarise_losses(losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over all predicted tokens, and standard errors with the sequence as the independent draw.

    `losses` holds `dense`, `compressed` and `divergence`, each [S, T-1] in nats. The standard error of a perplexity
    exp(mean loss) is that of the mean loss times itself. `difference` is compressed minus dense, with the error of the
    paired difference, which is far smaller than the errors of the two alone suggest.
    """
    pairs = {**losses, "difference": losses["compressed"].astype(np.float64) - losses["dense"]}
    by_sequence = {name: values.mean(1, dtype=np.float64) for name, values in pairs.items()}
    mean = {name: float(values.mean()) for name, values in by_sequence.items()}
    error = {name: standard_error(values) for name, values in by_sequence.items()}
    perplexity = {model: math.exp(min(mean[model], LARGEST_LOSS)) for model in MODELS}
    return {
        "sequences": losses["dense"].shape[0],
        "predicted_tokens": losses["dense"].size,
        "mean": mean,
        "standard_error": error,
        "worst_share": worst_share(losses["divergence"]),
        "perplexity": perplexity,
        "perplexity_standard_error": {
            model: None if (spread := error[model]) is None else perplexity[model] * spread for model in MODELS
        },
    }


def worst_share(divergence: np.ndarray) -> float:
    """Share of the whole divergence that the worst hundredth of the tokens has, at least one; where there is none, 0.

    A mean over tokens hides a broken one (docs/developers/log.md, "The first token must be held").
    """
    ordered = np.sort(divergence, axis=None).astype(np.float64)
    whole = ordered.sum()
    return float(ordered[-max(1, round(WORST * ordered.size)) :].sum() / whole) if whole else 0.0


def summarise_answers(answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Accuracies of both models with standard errors, `difference` paired; None where there are no questions.

    `acc` takes the choice with the largest log-likelihood, `acc_norm` the one with the largest per character.
    """
    if not answers["dense"]:
        return None
    right = {
        rule: {model: np.array([row[rule] for row in answers[model]], float) for model in MODELS}
        for rule in ("acc", "acc_norm")
    }
    for values in right.values():
        values["difference"] = values["compressed"] - values["dense"]
    return {
        "questions": len(answers["dense"]),
        "mean": {rule: {name: float(row.mean()) for name, row in values.items()} for rule, values in right.items()},
        "standard_error": {
            rule: {name: standard_error(row) for name, row in values.items()} for rule, values in right.items()
        },
    }


def standard_error(draws: np.ndarray) -> float | None:
    """s / √n of n independent draws, s their sample standard deviation; None for a single one."""
    return float(draws.std(ddof=1) / math.sqrt(len(draws))) if len(draws) > 1 else None


def ratio_of_sums(values: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """r = Σ y / Σ n over k draws, and its standard error √(Σ (y - r n)² k / (k - 1)) / Σ n; none for a single draw."""
    ratio, draws = float(values.sum() / counts.sum()), len(values)
    if draws < 2:
        return ratio, None
    squares = float(np.square(values - ratio * counts).sum())
    return ratio, math.sqrt(squares * draws / (draws - 1)) / float(counts.sum())


def mean_by_position(losses: dict[str, np.ndarray], runs: int) -> list[tuple[float, ...]]:
    """Rows (position, dense, compressed, divergence): means in at most `runs` runs of positions of nearly equal length.

    The position is the middle one of the run; the first token of a sequence, which nothing predicts, is 0.
    """
    positions = np.arange(losses["dense"].shape[1])
    return [
        (float(run.mean()) + 1, *(float(losses[name][:, run].mean(dtype=np.float64)) for name in COMPARED))
        for run in np.array_split(positions, min(runs, len(positions)))
    ]


def tidy_results(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` as ``{"acc": {"value": 0.5, "standard_error": 0.1}}``."""
    metrics = {}
    for key, value in values.items():
        metric, comma, rule = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{rule}")
            metrics[metric if rule == "none" else f"{metric} ({rule})"] = {
                "value": _number(value),
                "standard_error": _number(error),
            }
    return {"metrics": metrics, "documents": values.get("sample_len")}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None
