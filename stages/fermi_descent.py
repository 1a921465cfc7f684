"""Allocator `fermigrad`: the descent of ``stages.fermigrad`` run on the prepared model and the tuning sequences.

Every batch of every step is a unit: it gets the step's μ and leaves one vector of gradients. A resumed stage replays the
steps from those vectors, so nothing else is saved and the bits are the same however often it was interrupted.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from stages.allocation import ALLOCATORS, Allocation, fisher
from stages.errors import NumericalError
from stages.fermigrad import (
    Descent,
    RankBudget,
    Schedule,
    SoftTruncatedLinear,
    adam_step,
    dense_network,
    divergence,
    next_token_loss,
    potential_gradient,
    set_occupations,
    soften,
)
from stages.models import DTYPES, load_model
from stages.params import FermigradParams
from stages.progress import track
from stages.store import read_array
from stages.tables import read_sequences
from stages.workspace import Workspace

OBJECTIVES = {"kl": divergence, "cross_entropy": next_token_loss}
ROUNDING = 1.5  # ranks: how far from μ a whole rank may end


@ALLOCATORS.register("fermigrad")
def fermigrad(allocation: Allocation) -> np.ndarray:
    """All μ descend the loss of the whole network from the ranks of `fisher`; then round, and repair by σ² per number.

    Leaves the trajectory (loss, τ and μ of every layer at every step) in ``allocation.tables["trajectory"]``.
    """
    params = allocation.params.fermigrad
    budget = rank_budget(allocation)
    state = Descent.start(budget.project(torch.from_numpy(fisher(allocation)).double()))
    schedule = Schedule(params.steps, params.tau_first, params.tau_last, params.rate_first, params.rate_last)
    names = [layer.name for layer in allocation.layers]
    rows = []
    for step in track("ranks", "FermiGrad steps", range(params.steps), params.steps):
        loss, gradient = _measure_step(allocation, names, state, schedule.tau(step))
        rows.append({"step": step, "loss": loss, "tau": schedule.tau(step), "mu": state.mu.tolist()})
        state = adam_step(state, gradient, budget, schedule)
    allocation.tables["trajectory"] = pa.Table.from_pylist(rows)
    return round_ranks(allocation, state.mu.numpy())


def rank_budget(allocation: Allocation) -> RankBudget:
    """The continuous budget: the same costs and the same total as the whole ranks have."""
    limit = torch.tensor([float(len(sigma)) for sigma in allocation.spectra], dtype=torch.float64)
    return RankBudget(torch.from_numpy(allocation.costs).double(), limit, float(allocation.budget))


def round_ranks(allocation: Allocation, mu: np.ndarray) -> np.ndarray:
    """Whole ranks near μ of most kept σ² under the exact budget.

    Each layer may take its allowed ranks within ROUNDING of μ, the nearest below and the nearest above. The nearest below
    cost no more than μ does, so the budget can be met.
    """
    ranks = np.arange(allocation.costs.shape[1])
    worth = np.full(allocation.costs.shape, -np.inf)
    for row, energies, allowed, target in zip(worth, allocation.energies(), allocation.allowed, mu, strict=True):
        below, above = ranks[allowed & (ranks <= target)], ranks[allowed & (ranks > target)]
        near = allowed & (np.abs(ranks - target) <= ROUNDING)
        near[below[-1:]] = near[above[:1]] = True
        row[near] = energies[near]
    return allocation.spend(worth)


def _measure_step(allocation: Allocation, names: list[str], state: Descent, tau: float) -> tuple[float, torch.Tensor]:
    """Mean loss and mean ∂L/∂μ over the step's batches, each a unit of the stage's scratch folder."""
    params, scratch = allocation.params.fermigrad, allocation.scratch
    parts = []
    for batch in range(params.batches):
        name = f"step-{state.step:04d}-batch-{batch:02d}"
        if not scratch.done(name):
            first = (state.step * params.batches + batch) * params.sequences
            with scratch.unit(name) as folder:
                measure_batch(folder, allocation.workspace, params, tuple(names), state.mu.tolist(), tau, first)
        parts.append(json.loads((scratch.units / name / "gradient.json").read_text()))
    loss = sum(part["loss"] for part in parts) / len(parts)
    return loss, torch.tensor([part["gradient"] for part in parts], dtype=torch.float64).mean(0)


def measure_batch(
    folder: Path,
    workspace: Workspace,
    params: FermigradParams,
    names: tuple[str, ...],
    mu: Sequence[float],
    tau: float,
    first: int,
) -> None:
    """Write loss and ∂L/∂μ of one batch: `params.sequences` tuning sequences from index `first` on, round and round.

    Raises:
        NumericalError: the loss or a gradient is not finite; names the module and the step's first sequence.
    """
    model, layers, sequences = softened_model(workspace, params.dtype, names)
    ids = sequences[(first + torch.arange(params.sequences)) % len(sequences)].to(model.device)
    with dense_network(layers):
        reference = model(input_ids=ids, use_cache=False).logits
    set_occupations(layers, torch.tensor(mu, dtype=torch.float64), tau)
    loss = OBJECTIVES[params.objective](reference, model(input_ids=ids, use_cache=False).logits, ids)
    loss.backward()
    gradient = potential_gradient(layers)
    broken = [name for name, finite in zip(names, gradient.isfinite().tolist(), strict=True) if not finite]
    if broken or not loss.isfinite():
        where = f"module {broken[0]!r}" if broken else "the loss"
        raise NumericalError(
            f"Stage 'ranks', fermigrad: {where} has a gradient that is not finite at tuning sequence {first % len(sequences)}. "
            "Use ranks.fermigrad.dtype = float32, or another allocator."
        )
    (folder / "gradient.json").write_text(json.dumps({"loss": float(loss.detach()), "gradient": gradient.tolist()}))


@lru_cache(maxsize=1)
def softened_model(
    workspace: Workspace, dtype: str, names: tuple[str, ...]
) -> tuple[PreTrainedModel, list[SoftTruncatedLinear], torch.Tensor]:
    """The prepared model with soft-truncated layers, loaded once a process, and the tuning sequences [S, T]."""
    model = load_model(workspace.model, DTYPES[dtype])
    bases = workspace.out("subspace") / "bases"
    layers = soften(model, lambda name: (read_array(bases, f"{name}/left"), read_array(bases, f"{name}/right")), names)
    return model, layers, read_sequences(workspace.table("tuning"), model.get_input_embeddings().num_embeddings)
