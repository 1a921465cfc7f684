"""Names of methods in params.yaml, checked against their registries before anything runs."""

import importlib
from operator import attrgetter

from fisherfold.run.params import Params

REGISTRIES = {
    ("kronecker", "estimator"): "fisherfold.fisher.estimators:ESTIMATORS",
    ("kronecker", "method"): "fisherfold.linalg.leading_pairs:SOLVERS",
    ("subspace", "metric"): "stages.subspace:METRICS",
    ("subspace", "fasc.objective"): "fisherfold.subspaces.fasc:OBJECTIVES",
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
