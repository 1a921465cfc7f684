"""Mistakes in params.yaml are refused by the parameters alone, before DVC removes the outputs of the stage that would refuse them."""

import sys
from pathlib import Path

import pytest
from project import command
from ruamel.yaml import YAML
from stand_in import clone_with_stand_in

from fisherfold.network.layers import DENSE_FILE, LinearLayer, write_layers
from fisherfold.run.errors import InputError, ParameterError
from fisherfold.run.params import Params, check_params
from fisherfold.run.workspace import Workspace
from flows.checked import record_check
from flows.pairs import check_pairs
from flows.preflight import check_inputs, check_prepared, check_tasks, restrict
from flows.staleness import stale_reasons

SKETCH = {"gradients": "sketch"}
STREAMED = {"placement": "streamed"}
FISHER = {"capture": SKETCH, "kronecker": {"estimator": "sequence"}}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kronecker": {"estimator": "token"}, "capture": {"tokens_per_sequence": 0}}, "tokens_per_sequence is 0"),
        (
            {"kronecker": {"estimator": "every_token", "clip": 2}, "capture": {"tokens_per_sequence": 0}},
            "single tokens",
        ),
        ({"subspace": {"metric": "svd", "input_damping": "oas"}}, "not a mean of samples"),
        ({"subspace": {"metric": "fasc", "experts": {"shared": True}}}, "experts.shared wants a metric on weights"),
        (
            {"ranks": {"allocator": "drop_experts"}, "prepare": {"experts": "dense"}},
            "experts that are layers of their own",
        ),
        (
            {"ranks": {"allocator": "drop_experts", "round_to": 32}, "factorize": {"bits": 4}},
            "set factorize.bits = null",
        ),
        ({"subspace": {"metric": "fasc", "output_damping": "oas"}}, "not a mean of samples"),
        ({"subspace": {"input_damping": "oas"}, "kronecker": {"diagnostics": "none"}}, "diagnostics = 'basic'"),
        ({"subspace": {"input_damping": "ledoit_wolf"}, "capture": {"tokens_per_sequence": 1}}, "2 or more"),
        (
            {"subspace": {"metric": "fasc", "fasc": {"threshold": 0.1}}, "capture": {"tokens_per_sequence": 0}},
            "subspace.fasc.threshold needs tokens",
        ),
        ({"capture": {"labels": "data", "draws": 2}}, "Set capture.draws = 1"),
        ({"kronecker": {"trim_tokens": 256}}, "leaves nothing of sequences of 256"),
        ({"capture": STREAMED | {"skip_nonfinite": True}}, "Set capture.skip_nonfinite: false"),
        (
            {"capture": STREAMED, "factorize": {"bits": 4}, "ranks": {"round_to": 32}},
            "keeps a model's unpacked weights",
        ),
        ({"factorize": {"bits": 4}}, "set ranks.round_to = 32"),
        ({"capture": STREAMED}, "Set factorize.heal.passes = 0"),
        ({"ranks": {"widths": [8, 4], "round_to": 32}}, "set ranks.budget = 'model_bytes'"),
        (
            {
                "ranks": {"widths": [8, 4], "round_to": 32, "budget": "model_bytes"},
                "capture": {"placement": "streamed", "knowledge_questions": 0},
            },
            "null and ranks.widths",
        ),
        ({"factorize": {"bits": 4}, "ranks": {"round_to": 32}, "subspace": {"share_inputs": True}}, "its own metric"),
        ({"factorize": {"bits": 8, "gguf_export": True}, "ranks": {"round_to": 64}}, "factorize.gguf_export = false"),
        ({"factorize": {"head_bits": 8, "gguf_export": True}}, "head_bits = 8 is not what GGUF"),
        ({"factorize": {"head_bits": 8, "target": "vllm"}}, "Set factorize.head_bits = null"),
    ],
)
def test_parameters_that_do_not_go_together(changed, says):
    with pytest.raises(ParameterError, match=says):
        check_pairs(check_params(changed, "test"))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"subspace": {"metric": "gfwsvd"}, **FISHER},
        {"subspace": {"metric": "fwsvd"}, "capture": SKETCH},
        {"subspace": {"metric": "fasc"}, "capture": SKETCH},
        {"subspace": {"metric": "svd_llm", "input_damping": "oas"}},
        {"capture": STREAMED, "kronecker": {"estimator": "every_token"}, "factorize": {"heal": {"passes": 0}}},
    ],
)
def test_parameters_that_go_together(changed):
    check_pairs(check_params(changed, "test"))


def workspace_with(folder: Path, *layers: LinearLayer) -> Workspace:
    workspace = Workspace(folder)
    workspace.out("prepare").mkdir(parents=True)
    write_layers(workspace.out("prepare"), layers)
    (workspace.out("prepare") / DENSE_FILE).write_text("{}")
    return workspace


