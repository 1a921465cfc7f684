"""Tokens are drawn from the model's distribution, and in bfloat16 only where the processor has units for it."""

import pytest
import torch

from fisherfold.inputs import sampling
from fisherfold.inputs.sampling import draw, writer, writing_dtype
from fisherfold.network.generation import Decoder
from fisherfold.run.errors import NumericalError
from fisherfold.run.params import PrepareParams
from tests.support.tiny import save_tiny

PROMPTS = [[1, 9, 11, 30, 7], [1, 60]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_in_proportion(temperature):
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.199, 0.001, 0.4]).log()
    drawn = draw(logits.expand(200_000, 5), temperature, never=[4]).bincount(minlength=5) / 200_000
    expected = (logits[:4] / temperature).softmax(-1)
    error = (expected * (1 - expected) / 200_000).sqrt()
    assert drawn[4] == 0 and ((drawn[:4] - expected).abs() < 4 * error).all()


def test_predictions_that_are_not_finite_are_refused():
    with pytest.raises(NumericalError, match="one of its predictions is not finite"):
        draw(torch.tensor([[0.0, float("nan"), 1.0]]))
    assert draw(torch.tensor([[-torch.inf, 0.0]])) == 1


def test_with_a_cache_and_without_the_same_text(tmp_path, monkeypatch):
    own = writer(save_tiny(tmp_path / "model"), "float32")
    assert own.decoder.caches
    with_cache = own.write(PROMPTS, 6, [], seed=1)
    monkeypatch.setattr(Decoder, "caches", False)
    assert own.write(PROMPTS, 6, [], seed=1) == with_cache != own.write(PROMPTS, 6, [], seed=2)


def test_what_the_head_reads_lies_side_by_side(tmp_path):
    own = writer(save_tiny(tmp_path / "model"), "bfloat16")
    strides = []
    head = own.decoder.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].is_contiguous()))
    own.write(PROMPTS, 3, [], seed=0)
    assert strides and all(strides)


@pytest.mark.parametrize(("units", "asked", "own", "expected"), [
    (True, "bfloat16", "float32", "bfloat16"), (False, "bfloat16", "float32", "float32"),
    (True, None, "float32", "float32"), (False, "bfloat16", "float16", "float16"),
])  # fmt: skip
def test_the_dtype_that_a_model_writes_in(units, asked, own, expected, monkeypatch):
    monkeypatch.setattr(sampling, "has_bfloat16_units", lambda: units)
    assert writing_dtype(PrepareParams(dtype=own, writing_dtype=asked)) == expected
