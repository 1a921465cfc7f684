"""Stage `evaluate` with one decoder block of either model in memory: the very output of whole models."""

import json
import shutil

import pytest
from tiny import as_truncated, tiny_workspace
from tiny_subspace import mixed_ranks, publish_ranks, publish_subspace

from fisherfold.evaluation.model_run import forget_models
from fisherfold.network.layers import read_layers
from fisherfold.network.streamed_model import is_stand_in
from fisherfold.run.determinism import STREAMED, placed
from fisherfold.run.params import EvaluateParams
from fisherfold.run.times import speed
from fisherfold.run.workspace import Workspace
from stages import evaluate, factorize


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    """After stage `factorize`, with every kind of layer."""
    workspace = tiny_workspace(tmp_path_factory.mktemp("w"), sequences=9)
    publish_subspace(workspace, read_layers(workspace.out("prepare")), {}, False, "svd")
    publish_ranks(workspace, mixed_ranks(workspace))
    factorize.run(workspace, as_truncated())
    return workspace


def evaluated(workspace: Workspace, root) -> dict[str, bytes]:
    shutil.copytree(workspace.root, root)
    evaluate.run(Workspace(root), EvaluateParams(batch_size=2, answer_tokens=6))
    return {path.name: path.read_bytes() for path in Workspace(root).out("evaluate").iterdir()}


def test_the_output_is_that_of_whole_models(workspace, tmp_path, monkeypatch):
    whole = evaluated(workspace, tmp_path / "whole")
    assert speed(Workspace(tmp_path / "whole"))
    loaded, forget = [], forget_models
    monkeypatch.setattr(evaluate, "forget_models", lambda: (loaded.extend(models()), forget()))
    with placed(STREAMED):
        streamed = evaluated(workspace, tmp_path / "streamed")
    assert streamed == whole and json.loads(whole["metrics.json"])["compressed"]["kl_to_dense"] > 0
    assert speed(Workspace(tmp_path / "streamed")) is None
    assert len(loaded) == 2
    for model in loaded:
        absent = [name for name, weight in model.named_parameters() if is_stand_in(weight)]
        assert len(absent) > 10 and {name for name, _ in model.named_parameters()} - {*absent} == {"model.norm.weight"}


def models() -> list:
    """What stays loaded."""
    from fisherfold.network.models import StaysLoaded

    return [kept.model for kept in StaysLoaded._places.values()]
