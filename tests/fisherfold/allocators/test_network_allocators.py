"""Allocators that look at the network, on a tiny model that went through the real stages before."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from tiny_subspace import subspace_workspace

from fisherfold.allocators import corrected, fermi_descent, measured_allocation, zero_sum
from fisherfold.allocators.allocation import ALLOCATORS, Allocation, allocate, fisher, pose
from fisherfold.allocators.fermi_descent import round_ranks, softened_model
from fisherfold.allocators.fermigrad import next_token_loss
from fisherfold.allocators.limits import Limits
from fisherfold.network.divergence import divergence
from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import StaysLoaded, load_model
from fisherfold.network.sites import Site, find_sites, read_sites
from fisherfold.network.streamed_model import is_stand_in
from fisherfold.run import scratch
from fisherfold.run.determinism import STREAMED, describe_machine, placed
from fisherfold.run.engine import use_engine
from fisherfold.run.errors import NumericalError
from fisherfold.run.files import read_manifest
from fisherfold.run.params import CaptureParams, KroneckerParams, RanksParams, SubspaceParams
from fisherfold.run.store import read_array
from fisherfold.run.tables import read_sequences, write_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from stages import capture, kronecker, ranks, subspace

SMALL = {"fermigrad": {"steps": 4, "batches": 2, "sequences": 1}, "measured": {"levels": 3, "sequences": 1}}
OF_ANY_MODEL = [name for name in ALLOCATORS if name != "drop_experts"]  # see tests/stages/test_experts.py
MEASURING = ("fermigrad", "corrected", "sensitivity", "ilp")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Workspace:
    workspace = tiny.tiny_workspace(tmp_path_factory.mktemp("workspace"), "qwen2")
    capture.run(
        workspace,
        CaptureParams(
            products="float32",
            labels="data",
            sequences_per_shard=4,
            gradients="sums",
            sketch_rank=4,
            knowledge_questions=0,
        ),
    )
    kronecker.run(workspace, KroneckerParams())
    subspace.run(workspace, SubspaceParams())
    return workspace


@pytest.fixture
def workspace(prepared, tmp_path) -> Workspace:
    softened_model.cache_clear()
    return Workspace(Path(shutil.copytree(prepared.root, tmp_path / "workspace")))


def parameters(allocator: str, ratio: float = 0.4) -> RanksParams:
    return RanksParams.model_validate({"ratio": ratio, "allocator": allocator, **SMALL})


@pytest.mark.parametrize("allocator", OF_ANY_MODEL)
def test_budget_is_met_to_within_one_rank_and_never_exceeded(workspace, allocator):
    ranks.run(workspace, parameters(allocator))
    budget = json.loads((workspace.out("ranks") / "budget.json").read_text())
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    largest_step = max(row["n"] + row["m"] for row in rows)
    assert budget["budget"] - largest_step < budget["stored_parameters"] <= budget["budget"]
    assert {row["allocator"] for row in rows} == {allocator}


LIMITS = {
    "floor": {"floor": 0.2},
    "floor by pattern": {"floor": {"*.up_proj": 0.5, "*": 0.1}},
    "ceiling": {"ceiling": 0.6},
    "both": {"floor": 0.15, "ceiling": 0.7},
    "multiples": {"round_to": 3},
    "fixed": {"fixed": {"*.0.mlp.up_proj": 3}},
    "exclude": {"exclude": ["*.v_proj"]},
    "plain factors": {"storage": "factors", "floor": 0.2},
    "bytes": {"budget": "model_bytes", "ratio": 0.2, "floor": 0.2},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("allocator", OF_ANY_MODEL)
def test_no_allocator_exceeds_the_budget_or_a_limit(workspace, allocator, limits):
    """The descent takes large steps here, so that it runs into the limits (a floor of 0.2 once cost it 2966 of 2611)."""
    steep = {**SMALL["fermigrad"], "rate_first": 0.2, "rate_last": 0.2}
    chosen = {**SMALL, "fermigrad": steep, "ratio": 0.5, "allocator": allocator, **LIMITS[limits]}
    ranks.run(workspace, RanksParams.model_validate(chosen))
    budget = json.loads((workspace.out("ranks") / "budget.json").read_text())
    assert budget["spent"] <= budget["budget"]
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    wanted = Limits.of(RanksParams.model_validate(chosen))
    for row, site in zip(rows, read_sites(workspace.out("subspace")), strict=True):
        assert wanted.allowed(site)[row["rank"]], row["module"]


@pytest.mark.parametrize(("ranks_", "problem"), [([5, 5], "spends 60 of 50"), ([1, 0], "gives module 'layer1' rank 0")])
def test_ranks_that_break_the_budget_or_a_limit_are_refused(ranks_, problem):
    sites = find_sites([LinearLayer(f"layer{i}", 6, 5, False, False, f"layer{i}") for i in range(2)], shared=False)
    task = pose(sites, [np.ones(5)] * 2, RanksParams(ratio=0.1, storage="factors"), Limits(floor={"layer1": 0.2}))
    with pytest.raises(NumericalError, match=f"allocator 'fisher' {problem}"):
        allocate(replace(task, budget=50), lambda part: np.array(ranks_))


@pytest.mark.parametrize("allocator", ["sensitivity", "ilp"])
def test_measured_losses_that_leave_no_allocation(monkeypatch, allocator):
    losses = np.array([[np.inf, np.inf, 1.0], [np.inf, np.inf, 1.0]])
    task = task_of(losses, 0.5)
    candidates = np.stack([measured_allocation.candidate_ranks(allowed, 2) for allowed in task.allowed])
    monkeypatch.setattr(measured_allocation, "measure_losses", lambda allocation: (candidates, losses))
    with pytest.raises(NumericalError, match="do not meet the budget"):
        ALLOCATORS.lookup(allocator)(task)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Workspace:
    """A capture as above, and a subspace whose layers share right factors."""
    workspace = subspace_workspace(tmp_path_factory.mktemp("shared"), shared=True)
    write_sequences(workspace.table("calibration"), tiny.random_ids(4, 12).numpy(), [["a"]] * 4, tiny.VOCABULARY)
    capture.run(workspace, CaptureParams(labels="data", gradients="sums", sketch_rank=4, knowledge_questions=0))
    return workspace


@pytest.mark.parametrize("allocator", OF_ANY_MODEL)
def test_sites_of_several_layers(shared, allocator):
    softened_model.cache_clear()
    ranks.run(shared, parameters(allocator))
    budget = json.loads((shared.out("ranks") / "budget.json").read_text())
    sites = read_sites(shared.out("subspace"))
    largest_step = max(site.outputs + site.inputs for site in sites)
    assert budget["budget"] - largest_step < budget["stored_parameters"] <= budget["budget"]
    if allocator == "fermigrad":
        steps = pq.read_table(shared.out("ranks") / "trajectory.parquet").to_pylist()
        assert [row["module"] for row in steps] == [site.name for site in sites] * 4


def test_settled_sites_are_truncated_in_the_network_that_descends(workspace, monkeypatch):
    seen = []
    model_of = fermi_descent.softened_model
    monkeypatch.setattr(fermi_descent, "softened_model", lambda softened: seen.append(softened) or model_of(softened))
    ranks.run(workspace, parameters("fermigrad").model_copy(update={"fixed": {"*.0.mlp.up_proj": 3}}))
    assert dict(seen[0].settled) == {"model.layers.0.mlp.up_proj": 3}
    settled = model_of(seen[0]).settled[0]
    assert settled.occupations()[:5].tolist() == [1, 1, 1, 0, 0]


def test_text_for_training_is_what_ranks_descend_on(workspace):
    settled = fermi_descent.Softened(workspace, "float32", ())
    tuning = read_sequences(workspace.table("tuning"), tiny.VOCABULARY)
    assert torch.equal(softened_model(settled).sequences, tuning)
    others = tiny.random_ids(3, tuning.shape[1], 77)
    write_sequences(workspace.table("training"), others.numpy(), [["a"]] * 3, tiny.VOCABULARY)
    softened_model.cache_clear()
    assert torch.equal(softened_model(settled).sequences, others)


@pytest.mark.parametrize("allocator", MEASURING)
def test_layer_without_a_choice_is_not_touched(workspace, allocator, monkeypatch):
    softened = []
    soften = fermi_descent.soften
    monkeypatch.setattr(fermi_descent, "soften", lambda *parts: softened.extend(parts[2]) or soften(*parts))
    ranks.run(workspace, parameters(allocator).model_copy(update={"exclude": ["*.0.mlp.up_proj"]}))
    rows = {row["module"]: row for row in pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()}
    assert rows["model.layers.0.mlp.up_proj"]["storage"] == "dense"
    assert set(rows) - {site.name for site in softened} == {"model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize("allocator", ["fermigrad", "ilp"])
def test_with_one_decoder_block_in_memory_the_ranks_are_the_same(workspace, allocator):
    """Factors, too, are there only while their block runs."""
    ranks.run(workspace, parameters(allocator))
    expected = read_manifest(workspace.out("ranks"))
    shutil.rmtree(workspace.artifacts / "ranks.partial")
    with placed(STREAMED):
        ranks.run(workspace, parameters(allocator))
        (kept,) = [loaded for (_, placement, *_), loaded in StaysLoaded._places.items() if placement == STREAMED]
    assert read_manifest(workspace.out("ranks")) == expected
    tensors = [*kept.model.named_parameters(), *kept.model.named_buffers()]
    there = {name for name, tensor in tensors if tensor.numel() > 1 and not is_stand_in(tensor)}
    assert all("norm" in name or "rotary" in name for name in there)
    assert len([name for name, _ in tensors if name.endswith((".left", ".right"))]) == 28


def test_what_cutting_a_group_of_layers_costs_is_measured_as_the_cut_model_says(workspace):
    """`corrected`: the divergence of a model whose weights of one kind, in one part of the depth, are the truncated products."""
    ranks.run(workspace, parameters("fisher"))
    chosen = {row["module"]: row["rank"] for row in pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()}
    ranks.run(workspace, parameters("corrected"))
    table = pq.read_table(workspace.out("ranks") / "corrections.parquet").to_pylist()
    assert len(table) == 14 and len({row["weight"] for row in table}) > 1
    dense, cut = load_model(workspace.model, torch.float32), load_model(workspace.model, torch.float32)
    for site in read_sites(workspace.out("subspace")):
        if site.name.endswith("layers.1.mlp.up_proj"):
            assert chosen[site.name] < site.full_rank
            (left,), right = site.read_basis(workspace.out("subspace") / "bases", chosen[site.name])
            cut.get_submodule(site.name).weight.data.copy_(left @ right)
    ids = read_sequences(workspace.table("tuning"), tiny.VOCABULARY)
    expected = divergence(dense(ids).logits, cut(ids).logits).mean().item()
    (row,) = [row for row in table if row["kind"] == "model.layers.*.mlp.up_proj" and row["part"] == 1]
    assert (
        row["measured"] == pytest.approx(expected, rel=0.02) and expected > 0
    )  # a divergence of 1e-7 from logits in float32


def test_groups_that_lose_more_than_predicted_keep_more(monkeypatch):
    """Losses as predicted give the ranks of `fisher`; the weight of a group is held within bounds."""
    names = [f"blocks.{i}.{kind}" for i in range(2) for kind in ("a", "b")]
    sites = find_sites([LinearLayer(name, 8, 8, False, False, name) for name in names], shared=False)
    task = pose(sites, [np.linspace(1, 0.3, 8)] * 4, RanksParams(ratio=0.4, storage="factors", floor=0.1))

    def measured(factors):
        def measure(allocation, groups, ranks_):
            tails = [np.square(sigma[rank:]).sum() for sigma, rank in zip(allocation.spectra, ranks_)]
            return {group: factors[group[0][-1]] * sum(tails[row] for row in rows) for group, rows in groups.items()}

        monkeypatch.setattr(corrected, "measure_groups", measure)
        return corrected.corrected(task).reshape(2, 2).sum(0)

    assert measured({"a": 3.0, "b": 3.0}).tolist() == fisher(task).reshape(2, 2).sum(0).tolist()
    a, b = measured({"a": 3.0, "b": 1.0})
    assert a > b
    assert corrected.groups_of(sites) == {
        ("blocks.*.a", 0): [0],
        ("blocks.*.b", 0): [1],
        ("blocks.*.a", 1): [2],
        ("blocks.*.b", 1): [3],
    }
    a, b, c = ("a", 0), ("b", 0), ("c", 0)
    assert corrected.weights_of({a: 1.0, b: 1.0, c: 0.0}, {a: 99.0, b: 1.0}) == pytest.approx(
        {a: 1.98**0.5, b: 0.5, c: 1.0}
    )
    assert corrected.weights_of({a: 0.0}, {}) == {a: 1.0}


@pytest.mark.parametrize("allocator", MEASURING)
def test_killed_allocator_resumes_with_the_same_bytes(workspace, allocator, monkeypatch):
    ranks.run(workspace, parameters(allocator))
    expected = read_manifest(workspace.out("ranks"))
    shutil.rmtree(workspace.artifacts / "ranks.partial")
    shutil.rmtree(workspace.out("ranks"))
    units, write_unit = itertools.count(), scratch.write_unit

    def dying_unit(*arguments):
        if next(units) == 3:
            raise KeyboardInterrupt
        return write_unit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scratch, "write_unit", dying_unit)
        ranks.run(workspace, parameters(allocator))
    calls = []
    for module, name in (
        (fermi_descent, "measure_batch"),
        (measured_allocation, "measure_site"),
        (corrected, "measure_sequence"),
    ):
        work = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, work=work: (calls.append(arguments), work(*arguments)))
    ranks.run(workspace, parameters(allocator))
    assert read_manifest(workspace.out("ranks")) == expected
    assert len(calls) == {"fermigrad": 8, "corrected": 8}.get(allocator, 14) - 3


@pytest.mark.parametrize("allocator", OF_ANY_MODEL)
def test_allocator_killed_after_its_last_unit_resumes_with_the_same_bytes(workspace, allocator, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ranks, "choose_storage", killed)
        ranks.run(workspace, parameters(allocator))
    assert not workspace.out("ranks").exists()
    softened_model.cache_clear()
    ranks.run(workspace, parameters(allocator))
    resumed = read_manifest(workspace.out("ranks"))
    shutil.rmtree(workspace.artifacts / "ranks.partial")
    ranks.run(workspace, parameters(allocator))
    assert read_manifest(workspace.out("ranks")) == resumed


class Backwards:
    """An engine that takes the last unit first."""

    slots = 1

    def machine(self):
        return describe_machine()

    def run(self, write, units):
        for name in reversed(units):
            yield name, write(name, units[name])


@pytest.mark.parametrize("allocator", MEASURING)
def test_units_in_another_order_give_the_same_bytes(workspace, allocator):
    ranks.run(workspace, parameters(allocator))
    expected = read_manifest(workspace.out("ranks"))
    shutil.rmtree(workspace.artifacts / "ranks.partial")
    with use_engine(Backwards()):
        ranks.run(workspace, parameters(allocator))
    assert read_manifest(workspace.out("ranks")) == expected


def test_descent_from_a_bad_start_lowers_the_loss_by_a_third(tmp_path, monkeypatch):
    """At one temperature, in float32, of a model whose outputs are far from uniform: the loss is far above rounding."""
    softened_model.cache_clear()
    quiet = tiny.tiny_model
    monkeypatch.setattr(tiny, "tiny_model", lambda *of: scaled(quiet(*of), 8.0))
    workspace = subspace_workspace(tmp_path, "qwen2")
    monkeypatch.setattr(fermi_descent, "fisher", every_second_site)
    steady = {"steps": 30, "sequences": 2, "tau_first": 0.06, "tau_last": 0.06, "rate_first": 0.03, "rate_last": 0.03}
    params = {"ratio": 0.4, "allocator": "fermigrad", "fermigrad": {**steady, "dtype": "float32"}}
    ranks.run(workspace, RanksParams.model_validate(params))
    losses = pq.read_table(workspace.out("ranks") / "trajectory.parquet")["loss"].to_pylist()
    assert losses[-1] < 0.67 * losses[0]


@torch.no_grad()
def scaled(model: torch.nn.Module, by: float) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.mul_(by)
    return model


def every_second_site(allocation: Allocation) -> np.ndarray:
    """A start far from any optimum: full rank, nothing, full rank, nothing, …"""
    return np.array([len(sigma) * (index % 2) for index, sigma in enumerate(allocation.spectra)])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            [-1.0, 4.0],
            [3.0, -5.0],
            {60: [3, 3], 50: [2, 3], 40: [2, 2], 20: [2, 0]},
        ),  # −1; +3 makes 2; −5 makes −3, +4 would 6
        (
            [-2.0, 4.0],
            [1.0, -5.0],
            {60: [3, 3], 50: [3, 2], 40: [2, 2], 30: [1, 2], 10: [1, 0]},
        ),  # +1; −2 makes −1; +4 makes 3
    ],
)
def test_the_next_site_is_the_one_that_brings_the_sum_of_effects_nearest_to_zero(first, second, expected):
    costs = np.tile(np.arange(0, 40, 10), (2, 1))
    steps = [(np.array([3, 2, 1]), np.array(first)), (np.array([3, 2, 0]), np.array(second))]
    assert {budget: zero_sum.lower_to_budget(costs, budget, steps).tolist() for budget in expected} == expected


def test_first_order_effects_are_derivatives_of_the_loss(workspace):
    model = load_model(workspace.model, torch.float32)
    ids = read_sequences(workspace.table("calibration"), 96)
    statistics = Statistics(workspace.out("capture"))
    layer = statistics.layers[4]
    site = Site(layer.name, (layer,))
    allocation = Allocation([site], [], np.zeros((1, 1)), np.zeros((1, 1), bool), 0, workspace=workspace)
    effects = zero_sum.first_order_effects(allocation, statistics, site)
    weight = model.get_submodule(layer.name).weight.requires_grad_()
    next_token_loss(None, model(ids).logits, ids).backward()
    bases = workspace.out("subspace") / "bases"
    left, right = (read_array(bases, f"{layer.name}/{side}") for side in ("left", "right"))
    expected = [-float((weight.grad * torch.outer(left[:, i], right[i])).sum()) for i in range(len(right))]
    np.testing.assert_allclose(effects, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())


def task_of(losses: np.ndarray, ratio: float) -> Allocation:
    sites = find_sites(
        [LinearLayer(f"layer{i}", 6, 5 + i, False, False, f"layer{i}") for i in range(len(losses))], shared=False
    )
    spectra = [np.linspace(1, 0.1, 5 + min(i, 1)) for i in range(len(losses))]
    return pose(sites, spectra, RanksParams(ratio=ratio, storage="factors"))


@pytest.mark.parametrize("seed", range(5))
def test_ilp_is_the_best_of_all_choices(monkeypatch, seed):
    losses = np.sort(np.random.default_rng(seed).random((3, 4)), axis=1)[:, ::-1]
    task = task_of(losses, 0.45)
    candidates = np.stack([measured_allocation.candidate_ranks(allowed, 3) for allowed in task.allowed])
    monkeypatch.setattr(measured_allocation, "measure_losses", lambda allocation: (candidates, losses))
    chosen = []
    monkeypatch.setattr(Allocation, "fill_from", lambda self, ranks: chosen.append(ranks) or ranks)
    measured_allocation.ilp(task)
    costs = measured_allocation.candidate_costs(task, candidates)
    feasible = [
        choice for choice in itertools.product(range(4), repeat=3) if costs[range(3), choice].sum() <= task.budget
    ]
    best = min(losses[range(3), choice].sum() for choice in feasible)
    columns = [int(np.flatnonzero(row == rank)[0]) for row, rank in zip(candidates, chosen[0], strict=True)]
    assert losses[range(3), columns].sum() == pytest.approx(best)


def test_rounding_stays_near_mu_and_in_budget():
    task = task_of(np.zeros((3, 1)), 0.4)
    budget = fermi_descent.rank_budget(task)
    mu = budget.project(budget.limit * torch.tensor([0.2, 0.5, 0.4]))
    rounded = round_ranks(task, mu.numpy())
    assert task.costs[range(3), rounded].sum() <= task.budget
    for rank, target, allowed in zip(rounded, mu.numpy(), task.allowed, strict=True):
        between = np.flatnonzero(allowed)
        between = between[(between > min(rank, target)) & (between < max(rank, target))]
        assert allowed[rank]
        assert abs(rank - target) <= 1.5 or not len(between)


def test_gradient_that_is_not_finite_is_named(workspace, monkeypatch):
    monkeypatch.setitem(fermi_descent.OBJECTIVES, "kl", lambda dense, soft, ids: soft.sum() * float("nan"))
    with pytest.raises(NumericalError, match="fermigrad: module"):
        ranks.run(workspace, parameters("fermigrad"))
