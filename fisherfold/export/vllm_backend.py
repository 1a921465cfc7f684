"""What vLLM's Transformers backend makes of a model, tried on its shapes alone, without vLLM and without weights.

The backend (vllm/model_executor/models/transformers, read in 0.32) takes the model without its head, puts an attention of its own behind
transformers' interface, which gives one row of numbers a token, and computes the logits itself: the output embedding's product,
capped by `final_logit_softcapping` and multiplied by `logit_scale`. A model that wants something else stops there, or answers wrongly.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fisherfold.run.errors import first_line

TOKENS = 5
ROWS = 7  # of the output embedding that stands for the whole one
CLOSE = 1e-4  # of the logits' norm
PLAIN, ROWS_ALONE = "shapes_of_transformers", "shapes_of_vllm"


def attention_fails(config: PreTrainedConfig) -> str | None:
    """How a pass fails when the attention's result is one row a token, [T, heads · size], though it runs with transformers' own form,
    [1, T, heads, size]; None if neither fails, or both.
    """
    _register()
    return None if _pass_fails(config, PLAIN) else _pass_fails(config, ROWS_ALONE)


@cache
def _register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(PLAIN, partial(_attention, lambda tokens, heads, size: (1, tokens, heads, size)))
    ALL_ATTENTION_FUNCTIONS.register(
        ROWS_ALONE, partial(_attention, lambda tokens, heads, size: (tokens, heads * size))
    )


def _attention(
    shape: Callable[[int, int, int], tuple[int, ...]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """A result of the right shape, of [1, heads, T, size]."""
    return query.new_zeros(shape(query.shape[2], query.shape[1], value.shape[-1])), None


def _pass_fails(config: PreTrainedConfig, attention: str) -> str | None:
    config = copy.deepcopy(config)
    config.get_text_config()._attn_implementation = attention
    try:
        with FakeTensorMode(), no_init_weights(), torch.no_grad(), _quiet():
            model: Any = AutoModel.from_config(config, dtype=torch.bfloat16).eval()  # experts' kernels want that
            ids, places = torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)[None]
            model(input_ids=ids, position_ids=places, use_cache=False, return_dict=False)
    except Exception as error:  # whatever the model's code makes of it
        return first_line(error)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs of an operation whose shapes do not fit."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def logit_scale(model: PreTrainedModel) -> float | None:
    """c, if the model's logits are c times the product of its output embedding, capped as its configuration says; None if they are something else.

    Args:
        model: on the meta device; it is of no further use.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            product, logits = _logits(model.eval())
    except Exception:  # a part without numbers, or an output embedding that is not where others have it
        return None
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        product = cap * torch.tanh(product / cap)
    scale = float((logits * product).sum() / (product * product).sum())
    fits = float((logits - scale * product).norm()) <= CLOSE * float(logits.norm())
    return float(f"{scale:.6g}") if fits else None


def _logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output embedding's product with some hidden states, and the model's logits of them; the embedding has a few rows."""
    whole = model.get_output_embeddings()
    head = nn.Linear(whole.weight.shape[1], ROWS, bias=getattr(whole, "bias", None) is not None)
    model.set_output_embeddings(head)
    hidden = torch.randn(1, TOKENS, head.in_features)
    bases = {model.base_model, model.get_decoder()} - {model}  # the model itself is where its class misnames its base
    for part in bases or (part for part in model.children() if isinstance(part, PreTrainedModel)):
        part.forward = lambda *_, **__: HiddenStates(last_hidden_state=hidden)
    return head(hidden), model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False).logits


class HiddenStates(BaseModelOutputWithPast):
    """Of what else a model without its head may give, None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
