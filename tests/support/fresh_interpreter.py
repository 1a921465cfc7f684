"""Run by test_checkpoint.py in an interpreter of its own, where importing anything of this project fails.

Usage: python -I fresh_interpreter.py FOLDER. FOLDER holds one workspace output a family: <family>/model and <family>/dense. Prints one
line of JSON: what every check found, or the error that it raised, by family.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch


class Forbidden:
    """An import hook for a machine without this project."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fisherfold", "stages", "flows"):
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Forbidden())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

CHECKS = {}
COMPILED = ("llama", "gpt2")  # tracing takes seconds
MANY = (5, 40)  # sequences, tokens: more than the layers' threshold for many tokens


def check(function):
    CHECKS[function.__name__] = function
    return function


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def ids(sequences=2, tokens=9):
    return torch.randint(3, 90, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def largest_difference(model, other, shape=(2, 9)):
    with torch.no_grad():
        return float((model(ids(*shape)).logits.float() - other(ids(*shape)).logits.float()).abs().max())


def raised(function, *arguments, **options):
    """The error that a call raises, as text, or a sentence that says it raised none."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@check
def project_is_missing(folder):
    return raised(__import__, "fisherfold.runtime")


@check
def refuses_without_trust(folder):
    return raised(AutoModelForCausalLM.from_pretrained, folder / "model", trust_remote_code=False)


@check
def tokenizer_without_question(folder):
    """Whether the tokenizer loads, and whether anybody was asked whether code may run."""
    asked = []
    with patch("builtins.input", lambda text: asked.append(text) or "n"):
        found, dense = (
            AutoTokenizer.from_pretrained(folder / part)("w5 w6")["input_ids"] for part in ("model", "dense")
        )
    return [found == dense, bool(asked)]


@check
def base_model(folder):
    model = AutoModel.from_pretrained(folder / "model", trust_remote_code=True).eval()
    dense = AutoModel.from_pretrained(folder / "dense").eval()
    with torch.no_grad():
        return float((model(ids())[0] - dense(ids())[0]).abs().max())


@check
def dense_class_refuses(folder):
    dense = AutoConfig.from_pretrained(folder / "dense").architectures[0]
    return raised(getattr(transformers, dense).from_pretrained, folder / "model")


@check
def lost_tensor_is_noticed(folder):
    from safetensors.torch import load_file, save_file

    broken = folder / "broken"
    load(folder / "model").save_pretrained(broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("down.weight"))
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name}, broken / "model.safetensors", {"format": "pt"}
    )
    return name, raised(load, broken)


@check
def equals_dense_export(folder):
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    model = load(folder / "model")
    return [largest_difference(model, dense, shape) for shape in ((2, 9), MANY)]


@check
def generates(folder):
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    model = load(folder / "model")
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = dense.generate(ids(), **options)
    return [
        torch.equal(model.generate(ids(), **options), expected),
        torch.equal(model.generate(ids(), cache_implementation="static", disable_compile=True, **options), expected),
        model.generation_config.eos_token_id,
    ]


@check
def saved_again(folder):
    model = load(folder / "model")
    model.save_pretrained(folder / "saved")
    AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=True).save_pretrained(folder / "saved")
    again, info = load(folder / "saved"), load_info(folder / "saved")
    again.save_pretrained(folder / "saved twice")
    return {
        "difference": largest_difference(model, again),
        "difference of the second": largest_difference(model, load(folder / "saved twice")),
        "info": {key: sorted(map(str, value)) for key, value in info.items()},
        "code": (folder / "saved" / "modeling_fisherfold.py").read_text()
        == (folder / "model" / "modeling_fisherfold.py").read_text(),
        "auto_map": json.loads((folder / "saved" / "config.json").read_text())["auto_map"],
        "dense class": raised(
            type(AutoModelForCausalLM.from_pretrained(folder / "dense")).from_pretrained, folder / "saved"
        ),
    }


def load_info(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    return info


@check
def sharded(folder):
    return largest_difference(load(folder / "model"), load(folder / "sharded"))


@check
def half_precision(folder):
    model, half = load(folder / "model"), load(folder / "model", dtype=torch.bfloat16)
    whole = {name: value for name, value in model.state_dict().items() if not value.is_floating_point()}
    found = half.state_dict()
    return {
        "dtypes": sorted({str(value.dtype) for value in found.values()}),
        "orders": all(torch.equal(found[name], value) for name, value in whole.items()),
        "number of orders": len(whole),
        "differences": [largest_difference(model, half, shape) for shape in ((2, 9), MANY)],
        "scale": float(model(ids()).logits.std()),
    }


@check
def training_step(folder):
    """Losses before and after steps on all parameters, and how far gradients move under gradient checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        model = load(folder / "model").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        losses = [optimise(model, ids(*MANY)) for _ in range(2)]
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        )
    return losses, float((gradients[0] - gradients[1]).abs().max()), float(gradients[0].abs().max())


