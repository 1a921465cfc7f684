"""Allocator `fermigrad`: the descent of ``fisherfold.allocators.fermigrad`` run on the prepared model and the training sequences (without any,
those for tuning): text that the metric has not seen, since what a layer can spare is not told by the text that chose its components.

The state before every step is a unit, and so is every batch of a step: it gets the path of the state and leaves one vector
of gradients, the only thing that data-parallel workers send. A resumed stage goes over the steps from those vectors, so the
bits are the same however often it was interrupted and on whatever engine.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from fisherfold.allocators.allocation import ALLOCATORS, Allocation, fisher
from fisherfold.allocators.fermigrad import (
    Descent,
    RankBudget,
    Schedule,
    SoftRank,
    adam_step,
    dense_network,
    mean_divergence,
    next_token_loss,
    potential_gradient,
    set_ranks,
    soften,
)
from fisherfold.network.experts import unfold_experts
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import DTYPES, StaysLoaded, load_model
from fisherfold.network.sites import read_sites
from fisherfold.network.weights_on_call import compute_again
from fisherfold.run.determinism import multiplying
from fisherfold.run.errors import NumericalError
from fisherfold.run.params import FermigradParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OBJECTIVES = {"kl": mean_divergence, "cross_entropy": next_token_loss}
ROUNDING = 1.5  # ranks: how far from μ a whole rank may end
SHARP = 1e-9  # temperature, in shares of the rank range, at which occupations are 0 or 1
STATE, GRADIENT = "state.json", "gradient.json"


@ALLOCATORS.register("fermigrad")
def fermigrad(allocation: Allocation) -> np.ndarray:
    """All μ descend the loss of the whole network from the ranks of `fisher`; then round, and repair by σ² per number.

    Leaves the trajectory (loss, τ and μ of every site at every step, τ and μ in ranks) in ``allocation.tables["trajectory"]``.
    """
    params = allocation.params.fermigrad
    budget = rank_budget(allocation)
    state = Descent.start(budget.project(torch.from_numpy(fisher(allocation)).double()))
    schedule = Schedule(params.steps, params.tau_first, params.tau_last, params.rate_first, params.rate_last)
    rows = []
    for step in range(params.steps):
        loss, gradient = measure_step(allocation, state, schedule.tau(step))
        rows.append({"step": step, "loss": loss, "tau": schedule.tau(step), "mu": state.mu.tolist()})
        state = adam_step(state, gradient, budget, schedule)
    allocation.tables["trajectory"] = trajectory(allocation, rows)
    return round_ranks(allocation, state.mu.numpy())


def rank_budget(allocation: Allocation) -> RankBudget:
    """The continuous budget: the same costs, lowest and highest ranks and total as the whole ranks have."""
    limit = torch.tensor([float(len(sigma)) for sigma in allocation.spectra], dtype=torch.float64)
    least = torch.from_numpy(allocation.allowed.argmax(axis=1)).double()
    most = allocation.allowed.shape[1] - 1 - torch.from_numpy(allocation.allowed[:, ::-1].argmax(axis=1)).double()
    return RankBudget(torch.from_numpy(allocation.costs).double(), limit, least, most, float(allocation.budget))


def round_ranks(allocation: Allocation, mu: np.ndarray) -> np.ndarray:
    """Whole ranks near μ of most kept σ² under the exact budget.

    Each site may take its allowed ranks within ROUNDING of μ, the nearest below and the nearest above. No μ is below the lowest
    allowed rank, and the nearest below cost no more than μ does, so the budget can be met.
    """
    ranks = np.arange(allocation.costs.shape[1])
    worth = np.full(allocation.costs.shape, -np.inf)
    for row, energies, allowed, target in zip(worth, allocation.energies(), allocation.allowed, mu, strict=True):
        below, above = ranks[allowed & (ranks <= target)], ranks[allowed & (ranks > target)]
        near = allowed & (np.abs(ranks - target) <= ROUNDING)
        near[below[-1:]] = near[above[:1]] = True
        row[near] = energies[near]
    return allocation.spend(worth)


def trajectory(allocation: Allocation, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Long table: step, loss, tau as a share of the rank range, and module and mu of every site."""
    names = [site.name for site in allocation.sites]
    columns = {key: [row[key] for row in rows for _ in names] for key in ("step", "loss", "tau")}
    columns |= {"module": names * len(rows), "mu": [mu for row in rows for mu in row["mu"]]}
    return pa.table(columns)


