"""Run by family_sweep.py in an interpreter of its own: what the checkpoints of many families do there.

Usage: python -I family_checkpoints.py PROJECT FOLDER…. Each folder is a workspace after stage `factorize`. First importing anything of
this project fails, as on a machine without it; then the checkpoints are loaded once more after `import fisherfold.runtime`. Prints one line of
JSON: by folder a list of what is wrong.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

OURS = ("fisherfold", "stages", "flows")
TOLERANCE = 1e-4  # of the logits' deviation


class Forbidden:
    """An import hook for a machine without this project."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Forbidden())
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IDS = torch.arange(3, 21).reshape(2, 9)


def load(folder, own_code):
    options = {"trust_remote_code": True} if own_code else {}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def multiplied_out(folder):
    """The prepared dense model with every low-rank layer's matrix in the place of its weight."""
    dense, compressed = (
        AutoModelForCausalLM.from_pretrained(folder / "prepare/model").eval(),
        load(folder / "factorize/model", True),
    )
    for name in compressed.config.fisherfold["layers"]:
        weight, layer = dense.get_submodule(name).weight, compressed.get_submodule(name)
        rows = isinstance(dense.get_submodule(name), torch.nn.Linear)
        inputs = weight.shape[1] if rows else weight.shape[0]
        matrix = layer(torch.eye(inputs)) - layer(torch.zeros(1, inputs))
        weight.copy_(matrix.T if rows else matrix)
    return dense


def difference(found, expected):
    """The largest, in deviations of the expected logits."""
    return float((found - expected).abs().max() / expected.std())


def written(model, cache):
    """Greedy tokens; the name of the error where a model cannot write so."""
    try:
        return model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0).tolist()
    except Exception as error:
        return type(error).__name__


def trained(model):
    """Loss of a training step and of how many parameters it moves; the name of the error where there is none."""
    torch.manual_seed(0)
    model.train().requires_grad_(True)
    try:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    except Exception as error:
        return type(error).__name__
    reached = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not all(parameter.grad.isfinite().all() for parameter in reached):
        return "a gradient that is not finite"
    torch.optim.SGD(reached, lr=1e-3).step()
    return None if loss.isfinite() else "a loss that is not finite"


def faults(folder, own_code):
    """What one way of loading does wrong."""
    dense = multiplied_out(folder)
    expected, model = logits(dense), load(folder / "factorize/model", own_code)
    found = {
        "first": logits(model),
        "second": logits(load(folder / "factorize/model", own_code)),
        "dense export": logits(AutoModelForCausalLM.from_pretrained(folder / "factorize/dense").eval()),
    }
    saved = folder / f"saved-{own_code}"
    model.save_pretrained(saved)
    found["saved"] = logits(load(saved, own_code))
    for what, values in found.items():
        if not difference(values, expected) <= TOLERANCE:  # nor for nan
            yield f"{what}: logits differ by {difference(values, expected):.1e}"
    for cache in (True, False):
        ours, theirs = written(model, cache), written(dense, cache)
        if ours != theirs and isinstance(theirs, list):
            yield f"generate, use_cache={cache}: {ours} where the dense model gives {theirs}"
    ours, theirs = trained(model), trained(dense)
    if ours and not theirs:
        yield f"training step: {ours} where the dense model has {theirs}"


def explained(folder, own_code):
    way = "trust_remote_code" if own_code else "import fisherfold.runtime"
    try:
        return [f"{way}: {fault}" for fault in faults(folder, own_code)]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = next(iter(str(error).splitlines()), "")
        return [f"{way}: {type(error).__name__}: {line[:300]} ({Path(place.filename).name}:{place.lineno})"]


def main(project, folders):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {folder: explained(Path(folder) / "artifacts", True) for folder in folders}
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Forbidden)]
    sys.path.insert(0, project)
    __import__("fisherfold.runtime")
    for folder in folders:
        found[folder] += explained(Path(folder) / "artifacts", False)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
