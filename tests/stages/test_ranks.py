import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tiny import as_truncated
from tiny_subspace import subspace_workspace

from fisherfold.allocators.cost import FORMATS
from fisherfold.allocators.limits import Limits
from fisherfold.network.layers import LinearLayer, read_layers
from fisherfold.network.sites import find_sites
from fisherfold.run.errors import CorruptArtifact, NumericalError, ParameterError
from fisherfold.run.files import digest_file
from fisherfold.run.params import RanksParams
from stages import factorize, ranks
from stages.ranks import read_spectra


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return subspace_workspace(tmp_path_factory.mktemp("ranks"))


def run(workspace, **params):
    ranks.run(workspace, RanksParams(**params))
    out = workspace.out("ranks")
    return pq.read_table(out / "ranks.parquet").to_pylist(), json.loads((out / "budget.json").read_text())


@pytest.mark.parametrize("allocator", ["uniform", "fisher"])
@pytest.mark.parametrize("storage", FORMATS)
def test_rows_and_budget(workspace, allocator, storage):
    rows, budget = run(workspace, ratio=0.4, allocator=allocator, storage=storage)
    layers = read_layers(workspace.out("ranks"))
    assert [row["module"] for row in rows] == [layer.name for layer in layers]
    assert budget["targeted_parameters_dense"] == sum(row["dense_parameters"] for row in rows)
    assert budget["budget"] == int(0.6 * budget["targeted_parameters_dense"])
    assert budget["stored_parameters"] == sum(row["stored_parameters"] for row in rows) <= budget["budget"]
    assert {row["storage"] for row in rows} <= {"dense", "factors"} | {storage}
    assert {(row["method"], row["allocator"]) for row in rows} == {("svd", allocator)}
    for row in rows:
        assert (row["storage"] == "dense") == (row["stored_parameters"] == row["dense_parameters"])


def test_predicted_loss_is_half_the_dropped_energy(workspace):
    rows, budget = run(workspace, ratio=0.5)
    table = pq.read_table(workspace.out("subspace") / "spectra.parquet").to_pandas()
    dropped = [table[table.module == row["module"]].sigma.to_numpy()[row["rank"] :] for row in rows]
    assert budget["predicted_loss_increase"] == pytest.approx(0.5 * sum(np.sum(sigma**2) for sigma in dropped))


def test_fisher_predicts_no_more_loss_than_uniform(workspace):
    losses = {
        name: run(workspace, ratio=0.5, allocator=name)[1]["predicted_loss_increase"] for name in ("uniform", "fisher")
    }
    assert losses["fisher"] <= losses["uniform"]


def test_the_same_parameters_give_the_same_bytes(workspace):
    run(workspace, ratio=0.3)
    first = {path.name: digest_file(path) for path in workspace.out("ranks").iterdir()}
    run(workspace, ratio=0.31)
    run(workspace, ratio=0.3)
    assert {path.name: digest_file(path) for path in workspace.out("ranks").iterdir()} == first


def test_excluded_modules_and_modules_without_a_basis_stay_dense(tmp_path):
    blind = "model.layers.1.mlp.up_proj"
    workspace = subspace_workspace(tmp_path, dense={blind: "its input metric is zero"})
    rows, _ = run(workspace, ratio=0.3, exclude=["*.v_proj"])
    dense = {row["module"] for row in rows if row["storage"] == "dense"}
    assert {blind, "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"} <= dense


def test_rank_0_is_allowed_and_said(workspace, capsys):
    rows, _ = run(workspace, ratio=0.99)
    dropped = [row["module"] for row in rows if row["rank"] == 0]
    assert dropped
    said = " ".join(capsys.readouterr().err.split())
    assert "rank 0" in said
    assert dropped[0] in said


@pytest.mark.parametrize("storage", FORMATS)
def test_a_budget_of_the_models_bytes(workspace, storage):
    """What factorize counts of the whole model is within the budget, by less than a rank of a layer."""
    rows, budget = run(workspace, ratio=0.2, budget="model_bytes", storage=storage)
    factorize.run(workspace, as_truncated())
    facts = json.loads((workspace.out("factorize") / "factorize.json").read_text())
    allowed = 0.8 * facts["model_bytes_dense"]
    step = max(4 * (row["n"] + row["m"]) for row in rows)
    assert allowed - step < facts["model_bytes_compressed"] <= allowed
    assert budget["unit"] == "model_bytes"
    assert budget["spent"] <= budget["budget"]
    with pytest.raises(ParameterError, match=r"bytes of the whole model, but the smallest possible allocation needs"):
        run(workspace, ratio=0.9, budget="model_bytes")


