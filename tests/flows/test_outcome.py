"""What a run ends with, what is remembered of it, and how two runs are compared."""

import json

import pytest

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import STAGES, Params, check_params
from fisherfold.run.progress import millions
from fisherfold.run.times import note_speed
from fisherfold.run.workspace import Workspace
from flows import cli
from flows.compare import compare, print_comparison
from flows.history import find_run, last_two, read_runs
from flows.outcome import WIDTH, in_bytes, less, more, tell_outcome

METRICS = {
    "dense": {"perplexity": 20.0, "knowledge_accuracy": 0.5},
    "compressed": {"perplexity": 21.0, "knowledge_accuracy": 0.49, "kl_to_dense": 0.1, "own_answers_kl": 0.12},
    "size": {
        "targeted_parameters_dense": 100_000_000,
        "targeted_parameters_compressed": 80_000_000,
        "model_bytes_dense": 538_000_000,
        "model_bytes_compressed": 458_000_000,
    },
}
DAMAGED = METRICS | {"compressed": METRICS["compressed"] | {"perplexity": 60.0, "own_answers_kl": 2.0}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    return Workspace(tmp_path)


def finish(project: Workspace, metrics: dict, stages=STAGES, **ranks) -> None:
    """What a run leaves and tells."""
    project.out("evaluate").mkdir(parents=True, exist_ok=True)
    (project.out("evaluate") / "metrics.json").write_text(json.dumps(metrics))
    tell_outcome(project, check_params({"ranks": ranks}, "test"), stages, 540)


def test_a_run_ends_with_figures_a_verdict_places_and_what_to_do_next(project, capsys):
    finish(project, METRICS, ratio=0.2)
    told = capsys.readouterr().out
    for text in (
        "perplexity   20 → 21 (1.05 times)",
        "own answers  0.120 nats",
        "knowledge    50.0 % → 49.0 %",
        "size         538 MB → 458 MB (14.9 % less)",
        "layers       100 M → 80 M (20.0 % less)",
        "took         9 min",
        "model        artifacts/factorize/model",
        "report       artifacts/report/index.html",
        "Verdict: close.",
        "fisherfold chat",
        "transformers serve artifacts/factorize/model --trust-remote-code",
        "fisherfold run --set ranks.ratio=0.3",
    ):
        assert text in told
    assert max(map(len, told.splitlines())) <= WIDTH


def test_how_fast_the_models_are_is_told_remembered_and_compared(project, capsys):
    finish(project, METRICS, ratio=0.2)  # was not measured
    assert "tokens a second" not in capsys.readouterr().out
    (project.out("factorize")).mkdir(parents=True)
    (project.out("factorize") / "manifest.json").write_text('{"files": {}}')
    note_speed(
        project, {"reading": {"dense": 800.0, "compressed": 1000.0}, "answering": {"dense": 20.0, "compressed": 22.0}}
    )
    finish(project, DAMAGED, ratio=0.4)
    told = capsys.readouterr().out
    assert "reads        800 → 1000 tokens a second (1.25 times)" in told
    assert "answers      20 → 22 tokens a second (1.10 times)" in told
    assert compare(*read_runs(project))["measures"]["answers, tokens a second"] == [None, 22.0]


def test_what_an_engine_s_format_cost_is_told(project, capsys):
    project.out("ranks").mkdir(parents=True)
    budget = {"format": {"storage": "pivoted", "round_to": 32, "price": 0.123}}
    (project.out("ranks") / "budget.json").write_text(json.dumps(budget))
    finish(project, METRICS)
    assert "format       pivoted in multiples of 32: predicted loss +12.3%" in capsys.readouterr().out


def test_of_a_damaged_model_less_is_to_be_removed(project, capsys):
    finish(project, DAMAGED, ratio=0.2)
    told = capsys.readouterr().out
    assert "Verdict: damaged." in told and "fisherfold run --set ranks.ratio=0.1\n" in told


def test_a_run_that_stopped_before_stage_evaluate_tells_nothing_of_an_earlier_one(project, capsys):
    finish(project, METRICS, STAGES[:6])
    told = capsys.readouterr().out
    assert "perplexity" not in told and "Verdict" not in told and "artifacts/factorize/model" in told
    assert read_runs(project) == []


def test_lines_that_tell_of_no_run_are_passed_over(tmp_path):
    (tmp_path / "params.yaml").write_text("")
    workspace = Workspace(tmp_path)
    workspace.artifacts.mkdir()
    lines = (b"[1]", b"null", b'{"run": 1}', b'{"run": 2, "metrics": {}}', b"\xff", b'{"run": 3')
    (workspace.artifacts / "runs.jsonl").write_bytes(b"\n".join(lines))
    assert [run["run"] for run in read_runs(workspace)] == [2]


@pytest.mark.parametrize(("ratio", "lower", "higher"), [(0.2, 0.1, 0.3), (0.01, 0.01, 0.11), (0.95, 0.47, 0.97)])
def test_the_next_ratio_is_one_that_can_be(ratio, lower, higher):
    assert (less(ratio), more(ratio)) == (lower, higher)
    assert Params.model_validate({"ranks": {"ratio": lower}}) and Params.model_validate({"ranks": {"ratio": higher}})


def test_sizes_in_words():
    assert [in_bytes(number) for number in (12, 5_380_000, 13.5e9)] == ["12 bytes", "5.38 MB", "13.5 GB"]
    assert [millions(number) for number in (106_500_000, 6.7e9)] == ["106.5 M", "6.7 B"]


def test_two_runs_are_compared_by_what_differs(project, capsys):
    finish(project, METRICS, ratio=0.2)
    finish(project, METRICS, ratio=0.2)  # the same again is no other run
    finish(project, DAMAGED, ratio=0.4)
    assert [run["run"] for run in read_runs(project)] == [1, 2]
    assert capsys.readouterr().out.count("fisherfold compare") == 1  # there was nothing to compare the first with
    assert cli.main(["compare", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == {"ranks.ratio": [0.2, 0.4]}
    assert found["measures"]["perplexity"] == [21.0, 60.0] and found["verdicts"] == ["close", "damaged"]
    assert "empty answers" not in found["measures"]
    print_comparison(found)
    table = capsys.readouterr().out
    assert "run 1" in table and max(map(len, table.splitlines())) <= WIDTH


def test_a_run_is_a_number_a_file_or_a_folder(project, tmp_path, capsys):
    finish(project, METRICS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "metrics.json").write_text(json.dumps(DAMAGED))
    names = "1", "elsewhere", "elsewhere/metrics.json", "."
    runs = [find_run(project, name) for name in names]
    assert [run["metrics"]["compressed"]["perplexity"] for run in runs] == [21.0, 60.0, 60.0, 21.0]
    assert compare(runs[0], runs[1])["parameters"] == {}  # those of a mere file are not known
    (tmp_path / "elsewhere" / "metrics.json").write_text("[]")
    for name, says in (("elsewhere", "is no metrics.json"), ("7", "is no run here \\(1\\)")):
        with pytest.raises(ParameterError, match=says):
            find_run(project, name)
    with pytest.raises(ParameterError, match="not two runs"):
        last_two(project)
    assert cli.main(["compare", "1"]) == 2
    assert "Name two runs" in capsys.readouterr().err


def test_a_line_that_a_kill_has_cut_is_no_run(project):
    finish(project, METRICS)
    with (project.artifacts / "runs.jsonl").open("a") as file:
        file.write('{"run": 2, "met\n')
    finish(project, DAMAGED)
    assert [run["run"] for run in read_runs(project)] == [1, 2]
