"""Healing: all factors of a compressed model trained together, to give the dense model's predictions; a unit of stage `factorize`.

    minimise  mean over sequences and tokens of  KL(p_t ‖ p̂_t),   p_t, p̂_t what the dense and the compressed model predict after token t

One pass over text that nothing else has read is what pays (half of ``prepare.training_sequences``): several over little text lower the loss on
that text and raise it elsewhere. Without such text it is that of the calibration. Steps of all layers at once add noise to what they learn: what is
learnt gains in proportion to the way θ₁ − θ₀ that the factors have gone, the noise costs its square. So θ₀ + s (θ₁ − θ₀) is kept with the largest of
`SHARES` s that raises the divergence on held-out sequences by no more than these few can tell from chance (`harmful`), or θ₀ if none is. The
state (factors, moments of AdamW) becomes durable every few minutes and is exact.

<unit>/layers/<layer>/model.safetensors   the trained layers, if they were kept
<unit>/healing.json                       what `Healing` says

Memory: both models, and four times the factors more (on the CPU once more a thread that computes a sequence), in float32. Time: a training step of both models a sequence.

Shapes: S sequences of T tokens, B of them a step.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fisherfold.export.expert_tensors import Stack
from fisherfold.export.free_factors import free_factors, pivot_again
from fisherfold.export.refined_blocks import LowRank, compress_block, put_rest, write_layers_of
from fisherfold.export.refinement import adamw, batches_of, descend, schedule
from fisherfold.export.trained_experts import factor_names, take_experts
from fisherfold.export.training_text import healing_text
from fisherfold.network.blocks import list_blocks
from fisherfold.network.divergence import divergence
from fisherfold.network.kept_state import KEEPS, keeps_state
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import load_model
from fisherfold.network.rounded_products import rounded_products
from fisherfold.run.checkpoint import read_tensors
from fisherfold.run.determinism import multiplying
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import HealParams
from fisherfold.run.progress import announce, track_lines
from fisherfold.run.savepoints import SavepointPlace, Savepoints
from fisherfold.run.side_by_side import Apply, at_once, piece_count, side_by_side
from fisherfold.run.store import close_groups, read_array
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "state"
FACTS = "healing.json"
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the way, in the order in which they are tried."""


@dataclass(frozen=True)
class Healing:
    """What was gained: nats a token on held-out sequences before and after, whether it was kept and what share of the way, optimiser steps done.

    Of what was not kept, `held_out_after` and `share` are those of the last try.
    """

    held_out_before: float
    held_out_after: float
    accepted: bool
    share: float
    steps: int


def heal_unit(
    folder: Path,
    place: SavepointPlace,
    workspace: Workspace,
    layers: dict[str, LowRank],
    stacks: Sequence[Stack],
    rest: tuple[Path, ...],
    params: HealParams,
) -> None:
    """Unit of work: train the factors of `layers` and `stacks` of experts.

    Args:
        place: of its savepoints.
        layers: of the compressed model; their entry says how they are stored.
        rest: files with other tensors that differ from the dense model's.
    """
    with side_by_side(params.threads, piece_count(params.batch_size)) as apply, multiplying(params.products):
        dense = load_model(workspace.model, torch.float32)
        changed = {name: tensor for file in rest for name, tensor in read_tensors(file).items()}
        compressed = compress_block(dense, "", layers, stacks, changed)
        put_rest(compressed, "", changed, stacks)
        vocabulary = len(input_embedding(dense))
        text, tuning = healing_text(workspace, vocabulary), read_sequences(workspace.table("tuning"), vocabulary)

        def loss(batch: torch.Tensor) -> torch.Tensor:
            return to_dense(dense, compressed, batch).mean()

        def judged() -> torch.Tensor:
            return held_out(dense, compressed, tuning, params, apply)

        pivoted = free_factors(compressed)
        factors = factors_of(compressed, (*(f"{name}." for name in layers), *factor_names(stacks)))
        if keeps_state(dense, tuning[:1]):
            announce("factorize", f"nothing is healed: {type(dense).__name__} {KEEPS}")
            factors = {}
        with rounded_products([*list_blocks(dense).values(), *list_blocks(compressed).values()], params.products):
            before = judged()
            found = Healing(float(before.mean()), float(before.mean()), False, 0.0, 0)
            if factors:  # none, too, where every layer that was cut has rank 0
                begun = {name: factor.detach().clone() for name, factor in factors.items()}
                steps = train(Savepoints(place, folder), factors, loss, text, params, apply)
                share, after = share_of_way(factors, begun, before, judged)
                found = Healing(float(before.mean()), float(after.mean()), not harmful(before, after), share, steps)
    if found.accepted:
        pivot_again(compressed, pivoted)
        state = {name: value.cpu() for name, value in compressed.state_dict().items()}
        take_experts(folder / "layers", state, "", dense, stacks)
        write_layers_of(folder, state, "", layers)
    (folder / FACTS).write_text(json.dumps(asdict(found), sort_keys=True) + "\n", encoding="utf-8")


