"""What later stages would refuse, refused where stage prepare has found the model's layers."""

import json

import pytest
from tiny import tiny_workspace

from fisherfold.run.errors import InputError, ParameterError
from fisherfold.run.params import Params
from flows.foresight import foresee


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny workspace of a model with 1000 parameters of which 300 are targets, says coverage.json."""
    workspace = tiny_workspace(tmp_path_factory.mktemp("prepared"))
    facts = {"model_parameters": 1000, "targeted_parameters": 300}
    (workspace.out("prepare") / "coverage.json").write_text(json.dumps(facts))
    return workspace


def look(workspace, **blocks):
    foresee(Params.model_validate(blocks), workspace.model, workspace.out("prepare"))


def test_a_budget_out_of_reach(prepared):
    with pytest.raises(ParameterError, match=r"ranks.ratio = 0.9 leaves .* bytes of the whole model, but the smallest"):
        look(prepared, ranks={"ratio": 0.9, "budget": "model_bytes"})


def test_a_pattern_that_matches_nothing(prepared):
    with pytest.raises(ParameterError, match=r"ranks.floor: '\*.nothing' matches none"):
        look(prepared, ranks={"floor": {"*.nothing": 0.5}})


def test_a_model_that_gguf_cannot_hold(tmp_path):
    workspace = tiny_workspace(tmp_path, "gpt2")
    (workspace.out("prepare") / "coverage.json").write_text('{"model_parameters": 9, "targeted_parameters": 9}')
    with pytest.raises(InputError, match=r"factorize.gguf_export: 'gpt2'"):
        look(workspace, factorize={"gguf_export": True})
    look(workspace)


@pytest.mark.parametrize(("ratio", "warned"), [(0.2, True), (0.4, False)])
def test_little_of_the_model_removed(prepared, capsys, ratio, warned):
    look(prepared, ranks={"ratio": ratio})
    assert ("removes 6.0% of the whole model" in capsys.readouterr().err) == warned


def test_a_target_for_which_nothing_is_written(prepared):
    with pytest.raises(ParameterError, match=r"gguf_export is false\. `--set factorize\.target=gguf` sets both"):
        look(prepared, factorize={"target": "gguf"})


def test_what_a_target_costs(prepared, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    look(prepared, factorize={"target": "vllm"}, ranks={"storage": "factors", "round_to": 4, "ratio": 0.4})
    look(prepared, factorize={"target": "gguf", "gguf_export": True})
    told = capsys.readouterr().err
    assert "factors in ranks of multiples of 4 keep 21% of the full ranks at ranks.ratio = 0.4" in told
    assert "pip install vllm" in told
    assert "as large and as slow as the dense model" in told
    look(prepared)
    assert "factorize.target" not in capsys.readouterr().err
