"""The dense model's architecture, and the configuration and code of a checkpoint that extends it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fisherfold import runtime
from fisherfold.run.errors import InputError

TEMPLATE = Path(runtime.__file__).with_name("modeling_fisherfold.py")
TEMPLATE_CLASSES = ("LlamaConfig", "LlamaForCausalLM")  # named once each in the template, replaced by the model's own
OWN_FILES = {"config.json", "README.md"}  # of a checkpoint folder, never copied from another
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")


@dataclass(frozen=True)
class DenseArchitecture:
    """Attributes:
    config_class, model_class: names of the classes in transformers.
    config: the text of config.json, parsed.
    """

    config_class: str
    model_class: str
    config: dict[str, Any]

    @property
    def dtype(self) -> str:
        """The dtype that config.json names; float32 where it names none."""
        return self.config.get("dtype") or self.config.get("torch_dtype") or "float32"


def dense_architecture(folder: Path) -> DenseArchitecture:
    """What kind of model the folder holds.

    Raises:
        InputError: its classes are not transformers' own, so a checkpoint could not extend them.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config_class = None if "auto_map" in config else type(AutoConfig.from_pretrained(folder, local_files_only=True))
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"Stage 'factorize': {folder} is a {config.get('model_type')!r} model with code of its own. The compressed checkpoint extends "
            "a class of transformers, so only architectures that transformers itself knows can be factorized."
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    names = config_class.__name__, model_class.__name__
    for name in names:
        if not hasattr(transformers, name):
            raise InputError(
                f"Stage 'factorize': transformers does not export {name!r}, which the compressed checkpoint would extend."
            )
    return DenseArchitecture(*names, config)


def write_code(folder: Path, architecture: DenseArchitecture) -> None:
    """Write the template with the model's own classes in place of the example's."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for example, own in zip(TEMPLATE_CLASSES, (architecture.config_class, architecture.model_class)):
        text = text.replace(example, own)
    (folder / TEMPLATE.name).write_text(text, encoding="utf-8")


def write_config(
    folder: Path, architecture: DenseArchitecture, dtype: torch.dtype, layers: Mapping[str, dict[str, Any]]
) -> None:
    """Write config.json: the dense model's, a model type that no program takes for the dense one, and the low-rank layers."""
    module = TEMPLATE.stem
    own = {
        "model_type": f"fisherfold_{architecture.config['model_type']}",
        "architectures": ["FisherfoldForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.FisherfoldConfig",
            "AutoModelForCausalLM": f"{module}.FisherfoldForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "fisherfold": {"layers": dict(layers)},
    }
    (folder / "config.json").write_text(
        json.dumps(architecture.config | own, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides weights and configuration: tokenizer, chat template, generation settings."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in OWN_FILES and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, target / path.name)
