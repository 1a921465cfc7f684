"""The checkpoint in the hands of a user who has no fisherfold: all checks run in one fresh interpreter, see fresh_interpreter.py."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import ROOT, last_line
from tiny import FAMILIES, as_truncated
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace

from fisherfold.run.checkpoint import read_tensors, write_tensors
from stages import factorize

SCRIPT = ROOT / "tests" / "support" / "fresh_interpreter.py"


CHECKED = ("llama", "gpt2", "gemma3_text")  # the others are like llama, but for biases and norms
OTHERS = tuple(family for family in FAMILIES if family not in CHECKED)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check found, by family and check, of some families."""

    @cache
    def of(families):
        root = tmp_path_factory.mktemp("checkpoints")
        for family in families:
            workspace = subspace_workspace(root / "work" / family, family)
            publish_ranks(workspace, mixed_ranks(workspace))
            factorize.run(workspace, as_truncated(dense_export=True))
            shutil.copytree(workspace.out("factorize"), root / "users" / family)
            shard(root / "users" / family / "model", root / "users" / family / "sharded")
        elsewhere = root / "elsewhere"
        elsewhere.mkdir()
        return last_line(elsewhere, "-I", str(SCRIPT), str(root / "users"), hub=root / "hub")

    return of


def shard(folder, target):
    """A copy of a checkpoint whose weights are in many small files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    write_tensors(target, read_tensors(folder), shard_bytes=4000)


@pytest.fixture(params=[*CHECKED, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)])
def found(request, outcomes):
    return outcomes(CHECKED if request.param in CHECKED else OTHERS)[request.param]


def test_the_interpreter_has_no_fisherfold(found):
    assert "No module named 'fisherfold" in found["project_is_missing"]


def test_loading_without_its_code_fails_loudly(found):
    assert found["refuses_without_trust"].startswith("RuntimeError")


def test_the_dense_class_never_fills_it_with_random_weights(found):
    assert found["dense_class_refuses"].startswith("RuntimeError")
    assert found["saved_again"]["dense class"].startswith("RuntimeError")


def test_a_lost_tensor_fails_loudly(found):
    name, error = found["lost_tensor_is_noticed"]
    assert error == f"RuntimeError: The checkpoint lacks 1 tensors of the model, such as {name!r}."


def test_it_computes_what_the_dense_export_computes(found):
    assert max(found["equals_dense_export"]) < 2e-5


def test_it_generates_with_dynamic_and_static_cache(found):
    assert found["generates"] == [True, True, 2]


def test_its_tokenizer_asks_nobody(found):
    assert found["tokenizer_without_question"] == [True, False]


def test_the_base_model_loads_by_itself(found):
    assert found["base_model"] < 2e-5


def test_save_pretrained_round_trip(found):
    saved = found["saved_again"]
    assert saved["difference"] == saved["difference of the second"] == 0
    assert not any(saved["info"].values())
    assert saved["code"]
    assert saved["auto_map"] == {
        "AutoConfig": "modeling_fisherfold.FisherfoldConfig",
        "AutoModel": "modeling_fisherfold.FisherfoldModel",
        "AutoModelForCausalLM": "modeling_fisherfold.FisherfoldForCausalLM",
    }


def test_loads_in_bfloat16(found):
    half = found["half_precision"]
    assert half["dtypes"] == ["torch.bfloat16", "torch.int64"]
    assert half["orders"]
    assert half["number of orders"] > 2
    assert max(half["differences"]) < 0.2 * half["scale"]


def test_trains_with_and_without_gradient_checkpointing(found):
    (first, second), difference, scale = found["training_step"]
    assert second < first
    assert difference <= 1e-5 * scale


def test_accelerate_places_it(found):
    assert found["device_maps"] == {
        "automatic": 0,
        "offloaded": pytest.approx(0, abs=1e-5),
        "on disk": True,
        "no split": True,
    }


def test_inner_layers_can_be_quantized_later(found):
    inner, left, moved, finite = found["quantized"]
    assert inner > 10
    assert left == 0
    assert moved < 0.15
    assert finite


def test_shards_load(found):
    assert found["sharded"] == 0


def test_compiles_without_graph_breaks(outcomes):
    traced = {family: found["compiles"] for family, found in outcomes(CHECKED).items() if found["compiles"]}
    assert traced.keys() == {"llama", "gpt2"}
    assert max(max(differences) for differences in traced.values()) < 1e-5


def test_inside_are_ordinary_linear_layers(found):
    assert found["inner_layers"] == ["Linear"]


def test_lora_trains_on_it(found):
    if found["adapters"] is None:
        pytest.skip("peft is not installed")
    losses, differences = found["adapters"]
    assert losses[-1] < losses[0]
    assert max(differences) == 0


LM_EVAL = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fisherfold", "stages", "flows"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Forbidden())
from lm_eval.__main__ import cli_evaluate

cli_evaluate()
"""


@pytest.mark.slow
def test_the_stock_lm_eval_command_runs_it(tmp_path):
    workspace = subspace_workspace(tmp_path)
    publish_ranks(workspace, mixed_ranks(workspace))
    factorize.run(workspace, as_truncated())
    rows = [{"question": "w5 w6", "choices": ["w7", "w8"], "answer": 0}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "questions.parquet")
    task = {
        "task": "tiny_questions",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.parquet")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny_questions.yaml").write_text(json.dumps(task))
    model = f"pretrained={workspace.out('factorize') / 'model'},trust_remote_code=True"
    arguments = [
        "--model",
        "hf",
        "--model_args",
        model,
        "--tasks",
        "tiny_questions",
        "--include_path",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    process = subprocess.run(
        [sys.executable, "-I", "-c", LM_EVAL, *arguments],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "|tiny_questions|" in process.stdout
