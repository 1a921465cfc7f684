"""The registered quantizer: with `import fisherfold.runtime` checkpoints load without remote code, from the wheel alone."""

from pathlib import Path

import pytest
from project import last_line
from tiny import FAMILIES, as_truncated
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace

from stages import factorize

SCRIPT = """
import json, sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
IDS = torch.arange(3, 21).reshape(2, 9)


def load(folder, **options):
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def difference(model, other):
    return model if isinstance(model, str) else float((logits(model) - logits(other)).abs().max())


def check(folder):
    dense = load(folder / "dense")
    remote = load(folder / "model", trust_remote_code=True)
    import fisherfold.runtime

    model = load(folder / "model")
    found = {"file": fisherfold.__file__, "class": type(model).__module__, "difference": difference(model, dense)}
    found["trusted too"] = difference(load(folder / "model", trust_remote_code=True), remote)
    found["bfloat16"] = str(load(folder / "model", dtype=torch.bfloat16).to(torch.float16).dtype)
    found["generates"] = torch.equal(*(m.generate(IDS, max_new_tokens=5, do_sample=False) for m in (model, dense)))
    AutoTokenizer.from_pretrained(folder / "model")
    model.save_pretrained(folder / "saved")
    found["saved"] = difference(load(folder / "saved"), dense)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    found["trains"] = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    found["torn"] = load(folder / "torn")
    found["accelerate"] = difference(load(folder / "model", device_map="auto"), dense)
    return found


def check_without_import(folder):
    return {"refused": load(folder / "model"), "saved, not imported": load(folder / "saved")}


run = {"check": check, "check_without_import": check_without_import}[sys.argv[1]]
found = {folder.name: run(folder) for folder in sorted(Path(sys.argv[2]).iterdir())}
print()  # after a question that transformers asks
print(json.dumps({name: {key: str(value) for key, value in row.items()} for name, row in found.items()}))
"""
CHECKED = ("llama", "gpt2")


def tear(folder: Path, target: Path) -> None:
    """A copy of a checkpoint that lacks one tensor of a low-rank layer."""
    from fisherfold.run.checkpoint import read_tensors, write_tensors

    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = read_tensors(folder)
    lost = next(name for name in sorted(tensors) if name.endswith("down.weight"))
    write_tensors(target, {name: tensor for name, tensor in tensors.items() if name != lost})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, wheel_alone):
    root = tmp_path_factory.mktemp("registered")
    users = root / "users"
    for family in CHECKED:
        assert family in FAMILIES
        workspace = subspace_workspace(root / "work" / family, family)
        publish_ranks(workspace, mixed_ranks(workspace))
        factorize.run(workspace, as_truncated(dense_export=True))
        (users / family).mkdir(parents=True)
        for part in ("model", "dense"):
            workspace.out("factorize").joinpath(part).rename(users / family / part)
        tear(users / family / "model", users / family / "torn")
    found = {}
    for mode in ("check", "check_without_import"):
        words = "-I", "-c", SCRIPT, mode, str(root / "users")
        for family, row in last_line(root, *words, hub=root / "hub", python=wheel_alone / "python").items():
            found[family] = found.get(family, {}) | row
    return found


@pytest.fixture(params=CHECKED)
def found(request, outcomes):
    return outcomes[request.param]


def test_the_library_is_the_wheel_s(found, wheel_alone):
    assert Path(found["file"]).is_relative_to(wheel_alone.parent)


def test_it_is_refused_before_the_import(found):
    assert found["refused"].startswith("RuntimeError")


def test_it_loads_after_the_import_as_the_dense_class(found):
    assert found["class"].startswith("transformers.models.")
    assert float(found["difference"]) < 2e-5
    assert float(found["trusted too"]) < 2e-5
    assert float(found["accelerate"]) < 2e-5


def test_it_is_no_quantized_model_to_users(found):
    """It generates, casts and trains."""
    assert (found["generates"], found["bfloat16"], found["trains"]) == ("True", "torch.float16", "True")


def test_saved_again_it_needs_the_import(found):
    assert float(found["saved"]) < 2e-5
    assert found["saved, not imported"].startswith("RuntimeError")


def test_a_lost_tensor_fails_loudly(found):
    assert found["torn"].startswith("CorruptArtifact: The checkpoint lacks 1 tensors")