def test_layers_that_share_a_right_factor_have_one_rank(tmp_path):
    workspace = subspace_workspace(tmp_path, shared=True)
    rows, budget = run(workspace, ratio=0.4)
    by_name = {row["module"]: row for row in rows}
    assert list(by_name) == [layer.name for layer in read_layers(workspace.out("ranks"))]
    for row in rows:
        assert row["rank"] == by_name[row["site"]]["rank"] or row["storage"] == "dense"
    assert len({row["site"] for row in rows}) == 8  # two blocks of qkv, o, gate and up, down
    assert sum(row["stored_parameters"] for row in rows) == budget["stored_parameters"] <= budget["budget"]
    rows, _ = run(workspace, ratio=0.3, exclude=["*.v_proj"])
    assert {row["storage"] for row in rows if "self_attn" in row["module"] and "o_proj" not in row["module"]} == {
        "dense"
    }


def test_the_method_of_a_site_is_told(tmp_path):
    workspace = subspace_workspace(tmp_path, shared=True)
    facts = workspace.out("subspace") / "subspace.json"
    text = facts.read_text().replace(
        '"shared": true', '"shared": true, "methods": {"model.layers.1.mlp.gate_proj": "fasc"}'
    )
    facts.unlink()
    facts.write_text(text)
    manifest = workspace.out("subspace") / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"]["subspace.json"]["bytes"] = len(text)
    manifest.unlink()
    manifest.write_text(json.dumps(listed))
    methods = {row["module"]: row["method"] for row in run(workspace, ratio=0.4)[0]}
    assert {name for name, method in methods.items() if method == "fasc"} == {
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_ratios_that_cannot_be_met(workspace):
    with pytest.raises(ParameterError, match="smallest possible"):
        run(workspace, ratio=0.5, floor=0.9)
    with pytest.raises(ParameterError, match="met already"):
        run(workspace, ratio=0.1, ceiling=0.3)
    with pytest.raises(ValidationError):
        RanksParams(ratio=1.0)


def test_unknown_names_are_explained(workspace):
    with pytest.raises(ParameterError, match=r"ranks\.allocator = 'fischer' is unknown\. Did you mean 'fisher'"):
        run(workspace, allocator="fischer")
    with pytest.raises(ParameterError, match=r"'\*\.value_proj' matches none"):
        run(workspace, exclude=["*.value_proj"])


SITES = find_sites([LinearLayer(name, 3, 2, False, False, name) for name in ("a.1", "a.2")], shared=False)


def spectra_table(path, sigmas):
    rows = [{"module": name, "component": i, "sigma": s} for name, sigma in sigmas.items() for i, s in enumerate(sigma)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_spectra_that_are_not_finite_or_not_whole(tmp_path):
    path = tmp_path / "spectra.parquet"
    assert [s.tolist() for s in read_spectra(spectra_table(path, {"a.1": [2.0, 1.0], "a.2": [4.0, 3.0]}), SITES)] == [
        [2, 1],
        [4, 3],
    ]
    with pytest.raises(NumericalError, match=r"module 'a\.2': component 1 of its spectrum is nan"):
        read_spectra(spectra_table(path, {"a.1": [2.0, 1.0], "a.2": [4.0, float("nan")]}), SITES)
    with pytest.raises(CorruptArtifact, match=r"module 'a\.2': expected components 0 … 1, found 0 rows"):
        read_spectra(spectra_table(path, {"a.1": [2.0, 1.0]}), SITES)
    path.write_bytes(b"not parquet")
    with pytest.raises(CorruptArtifact, match="not readable"):
        read_spectra(path, SITES)


def test_patterns_select_sites():
    assert [Limits(exclude=["a.2"]).allowed(site).tolist() for site in SITES] == [[True] * 3, [False, False, True]]
    assert [Limits(exclude=["a.*"]).allowed(site).tolist() for site in SITES] == [[False, False, True]] * 2


def test_a_missing_table_is_named(tmp_path):
    workspace = subspace_workspace(tmp_path)
    workspace.table("tuning").unlink()
    with pytest.raises(CorruptArtifact, match=r"tuning\.parquet is missing"):
        run(workspace)
