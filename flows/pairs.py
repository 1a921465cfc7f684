"""Parameters of different stages, or of different methods, that do not go together: found before hours are spent on the first of them.

What each stage refuses by itself once its inputs are there is refused here by the parameters alone, in the stage's own words where it can be.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params

PAIRS: list[Callable[[Params], str | None]] = []
"""Functions of the parameters: what is wrong and what to do, or None. Whatever else they read is imported when they run."""

FROM_FACTORS = "gfwsvd"
"""The metric that is stage kronecker's own factors."""
DROPS = "drop_experts"
"""The allocator that leaves whole experts out."""


def check_pairs(params: Params) -> None:
    """Try every pair.

    Raises:
        ParameterError: some do not go together; names all of them.
    """
    faults = [fault for check in PAIRS if (fault := check(params))]
    if faults:
        raise ParameterError(" ".join(faults))


def _estimator(params: Params) -> Any:
    return importlib.import_module("fisherfold.fisher.estimators").ESTIMATORS.lookup(params.kronecker.estimator)


@PAIRS.append
def tokens_for_estimator(params: Params) -> str | None:
    """An estimator may read sampled tokens, which stage capture keeps only if told to; for gradients see `flows.methods`."""
    name, estimator = params.kronecker.estimator, _estimator(params)
    clips = params.kronecker.clip is not None and estimator.passes
    if not (estimator.reads == "has_tokens" or clips) or params.capture.tokens_per_sequence:
        return None
    needed = importlib.import_module("stages.kronecker").NEEDED["has_tokens"]
    return f"kronecker.estimator = {name!r} needs {needed}, or choose 'kfac'."


@PAIRS.append
def draws_of_labels(params: Params) -> str | None:
    """The text has one label a token."""
    if params.capture.draws <= 1 or params.capture.labels == "model":
        return None
    return "capture.draws counts labels drawn from the model, and capture.labels is 'data'. Set capture.draws = 1, or capture.labels = 'model'."


@PAIRS.append
def damping_from_data(params: Params) -> str | None:
    """A damping that is chosen from data wants a metric that is a mean of samples, their diagnostics and, for one rule, their variance."""
    subspace, capture = params.subspace, params.capture
    chosen = sorted({rule for rule in (subspace.input_damping, subspace.output_damping) if isinstance(rule, str)})
    means = [*importlib.import_module("fisherfold.subspaces.shrinkage").TOKEN_WISE, FROM_FACTORS]
    if not chosen:
        return None
    if subspace.metric not in means:
        return (
            f"subspace.metric = {subspace.metric!r} is not a mean of samples that a damping could be chosen from: "
            f"give subspace.input_damping and output_damping numbers, or use {', '.join(means)}."
        )
    if params.kronecker.diagnostics == "none":
        return f"A damping chosen from data ({', '.join(chosen)}) needs kronecker.diagnostics = 'basic'."
    if "ledoit_wolf" in chosen and capture.tokens_per_sequence < 2:
        return "Damping 'ledoit_wolf' needs capture.tokens_per_sequence of 2 or more; or choose 'oas' or a number."
    return None


@PAIRS.append
def tokens_for_fasc(params: Params) -> str | None:
    """Parts of metric fasc are measured on sampled tokens."""
    fasc = params.subspace.fasc
    asks = {"objective = 'empirical'": fasc.objective == "empirical", "threshold": fasc.threshold is not None}
    wanting = [name for name, asked in asks.items() if asked]
    if params.subspace.metric != "fasc" or not wanting or params.capture.tokens_per_sequence:
        return None
    return f"subspace.fasc.{wanting[0]} needs tokens: set capture.tokens_per_sequence = 16, say."


@PAIRS.append
def tokens_left_by_trimming(params: Params) -> str | None:
    """Some token of every sequence is left to be measured."""
    trim, length = params.kronecker.trim_tokens, params.prepare.sequence_length
    return None if trim < length else f"kronecker.trim_tokens = {trim} leaves nothing of sequences of {length} tokens."


def _placement(params: Params) -> Any:
    return importlib.import_module("fisherfold.statistics.streamed_placement").PLACEMENTS.lookup(
        params.capture.placement
    )


@PAIRS.append
def placement_of_capture(params: Params) -> str | None:
    """A placement of the model may be unable to do what other parameters of stage capture ask for."""
    return _placement(params).fault(params.capture)


