"""The checkpoint in the hands of a user who has no fisherfold: all checks run in one fresh interpreter, see fresh_interpreter.py."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from project import ROOT, last_line
from tiny import FAMILIES
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace
from transformers.pytorch_utils import Conv1D

from fisherfold.export.gauges import gauge, product
from fisherfold.run.checkpoint import read_tensors, write_tensors
from fisherfold.run.params import FactorizeParams
from fisherfold.runtime import modeling_fisherfold as runtime
from stages import factorize

SCRIPT = ROOT / "tests" / "support" / "fresh_interpreter.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check found, by family and check."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        workspace = subspace_workspace(root / "work" / family, family)
        publish_ranks(workspace, mixed_ranks(workspace))
        factorize.run(workspace, FactorizeParams(dense_export=True))
        shutil.copytree(workspace.out("factorize"), root / "users" / family)
        shard(root / "users" / family / "model", root / "users" / family / "sharded")
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    return last_line(elsewhere, "-I", str(SCRIPT), str(root / "users"), hub=root / "hub")


def shard(folder, target):
    """A copy of a checkpoint whose weights are in many small files."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    write_tensors(target, read_tensors(folder), shard_bytes=4000)


@pytest.fixture(params=FAMILIES)
def found(request, outcomes):
    return outcomes[request.param]


def test_the_interpreter_has_no_fisherfold(found):
    assert "No module named 'fisherfold" in found["project_is_missing"]


def test_loading_without_its_code_fails_loudly(found):
    assert "trust_remote_code=True" in found["refuses_without_trust"]


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


def test_save_pretrained_round_trip(found):
    saved = found["saved_again"]
    assert saved["difference"] == saved["difference of the second"] == 0
    assert not any(saved["info"].values())
    assert saved["code"]
    assert saved["auto_map"] == {
        "AutoConfig": "modeling_fisherfold.FisherfoldConfig",
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
    traced = {family: found["compiles"] for family, found in outcomes.items() if found["compiles"]}
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
    factorize.run(workspace, FactorizeParams())
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


# The layers alone, against the dense product in float64

KINDS = [
    ("factors", 12, 20, 3),
    ("pivoted", 12, 20, 7),
    ("pivoted", 20, 12, 7),
    ("pivoted", 16, 16, 15),
    ("pivoted", 9, 5, 0),
]


def low_rank(storage, n, m, rank, bias):
    """A runtime layer of random content, the product it stands for, and its bias."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).double().numpy() for shape in ((n, rank), (rank, m)))
    stored = gauge(left, right, storage, torch.float64)
    dense = torch.nn.Linear(m, n, bias=bias, dtype=torch.float64)
    layer = runtime.replace(dense, stored.kind, rank).double()
    state = {name: torch.from_numpy(values.copy()) for name, values in stored.parameters.items()}
    if bias:
        state["bias" if stored.kind in factorize.OWN_BIAS else "up.bias"] = dense.bias.data
    layer.load_state_dict(state)
    return layer, torch.from_numpy(product(stored.kind, stored.parameters, n, m)), dense.bias


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("storage", "n", "m", "rank"), KINDS)
def test_layers_compute_their_product(storage, n, m, rank, bias, grad):
    layer, weight, offset = low_rank(storage, n, m, rank, bias)
    for shape in ((m,), (1, 1, m), (3, m), (2, 3, m), (2, 100, m)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()
        with torch.set_grad_enabled(grad):
            found = layer(x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, offset), atol=1e-12, rtol=1e-12)


@pytest.fixture(params=[1, 10**9], ids=["whole", "permuted"])
def many_tokens(request, monkeypatch):
    """Forces either way of computing many tokens."""
    monkeypatch.setattr(runtime, "MANY_TOKENS", request.param)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12)])
def test_either_way_through_a_layer_gives_the_same(n, m, storage, many_tokens):
    layer, weight, offset = low_rank("pivoted", n, m, 7, bias=True)
    dtype = getattr(torch, storage)
    x = torch.randn(5, 8, m, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x.double(), weight, offset)
    with torch.no_grad():
        found = layer.to(dtype)(x.to(dtype)).double()
    assert (found - expected).norm() < {"float32": 1e-6, "bfloat16": 2e-2}[storage] * expected.norm()


@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("write", ["copy_", "data"])
def test_a_whole_factor_is_made_anew_when_its_weight_changes(n, m, write, monkeypatch):
    """Also when it is written to behind autograd's back, as adapters do that merge themselves."""
    monkeypatch.setattr(runtime, "MANY_TOKENS", 1)
    layer, *_ = low_rank("pivoted", n, m, 7, bias=False)
    x = torch.randn(5, m, generator=torch.Generator().manual_seed(1)).double()
    inner = layer.up if n < m else layer.down
    with torch.no_grad():
        layer(x)
        assert layer.memory
        if write == "data":
            inner.weight.data += 1
        else:
            inner.weight.copy_(inner.weight + 1)
        found = layer(x)
    torch.testing.assert_close(found, layer(x).detach(), atol=1e-12, rtol=1e-12)
    assert not copy.deepcopy(layer).memory
    assert "whole" not in "".join(layer.state_dict())


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize(("storage", "n", "m", "rank"), KINDS[:3])
def test_a_layer_that_something_took_over_is_called_as_it_is(storage, n, m, rank, tokens):
    """An adapter in place of an inner layer, or a hook on it, must see every token, however many."""
    layer, *_ = low_rank(storage, n, m, rank, bias=False)
    x = torch.randn(tokens, m, generator=torch.Generator().manual_seed(1)).double()

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.in_features, self.out_features, self.weight = inner.in_features, inner.out_features, inner.weight

        def forward(self, x):
            return 2 * self.inner(x)

    with torch.no_grad():
        layer(x)
        plain, layer.up = layer.up, Doubled(layer.up)
        doubled = layer(x)
        layer.up = plain
        handle = layer.up.register_forward_hook(lambda module, arguments, output: 2 * output)
        torch.testing.assert_close(layer(x), doubled)
        handle.remove()
    torch.testing.assert_close(doubled, as_doubled(layer, storage, n, m, x), atol=1e-12, rtol=1e-12)


def as_doubled(layer, storage, n, m, x):
    """What the layer computes if the output of its `up` is doubled, from the formula."""
    if storage == "factors" or n > m:
        return 2 * layer(x)
    pivots = layer.down(x)
    return torch.cat((pivots, 2 * layer.up(pivots)), dim=-1)[..., layer.order]


def test_conv1d_becomes_an_ordinary_layer():
    dense = Conv1D(nf=6, nx=10)
    layer = runtime.replace(dense, "factors", 2)
    assert (layer.down.in_features, layer.up.out_features, layer.up.bias is not None) == (10, 6, True)


def test_half_precision_layers_take_both_ways():
    layer, _, _ = low_rank("pivoted", 12, 20, 7, bias=True)
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = layer.bfloat16()
    torch.testing.assert_close(layer(x), torch.cat([layer(part) for part in x.split(10)]), atol=0.1, rtol=0.05)
