"""What an engine cannot run, refused before the work; and what is given up for it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fisherfold.allocators.cost import rank_costs
from fisherfold.export.architecture import base_class, dense_architecture
from fisherfold.export.gguf_export import check_gguf
from fisherfold.export.vllm_backend import attention_fails, logit_scale
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.errors import InputError, ParameterError
from fisherfold.run.params import FactorizeParams

Check = Callable[[FactorizeParams, Path, Sequence[LinearLayer]], None]
"""Of the parameters, a dense model's folder and the layers that are compressed."""
ELSEWHERE = "Set factorize.target: transformers, or serve the dense folder that factorize.dense_export writes."


def check_transformers(params: FactorizeParams, model: Path, layers: Sequence[LinearLayer]) -> None:
    """Whatever can be factorized runs there."""


def check_vllm(params: FactorizeParams, model: Path, layers: Sequence[LinearLayer]) -> None:
    """vLLM's Transformers backend takes the model without its head and puts an attention of its own into it.

    Raises:
        InputError: experts are among the layers, transformers has no class of the model without its head, its attention cannot be replaced, or
            something else computes its logits.
    """
    if any(layer.stack for layer in layers):
        raise InputError(
            "factorize.target = vllm: vLLM runs a mixture's experts by kernels of its own, which know no low-rank ones. Set prepare.experts: dense, "
            "or factorize.target: transformers."
        )
    architecture = dense_architecture(model)
    kind, empty = architecture.config["model_type"], architecture.empty_model()
    if base_class(empty) is None:
        raise InputError(
            f"factorize.target = vllm: vLLM wants the model without its head, for which transformers has no class of {kind!r}. {ELSEWHERE}"
        )
    if not type(empty).is_backend_compatible():
        raise InputError(
            f"factorize.target = vllm: the attention of {kind!r} in transformers is not one that vLLM can replace. {ELSEWHERE}"
        )
    if reason := attention_fails(architecture.read_config()):
        raise InputError(
            f"factorize.target = vllm: {kind!r} in transformers wants its attention's result in another form than vLLM gives it, one row of "
            f"numbers a token ({reason}). {ELSEWHERE}"
        )
    if logit_scale(empty) is None:
        raise InputError(
            f"factorize.target = vllm: vLLM takes the logits of {kind!r} for the output embedding's product, which in transformers they are not. "
            f"{ELSEWHERE}"
        )


def check_llama_cpp(params: FactorizeParams, model: Path, layers: Sequence[LinearLayer]) -> None:
    """llama.cpp reads GGUF.

    Raises:
        ParameterError: nothing is written for it.
        InputError: the model or its tokenizer cannot be written as GGUF.
    """
    if not params.gguf_export:
        raise ParameterError(
            "factorize.target = gguf writes nothing for llama.cpp while factorize.gguf_export is false. `--set factorize.target=gguf` sets both."
        )
    check_gguf(json.loads((model / "config.json").read_text(encoding="utf-8")), model)


CHECKS: dict[str, Check] = {"transformers": check_transformers, "vllm": check_vllm, "gguf": check_llama_cpp}
"""By value of ``factorize.target``: refuses what the engine cannot run."""


def kept_rank_share(sites: Sequence[Site], storage: str, round_to: int, ratio: float) -> float:
    """Σ r / Σ k over sites that each lose `ratio` of their numbers, r the largest multiple of `round_to` that fits, k the full rank."""
    ranks = [_fitting_rank(site, storage, round_to, ratio) for site in sites]
    return sum(ranks) / sum(site.full_rank for site in sites)


def _fitting_rank(site: Site, storage: str, round_to: int, ratio: float) -> int:
    fits = np.flatnonzero(rank_costs(site, storage) <= (1 - ratio) * site.dense_numbers)
    return int(fits[-1]) // round_to * round_to
