"""The plan by which factors are split over devices, followed by hand on two of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import served_models
import torch
from prefect_server import free_port
from served_models import served_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from fisherfold.export.tensor_parallel import split_plan
from fisherfold.runtime.modeling_fisherfold import FisherfoldConfig

FACTORS = {"kind": "factors", "rank": 3}
Q, O, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"


def read_plan(layers: dict) -> dict[str, str]:
    """The plan as a checkpoint's configuration has it, which is stored with sorted keys."""
    stored = json.dumps({"tensor_parallel": split_plan(tiny_model(), layers)}, sort_keys=True)
    return FisherfoldConfig(fisherfold=json.loads(stored)).base_model_tp_plan


def style(plan: dict[str, str], name: str) -> str:
    """As engines look it up: the first pattern that the name begins with."""
    return next((style for pattern, style in plan.items() if re.match(pattern, name)), "replicate")


def two_devices(x: torch.Tensor, weight: torch.Tensor, how: str, split: bool) -> tuple[list[torch.Tensor], bool]:
    """W x on two devices; each has all of x, or, if it is split, a half. Whether the results are halves."""
    parts = list(x.chunk(2, -1)) if split else [x, x]
    if how == "colwise":
        return [part @ half.T for part, half in zip(parts, weight.chunk(2))], True
    if how == "rowwise":
        summed = sum(part @ half.T for part, half in zip(parts, weight.chunk(2, 1)))
        return [summed, summed], False
    return [part @ weight.T for part in parts], False


@pytest.mark.parametrize("name", [Q, O, DOWN])
def test_both_devices_together_compute_the_product(name):
    plan = read_plan({name: FACTORS})
    dense = tiny_model().config.base_model_tp_plan[re.sub(r"\d", "*", name.removeprefix("model."))]
    x, down, up = torch.randn(5, 8), torch.randn(4, 8), torch.randn(6, 4)
    short = name.removeprefix("model.")
    halved = dense == "rowwise"
    z, halves = two_devices(x, down, style(plan, f"{short}.down"), halved)
    assert not halves
    y, halves = two_devices(z[0], up, style(plan, f"{short}.up"), False)
    assert halves == (dense == "colwise")
    found = torch.cat(y, -1) if halves else y[0]
    torch.testing.assert_close(found, x @ down.T @ up.T, atol=1e-5, rtol=1e-5)


def test_the_dense_layers_keep_their_plan():
    plan, dense = read_plan({Q: FACTORS}), tiny_model().config.base_model_tp_plan
    assert style(plan, "layers.1.self_attn.q_proj") == dense["layers.*.self_attn.q_proj"]
    assert style(plan, "layers.0.mlp.up_proj") == dense["layers.*.mlp.up_proj"]


def test_a_dropped_layer_whose_results_are_added():
    plan = read_plan({O: {"kind": "zero", "rank": 0}, Q: FACTORS})
    assert plan and style(plan, "layers.0.self_attn.q_proj.up") == "colwise"


@pytest.mark.parametrize(
    "layers",
    [
        {Q: {"kind": "zero", "rank": 0}},
        {Q: {"kind": "pivoted_outputs", "rank": 3}},
        {Q: FACTORS, DOWN: {"kind": "pivoted_inputs", "rank": 3}},
    ],
)
def test_what_cannot_be_split_has_no_plan(layers):
    assert split_plan(tiny_model(), layers) is None
    assert split_plan(tiny_model("gpt2"), {}) is None  # nor what transformers has no plan for


@pytest.mark.slow
@pytest.mark.parametrize(("family", "storage"), [("llama", "plain"), ("qwen2", "shared"), ("gemma3_text", "plain")])
def test_transformers_splits_a_checkpoint_over_two_processes(tmp_path, family, storage):
    folder, tokens = served_model(tmp_path, family, storage), [3, 14, 15, 92, 65, 35]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        whole = model(torch.tensor([tokens])).logits
    script = Path(served_models.__file__).with_name("split_logits.py")
    world = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), str(folder), json.dumps(tokens), str(tmp_path / "logits.npy")]
    ranks = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, env=rank, stdout=subprocess.PIPE, text=True) for rank in ranks]
    held, _ = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-4)
    assert int(held) < 0.7 * model.num_parameters()  # it was split
