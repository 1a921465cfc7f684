"""What holds on a CUDA device: the same statistics and decompositions as on a CPU, the same bits again, stages end to end."""

import json
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
import torch
from tiny import as_truncated, random_ids, tiny_model, tiny_workspace

from fisherfold.linalg.gram import add_tokens, exact_products, mirror
from fisherfold.linalg.weighted_svd import metric_root, weighted_svd
from fisherfold.network.layers import find_layers
from fisherfold.network.models import load_model
from fisherfold.run.determinism import describe_machine
from fisherfold.run.params import CaptureParams, FactorizeParams, KroneckerParams, RanksParams, SubspaceParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.shard import loaded_model
from stages import capture, factorize, kronecker, ranks, subspace

CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARDS, reason="this machine has no CUDA device")]

Stage = Callable[[Workspace], None]


def statistics(device: str, form: str = "sketch") -> dict[str, torch.Tensor]:
    model = tiny_model().requires_grad_(False).to(device)
    sums = ModelSums(model, find_layers(model), GRADIENT_FORMS.lookup(form), 4, 0)
    for ids in random_ids(6, 24).split(2):
        sums.add(ids)
    return {name: values.cpu() for name, values in [*sums.arrays(), *sums.take_gradients()]}


@pytest.mark.parametrize("form", ["none", "sums", "exact"])
def test_sums_equal_those_of_the_cpu(form: str) -> None:
    expected, found = statistics("cpu", form), statistics("cuda", form)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name],
            values,
            rtol=1e-4,
            atol=1e-5 * float(values.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_the_same_pass_gives_the_same_bits() -> None:
    first, second = statistics("cuda"), statistics("cuda")
    assert all(torch.equal(values, second[name]) for name, values in first.items())


def test_float32_is_summed_without_tf32_and_bfloat16_is_exact_with_it() -> None:
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).cuda()
    for values, allowed in ((rows, 1e-6), (rows.bfloat16(), 1e-6)):
        oracle = values.double().T @ values.double()
        with exact_products(values):
            found = values.float().T @ values.float()
        assert (found - oracle).abs().max() <= allowed * 8 * oracle.abs().max(), values.dtype
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"  # left as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [192, 700])
def test_grams_of_either_dtype_are_summed_in_float32(dtype: torch.dtype, size: int) -> None:
    rows = torch.randn(2, 300, size, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    total = torch.zeros(size, size, device="cuda")
    add_tokens(total, rows)
    oracle = rows.flatten(0, 1).double().T @ rows.flatten(0, 1).double()
    assert (mirror(total) - oracle).abs().max() <= 1e-5 * oracle.abs().max()


def test_decompositions_equal_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    W, X, D = (torch.randn(*shape, generator=generator).double() for shape in ((48, 96), (300, 96), (300, 48)))
    on = {}
    for device in ("cpu", "cuda"):
        A, B = ((rows.T @ rows / len(rows)).to(device) for rows in (X, D))
        on[device] = weighted_svd(W.to(device), metric_root(A, 0.01), metric_root(B, 0.1))
    torch.testing.assert_close(on["cuda"].sigma.cpu(), on["cpu"].sigma, rtol=1e-10, atol=1e-12)
    for rank in (1, 17, 48):
        cut = [basis.left[:, :rank].cpu() @ basis.right[:rank].cpu() for basis in on.values()]
        torch.testing.assert_close(*cut, rtol=1e-8, atol=1e-8)


def stages_on(
    device: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, last: FactorizeParams | None = None
) -> Workspace:
    """Stages from `capture` to `factorize`, in this process."""
    monkeypatch.setenv("FISHERFOLD_DEVICE", device)
    loaded_model.cache_clear()
    capture.run(
        workspace, CaptureParams(sequences_per_shard=4, gradients="sketch", sketch_rank=4, knowledge_questions=2)
    )
    kronecker.run(workspace, KroneckerParams(dependence_draws=0))
    subspace.run(workspace, SubspaceParams())
    ranks.run(workspace, RanksParams(ratio=0.3))
    factorize.run(workspace, last or as_truncated())
    loaded_model.cache_clear()
    return workspace


def logits(workspace: Workspace) -> torch.Tensor:
    model = load_model(workspace.out("factorize") / "model", torch.float32)
    return model(random_ids(2, 12).to(model.device)).logits.cpu()


def test_stages_on_the_device_give_the_model_of_the_cpu(tmp_path, monkeypatch) -> None:
    made = {device: stages_on(device, tiny_workspace(tmp_path / device), monkeypatch) for device in ("cpu", "cuda")}
    tables = [pq.read_table(each.out("ranks") / "ranks.parquet").select(["module", "rank"]) for each in made.values()]
    assert tables[0] == tables[1]
    torch.testing.assert_close(logits(made["cuda"]), logits(made["cpu"]), rtol=1e-3, atol=1e-4)


def test_training_on_the_device_gives_the_model_of_the_cpu(tmp_path, monkeypatch) -> None:
    training = as_truncated(refine={"passes": 1, "min_steps": 0}, heal={"passes": 1, "rate": 1e-3})
    made = {
        device: stages_on(device, tiny_workspace(tmp_path / device), monkeypatch, training)
        for device in ("cpu", "cuda")
    }
    of_heal = [json.loads((each.out("factorize") / "factorize.json").read_text())["healing"] for each in made.values()]
    assert of_heal[0]["steps"] == of_heal[1]["steps"] > 0
    # some 2e-7 nats of logits that are all but equal, of which float32 rounds 1e-8 away
    assert of_heal[1]["held_out_after"] == pytest.approx(of_heal[0]["held_out_after"], rel=1e-2, abs=1e-8)
    torch.testing.assert_close(logits(made["cuda"]), logits(made["cpu"]), rtol=1e-2, atol=1e-2)


def test_what_was_computed_on_one_device_is_not_gone_on_with_on_another(tmp_path, monkeypatch) -> None:
    """A stage that dies after two units on the device computes all of them again on the CPU."""
    workspace, log = Workspace(tmp_path), tmp_path / "log"
    units = {f"unit-{i}": (str(log), i) for i in range(3)}
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("FISHERFOLD_DEVICE", device)
        with Scratch(workspace, "kronecker", KroneckerParams(threads=1), {}) as scratch:
            scratch.map("computing", note_unit, units)
    monkeypatch.setenv("FISHERFOLD_DEVICE", "cuda")
    assert log.read_text().split() == ["0", "1", "2"] * 2
    assert describe_machine()["device"].startswith("cuda ")


def note_unit(folder, log: str, number: int) -> None:
    with open(log, "a", encoding="utf-8") as file:
        print(number, file=file)
    (folder / "done.json").write_text(json.dumps(number), encoding="utf-8")


@pytest.mark.skipif(CARDS < 2, reason="this machine has no two CUDA devices")
def test_a_model_spread_over_two_devices_gives_the_same_sums(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FISHERFOLD_DEVICE", "auto")
    tiny_model().save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)
    assert len({parameter.device for parameter in model.parameters()}) == 2
    sums = ModelSums(model, find_layers(model), GRADIENT_FORMS.lookup("sketch"), 4, 0)
    for ids in random_ids(6, 24).split(2):
        sums.add(ids)
    expected = statistics("cuda")
    for name, values in sums.arrays():
        torch.testing.assert_close(values.cpu(), expected[name], rtol=1e-4, atol=1e-6)