def optimise(model, batch):
    model.zero_grad()
    loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    return loss.item()


@check
def device_maps(folder):
    """Placed by accelerate, all on one device and with a block on disk."""
    model = load(folder / "model")
    blocks = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    base = blocks.rpartition(".")[0]
    spread = {f"{base}.{name}": "cpu" for name, _ in model.get_submodule(base).named_children()}
    del spread[blocks]
    spread |= {f"{blocks}.0": "disk", f"{blocks}.1": "cpu", "lm_head": "cpu"}
    placed = load(folder / "model", device_map=spread, offload_folder=folder / "offload")
    automatic = load(folder / "model", device_map="auto")
    return {
        "automatic": largest_difference(model, automatic, MANY),
        "offloaded": largest_difference(model, placed, MANY),
        "on disk": any(value.device.type == "meta" for value in placed.state_dict().values()),
        "no split": model._no_split_modules == AutoModelForCausalLM.from_pretrained(folder / "dense")._no_split_modules,
    }


@check
def quantized(folder):
    """Later quantization of the inner layers to 8 bits: how many became quantized, and how far logits move, in their deviations."""
    model = load(folder / "model")
    expected = model(ids()).logits
    inner = sum(type(module) is torch.nn.Linear for module in model.modules())
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    left = sum(type(module) is torch.nn.Linear for module in small.modules())
    with torch.no_grad():
        found = [small(ids()).logits, small(ids(2, 1)).logits]
    return (
        inner,
        left,
        float((found[0] - expected.detach()).std() / expected.std()),
        bool(torch.isfinite(found[1]).all()),
    )


@check
def compiles(folder):
    """Traced whole, without graph breaks, at two lengths (the backend runs the traced graph as it is)."""
    if folder.name not in COMPILED:
        return None
    torch.compiler.reset()
    model = load(folder / "model")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    return [largest_difference(model, compiled, shape) for shape in ((2, 9), MANY)]


@check
def adapters(folder):
    """Steps of LoRA on every inner layer (losses), and whether a saved adapter computes the same; None without peft."""
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        return None
    torch.manual_seed(0)
    model = get_peft_model(load(folder / "model"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(ids(*MANY), labels=ids(*MANY)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(load(folder / "model"), folder / "adapter")
    return losses, [largest_difference(model.eval(), again, shape) for shape in ((2, 9), MANY)]


@check
def inner_layers(folder):
    """Modules by type inside the replaced layers: what adapters and quantizers look for."""
    model = load(folder / "model")
    inside = [model.get_submodule(name) for name in model.config.fisherfold["layers"]]
    return sorted({type(child).__name__ for module in inside for child in module.children()})


def main(folder):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for family in sorted(folder.iterdir()):
        found[family.name] = {}
        for name, function in CHECKS.items():
            try:
                found[family.name][name] = function(family)
            except Exception as error:
                found[family.name][name] = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
