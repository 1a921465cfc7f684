"""Checkpoints that no pass can use are refused with the tensor's name, and a cure that is not a parameter."""

from pathlib import Path

import pytest
import tiny
import torch

from fisherfold.network.weight_check import check_weights
from fisherfold.run.errors import NumericalError
from fisherfold.run.params import CaptureParams, KroneckerParams
from fisherfold.statistics.shard import loaded_model
from stages import capture, kronecker


def broken_workspace(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, everywhere: bool):
    """As stage `prepare` leaves it, with one weight (or all) of a tensor set to `value`."""
    sound = tiny.tiny_model

    def broken(*of: object) -> torch.nn.Module:
        model = sound(*of)
        weight = model.get_parameter(name).detach()
        (weight if everywhere else weight.view(-1)[:1]).fill_(value)
        return model

    monkeypatch.setattr(tiny, "tiny_model", broken)
    loaded_model.cache_clear()
    return tiny.tiny_workspace(folder, "qwen2")


@pytest.mark.parametrize("value", [1e30, -1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_weight_beyond_all_measure_is_named_before_any_pass(tmp_path, monkeypatch, name, value):
    workspace = broken_workspace(tmp_path, monkeypatch, name, value, everywhere=False)
    with pytest.raises(NumericalError, match=rf"The weight {name!r} .* value {value:g}".replace("+", r"\+")):
        capture.run(workspace, CaptureParams(knowledge_questions=0))


def test_large_weights_of_a_trained_model_pass():
    model = tiny.tiny_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(3e4)
    check_weights(model)


def test_gradients_that_are_zero_everywhere_are_refused(tmp_path, monkeypatch):
    workspace = broken_workspace(tmp_path, monkeypatch, "lm_head.weight", 0.0, everywhere=True)
    capture.run(workspace, CaptureParams(sketch_rank=4, knowledge_questions=0))
    with pytest.raises(
        NumericalError, match=r"from 'model.layers.0.+' to 'model.layers.1.+', are zero.+ of 'lm_head.weight' is zero"
    ):
        kronecker.run(workspace, KroneckerParams())
