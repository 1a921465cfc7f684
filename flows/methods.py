"""Names of methods in params.yaml, and what they need of other stages, checked before anything runs."""

import importlib
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import NamedTuple

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

SUMMED, KEPT = ("sums", "sketch", "exact"), ("sketch", "exact")


class Need(NamedTuple):
    """A parameter that a method cannot do with any value of.

    Attributes:
        block: the method's.
        key: of that block, which names the method.
        method: its name.
        parameter: dotted.
        values: that do, the cheapest first.
        why: the method wants one of them.
        others: finds further values that do.
    """

    block: str
    key: str
    method: str
    parameter: str
    values: tuple[str, ...]
    why: str
    others: Callable[[], Iterable[str]] = tuple

    def unmet(self, params: Params) -> bool:
        """Whether the method is asked for and the parameter has another value."""
        asked = attrgetter(f"{self.block}.{self.key}")(params) == self.method
        return asked and attrgetter(self.parameter)(params) not in {*self.values, *self.others()}


def _making_factors() -> list[str]:
    """Estimators that do, those of a project's own among them."""
    estimators = importlib.import_module("fisherfold.fisher.estimators").ESTIMATORS
    return [name for name in estimators if estimators.lookup(name).makes_factors]


GRADIENTS, FACTORS = "reads the gradients of sequences", "needs Kronecker factors"
LOSS = "reads the slope of the text's loss, whose mean is zero with labels drawn from the model"
NEEDS = (
    Need("kronecker", "estimator", "sequence", "capture.gradients", KEPT, GRADIENTS),
    Need("subspace", "metric", "gfwsvd", "kronecker.estimator", ("sequence", "token"), FACTORS, _making_factors),
    Need("subspace", "metric", "fwsvd", "capture.gradients", SUMMED, GRADIENTS),
    Need("subspace", "metric", "fasc", "capture.gradients", SUMMED, GRADIENTS),
    Need("ranks", "allocator", "zero_sum", "capture.gradients", SUMMED, GRADIENTS),
    Need("ranks", "allocator", "zero_sum", "capture.labels", ("data",), LOSS),
)
"""What methods need of other stages; by default nothing of gradients is kept, which is a third of the capture's time."""


def metric_settings(metrics: Iterable[str]) -> dict[str, str]:
    """For each parameter that one of `metrics` needs, or a method that it needs, the first value that serves all of them."""
    asked = [("subspace.metric", metric) for metric in metrics]
    served: dict[str, list[str]] = {}
    for name, method in asked:  # grows: what a metric needs may be a method with needs of its own
        for need in NEEDS:
            if (f"{need.block}.{need.key}", need.method) == (name, method):
                served[need.parameter] = [
                    value for value in need.values if value in served.get(need.parameter, need.values)
                ]
                asked.append((need.parameter, served[need.parameter][0]))
    return {parameter: values[0] for parameter, values in served.items()}


def check_methods(params: Params) -> None:
    """Look every named method up in its registry, and see that other stages give what it needs.

    Raises:
        ParameterError: one is unknown, and the message gives the nearest name and all of them; or another parameter is not what it needs.
    """
    for (block, key), location in REGISTRIES.items():
        module, _, name = location.partition(":")
        getattr(importlib.import_module(module), name).lookup(attrgetter(f"{block}.{key}")(params))
    for need in NEEDS:
        if need.unmet(params):
            found = attrgetter(need.parameter)(params)
            raise ParameterError(
                f"{need.block}.{need.key} = {need.method!r} {need.why}, and {need.parameter} is {found!r}. "
                f"Set it to {' or '.join(map(repr, need.values))}, for instance with --set {need.parameter}={need.values[0]}."
            )