def test_a_budget_that_no_allocation_meets_is_refused_once_the_layers_are_known(tmp_path):
    name = "model.layers.0.mlp.up_proj"
    workspace = workspace_with(tmp_path, LinearLayer(name, 8, 8, bias=False, transposed=False, group=name))
    check_prepared(workspace, Params())
    with pytest.raises(ParameterError, match="ratio"):
        check_prepared(workspace, check_params({"ranks": {"ratio": 0.5, "floor": 0.9}}, "test"))
    with pytest.raises(ParameterError, match="no_such"):
        check_prepared(workspace, check_params({"ranks": {"exclude": ["no_such*"]}}, "test"))


def test_layers_that_groups_do_not_divide_are_refused(tmp_path):
    few = check_params({"factorize": {"bits": 4}}, "test")
    workspace = workspace_with(tmp_path, LinearLayer("down", 64, 48, bias=False, transposed=False, group="down"))
    with pytest.raises(ParameterError, match="48 inputs, which groups of 32 do not divide"):
        check_prepared(workspace, few)


def test_a_folder_of_tasks_that_is_not_there(tmp_path):
    check_tasks(Workspace(tmp_path), Params())
    with pytest.raises(ParameterError, match="is not a folder"):
        check_tasks(Workspace(tmp_path), check_params({"evaluate": {"task_folder": "mine"}}, "test"))


def test_tasks_that_nobody_has_or_that_would_run_code(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "t.yaml").write_text("task: coded\ncustom_dataset: !function evil.run\n")
    for task, says in (("codde", "evaluate.tasks = 'codde': neither"), ("coded", "evaluate.trust_task_code")):
        with pytest.raises(ParameterError, match=says):
            check_tasks(
                Workspace(tmp_path), check_params({"evaluate": {"task_folder": "mine", "tasks": [task]}}, "test")
            )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project of which stage `check` is the real one, and stage prepare a stand-in that has run."""
    folder = clone_with_stand_in(tmp_path_factory.mktemp("project"))
    yaml = YAML()
    pipeline = yaml.load(folder / "dvc.yaml")
    pipeline["stages"]["check"]["cmd"] = f"{sys.executable} -m fisherfold check"
    yaml.dump(pipeline, folder / "dvc.yaml")
    result = command(folder, "dvc", "repro", "prepare", environment={"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    return folder


def test_names_mean_something_without_a_download(project, monkeypatch, tmp_path):
    monkeypatch.setenv("FISHERFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_inputs(Workspace(project), Params())
    assert list(tmp_path.iterdir()) == []
    wrong = {
        "model": "no/such",
        "corpus": "no such.txt",
        "unseen": "gone.txt",
        "questions": "nothing",
        "prompts": "none",
    }
    for key, value in wrong.items():
        with pytest.raises(InputError, match=key):
            check_inputs(Workspace(project), check_params({"prepare": {key: value}}, "test"))


@pytest.mark.parametrize("driver", ["dvc", pytest.param("fisherfold", marks=pytest.mark.slow)])
def test_a_mistyped_name_costs_no_finished_output(project, driver):
    """`dvc repro` removes the outputs of a stage before it runs."""
    before = (project / "params.yaml").read_text()
    if driver == "dvc":
        (project / "params.yaml").write_text(before.replace("smollm2-135m-instruct", "no/such", 1))
        words = ["dvc", "repro", "prepare"]
    else:
        words = [sys.executable, "-m", "fisherfold", "run", "--until", "prepare", "--set", "prepare.model=no/such"]
    try:
        result = command(project, *words, environment={"HF_HUB_OFFLINE": "1"})
    finally:
        (project / "params.yaml").write_text(before)
    assert result.returncode == (255 if driver == "dvc" else 1), result.stderr
    assert "prepare.model = 'no/such'" in result.stderr
    assert (project / "artifacts/prepare/manifest.json").exists() and (project / "data/prepared").exists()


def test_a_check_that_a_run_has_made_is_not_repeated_by_dvc(project):
    workspace = Workspace(project)
    (project / "artifacts/checked.txt").unlink(missing_ok=True)
    assert "check" in stale_reasons(workspace)
    record_check(workspace)
    assert not {"check", "prepare"} & stale_reasons(workspace).keys()


def test_overrides_through_the_api_let_no_code_from_elsewhere_run(tmp_path):
    workspace, path = Workspace(tmp_path), tmp_path / "params.yaml"
    path.write_text("prepare: {model: mine}\n")
    restrict(workspace, ["prepare.model=other", "ranks.ratio=0.5"])
    with pytest.raises(ParameterError, match=r"evaluate.trust_task_code is on"):
        restrict(workspace, ["evaluate.trust_task_code=true"])
    path.write_text("evaluate: {trust_task_code: true}\n")
    restrict(workspace, ["ranks.ratio=0.5"])
    with pytest.raises(ParameterError, match="may change nothing of block 'evaluate'"):
        restrict(workspace, ["evaluate.task_folder=other"])
