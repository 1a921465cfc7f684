"""Tiny mixtures through all stages: experts are compressed as layers, and the checkpoint is what its factors multiply out to."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny import as_truncated
from tiny_families import save_family
from tiny_project import set_params, tiny_project
from transformers import AutoModelForCausalLM

from fisherfold.allocators.dropped_experts import read_dropped
from fisherfold.network.layers import read_layers
from fisherfold.run.checkpoint import StoredTensor, read_tensors
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import EvaluateParams, FactorizeParams, RanksParams, SubspaceParams, load_params
from fisherfold.run.workspace import STAGES, Workspace
from stages import evaluate, factorize, ranks, subspace

IDS = torch.arange(3, 27).view(2, 12)

PARAMS = {
    "prepare": {"question_count": 2},
    "capture": {"gradients": "none", "leaves": 1, "knowledge_questions": 2},
    "kronecker": {"estimator": "kfac", "dependence_draws": 0},
    "subspace": {"experts": {"prior_tokens": 8, "fewest": 3, "few": "dense"}},
    "ranks": {"ratio": 0.4, "expert_classes": 2},
    "factorize": {"dense_export": True},
}
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.arange(3, 27).view(2, 12)
def logits(name, **options):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", **options)(input_ids=ids).logits
dense = logits("dense")
remote = AutoModelForCausalLM.from_pretrained(f"{folder}/model", trust_remote_code=True)
remote.save_pretrained(f"{folder}/again")
read_map = lambda name: json.load(open(f"{folder}/{name}/config.json"))["auto_map"]
assert read_map("again") == {way: own for way, own in read_map("model").items() if way in read_map("again")}
found = {"remote": remote(input_ids=ids).logits, "again": logits("again", trust_remote_code=True)}
assert "fisherfold.runtime" not in sys.modules
import fisherfold.runtime
found["runtime"] = logits("model")
print(json.dumps({way: ((values - dense).norm() / dense.norm()).item() for way, values in found.items()}))
"""


def families(*slow: str) -> list:
    """One that is tried by default, and others that are asked for."""
    return ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.fixture(scope="module")
def through_all_stages(tmp_path_factory) -> Callable[[str], Workspace]:
    """Where the eight stages have run on a tiny mixture of a family, once each."""

    @cache
    def run(family: str) -> Workspace:
        root = tiny_project(tmp_path_factory.mktemp(family))
        save_family(root / "tiny-model", family)
        set_params(root, PARAMS)
        workspace, params = Workspace(root), load_params(root / "params.yaml")
        for stage in STAGES:
            importlib.import_module(f"stages.{stage}").run(workspace, getattr(params, stage))
        return workspace

    return run


@pytest.fixture(params=families("llama4_text"))
def mixture(request, through_all_stages) -> Workspace:
    """A transposed, biased, interleaved layout behind the interface, and one without it."""
    return through_all_stages(request.param)


@pytest.fixture(
    params=families(
        "llama4_text", "qwen3_moe", "mixtral", "deepseek_v3", "gemma4_text", "granitemoe", "olmoe", "ernie4_5_moe"
    )
)
def each_mixture(request, through_all_stages) -> Workspace:
    """Those that docs/experts.md names."""
    return through_all_stages(request.param)


def read_json(workspace: Workspace, stage: str, name: str) -> dict:
    return json.loads((workspace.out(stage) / name).read_text())


def test_experts_have_ranks_in_few_classes(each_mixture):
    rows = pq.read_table(each_mixture.out("ranks") / "ranks.parquet").to_pylist()
    stacks: dict[str, list[dict]] = {}
    experts = {layer.name: layer.stack for layer in read_layers(each_mixture.out("prepare")) if layer.stack}
    routed = read_json(each_mixture, "ranks", "budget.json")["routed"]
    assert routed.keys() == experts.keys()
    dense = read_json(each_mixture, "subspace", "subspace.json")["dense"]
    for row in rows:
        if stack := experts.get(row["module"]):
            stacks.setdefault(stack, []).append(row)
            few = routed[row["module"]] * 8 * 16 < 2.5  # tokens
            assert few == (row["module"] in dense) and (not few or row["storage"] == "dense")
    for own in stacks.values():
        assert len({row["rank"] for row in own if row["module"] not in dense}) <= 2
    low = sum(row["storage"] != "dense" for own in stacks.values() for row in own)
    assert low > len(experts) / 2


def test_the_checkpoint_is_what_its_factors_multiply_out_to(each_mixture, tmp_path):
    command = [sys.executable, "-c", LOAD, str(each_mixture.out("factorize"))]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(factorize.__file__).parents[1]),
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for difference in json.loads(done.stdout.splitlines()[-1]).values():
        assert difference < 1e-5


def test_sizes_are_counted_and_what_a_token_meets(each_mixture):
    size = read_json(each_mixture, "evaluate", "metrics.json")["size"]
    rows = pq.read_table(each_mixture.out("ranks") / "ranks.parquet").to_pylist()
    assert size["targeted_parameters_compressed"] == sum(row["stored_parameters"] for row in rows)
    assert 0.58 < size["targeted_parameters_compressed"] / size["targeted_parameters_dense"] <= 0.6
    routed = read_json(each_mixture, "ranks", "budget.json")["routed"]
    for model, column in (("dense", "dense_parameters"), ("compressed", "stored_parameters")):
        idle = sum((1 - routed.get(row["module"], 1.0)) * row[column] for row in rows)
        assert size[f"active_parameters_{model}"] == round(size[f"model_parameters_{model}"] - idle)
        assert size[f"active_parameters_{model}"] < size[f"model_parameters_{model}"]
    assert "that a token meets" in (each_mixture.out("report") / "index.html").read_text()


