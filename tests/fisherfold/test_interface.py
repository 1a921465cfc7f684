"""The interface in Python gives what the stages give, and what float64 says."""

import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file

from fisherfold import Compression, compress
from fisherfold.run.errors import InputError, ParameterError
from fisherfold.run.params import check_params
from fisherfold.run.store import read_array
from fisherfold.run.workspace import STAGES, Workspace
from stages import capture, factorize, kronecker, prepare, ranks, subspace

MODULES = (prepare, capture, kronecker, subspace, ranks, factorize)
SMALL = {"sequence_length": 16, "calibration_sequences": 8}
LAYER = "model.layers.0.mlp.down_proj"


def texts(count: int = 24) -> list[str]:
    """Documents of the tiny tokenizer's words."""
    generator = random.Random(0)
    return [" ".join(f"w{generator.randrange(3, tiny.VOCABULARY)}" for _ in range(40)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("model") / "tiny-model")


@pytest.fixture(scope="module")
def work(folder: Path) -> Compression:
    work = Compression(folder, texts(), **SMALL)
    work.capture(gradients="exact")
    return work


@pytest.fixture(scope="module")
def staged(work: Compression, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The stages themselves, one after the other, on the same sequences."""
    workspace = Workspace(tmp_path_factory.mktemp("staged"))
    params = work.params.model_dump() | {"kronecker": {"estimator": "sequence"}, "ranks": {"ratio": 0.4}}
    params["subspace"]["metric"] = "gfwsvd"
    blocks = check_params(params, source="test")
    for module, stage in zip(MODULES, STAGES, strict=False):
        module.run(workspace, getattr(blocks, stage))
    return workspace


def test_one_layer_has_the_factors_and_the_basis_of_the_stages(work: Compression, staged: Workspace) -> None:
    pair = work.estimate(LAYER, estimator="sequence")
    factors = staged.out("kronecker") / "factors"
    assert torch.equal(pair.A.float(), read_array(factors, f"{LAYER}/A"))
    assert torch.equal(pair.B.float(), read_array(factors, f"{LAYER}/B"))
    basis = work.decompose(LAYER, metric="gfwsvd")
    assert torch.equal(basis.left, read_array(staged.out("subspace") / "bases", f"{LAYER}/left"))
    assert torch.equal(basis.right, read_array(staged.out("subspace") / "bases", f"{LAYER}/right"))


def test_the_whole_has_the_ranks_and_the_weights_of_the_stages(
    work: Compression, staged: Workspace, tmp_path: Path
) -> None:
    work.estimate(LAYER, estimator="sequence")
    work.decompose(LAYER, metric="gfwsvd")
    table = work.allocate(ratio=0.4)
    assert table.equals(pq.read_table(staged.out("ranks") / "ranks.parquet"))
    saved = work.save(tmp_path / "small")
    wanted = load_file(staged.out("factorize") / "model" / "model.safetensors")
    found = load_file(saved / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(InputError, match="not empty"):
        work.save(saved)


def test_a_basis_is_the_best_under_its_metric(work: Compression) -> None:
    """‖ΔW R‖² with R Rᵀ = E[x xᵀ] equals the tail of σ² at every rank; a plain SVD loses no less."""
    layer = next(each for each in work.layers if each.name == LAYER)
    basis = work.decompose(layer, metric="svd_llm", input_damping=0.0)
    weight = load_file(work.workspace.model / "model.safetensors")[f"{LAYER}.weight"].double()
    gram = work.capture().input_covariance(layer).double()
    U, sigma, Vh = torch.linalg.svd(weight)

    def loss(product: torch.Tensor) -> float:
        error = weight - product
        return torch.trace(error @ gram @ error.T).item()

    for rank in (0, 3, 9):
        tail = basis.sigma[rank:].square().sum().item()
        assert loss(basis.truncated(rank).double()) == pytest.approx(tail, rel=1e-4)
        assert loss((U[:, :rank] * sigma[:rank]) @ Vh[:rank]) >= tail * (1 - 1e-6)


def test_finished_stages_are_not_computed_again(work: Compression) -> None:
    work.allocate(ratio=0.4)
    before = {stage: work.workspace.out(stage).stat().st_ino for stage in ("capture", "subspace", "ranks")}
    work.allocate(ratio=0.5)
    after = {stage: work.workspace.out(stage).stat().st_ino for stage in before}
    assert {stage for stage in before if before[stage] != after[stage]} == {"ranks"}


def test_a_model_in_memory_is_compressed_and_left_as_it_was() -> None:
    dense = tiny.tiny_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    blocks = {"prepare": SMALL, "subspace": {"metric": "svd_llm"}, "ranks": {"storage": "factors"}}
    small = compress(dense, texts(), 0.5, tokenizer=tiny.tiny_tokenizer(), **blocks)
    ids = tiny.random_ids(2, 8)
    assert small(ids).logits.shape == dense(ids).logits.shape
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_wrong_use_is_explained(work: Compression, folder: Path) -> None:
    with pytest.raises(InputError, match="no layer that is compressed"):
        work.estimate("model.layers.9.mlp.down_proj")
    with pytest.raises(ParameterError, match=r"did you mean 'sequence_length'"):
        Compression(folder, texts(), sequence_lenght=8)
    with pytest.raises(ParameterError, match="use `allocate`"):
        work.estimate(LAYER, estimator="every_token")
    work.estimate(LAYER, estimator="kfac")
    with pytest.raises(InputError, match="tokenizer"):
        compress(tiny.tiny_model(), texts())


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = "import fisherfold, sys; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
