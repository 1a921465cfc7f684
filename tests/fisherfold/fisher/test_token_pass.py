"""The nearest pair of the per-token Fisher from every calibration token, against the dense Fisher of a tiny model in float64."""

import itertools
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from dense_fisher import dense_fisher, van_loan

from fisherfold.fisher.token_pass import part_bounds
from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import forward_hooks, linear_modules
from fisherfold.network.models import load_model
from fisherfold.run import scratch
from fisherfold.run.determinism import STREAMED, placed
from fisherfold.run.errors import ParameterError
from fisherfold.run.files import read_manifest
from fisherfold.run.params import CaptureParams, KroneckerParams, SubspaceParams
from fisherfold.run.store import read_array
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from stages import capture, kronecker, subspace

SEQUENCES, LENGTH = 5, 8
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    workspace = tiny.tiny_workspace(tmp_path_factory.mktemp("passes"), "qwen2", SEQUENCES, LENGTH)
    params = CaptureParams(
        products="float32",
        labels="data",
        gradients="none",
        tokens_per_sequence=LENGTH,
        token_dtype="float32",
        knowledge_questions=0,
    )
    capture.run(workspace, params)
    return workspace


def tokens_of(workspace: Workspace, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x and d [S, T, ...] of one layer in float64 arithmetic."""
    model = load_model(workspace.model, torch.float64)
    seen = {}

    def keep(_: str, x: torch.Tensor, output: torch.Tensor) -> None:
        seen["x"] = x.detach()
        output.register_hook(lambda d: seen.update(d=d))

    with forward_hooks({name: linear_modules(model)[name]}, keep):
        gradient_pass(model, read_sequences(workspace.table("calibration"), tiny.VOCABULARY))
    return seen["x"].double(), seen["d"].double()


def estimated(workspace: Workspace, name: str, **params: object) -> torch.Tensor:
    """A ⊗ B of the stage."""
    options = {"passes": params.pop("passes", 1), "batch_size": params.pop("batch_size", 2)}
    options["layers_per_pass"] = params.pop("layers_per_pass", None)
    kronecker.run(workspace, KroneckerParams(estimator="every_token", token_pass=options, **params))
    factors = workspace.out("kronecker") / "factors"
    return torch.kron(*(read_array(factors, f"{name}/{side}").double() for side in "AB"))


def clipped(x: torch.Tensor, d: torch.Tensor, clip: float | None, trim: int) -> torch.Tensor:
    """G = d xᵀ [N, n, m] of the tokens that count, scaled down to `clip` times the median norm."""
    G = (d[..., None] * x[..., None, :])[:, trim:].flatten(0, 1)
    norms = G.norm(dim=(1, 2))
    limit = clip * norms[norms > 0].median() if clip else torch.inf
    return G * (limit / norms.clamp(min=1e-300)).clamp(max=1)[:, None, None]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("clip", "trim"), [(None, 0), (1.5, 1)])
def test_many_passes_find_the_pair_nearest_to_the_dense_fisher(workspace, name, clip, trim):
    F = dense_fisher(clipped(*tokens_of(workspace, name), clip, trim))
    n, m = linear_modules(load_model(workspace.model, torch.float32))[name].weight.shape
    A, B, sigma = van_loan(F, n, m)
    found = estimated(workspace, name, passes=20, batch_size=SEQUENCES, clip=clip, trim_tokens=trim)
    torch.testing.assert_close(found, sigma * torch.kron(A, B), rtol=2e-3, atol=2e-4 * sigma)


@pytest.mark.parametrize("name", LAYERS)
def test_one_pass_is_one_step_from_the_factors_of_kfac(workspace, name):
    x, d = (side.flatten(0, 1) for side in tokens_of(workspace, name))
    A, B = (M / M.norm() for M in (x.T @ x, d.T @ d))
    inputs = x.T @ (((d @ B) * d).sum(1, keepdim=True) * x) / len(x)
    outputs = d.T @ (((x @ A) * x).sum(1, keepdim=True) * d) / len(x)
    sigma = (inputs.norm() * outputs.norm()).sqrt()
    expected = torch.kron(inputs / inputs.norm(), outputs / outputs.norm()) * sigma
    torch.testing.assert_close(estimated(workspace, name), expected, rtol=1e-3, atol=1e-5 * expected.norm().item())


def test_slices_of_layers_and_sizes_of_batches_change_nothing_but_rounding(workspace):
    whole = estimated(workspace, LAYERS[1])
    sliced = estimated(workspace, LAYERS[1], layers_per_pass=3)
    assert torch.equal(whole, sliced)
    alone = estimated(workspace, LAYERS[1], batch_size=1)
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-6 * whole.norm().item())


def test_with_one_decoder_block_in_memory_the_bits_are_the_same(workspace):
    whole = estimated(workspace, LAYERS[1])
    shutil.rmtree(workspace.artifacts / "kronecker.partial")
    with placed(STREAMED):
        assert torch.equal(estimated(workspace, LAYERS[1]), whole)


def test_a_killed_pass_resumes_with_the_same_bytes(workspace, monkeypatch):
    estimated(workspace, LAYERS[0], passes=2)
    expected = read_manifest(workspace.out("kronecker"))
    shutil.rmtree(workspace.artifacts / "kronecker.partial")
    shutil.rmtree(workspace.out("kronecker"))
    units, write_unit = itertools.count(), scratch.write_unit

    def dying_unit(*arguments):
        if next(units) == 4:
            raise KeyboardInterrupt
        return write_unit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scratch, "write_unit", dying_unit)
        estimated(workspace, LAYERS[0], passes=2)
    estimated(workspace, LAYERS[0], passes=2)
    assert read_manifest(workspace.out("kronecker")) == expected


def test_a_metric_reads_the_factors(workspace):
    estimated(workspace, LAYERS[0], clip=3.0, trim_tokens=1, prior=0.5)
    subspace.run(workspace, SubspaceParams(metric="gfwsvd"))
    assert len(Statistics(workspace.out("capture")).layers) == 14
    assert (workspace.out("subspace") / "spectra.parquet").exists()


def test_parts_hold_whole_batches_and_every_sequence_once():
    for sequences, batch in ((1, 2), (5, 2), (8, 2), (9, 1), (48, 5)):
        bounds = part_bounds(sequences, batch)
        assert [low for low, _ in bounds[1:]] == [high for _, high in bounds[:-1]]
        assert (bounds[0][0], bounds[-1][1]) == (0, sequences)
        assert all(low % batch == 0 and low < high for low, high in bounds)
        assert len(bounds) <= 4


def test_clipping_needs_sampled_tokens(tmp_path: Path):
    workspace = tiny.tiny_workspace(tmp_path, sequences=2)
    capture.run(workspace, CaptureParams(labels="data", gradients="none", tokens_per_sequence=0, knowledge_questions=0))
    with pytest.raises(ParameterError, match=r"capture\.tokens_per_sequence"):
        estimated(workspace, LAYERS[0], clip=3.0)