def measure_step(allocation: Allocation, state: Descent, tau: float) -> tuple[float, torch.Tensor]:
    """Mean loss and mean ∂L/∂μ over the step's batches."""
    params, scratch, workspace = allocation.params.fermigrad, allocation.scratch, allocation.workspace
    assert scratch is not None and workspace is not None
    softened = Softened(
        workspace,
        params.dtype,
        tuple(site.name for site in allocation.sites),
        tuple(sorted(allocation.settled.items())),
    )
    kept = keep_state(scratch, state, tau)
    units = {
        f"step-{state.step:04d}-batch-{batch:02d}": (softened, params, kept, state.step * params.batches + batch)
        for batch in range(params.batches)
    }
    folders = scratch.map(f"FermiGrad step {state.step + 1} of {params.steps}", measure_batch, units)
    parts = [json.loads((folder / GRADIENT).read_text(encoding="utf-8")) for folder in folders.values()]
    loss = sum(part["loss"] for part in parts) / len(parts)
    return loss, torch.tensor([part["gradient"] for part in parts], dtype=torch.float64).mean(0)


def keep_state(scratch: Scratch, state: Descent, tau: float) -> Path:
    """The file of a step's state; written unless it was before."""
    name = f"step-{state.step:04d}"
    if not scratch.done(name):
        with scratch.unit(name) as folder:
            vectors = {field: getattr(state, field).tolist() for field in ("mu", "first_moment", "second_moment")}
            (folder / STATE).write_text(json.dumps({"step": state.step, "tau": tau, **vectors}), encoding="utf-8")
    return scratch.units / name / STATE


@dataclass(frozen=True)
class Softened:
    """The prepared model with layers that can be truncated softly.

    Attributes:
        dtype: of the computation.
        sites: names of those with a soft rank.
        settled: names and ranks of those that are truncated for good.
    """

    workspace: Workspace
    dtype: str
    sites: tuple[str, ...]
    settled: tuple[tuple[str, int], ...] = ()


def measure_batch(folder: Path, softened: Softened, params: FermigradParams, state: Path, batch: int) -> None:
    """Unit of work: loss and ∂L/∂μ of one batch of `params.sequences` sequences; batches go round the table.

    Raises:
        NumericalError: the loss or a gradient is not finite; names the module and the batch's first sequence.
    """
    model, ranks, settled, sequences = softened_model(softened)
    first = batch * params.sequences
    ids = sequences[(first + torch.arange(params.sequences)) % len(sequences)].to(model.device)
    at = json.loads(state.read_text(encoding="utf-8"))
    with multiplying(params.products):
        with dense_network([*ranks, *settled]):
            reference = model(input_ids=ids, use_cache=False).logits
        set_ranks(ranks, torch.tensor(at["mu"], dtype=torch.float64), at["tau"])
        loss = OBJECTIVES[params.objective](reference, model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()
    gradient = potential_gradient(ranks)
    broken = [name for name, finite in zip(softened.sites, gradient.isfinite().tolist(), strict=True) if not finite]
    if broken or not loss.isfinite():
        where = f"module {broken[0]!r}" if broken else "the loss"
        raise NumericalError(
            f"Stage 'ranks', fermigrad: {where} has a gradient that is not finite at sequence {first % len(sequences)} of the text it descends on. "
            "Use ranks.fermigrad.dtype = float32, or another allocator."
        )
    (folder / GRADIENT).write_text(
        json.dumps({"loss": float(loss.detach()), "gradient": gradient.tolist()}), encoding="utf-8"
    )


class SoftModel(NamedTuple):
    """A model in memory with the soft ranks of its sites, those of settled sites, and sequences [S, T]."""

    model: "PreTrainedModel"
    ranks: list[SoftRank]
    settled: list[SoftRank]
    sequences: torch.Tensor


@StaysLoaded
def softened_model(softened: Softened) -> SoftModel:
    """The model that `softened` describes, loaded once a process."""
    workspace = softened.workspace
    model = load_model(workspace.model, DTYPES[softened.dtype])
    compute_again(model)
    bases, sites = (
        workspace.out("subspace") / "bases",
        {site.name: site for site in read_sites(workspace.out("subspace"))},
    )

    if any(layer.stack for site in sites.values() for layer in site.layers):
        unfold_experts(model)

    def soften_named(names: Iterable[str]) -> list[SoftRank]:
        return soften(model, lambda site: site.read_basis(bases), [sites[name] for name in names])

    truncated = {name: rank for name, rank in softened.settled if rank < sites[name].full_rank}
    settled = soften_named(truncated)
    set_ranks(settled, torch.tensor(list(truncated.values())), SHARP)
    training, tuning = (
        read_sequences(workspace.table(name), len(input_embedding(model))) for name in ("training", "tuning")
    )
    return SoftModel(model, soften_named(softened.sites), settled, training if len(training) else tuning)
