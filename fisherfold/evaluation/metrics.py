"""metrics.json: the figures of both models by name, unrounded, each measured one with its standard error (`…_error`)."""

from collections.abc import Mapping
from typing import Any

from fisherfold.run.workspace import MODELS

ACCURACY = "acc"


def metrics(
    text: dict[str, Any],
    sources: dict[str, dict[str, Any]],
    knowledge: dict[str, Any] | None,
    own: dict[str, Any] | None,
    greedy: dict[str, Any] | None,
    zero: list[str],
    size: Mapping[str, int],
) -> dict[str, Any]:
    """All figures. What was not measured, for want of questions or prompts, is null.

    Args:
        text, sources: see `summarise_losses`, `summarise_sources`.
        knowledge, own, greedy: see `summarise_answers`, `summarise_own_answers`, `summarise_samples`.
        zero: see `zero_layers`.
        size: parameters and bytes of both models.
    """
    figures = {model: _of_model(model, text, knowledge, greedy) for model in MODELS}
    figures["compressed"] |= _to_dense(text, knowledge, own, greedy) | {"zero_layers": len(zero)}
    return {
        **figures,
        "answers": {"prompts": greedy["prompts"] if greedy else 0, "tokens": own["tokens"] if own else 0},
        "by_source": {name: _of_source(source) for name, source in sources.items()},
        "size": dict(size),
    }


def _of_model(
    model: str, text: dict[str, Any], knowledge: dict[str, Any] | None, greedy: dict[str, Any] | None
) -> dict[str, Any]:
    """Figures that each model has by itself."""
    return {
        "perplexity": text["perplexity"][model],
        "perplexity_error": text["perplexity_standard_error"][model],
        "knowledge_accuracy": knowledge["mean"][ACCURACY][model] if knowledge else None,
        "knowledge_accuracy_error": knowledge["standard_error"][ACCURACY][model] if knowledge else None,
        "empty_answers": greedy["empty"][model] if greedy else None,
        "looping_answers": greedy["looping"][model] if greedy else None,
    }


def _to_dense(
    text: dict[str, Any], knowledge: dict[str, Any] | None, own: dict[str, Any] | None, greedy: dict[str, Any] | None
) -> dict[str, Any]:
    """How far the compressed model is from the dense one."""
    shares = ("greedy_agreement", "greedy_agreement_error", "agreeing_prefix", "agreeing_prefix_error")
    return {
        "kl_to_dense": text["mean"]["divergence"],
        "kl_to_dense_error": text["standard_error"]["divergence"],
        "kl_worst_share": text["worst_share"],
        "own_answers_kl": own["mean"]["divergence"] if own else None,
        "own_answers_kl_error": own["standard_error"]["divergence"] if own else None,
        "knowledge_change_error": knowledge["standard_error"][ACCURACY]["difference"] if knowledge else None,
        **{name: greedy[name] if greedy else None for name in shares},
    }


def _of_source(source: dict[str, Any]) -> dict[str, Any]:
    """Perplexities of both models and the divergence on one source."""
    errors = source["perplexity_standard_error"]
    return {
        **source["perplexity"],
        **{f"{model}_error": errors[model] for model in MODELS},
        "kl_to_dense": source["mean"]["divergence"],
        "kl_to_dense_error": source["standard_error"]["divergence"],
        "sequences": source["sequences"],
        "calibrated": source["calibrated"],
    }