@PAIRS.append
def unpacked_bits(params: Params) -> str | None:
    """What reads numbers of few bits unpacks them at a layer's first call, and keeps them."""
    if not _asked_bits(params) or _placement(params).holds_model:
        return None
    return (
        f"{_asked_bits(params)}: compressed-tensors keeps a model's unpacked weights in memory when it is evaluated, which "
        f"capture.placement = {params.capture.placement!r} avoids. Set factorize.bits = null, factorize.head_bits = null and ranks.widths = [], or capture.placement = 'whole'."
    )


@PAIRS.append
def healing_of_whole_models(params: Params) -> str | None:
    """All factors are trained at once."""
    if not params.factorize.heal.passes or _placement(params).holds_model:
        return None
    return (
        f"factorize.heal.passes = {params.factorize.heal.passes} trains a whole model beside the dense one, which capture.placement = "
        f"{params.capture.placement!r} keeps out of memory. Set factorize.heal.passes = 0, or capture.placement = 'whole'."
    )


def _asked_bits(params: Params) -> str:
    """What asks for numbers of few bits; empty if nothing does."""
    if params.ranks.widths:
        return f"ranks.widths = {list(params.ranks.widths)}"
    asked = [
        f"factorize.{name} = {bits}" for name in ("bits", "head_bits") if (bits := getattr(params.factorize, name))
    ]
    return " and ".join(asked)


@PAIRS.append
def few_bits(params: Params) -> str | None:
    """Layers of few bits come in groups, and are rounded under a metric on weights."""
    widths, asked = params.ranks.widths, _asked_bits(params)
    if not (widths or params.factorize.bits):
        return None
    group = importlib.import_module("fisherfold.linalg.group_grid").GROUP
    weighers = importlib.import_module("fisherfold.allocators.loss_weights").WEIGHERS
    alone = not params.factorize.bits and params.ranks.budget == "model_bytes"
    if widths and not (alone and params.ranks.allocator in weighers):
        return (
            f"{asked} chooses the bits of every layer by what they cost in bytes: set ranks.budget = 'model_bytes', ranks.allocator = "
            f"{' or '.join(map(repr, weighers))} and factorize.bits = null."
        )
    if params.ranks.round_to % group:
        return f"{asked} rounds numbers in groups of {group}, which ranks have to be multiples of: set ranks.round_to = {group}."
    if importlib.import_module("stages.subspace").shares_inputs(params.subspace):
        return f"{asked} rounds each layer under its own metric: set subspace.share_inputs = false and a metric other than 'fasc'."
    return None


@PAIRS.append
def packed_numbers(params: Params) -> str | None:
    """Numbers of few bits are stored in one format, which a package reads."""
    asked = _asked_bits(params)
    if not asked:
        return None
    if params.factorize.head_bits and params.factorize.target != "transformers":
        return f"{asked}: {params.factorize.target} reads the head itself, in the numbers of factorize.dtype. Set factorize.head_bits = null."
    if params.factorize.gguf_export:
        return f"{asked} is not what GGUF files have: set factorize.gguf_export = false and let llama.cpp quantize the dense export."
    if importlib.util.find_spec("compressed_tensors") is None:
        return f"{asked} is stored in a format that transformers reads through compressed-tensors: pip install compressed-tensors."
    return None


@PAIRS.append
def experts_of_a_mixture(params: Params) -> str | None:
    """A right factor for all experts of a stack is found under a metric on weights; dropping wants experts that are layers of their own."""
    shared, drops = params.subspace.experts.shared, params.ranks.allocator == DROPS
    subspaces = importlib.import_module("stages.subspace")
    if shared and isinstance(subspaces.METRICS.lookup(params.subspace.metric), subspaces.OwnDecomposition):
        return f"subspace.experts.shared wants a metric on weights, and {params.subspace.metric!r} is none: set subspace.metric = 'kfac'."
    if drops and (shared or params.prepare.experts == "dense"):
        return f"ranks.allocator = {DROPS!r} wants experts that are layers of their own: set subspace.experts.shared = false and prepare.experts = 'layers'."
    if drops and params.factorize.bits:
        return f"ranks.allocator = {DROPS!r} leaves matrices as they are: set factorize.bits = null."
    return None
