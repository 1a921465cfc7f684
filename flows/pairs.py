"""Parameters of different stages, or of different methods, that do not go together: found before hours are spent on the first of them."""

import importlib
from collections.abc import Callable

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params
from fisherfold.run.workspace import Workspace

Check = Callable[[Params, Workspace], str | None]
PAIRS: list[Check] = []
"""Functions of the parameters and the project; what is wrong and what to do, or None."""

METRIC_NEEDS = {
    "gfwsvd": {"kronecker.estimator": "sequence", "capture.gradients": "sketch"},
    "fwsvd": {"capture.gradients": "sketch"},
    "fasc": {"capture.gradients": "sketch"},
}
"""Other parameters that a metric cannot do without, where params.yaml's defaults give something else."""


def check_pairs(params: Params, workspace: Workspace) -> None:
    """Try every pair.

    Raises:
        ParameterError: some do not go together; names all of them.
    """
    faults = [fault for check in PAIRS if (fault := check(params, workspace))]
    if faults:
        raise ParameterError(" ".join(faults))


@PAIRS.append
def tokens_for_estimator(params: Params, _: Workspace) -> str | None:
    """An estimator reads sampled tokens that stage capture keeps only if told to; for gradients see `flows.methods`."""
    name = params.kronecker.estimator
    reads = importlib.import_module("fisherfold.fisher.estimators").ESTIMATORS.lookup(name).reads
    if reads != "has_tokens" or params.capture.tokens_per_sequence:
        return None
    needed = importlib.import_module("stages.kronecker").NEEDED[reads]
    return f"kronecker.estimator = {name!r} needs {needed}, or choose 'kfac'."


@PAIRS.append
def factors_for_metric(params: Params, _: Workspace) -> str | None:
    """A metric of Kronecker factors wants an estimator that makes some."""
    estimator = params.kronecker.estimator
    entry = importlib.import_module("fisherfold.fisher.estimators").ESTIMATORS.lookup(estimator)
    made = getattr(entry, "makes_factors", entry.fisher is not None)
    if params.subspace.metric not in METRIC_NEEDS or made:
        return None
    return (
        f"subspace.metric = {params.subspace.metric!r} needs Kronecker factors, and kronecker.estimator = {estimator!r} makes none: "
        "set kronecker.estimator = 'sequence' (or 'token'), or subspace.metric = 'kfac'."
    )


@PAIRS.append
def damping_from_data(params: Params, _: Workspace) -> str | None:
    """A damping that is chosen from data wants a metric that is a mean of samples, their diagnostics and, for one rule, their variance."""
    chosen = {rule for rule in (params.subspace.input_damping, params.subspace.output_damping) if isinstance(rule, str)}
    means = {*importlib.import_module("fisherfold.subspaces.shrinkage").TOKEN_WISE, *METRIC_NEEDS}
    if not chosen:
        return None
    if params.subspace.metric not in means:
        return (
            f"subspace.metric = {params.subspace.metric!r} is not a mean of samples that a damping could be chosen from: "
            f"give subspace.input_damping and output_damping numbers, or use {', '.join(sorted(means))}."
        )
    if params.kronecker.diagnostics == "none":
        return f"A damping chosen from data ({', '.join(sorted(chosen))}) needs kronecker.diagnostics = 'basic'."
    if "ledoit_wolf" in chosen and params.capture.tokens_per_sequence < 2:
        return "Damping 'ledoit_wolf' needs capture.tokens_per_sequence of 2 or more; or choose 'oas' or a number."
    return None


@PAIRS.append
def tokens_for_projectors(params: Params, _: Workspace) -> str | None:
    """Parts of metric fasc are measured on sampled tokens."""
    fasc = params.subspace.fasc
    asked = {"objective = 'empirical'": fasc.objective == "empirical", "threshold": fasc.threshold is not None}
    wanting = [name for name, asks in asked.items() if asks]
    if params.subspace.metric != "fasc" or not wanting or params.capture.tokens_per_sequence:
        return None
    return f"subspace.fasc.{wanting[0]} needs tokens: set capture.tokens_per_sequence = 16, say."


@PAIRS.append
def tokens_left_by_trimming(params: Params, _: Workspace) -> str | None:
    """Some token of every sequence is left to be measured."""
    trim, length = params.kronecker.trim_tokens, params.prepare.sequence_length
    return None if trim < length else f"kronecker.trim_tokens = {trim} leaves nothing of sequences of {length} tokens."


@PAIRS.append
def tuning_for_search(params: Params, _: Workspace) -> str | None:
    """An allocator that measures the network has the tuning sequences that it asks for."""
    asked = {"fermigrad": params.ranks.fermigrad.sequences, "sensitivity": params.ranks.measured.sequences}
    asked["ilp"] = asked["sensitivity"]
    needed, there = asked.get(params.ranks.allocator, 0), params.prepare.tuning_sequences
    if needed <= there:
        return None
    return f"ranks.allocator = {params.ranks.allocator!r} asks for {needed} tuning sequences, prepare.tuning_sequences = {there}."


@PAIRS.append
def folder_of_tasks(params: Params, workspace: Workspace) -> str | None:
    """The folder of a user's own tasks is there."""
    folder = params.evaluate.task_folder
    if not folder or (workspace.root / folder).is_dir():
        return None
    return f"evaluate.task_folder = {folder!r}: {workspace.root / folder} is not a folder."
