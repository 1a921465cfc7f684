"""Tiny mixtures through all stages: experts are compressed as layers, and the checkpoint is what its factors multiply out to."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_families import save_family
from tiny_project import set_params, tiny_project

from fisherfold.network.layers import read_layers
from fisherfold.run.params import FactorizeParams, load_params
from fisherfold.run.workspace import STAGES, Workspace
from stages import factorize

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


@pytest.fixture(scope="module", params=["gpt_oss", pytest.param("llama4_text", marks=pytest.mark.slow)])
def mixture(request, tmp_path_factory) -> Workspace:
    """A transposed, biased, interleaved layout behind the interface, and one without it; all stages but the report have run."""
    root = tiny_project(tmp_path_factory.mktemp(request.param))
    save_family(root / "tiny-model", request.param)
    set_params(root, PARAMS)
    workspace, params = Workspace(root), load_params(root / "params.yaml")
    for stage in STAGES:
        importlib.import_module(f"stages.{stage}").run(workspace, getattr(params, stage))
    return workspace


def read_json(workspace: Workspace, stage: str, name: str) -> dict:
    return json.loads((workspace.out(stage) / name).read_text())


def test_experts_have_ranks_in_few_classes(mixture):
    rows = pq.read_table(mixture.out("ranks") / "ranks.parquet").to_pylist()
    stacks: dict[str, list[dict]] = {}
    experts = {layer.name: layer.stack for layer in read_layers(mixture.out("prepare")) if layer.stack}
    routed = read_json(mixture, "ranks", "budget.json")["routed"]
    assert routed.keys() == experts.keys()
    dense = read_json(mixture, "subspace", "subspace.json")["dense"]
    for row in rows:
        if stack := experts.get(row["module"]):
            stacks.setdefault(stack, []).append(row)
            few = routed[row["module"]] * 8 * 16 < 2.5  # tokens
            assert few == (row["module"] in dense) and (not few or row["storage"] == "dense")
    for own in stacks.values():
        assert len({row["rank"] for row in own if row["module"] not in dense}) <= 2
    low = sum(row["storage"] != "dense" for own in stacks.values() for row in own)
    assert low > len(experts) / 2


def test_the_checkpoint_is_what_its_factors_multiply_out_to(mixture, tmp_path):
    command = [sys.executable, "-c", LOAD, str(mixture.out("factorize"))]
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(factorize.__file__).parents[1]),
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for difference in json.loads(done.stdout.splitlines()[-1]).values():
        assert difference < 1e-5


def test_sizes_are_counted_and_what_a_token_meets(mixture):
    size = read_json(mixture, "evaluate", "metrics.json")["size"]
    rows = pq.read_table(mixture.out("ranks") / "ranks.parquet").to_pylist()
    assert size["targeted_parameters_compressed"] == sum(row["stored_parameters"] for row in rows)
    assert 0.58 < size["targeted_parameters_compressed"] / size["targeted_parameters_dense"] <= 0.6
    routed = read_json(mixture, "ranks", "budget.json")["routed"]
    for model, column in (("dense", "dense_parameters"), ("compressed", "stored_parameters")):
        idle = sum((1 - routed.get(row["module"], 1.0)) * row[column] for row in rows)
        assert size[f"active_parameters_{model}"] == round(size[f"model_parameters_{model}"] - idle)
        assert size[f"active_parameters_{model}"] < size[f"model_parameters_{model}"]
    assert "that a token meets" in (mixture.out("report") / "index.html").read_text()


def test_factors_of_a_mixture_are_not_trained(mixture, capsys):
    factorize.run(mixture, FactorizeParams(refine={"passes": 1}, heal={"passes": 1}))
    assert "factors are not trained: experts are among the layers" in capsys.readouterr().err