def factors_of(model: nn.Module, prefixes: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The floating-point parameters whose names begin so, by name; one that several layers share once."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and parameter.is_floating_point() and parameter.numel()
    }


def to_dense(dense: "PreTrainedModel", compressed: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """KL(p_t ‖ p̂_t) in nats [B, T - 1]."""
    ids = ids.to(input_embedding(dense).device)
    with torch.no_grad():
        wanted = dense(input_ids=ids, use_cache=False).logits[:, :-1]
    return divergence(wanted, compressed(input_ids=ids, use_cache=False).logits[:, :-1])


def held_out(
    dense: "PreTrainedModel", compressed: nn.Module, ids: torch.Tensor, params: HealParams, apply: Apply = map
) -> torch.Tensor:
    """Mean divergence over the tokens of each sequence [S]."""

    def losses(piece: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return to_dense(dense, compressed, piece).mean(1).cpu()

    return torch.cat(list(apply(losses, ids.split(at_once(params.batch_size)))))


def harmful(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the loss of sequences [S] has risen by more than its standard error, Δ̄ > s(Δ) / √S of the differences Δ.

    A smaller rise is chance, or tokens that the model knows by heart (words of a system prompt), and what nobody chose sequences for gains all the same.
    """
    rises = after - before
    error = float(rises.std()) / len(rises) ** 0.5 if len(rises) > 1 else 0.0
    return not float(rises.mean()) <= error


@torch.no_grad()
def share_of_way(
    factors: Mapping[str, nn.Parameter],
    begun: Mapping[str, torch.Tensor],
    before: torch.Tensor,
    judged: Callable[[], torch.Tensor],
) -> tuple[float, torch.Tensor]:
    """The largest share of the way from `begun` to the trained `factors`, which are set to it, that is not `harmful`, and its losses [S]; the smallest, if all are.

    Args:
        before: losses [S] at `begun`.
        judged: gives those of the factors as they are.
    """
    trained = {name: factor.detach().clone() for name, factor in factors.items()}
    share, after = 0.0, before
    for share in SHARES:
        for name, factor in factors.items():
            factor.copy_(begun[name].lerp(trained[name], share))
        after = judged()
        if not harmful(before, after):
            break
    return share, after


def train(
    points: Savepoints,
    factors: Mapping[str, nn.Parameter],
    loss: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    params: HealParams,
    apply: Apply,
) -> int:
    """Descend on `loss` of batches of `ids` [S, T], from the newest savepoint if there is one; steps in all."""
    optimizer = adamw(factors.values(), params.rate)
    batches = list(batches_of(len(ids), params.passes, params.batch_size))
    done = _resume(points, optimizer, factors)

    def steps() -> Iterator[tuple[list[torch.Tensor], float]]:
        for step in track_lines("factorize", "healing, step", range(done, len(batches)), len(batches) - done):
            if step > done and points.due():
                _save(points, step, optimizer, factors)
            batch = ids[batches[step]]
            yield list(batch.split(at_once(len(batch)))), schedule(step, len(batches))

    descend(optimizer, loss, steps(), apply)
    return len(batches)


def _save(points: Savepoints, step: int, optimizer: torch.optim.Optimizer, factors: Mapping[str, nn.Parameter]) -> None:
    arrays = [
        (f"{name}/{kind}", values)
        for name, factor in factors.items()
        for kind, values in (("value", factor.detach()), *((key, optimizer.state[factor][key]) for key in MOMENTS))
    ]
    with points.save(step) as folder:
        write_arrays(folder / STATE, arrays)


MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def _resume(points: Savepoints, optimizer: torch.optim.Optimizer, factors: Mapping[str, nn.Parameter]) -> int:
    """Steps that the newest savepoint has behind it, after factors and moments have been set to it."""
    folder = points.restore()
    if folder is None:
        return 0
    step = int(folder.name)
    for name, factor in factors.items():
        factor.copy_(read_array(folder / STATE, f"{name}/value"))
        moments = {key: read_array(folder / STATE, f"{name}/{key}").to(factor.device) for key in MOMENTS}
        optimizer.state[factor] = {"step": torch.tensor(float(step), device=factor.device), **moments}
    close_groups()
    return step


def healed(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Where each layer lies that was trained and kept."""
    return {name: folder / "layers" / name for name in names if (folder / "layers" / name).is_dir()}
