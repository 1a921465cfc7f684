"""benchmarks/ablation.py: every arm is what the parameters allow, and another than what is shipped."""

import importlib.util

from project import ROOT

from fisherfold.run.params import load_params
from fisherfold.run.workspace import Workspace
from flows.overrides import overridden


def test_every_arm_changes_the_shipped_parameters(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "benchmarks/ablation.py")
    ablation = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "ablation", ablation)
    spec.loader.exec_module(ablation)
    shipped, *arms = ablation.arms(Workspace(ROOT), ablation.AXES, 0.2, [0])
    found = [overridden(ROOT / "params.yaml", arm.overrides())[1] for arm in arms]
    assert overridden(ROOT / "params.yaml", shipped.overrides())[1] == load_params(ROOT / "params.yaml")
    assert all(params != load_params(ROOT / "params.yaml") for params in found)
    assert len({str(arm) for arm in arms}) == len({params.model_dump_json() for params in found}) == len(arms)
