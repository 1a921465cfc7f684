"""What vLLM's Transformers backend makes of a model: the form of its attention's result, and its logits."""

import json
from pathlib import Path

import pytest
import torch
from tiny_families import tiny_config
from transformers import AutoModelForCausalLM

from fisherfold.export.architecture import dense_architecture, write_config
from fisherfold.export.vllm_backend import attention_fails, logit_scale


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_neox", "jetmoe"])
def test_a_row_a_token_is_what_most_want(family: str):
    assert attention_fails(tiny_config(family)) is None


@pytest.mark.parametrize(("family", "says"), [("gpt2", "must have same reduction dim"), ("diffllama", "out of range")])
def test_what_wants_another_form(family: str, says: str):
    assert says in (attention_fails(tiny_config(family)) or "")


@pytest.mark.parametrize(
    ("family", "given", "scale"),
    [
        ("llama", {}, 1.0),
        ("phi", {}, 1.0),  # with a bias
        ("gemma2", {"final_logit_softcapping": 30.0}, 1.0),
        ("cohere", {"logit_scale": 0.0625}, 0.0625),
        ("granite", {"logits_scaling": 8.0}, 0.125),
        ("opt", {}, 1.0),  # its decoder is called, not the model without head
        ("llama4_text", {}, 1.0),  # its base model is itself
        ("bert", {}, None),  # a layer and a norm before the output embedding
        ("recurrent_gemma", {}, None),  # capped under another name
    ],
)
def test_logits(family: str, given: dict, scale: float | None):
    config = tiny_config(family)
    for name, value in given.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert logit_scale(model) == scale


@pytest.mark.parametrize(("scaling", "written"), [(8.0, 0.125), (1.0, None)])
def test_a_checkpoint_says_by_what_its_logits_are_multiplied(tmp_path: Path, scaling: float, written: float | None):
    config = tiny_config("granite")
    config.logits_scaling = scaling
    config.save_pretrained(tmp_path)
    (made := tmp_path / "made").mkdir()
    write_config(made, dense_architecture(tmp_path), torch.float32, {})
    assert json.loads((made / "config.json").read_text()).get("logit_scale") == written
