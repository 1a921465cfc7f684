"""Metric `fasc` of stage `subspace`, on a capture of which everything is known."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_capture
import torch
from tiny import as_truncated, random_ids, tiny_workspace
from tiny_capture import LAYERS, TinyCapture, input_gradients
from tiny_subspace import FACTS
from transformers import AutoModelForCausalLM

from fisherfold.network.layers import by_group
from fisherfold.run.errors import InputError, NumericalError, ParameterError
from fisherfold.run.files import MANIFEST, describe_files
from fisherfold.run.params import (
    CaptureParams,
    FascParams,
    KroneckerParams,
    RanksParams,
    SubspaceParams,
)
from fisherfold.run.store import array_names, read_array
from fisherfold.statistics.dependence import DEPENDENCE, TABLE
from fisherfold.statistics.input_gradients import Moments, input_gradient_shards, input_moments
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.fasc import OBJECTIVES, group_input
from fisherfold.subspaces.metrics import MetricSources
from fisherfold.subspaces.projectors import Empirical, Gaussian
from stages import capture, factorize, kronecker, ranks, subspace

GROUPS = by_group(LAYERS)


def make(folder: Path, tokens_kept: int = 7) -> TinyCapture:
    tiny = tiny_capture.random_tokens(folder)
    tiny_capture.publish(tiny, tokens_kept=tokens_kept)
    kronecker.run(tiny.workspace, KroneckerParams())
    return tiny


def run(tiny: TinyCapture, input_damping: float = 0.0, output_damping: float = 0.0, **fasc: object) -> Path:
    params = SubspaceParams(
        metric="fasc", input_damping=input_damping, output_damping=output_damping, fasc=FascParams(**fasc)
    )
    subspace.run(tiny.workspace, params)
    return tiny.workspace.out("subspace")


def spectra(out: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in pq.read_table(out / "spectra.parquet").to_pylist():
        found.setdefault(row["module"], []).append(row["sigma"])
    return found


def factors(out: Path, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    lefts = [read_array(out / "bases", f"{layer.name}/left") for layer in GROUPS[group]]
    return torch.cat(lefts).double(), read_array(out / "bases", f"{group}/right").double()


def tokens(tiny: TinyCapture, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tiny.inputs[group].flatten(0, 1), input_gradients(tiny, group).flatten(0, 1)


def test_tokens_give_the_gradient_of_the_shared_input(tmp_path):
    tiny = make(tmp_path)
    statistics = Statistics(tiny.workspace.out("capture"))
    for name, group in GROUPS.items():
        x, g = tokens(tiny, name)
        shards = list(input_gradient_shards(statistics, tiny.workspace.model, group))
        torch.testing.assert_close(torch.cat([x for x, _ in shards]).flatten(0, 1), x)
        torch.testing.assert_close(torch.cat([g for _, g in shards]).flatten(0, 1), g, rtol=1e-4, atol=1e-7)
        moments = input_moments(statistics, tiny.workspace.model, group)
        torch.testing.assert_close(moments.xg, x.T @ g / len(x), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(moments.gg, g.T @ g / len(x), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("projector", ["orthonormal", "oblique"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_right_factor_is_shared_and_losses_are_predicted(tmp_path, objective, projector):
    """gᵀ(I − P)x = Σ_c d_cᵀ (W_c x − left_c right x): what the factors lose is what the spectrum says, at every rank."""
    tiny = make(tmp_path)
    out = run(tiny, objective=objective, projector=projector)
    facts = json.loads((out / "subspace.json").read_text())
    assert facts["shared"] and facts["methods"] == dict.fromkeys(GROUPS, "fasc")
    expected = {f"{layer.name}/left" for layer in LAYERS} | {f"{name}/right" for name in GROUPS}
    assert set(array_names(out / "bases")) == expected
    for name, sigma in spectra(out).items():
        (left, right), W = factors(out, name), torch.cat([tiny.weights[layer.name] for layer in GROUPS[name]])
        assert len(sigma) == len(right) == min(W.shape)
        x, g = tokens(tiny, name)
        kind = Empirical(lambda x=x, g=g: iter([(x, g)])) if objective == "empirical" else Gaussian(_moments(x, g))
        d = torch.cat([tiny.gradients[layer.name].flatten(0, 1) for layer in GROUPS[name]], 1)
        lost = [_loss(kind, W, left[:, :k] @ right[:k], x, d) for k in range(len(sigma) + 1)]
        best = torch.tensor(lost).cummin(0).values
        tail = torch.tensor(sigma).square().flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(tail, best[:-1] - best[-1], rtol=1e-3, atol=1e-4 * best[0].item())


def _moments(x: torch.Tensor, g: torch.Tensor) -> Moments:
    return Moments(x.T @ x / len(x), x.T @ g / len(x), g.T @ g / len(x))


def _loss(kind: object, W: torch.Tensor, product: torch.Tensor, x: torch.Tensor, d: torch.Tensor) -> float:
    """f of the error E = W − product [n, m] of stacked layers: with (d, x) in the place of (g, x) and E in that of M."""
    E = W - product
    if isinstance(kind, Empirical):
        return ((x @ E.T) * d).sum(1).square().mean().item()
    xd, xx, dd = x.T @ d / len(x), x.T @ x / len(x), d.T @ d / len(x)
    crossed = E @ xd
    return (crossed.trace() ** 2 + (E @ xx @ E.T @ dd).trace() + (crossed @ crossed).trace()).item()


def test_the_best_objective_is_found_by_its_own_name(tmp_path):
    """At the rank that was asked for, gaussian's loss is least by gaussian's measure and empirical's by the tokens'."""
    tiny, found = make(tmp_path), {}
    for objective in OBJECTIVES:
        out = run(tiny, objective=objective, projector="oblique", steps=30)
        left, right = factors(out, "block.q")
        x, _ = tokens(tiny, "block.q")
        d = torch.cat([tiny.gradients[layer.name].flatten(0, 1) for layer in GROUPS["block.q"]], 1)
        W = torch.cat([tiny.weights[layer.name] for layer in GROUPS["block.q"]])
        product = left[:, :3] @ right[:3]
        found[objective] = [_loss(kind, W, product, x, d) for kind in (Empirical(None), None)]
    assert min(found, key=lambda name: found[name][0]) == "empirical"
    assert min(found, key=lambda name: found[name][1]) == "gaussian"


def publish_rho(tiny: TinyCapture, rho: dict[str, float]) -> None:
    out = tiny.workspace.out("kronecker")
    rows = [{"module": name, "rho_kfac": value} for name, value in rho.items()]
    pq.write_table(pa.Table.from_pylist(rows, DEPENDENCE), out / TABLE)
    republish(out)


def republish(out: Path) -> None:
    """Bring the manifest up to date with what was changed by hand."""
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).unlink()
    (out / MANIFEST).write_text(json.dumps(manifest | {"files": describe_files(out)}))


def test_a_threshold_chooses_for_every_input(tmp_path):
    tiny = make(tmp_path)
    publish_rho(tiny, {"block.q": 0.5, "block.up": 0.1, "block.down": 0.3})
    out = run(tiny, threshold=0.3)
    methods = json.loads((out / "subspace.json").read_text())["methods"]
    assert methods == {"block.q": "fasc", "block.up": "variance", "block.down": "variance"}
    x, _ = tokens(tiny, "block.up")
    right = factors(out, "block.up")[1]
    torch.testing.assert_close(right @ right.T, torch.eye(5).double(), rtol=0, atol=1e-5)
    variances = (x @ right.T).square().mean(0)
    torch.testing.assert_close(variances, torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0), rtol=1e-4, atol=0)


def test_what_is_missing_is_named(tmp_path):
    tiny = make(tmp_path, tokens_kept=0)
    with pytest.raises(ParameterError, match=r"threshold needs ρ.*tokens_per_sequence"):
        run(tiny, threshold=0.3)
    with pytest.raises(InputError, match=r"capture\.tokens_per_sequence is 0"):
        run(tiny, objective="empirical")
    with pytest.raises(
        ParameterError, match=r"subspace\.fasc\.objective = 'gausian' is unknown. Did you mean 'gaussian'"
    ):
        run(tiny, objective="gausian")
    tiny_capture.publish(tiny, form="none")
    kronecker.run(tiny.workspace, KroneckerParams())
    with pytest.raises(InputError, match=r"capture\.gradients"):
        run(tiny)


def test_an_input_that_is_always_zero_stays_dense(tmp_path):
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny.inputs["block.up"].zero_()
    tiny_capture.publish(tiny, tokens_kept=7)
    kronecker.run(tiny.workspace, KroneckerParams())
    for objective in OBJECTIVES:
        out = run(tiny, objective=objective)
        facts = json.loads((out / "subspace.json").read_text())
        assert facts["dense"] == {"block.up": "its input is zero at every calibration token"}
        assert set(spectra(out)) == {"block.q", "block.down"}


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny.weights["block.down"][0, 0] = torch.inf
    tiny_capture.publish(tiny)
    kronecker.run(tiny.workspace, KroneckerParams())
    with pytest.raises(NumericalError, match=r"'block\.down': S_\w+ holds values that are not finite"):
        run(tiny)


def test_damping_is_that_of_kfac(tmp_path):
    """S_xx and Wᵀ B W of the damped metrics that kfac uses, over several layers the sum of theirs beside the cross terms."""
    tiny = make(tmp_path)
    params = SubspaceParams(metric="fasc", input_damping=0.2, output_damping=0.3)
    sources = MetricSources(Statistics(tiny.workspace.out("capture")), tiny.workspace.out("kronecker"), params)
    for name, group in GROUPS.items():
        x, g = tokens(tiny, name)
        moments = group_input(sources, tiny.workspace.model, group).moments
        A = x.T @ x / len(x)
        torch.testing.assert_close(
            moments.xx, 0.8 * A + 0.2 * A.diagonal().mean() * torch.eye(len(A)), rtol=1e-4, atol=1e-6
        )
        added = 0.0
        for layer in group:
            W, d = tiny.weights[layer.name], tiny.gradients[layer.name]
            added = added + 0.3 * d.square().mean() * W.T @ W
        torch.testing.assert_close(moments.gg, 0.7 * g.T @ g / len(x) + added, rtol=1e-4, atol=1e-8)


def test_shared_projectors_become_a_model(tmp_path):
    """The whole way to a checkpoint; full rank of every input gives the dense model back."""
    workspace = tiny_workspace(tmp_path, sequences=4)
    (workspace.out("prepare") / "prepare.json").write_text(json.dumps({"model": FACTS}))
    republish(workspace.out("prepare"))
    capture.run(workspace, CaptureParams(gradients="sums", sketch_rank=2, knowledge_questions=0))
    kronecker.run(workspace, KroneckerParams())
    subspace.run(workspace, SubspaceParams(metric="fasc", fasc=FascParams(threshold=0.2)))
    ranks.run(workspace, RanksParams(ratio=0.3))
    factorize.run(workspace, as_truncated())
    methods = json.loads((workspace.out("subspace") / "subspace.json").read_text())["methods"]
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    assert {row["site"]: row["method"] for row in rows} == methods
    assert sum(row["stored_parameters"] for row in rows) <= 0.7 * sum(row["dense_parameters"] for row in rows)
    assert any(row["site"] != row["module"] and row["storage"] != "dense" for row in rows)
    model = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "model", trust_remote_code=True)
    assert model(random_ids(1, 6)).logits.isfinite().all()
