"""benchmarks/ablation.py: every arm is what the parameters allow, and another than what is shipped; a draw is compared with its own."""

import pytest
from project import ROOT, benchmark

from fisherfold.run.params import load_params
from fisherfold.run.workspace import Workspace
from flows.overrides import overridden


@pytest.fixture
def ablation(monkeypatch):
    return benchmark("ablation", monkeypatch)


def test_every_arm_changes_the_shipped_parameters(ablation):
    shipped, *arms = ablation.arms(Workspace(ROOT), ablation.AXES, 0.2, [0])
    found = [overridden(ROOT / "params.yaml", arm.overrides())[1] for arm in arms]
    assert overridden(ROOT / "params.yaml", shipped.overrides())[1] == load_params(ROOT / "params.yaml")
    assert all(params != load_params(ROOT / "params.yaml") for params in found)
    assert len({str(arm) for arm in arms}) == len({params.model_dump_json() for params in found}) == len(arms)


def test_each_draw_is_compared_with_what_is_shipped_in_it(ablation):
    def row(seed, times, nats, axis=ablation.SHIPPED, value=""):
        return {"seed": seed, "axis": axis, "value": value, "times_dense": times, "own_answers_kl": nats}

    rows = [row(0, 1.0, 0.2), row(0, 1.1, 0.1, "mix", "x"), row(1, 2.0, None), row(1, 2.2, 0.3, "mix", "x")]
    _, changed = ablation.table(rows)
    assert changed == ["mix", "x", "1.650 ± 0.550", "0.200 ± 0.100", "–", "–", "1.100 ± 0.000", "0.500"]
