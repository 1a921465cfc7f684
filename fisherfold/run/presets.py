"""Bundles of parameters that belong together: how much time a run may take for how good a model.

``--set preset=best`` writes all values of a bundle into params.yaml, where each can be changed after; `balanced` is what is shipped.
docs/figures.md has what they cost and bring.
"""

from collections.abc import Iterator
from typing import Any

Values = dict[tuple[str, ...], Any]

BALANCED: Values = {
    ("prepare", "calibration_sequences"): 256,
    ("prepare", "tuning_sequences"): 16,
    ("prepare", "training_sequences"): 512,
    ("prepare", "evaluation_sequences"): 32,
    ("prepare", "unseen_sequences"): 16,
    ("prepare", "question_count"): 200,
    ("prepare", "held_out_prompts"): 32,
    ("prepare", "answer_tokens"): 160,
    ("capture", "draws"): 1,
    ("capture", "knowledge_questions"): 32,
    ("kronecker", "dependence_draws"): 60,
    ("ranks", "allocator"): "fisher",
    ("factorize", "refine", "passes"): 2,
    ("factorize", "heal", "passes"): 1,
    ("evaluate", "answer_tokens"): 64,
}
"""The shipped values."""

PRESETS: dict[str, Values] = {
    "fast": BALANCED
    | {
        ("prepare", "calibration_sequences"): 32,
        ("prepare", "tuning_sequences"): 4,
        ("prepare", "training_sequences"): 0,
        ("prepare", "evaluation_sequences"): 12,
        ("prepare", "unseen_sequences"): 8,
        ("prepare", "question_count"): 60,
        ("prepare", "held_out_prompts"): 8,
        ("prepare", "answer_tokens"): 64,
        ("capture", "knowledge_questions"): 4,
        ("kronecker", "dependence_draws"): 0,
        ("ranks", "allocator"): "corrected",
        ("factorize", "refine", "passes"): 0,
        ("factorize", "heal", "passes"): 0,
        ("evaluate", "answer_tokens"): 32,
    },
    "balanced": BALANCED,
    "best": BALANCED
    | {
        ("prepare", "tuning_sequences"): 32,
        ("prepare", "training_sequences"): 768,
        ("capture", "draws"): 0,
        ("ranks", "allocator"): "fermigrad",
    },
}
"""All bundles set the same parameters, so that changing from one to another leaves nothing of the first."""


def own_values(preset: str, document: dict[str, Any]) -> Iterator[str]:
    """Where params.yaml, parsed, has another value than the preset that it names."""
    for keys, value in PRESETS[preset].items():
        found: Any = document
        for key in keys:
            found = found.get(key, value) if isinstance(found, dict) else value
        if found != value:
            yield f"{'.'.join(keys)} = {found}"
