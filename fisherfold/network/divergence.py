"""How far two models' predictions are apart.

Shapes: V words of a vocabulary; the first dimension of logits with three is sequences.
"""

from typing import Any, cast

import torch


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) = Σ_v p(v) (log p(v) − log q(v)) of every token, in nats; its gradient is that of `found` alone.

    One sequence's probabilities are in memory at a time, and of the others, where a gradient is asked for, that of their logits, q − p: a fraction of
    what autograd keeps of logarithms and products.

    Args:
        wanted: logits of p [..., V].
        found: logits of q [..., V].

    Returns:
        [...], in float32, or in float64 of logits that are.
    """
    return cast(torch.Tensor, _Divergence.apply(wanted, found))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        nats = precise(found[..., :0]).new_empty(found.shape[:-1])
        gradient = torch.empty_like(found) if ctx.needs_input_grad[1] else None
        for at in [...] if found.dim() < 3 else range(len(found)):
            log_p, log_q = (precise(logits[at]).log_softmax(-1) for logits in (wanted, found))
            p = log_p.exp()
            nats[at] = log_p.sub_(log_q).mul_(p).sum(-1)
            if gradient is not None:
                gradient[at] = log_q.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nats

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[None, torch.Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * slope.to(gradient.dtype)[..., None]


def precise(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32 at least, in which a softmax over a vocabulary can be taken."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
