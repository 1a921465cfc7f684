"""Fisher mass and ρ on questions, against autograd on weights."""

import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_tokenizer, tiny_workspace
from torch import nn
from transformers import AutoTokenizer

from fisherfold.network.gradient_pass import loss_gradient
from fisherfold.network.layers import find_layers
from fisherfold.network.models import load_model
from fisherfold.page.knowledge_view import knowledge_view, mass_shares, mean_rho
from fisherfold.run.determinism import STREAMED, WHOLE, placed
from fisherfold.run.errors import InputError
from fisherfold.run.params import CaptureParams
from fisherfold.run.tables import read_table
from fisherfold.statistics.knowledge import TABLE, encode_answer, measure_questions
from fisherfold.statistics.layer_statistics import Statistics
from stages import capture

PARAMS = CaptureParams(gradients="sketch", sketch_rank=2, tokens_per_sequence=2, knowledge_questions=4)


def test_mass_is_that_of_the_answers_weight_gradients(tmp_path):
    workspace = tiny_workspace(tmp_path, sequences=2)
    capture.run(workspace, PARAMS)
    rows = pq.read_table(workspace.out("capture") / TABLE).to_pylist()
    model, tokenizer = load_model(workspace.model, torch.float32), AutoTokenizer.from_pretrained(workspace.model)
    layers, modules = find_layers(model), dict(model.named_modules())
    model.requires_grad_(True)
    expected = dict.fromkeys([layer.name for layer in layers], 0.0)
    for question in read_table(workspace.table("questions")).to_pylist()[:4]:
        ids, first = encode_answer(tokenizer, question)
        assert tokenizer.decode(ids[first:]).strip() == question["choices"][question["answer"]]
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:]).backward()
        for name in expected:
            expected[name] += modules[name].weight.grad.square().sum().item() / 4
    assert {row["module"]: row["fisher_mass"] for row in rows} == pytest.approx(expected, rel=1e-3)
    statistics = Statistics(workspace.out("capture"))
    for row, layer in zip(rows, statistics.layers, strict=True):
        assert row["text_mass"] == pytest.approx(statistics.gradient_norms(layer).mean().item(), rel=1e-4)
        assert (row["rho_kfac"] is None) == (layer.group != layer.name) and row["questions"] == 4


def test_with_one_decoder_block_in_memory_the_figures_are_the_same(tmp_path):
    workspace = tiny_workspace(tmp_path / "w", sequences=2)
    tables = []
    for placement in (WHOLE, STREAMED):
        (tmp_path / placement).mkdir()
        with placed(placement):
            measure_questions(tmp_path / placement, workspace.model, workspace.table("questions"), PARAMS)
        tables.append(pq.read_table(tmp_path / placement / TABLE))
    assert tables[0].num_rows == 14 and tables[0].equals(tables[1])


def test_loss_of_the_last_tokens_alone():
    logits, ids = torch.randn(1, 6, 9, requires_grad=True), torch.randint(9, (1, 6))
    nn.functional.cross_entropy(logits[0, 3:-1], ids[0, 4:]).backward()
    losses, gradient = loss_gradient(logits.detach(), ids, first=4)
    torch.testing.assert_close(gradient, logits.grad)
    assert losses[0].item() == pytest.approx(nn.functional.cross_entropy(logits[0, 3:-1], ids[0, 4:]).item())


def test_no_questions_leave_an_empty_table(tmp_path):
    workspace = tiny_workspace(tmp_path, sequences=2)
    capture.run(workspace, PARAMS.model_copy(update={"knowledge_questions": 0}))
    assert pq.read_table(workspace.out("capture") / TABLE).num_rows == 0
    assert knowledge_view([], []) is None


def test_the_view_sums_masses_and_averages_rho():
    names = [f"model.layers.{block}.{kind}" for block in (0, 1) for kind in ("q", "up")]
    masses, rhos = (1.0, 2.0, 3.0, 2.0), (0.2, 0.4, None, 0.5)
    rows = [
        {"module": name, "questions": 3, "fisher_mass": mass, "text_mass": None, "rho_kfac": rho}
        for name, mass, rho in zip(names, masses, rhos)
    ]
    assert mass_shares(rows, "fisher_mass") == {0: 3 / 8, 1: 5 / 8} and mass_shares(rows, "text_mass") == {}
    assert mean_rho(rows) == pytest.approx({0: 0.3, 1: 0.5})
    page = str(knowledge_view(rows, []))
    assert "Where knowledge sits" in page and "37.5 %" in page.replace("\u202f", " ").replace("\xa0", " ")


def test_a_question_without_tokens_is_named():
    with pytest.raises(InputError, match="makes 0 tokens of question ''"):
        encode_answer(tiny_tokenizer(), {"question": "", "choices": ["", "w3"], "answer": 0})
