"""benchmarks/quality.py: draws of another seed from a project's prepared model, and what their truncated networks lose."""

from project import benchmark
from tiny_project import set_params, tiny_project

from fisherfold.run.params import load_params
from fisherfold.run.workspace import Workspace
from stages import prepare


def test_a_draw_is_captured_and_measured(tmp_path, monkeypatch, capsys):
    quality = benchmark("quality", monkeypatch)
    project = tiny_project(tmp_path / "project")
    set_params(project, {"kronecker": {"estimator": "kfac"}})
    params = load_params(project / "params.yaml")
    prepare.run(Workspace(project), params.prepare)
    found = quality.measure_draws(project, str(tmp_path), params, [("kfac", "uniform")], [0.2], [1])
    assert 0.5 < found["kfac", "uniform", 0.2, 1] < 2 and found["kfac", "uniform", 0.2, 1] != 1
    assert "uniform" in capsys.readouterr().out
