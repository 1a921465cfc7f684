"""One forward and backward pass for the gradients of activations alone.

Weights are frozen and the embedding's output asks for a gradient, so the backward pass makes the n x m products that
carry gradients to layer inputs and none that make weight gradients: a third of the step is saved.

Shapes: B sequences of T tokens over a vocabulary of V.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fisherfold.network.labels import Labels
from fisherfold.network.layers import input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GradientPass(NamedTuple):
    """What one pass says of its sequences: the mean loss [B] of each, and whether [B] loss and gradient are finite."""

    losses: torch.Tensor
    finite: torch.Tensor


@torch.enable_grad()
def gradient_pass(
    model: "PreTrainedModel", ids: torch.Tensor, first: int = 1, draws: Sequence[Labels | None] = (None,)
) -> GradientPass:
    """Run `ids` [B, T] forward and backward; hooks on the model's layers see activations and their gradients.

    The loss is Σ_s (1/(T-1)) Σ_{t<T-1} -log p(id[s, t+1] | id[s, ..t]): means of sequences, summed over the batch, so a
    sequence's gradients do not depend on the batch it is in. The labels are shifted here, once; the model is given none.

    Args:
        first: the first token that is predicted; the mean is over it and those after it.
        draws: the labels of each backward pass, None the text's next tokens; the losses are those of the text.

    Raises:
        RuntimeError: the model's weights are not frozen.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise RuntimeError("freeze the model's parameters first: model.requires_grad_(False)")
    ids = ids.to(input_embedding(model).device)
    with _leaves(model) as embedded:
        logits = model(input_ids=ids, use_cache=False).logits
    for left, labels in zip(reversed(range(len(draws))), draws):
        losses, gradient = loss_gradient(logits.detach(), ids.to(logits.device), first, labels)
        logits.backward(gradient, retain_graph=left > 0)
    finite = losses.isfinite().to(ids.device)
    for leaf in embedded:
        finite &= leaf.grad.flatten(1).isfinite().all(1) if leaf.grad is not None else True
    return GradientPass(losses.cpu(), finite.cpu())


@contextmanager
def _leaves(model: "PreTrainedModel") -> Iterator[list[torch.Tensor]]:
    """Inside, the outputs of the input embedding ask for gradients and are collected; the model gets copies, as some scale them in place."""
    collected: list[torch.Tensor] = []

    def give_copy(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        collected.append(output.detach().requires_grad_())
        return collected[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(give_copy)
    try:
        yield collected
    finally:
        handle.remove()


@torch.no_grad()
def loss_gradient(
    logits: torch.Tensor, ids: torch.Tensor, first: int = 1, labels: Labels | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token cross-entropy of every sequence and its gradient, (softmax - onehot) / (T-1).

    Computed in float32, one sequence at a time: besides the gradient itself, only one sequence's probabilities are held.

    Args:
        logits: [B, T, V]; row t predicts token t+1.
        ids: [B, T].
        first: the first token that is predicted, from 1.
        labels: instead of the text's next tokens, for the gradient.

    Returns:
        losses [B] in float32 and the gradient [B, T, V] in the dtype of `logits`; rows that predict nothing are zero.
    """
    gradient = torch.empty_like(logits)
    gradient[:, -1] = 0
    gradient[:, : first - 1] = 0
    losses = torch.empty(len(ids), device=logits.device)
    predicted = ids.shape[1] - first
    for s, predicted_ids in enumerate(ids[:, first:, None]):
        log_p = logits[s, first - 1 : -1].float().log_softmax(-1)
        losses[s] = -log_p.gather(-1, predicted_ids).mean()
        p = log_p.exp_()
        chosen = labels(s, p)[:, None] if labels else predicted_ids
        p.scatter_add_(-1, chosen, p.new_full((), -1.0).expand_as(chosen))
        torch.div(p, predicted, out=p)
        gradient[s, first - 1 : -1] = p
    return losses, gradient
