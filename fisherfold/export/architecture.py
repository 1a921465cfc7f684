"""The dense model's architecture, and the configuration and code of a checkpoint that extends it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

import fisherfold.runtime as runtime
from fisherfold.export.expert_tensors import Stack, expert_records
from fisherfold.export.tensor_parallel import split_plan
from fisherfold.export.vllm_backend import logit_scale
from fisherfold.run.errors import InputError

TEMPLATE = Path(runtime.__file__).with_name("modeling_fisherfold.py")
MIXTURE = TEMPLATE.with_name("modeling_fisherfold_experts.py")
"""What a checkpoint with low-rank experts carries beside it."""
OWN_FILES = {"config.json", "README.md"}  # of a checkpoint folder, never copied from another
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")
CHAT_TEMPLATES = "additional_chat_templates"  # the folder in which transformers saves all but the first


@dataclass(frozen=True)
class DenseArchitecture:
    """Attributes:
    config_class, model_class: names of the classes in transformers.
    config: the text of config.json, parsed.
    folder: where the model is.
    """

    config_class: str
    model_class: str
    config: dict[str, Any]
    folder: Path

    @property
    def dtype(self) -> str:
        """The dtype of the stored weights, by name."""
        return self.config.get("dtype") or self.config.get("torch_dtype") or "float32"

    def empty_model(self) -> PreTrainedModel:
        """The dense model on the meta device: its modules and shapes, no numbers."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.read_config())

    def own_head(self) -> tuple[str, nn.Module] | None:
        """The output embedding's name and module, without numbers; None if there is none, or its weight is the input's."""
        model = self.empty_model()
        head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight is inputs.weight:
            return None
        return next((name, module) for name, module in model.named_modules() if module is head)

    def read_config(self) -> PreTrainedConfig:
        """The configuration as transformers has it."""
        with TemporaryDirectory() as folder:  # classes read more forms from a file than they take from a dict
            (Path(folder) / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
            return AutoConfig.from_pretrained(folder, local_files_only=True)


def dense_architecture(folder: Path) -> DenseArchitecture:
    """What kind of model the folder holds.

    Raises:
        InputError: its classes are not transformers' own, so a checkpoint could not extend them.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    config_class: Any = (
        None if "auto_map" in config else type(AutoConfig.from_pretrained(folder, local_files_only=True))
    )
    if config_class not in known:
        raise InputError(
            f"Stage 'factorize': {folder} is a {config.get('model_type')!r} model with code of its own. The compressed checkpoint extends "
            "a class of transformers, so only architectures that transformers itself knows can be factorized."
        )
    names = config_class.__name__, known[config_class].__name__
    for name in names:
        if not hasattr(transformers, name):
            raise InputError(
                f"Stage 'factorize': transformers does not export {name!r}, which the compressed checkpoint would extend."
            )
    return DenseArchitecture(*names, config, folder)


def base_class(model: PreTrainedModel) -> str | None:
    """The class of the model without its head, if it is the one that AutoModel has for the configuration."""
    base = type(model.base_model)
    known = MODEL_MAPPING.get(type(model.config), ())
    return base.__name__ if base in (known if isinstance(known, tuple) else (known,)) else None


def auto_classes(mixture: bool) -> dict[str, str]:
    """The classes of a checkpoint's own code, as `auto_map` in its config.json has them."""
    model = f"{MIXTURE.stem}.FisherfoldMixture" if mixture else f"{TEMPLATE.stem}.Fisherfold"
    return {
        "AutoConfig": f"{TEMPLATE.stem}.FisherfoldConfig",
        "AutoModel": f"{model}Model",
        "AutoModelForCausalLM": f"{model}ForCausalLM",
    }


def write_code(folder: Path, architecture: DenseArchitecture, mixture: bool = False) -> None:
    """Write the template with the model's own classes in place of the example's, which it names once each; for a mixture, its experts, too."""
    text = TEMPLATE.read_text(encoding="utf-8")
    names = {
        "LlamaConfig": architecture.config_class,
        "LlamaForCausalLM": architecture.model_class,
        "LlamaModel": base_class(architecture.empty_model()) or architecture.model_class,
    }
    for example, own in names.items():
        text = text.replace(f"import {example} as", f"import {own} as")
    (folder / TEMPLATE.name).write_text(text, encoding="utf-8")
    if mixture:
        shutil.copyfile(MIXTURE, folder / MIXTURE.name)


def write_config(
    folder: Path,
    architecture: DenseArchitecture,
    dtype: torch.dtype,
    layers: Mapping[str, dict[str, Any]],
    stacks: Sequence[Stack] = (),
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json: the dense model's, the low-rank layers and stacks of experts, the classes in the folder's own code, and a method of quantization
    that keeps programs which know the dense model alone from taking this for one, or that of modules in few bits. Where logits are a multiple
    of the output embedding's product, it is written as `logit_scale`, by which vLLM knows it.
    """
    classes = auto_classes(mixture=bool(stacks))
    architectures = [classes["AutoModelForCausalLM"].rpartition(".")[2]]
    model = architecture.empty_model()
    if base_class(model) is None:
        del classes["AutoModel"]
    own: dict[str, Any] = {
        "architectures": architectures,
        "auto_map": classes,
        "dtype": str(dtype).removeprefix("torch."),
        "fisherfold": {"layers": dict(layers), "tensor_parallel": None if stacks else split_plan(model, layers)}
        | ({"experts": expert_records(model, stacks)} if stacks else {}),
        "quantization_config": dict(quantization or {"quant_method": runtime.METHOD}),
    }
    if (scale := logit_scale(model)) not in (None, 1.0):
        own["logit_scale"] = scale
    text = json.dumps(architecture.config | own, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides weights and configuration: tokenizer, chat templates, generation settings."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in OWN_FILES and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, target / path.name)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, target / CHAT_TEMPLATES)
