"""Per-token losses of two models side by side.

B sequences of T tokens over a vocabulary of V entries. Position t (0 ≤ t < T-1) predicts token t+1: exactly one label
shift, done here; the models see the tokens unshifted and compute no loss of their own.
"""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20  # of float32 logits turned into probabilities at a time


def compare_tokens(dense: PreTrainedModel, compressed: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses of both models and their divergence at every predicted token, in nats.

        dense, compressed   -log p(token t+1 | tokens ≤ t)                            [B, T-1]
        divergence          KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v)), p dense, q compressed   [B, T-1]

    Probabilities are float32 whatever the models compute in. Logits exist for the B sequences of one call only.

    Args:
        ids: token ids [B, T].
    """
    p_logits, q_logits = (_logits(model, ids) for model in (dense, compressed))
    q_logits = q_logits.to(p_logits.device)
    labels = ids[:, 1:].to(p_logits.device)
    parts = [
        _compare_rows(p_logits[where], q_logits[where], labels[where])
        for where in _row_chunks(labels.shape[0], labels.shape[1], p_logits.shape[-1])
    ]
    names = ("dense", "compressed", "divergence")
    return {
        name: torch.cat(values).view(labels.shape).cpu()
        for name, values in zip(names, zip(*parts, strict=True), strict=True)
    }


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T-1, V] that predict tokens 1 … T-1."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]


def _row_chunks(sequences: int, positions: int, vocabulary: int) -> Iterator[tuple[int, slice]]:
    """Indices (sequence, positions) of runs of rows that hold at most CHUNK_BYTES of float32 logits."""
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    for sequence in range(sequences):
        for start in range(0, positions, step):
            yield sequence, slice(start, start + step)


@torch.inference_mode()
def _compare_rows(p_logits: torch.Tensor, q_logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Losses and divergence [rows] of logits [rows, V] under labels [rows]."""
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    p_loss, q_loss = (-log.gather(-1, labels[:, None]).squeeze(-1) for log in (log_p, log_q))
    return p_loss, q_loss, (log_p.exp() * (log_p - log_q)).sum(-1)
