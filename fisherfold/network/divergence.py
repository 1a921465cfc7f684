"""How far two models' predictions are apart."""

import torch
from torch.nn.functional import kl_div


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) = Σ_v p(v) (log p(v) − log q(v)) of every token, in nats.

    Args:
        wanted: logits of p [..., V].
        found: logits of q [..., V].

    Returns:
        [...], in float32, or in float64 of logits that are.
    """
    log_p, log_q = (precise(logits).log_softmax(-1) for logits in (wanted, found))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def precise(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32 at least, in which a softmax over a vocabulary can be taken."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
