"""Names of methods in params.yaml, and what they need of the capture, checked before anything runs."""

import importlib
from collections.abc import Iterable
from operator import attrgetter

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params

REGISTRIES = {
    ("kronecker", "estimator"): "fisherfold.fisher.estimators:ESTIMATORS",
    ("kronecker", "method"): "fisherfold.linalg.leading_pairs:SOLVERS",
    ("subspace", "metric"): "stages.subspace:METRICS",
    ("subspace", "fasc.objective"): "fisherfold.subspaces.fasc:OBJECTIVES",
    ("ranks", "allocator"): "stages.ranks:ALLOCATORS",
    ("ranks", "budget"): "fisherfold.allocators.budget:BUDGETS",
}

METRIC_NEEDS = {
    "gfwsvd": {"kronecker.estimator": "sequence", "capture.gradients": "sketch"},
    "fwsvd": {"capture.gradients": "sketch"},
    "fasc": {"capture.gradients": "sketch"},
}
"""Other parameters that a metric cannot do without, where params.yaml's defaults give something else."""


def capture_needs(metrics: Iterable[str]) -> list[str]:
    """What one capture must keep for all of `metrics`, as ``--set`` takes it."""
    needs = {key: value for metric in metrics for key, value in METRIC_NEEDS.get(metric, {}).items()}
    return [f"{key}={value}" for key, value in needs.items() if key.startswith("capture.")]


SUMMED, KEPT = ("sums", "sketch", "exact"), ("sketch", "exact")
GRADIENTS = {
    ("kronecker", "estimator", "sequence"): KEPT,
    ("subspace", "metric", "fwsvd"): SUMMED,
    ("subspace", "metric", "fasc"): SUMMED,
    ("ranks", "allocator", "zero_sum"): SUMMED,
}
"""What capture.gradients has to be for a method; by default nothing of gradients is kept, which is a third of the capture's time."""

LABELS = {("ranks", "allocator", "zero_sum"): "data"}
"""What capture.labels has to be for a method."""


def check_methods(params: Params) -> None:
    """Look every named method up in its registry, and see that the capture keeps what it reads.

    Raises:
        ParameterError: one is unknown, and the message gives the nearest name and all of them; or capture.gradients is too little for it.
    """
    for (block, key), location in REGISTRIES.items():
        module, _, name = location.partition(":")
        getattr(importlib.import_module(module), name).lookup(_value(params, block, key))
    for (block, key, method), forms in GRADIENTS.items():
        if _value(params, block, key) == method and params.capture.gradients not in forms:
            raise ParameterError(
                f"{block}.{key} = {method!r} reads the gradients of sequences, and capture.gradients is {params.capture.gradients!r}. "
                f"Set it to {' or '.join(map(repr, forms))}, for instance with --set capture.gradients={forms[0]}."
            )
    for (block, key, method), labels in LABELS.items():
        if _value(params, block, key) == method and params.capture.labels != labels:
            raise ParameterError(
                f"{block}.{key} = {method!r} reads the slope of the text's loss, and with labels drawn from the model its mean is zero. "
                f"Set it with --set capture.labels={labels}."
            )


def _value(params: Params, block: str, key: str) -> object:
    return attrgetter(f"{block}.{key}")(params)