@pytest.fixture
def own_copy(mixture, tmp_path) -> Workspace:
    """A copy to run stages in again."""
    return Workspace(Path(shutil.copytree(mixture.root, tmp_path / "project", symlinks=True)))


@torch.no_grad()
def checkpoint_differs(workspace: Workspace) -> float:
    """Largest difference between the logits of the checkpoint and those of the model with its factors multiplied out."""
    folders = (workspace.out("factorize") / name for name in ("model", "dense"))
    own, dense = (AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits for folder in folders)
    return float((own - dense).abs().max() / dense.std())


def test_factors_of_experts_are_refined_and_healed(own_copy):
    ranks.run(own_copy, RanksParams(ratio=0.6))
    factorize.run(own_copy, as_truncated())
    before = torch.cat([t.read().flatten() for t in expert_tensors(own_copy)])
    trained = {"passes": 4, "threads": 1, "rate": 2e-5}
    factorize.run(own_copy, FactorizeParams(dense_export=True, refine=trained, heal=trained))
    rows = pq.read_table(own_copy.out("factorize") / "refinement.parquet").to_pylist()
    healing = read_json(own_copy, "factorize", "factorize.json")["healing"]
    assert all(row["accepted"] and row["held_out_after"] < row["held_out_before"] for row in rows) and len(rows) >= 2
    assert healing["accepted"] and healing["held_out_after"] < healing["held_out_before"]
    after = torch.cat([t.read().flatten() for t in expert_tensors(own_copy)])
    assert after.shape == before.shape and (after != before).double().mean() > 0.9
    assert checkpoint_differs(own_copy) < 1e-4


def expert_tensors(workspace: Workspace) -> list[StoredTensor]:
    """The factors of all experts in the checkpoint."""
    tensors = read_tensors(workspace.out("factorize") / "model")
    return [t for name, t in tensors.items() if "_classes." in name and t.dtype.is_floating_point]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_experts_of_a_stack_share_their_right_factor(own_copy, storage):
    subspace.run(own_copy, SubspaceParams(experts={"shared": True, "prior_tokens": 8, "fewest": 3}))
    ranks.run(own_copy, RanksParams(ratio=0.4, storage=storage))
    factorize.run(own_copy, FactorizeParams(dense_export=True))
    evaluate.run(own_copy, EvaluateParams(answer_tokens=2))
    rows = {row["module"]: row for row in pq.read_table(own_copy.out("ranks") / "ranks.parquet").to_pylist()}
    experts = [layer for layer in read_layers(own_copy.out("prepare")) if layer.stack]
    stacks = {layer.stack for layer in experts}
    low = [layer for layer in experts if rows[layer.name]["storage"] != "dense"]
    assert low and len({rows[layer.name]["site"] for layer in experts}) == len(stacks)
    tensors = read_tensors(own_copy.out("factorize") / "model")
    for stack in {layer.stack for layer in low}:
        own = [layer for layer in experts if layer.stack == stack]
        stored = [t for name, t in tensors.items() if name.startswith(f"{stack}_classes.0.")]
        assert sum(t.numbers for t in stored) == sum(rows[layer.name]["stored_parameters"] for layer in own)
        (down,) = (t for name, t in tensors.items() if name == f"{stack}_classes.0.down")
        assert len(down.shape) == 2, "one right factor for all experts"
    size = read_json(own_copy, "evaluate", "metrics.json")["size"]
    assert size["active_parameters_compressed"] < size["active_parameters_dense"]
    assert checkpoint_differs(own_copy) < 1e-4


def test_whole_experts_are_dropped_and_the_router_chooses_among_the_others(own_copy):
    workspace = own_copy
    ranks.run(workspace, RanksParams(ratio=0.15, allocator="drop_experts"))
    factorize.run(workspace, FactorizeParams(dense_export=True))
    evaluate.run(workspace, EvaluateParams(answer_tokens=2))
    gone = read_dropped(workspace.out("ranks"))
    assert {len(experts) for experts in gone.values()} == {1}
    size = read_json(workspace, "evaluate", "metrics.json")["size"]
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    assert size["targeted_parameters_compressed"] == sum(row["stored_parameters"] for row in rows)
    assert size["active_parameters_compressed"] < size["active_parameters_dense"]
    dense = AutoModelForCausalLM.from_pretrained(workspace.model).eval()
    small = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "model").eval()
    ordinary = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "dense").eval()
    with torch.no_grad():
        logits = dense(input_ids=IDS, use_cache=False).logits
        for name, experts in gone.items():
            avoid(dense.get_submodule(name.rpartition(".")[0]).router, experts)
        wanted = dense(input_ids=IDS, use_cache=False).logits
        assert (wanted - logits).abs().max() > 1e-3
        for model in (small, ordinary):
            torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, wanted, rtol=0, atol=1e-5)


def avoid(router: torch.nn.Module, experts: Sequence[int]) -> None:
    """Let a router never choose these."""
    router.bias = torch.nn.Parameter(torch.zeros(4) if router.bias is None else router.bias.detach().clone())
    router.bias[list(experts)] = -1e9


def test_dropping_more_experts_than_a_token_leaves_is_refused(mixture):
    with pytest.raises(ParameterError, match=r"a token chooses \d\. Lower ranks\.ratio"):
        ranks.run(mixture, RanksParams(ratio=0.6, allocator="drop_experts"))
