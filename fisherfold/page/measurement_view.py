"""How the statistics were captured, and how far they can be trusted."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from fisherfold.page.layer_views import diagnostic_table, estimator_table, residual_map
from fisherfold.page.page import element, number, section
from fisherfold.page.record import Record

TRUST = (
    "The Fisher information of a layer, how much the loss minds every possible change of its weights, is approximated by two small matrices: A, "
    "which inputs occur, and B, which outputs matter. Three figures say how far to trust them. Effective tokens: how many tokens' worth of "
    "gradients B really rests on, since few large ones outweigh many small. Variance: how much A and B would change with other text, as a share "
    "of their size (more text makes it smaller). Condition: the largest over the smallest weight that the metric gives to a direction; damping "
    "keeps it from growing without bound."
)


def measurement_view(record: Record) -> Markup:
    """The section on the calibration text, the Kronecker factors and the metrics."""
    conditions = {
        "input_condition": "input condition",
        "output_condition": "output condition",
        "input_damping": "input damping",
        "output_damping": "output damping",
    }
    kronecker = record.rows("kronecker", "diagnostics.parquet")
    return section(
        "How it was measured",
        element("p", _capture_sentence(record.facts["capture"])),
        element("p", TRUST),
        residual_map(kronecker),
        diagnostic_table(
            "Kronecker factors",
            kronecker,
            {
                "residual": "relative residual",
                "scale": "scale",
                "iterations": "iterations",
                "sigma_ratio": "σ₁/σ₂",
                "effective_sequences": "effective sequences",
                "effective_tokens": "effective tokens",
            },
        ),
        estimator_table(record.rows("kronecker", "comparison.parquet")),
        diagnostic_table(
            "Metrics of the weighted decomposition", record.rows("subspace", "diagnostics.parquet"), conditions
        ),
    )


def _capture_sentence(facts: Mapping[str, Any]) -> str:
    tokens, sequences, skipped = facts.get("tokens"), facts.get("sequences"), facts.get("skipped") or []
    if tokens is None or sequences is None:
        return "The capture stage recorded no facts."
    sketch = f"every sequence's gradient was kept as a sketch of rank {facts.get('sketch_rank')}"
    form = {"none": "no per-sequence gradient was kept", "exact": "every sequence's gradient was kept in full"}
    names = ", ".join(map(str, skipped[:8])) + (", …" if len(skipped) > 8 else "")
    left_out = f"{len(skipped)} skipped because a gradient was not finite ({names})" if skipped else "none skipped"
    return (
        f"Statistics come from {number(tokens)} tokens of {number(sequences)} calibration sequences, {left_out}; "
        f"{form.get(str(facts.get('gradients')), sketch)}."
    )
