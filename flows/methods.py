"""Names of methods in params.yaml, checked against their registries before anything runs."""

import importlib
from operator import attrgetter

from stages.params import Params

REGISTRIES = {
    ("kronecker", "estimator"): "stages.estimators:ESTIMATORS",
    ("kronecker", "method"): "stages.leading_pairs:SOLVERS",
    ("subspace", "metric"): "stages.subspace:METRICS",
    ("subspace", "fasc.objective"): "stages.fasc:OBJECTIVES",
    ("ranks", "allocator"): "stages.ranks:ALLOCATORS",
}

METRIC_NEEDS = {"gfwsvd": {"kronecker.estimator": "sequence"}}
"""Other parameters that a metric cannot do without, where params.yaml's defaults give something else."""


def check_methods(params: Params) -> None:
    """Look every named method up in its registry.

    Raises:
        ParameterError: one is unknown; the message gives the nearest name and all of them.
    """
    for (block, key), location in REGISTRIES.items():
        module, _, name = location.partition(":")
        getattr(importlib.import_module(module), name).lookup(attrgetter(key)(getattr(params, block)))
