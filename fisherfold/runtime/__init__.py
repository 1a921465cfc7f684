"""Loading compressed checkpoints without running code from their folder: `import fisherfold.runtime`, then

    model = AutoModelForCausalLM.from_pretrained(folder)

The import registers a quantizer named "fisherfold" with transformers, and every checkpoint's model type. Such a checkpoint then is
an ordinary model of the dense architecture whose listed layers the quantizer replaces before weights are loaded, by the very
classes that the checkpoint's own file holds. Without the import transformers refuses the folder, unless it may run that file
(`trust_remote_code=True`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fisherfold.run.errors import CorruptArtifact
from fisherfold.runtime.modeling_fisherfold import replace_layers

METHOD = "fisherfold"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """Which layers are low-rank, as in a checkpoint's config.json: {module name: {"kind": …, "rank": …}}."""

    def __init__(self, layers: dict[str, dict[str, Any]], **_) -> None:
        self.quant_method = METHOD
        self.layers = layers


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Replaces the layers of a dense model, on the meta device, before weights are loaded into them."""

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are ordinary modules."""
        return True

    def is_serializable(self) -> bool:
        """Saving writes the factors as they are."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_
    ) -> None:
        """
        Raises:
            CorruptArtifact: a tensor of a low-rank layer is in none of the files.
        """
        layers = self.quantization_config.layers
        replace_layers(model, layers)
        for (
            name
        ) in layers:  # their initial weights are set by some classes (GPT-2) through the dense layers that are gone
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        wanted = {f"{name}.{key}" for name in layers for key in model.get_submodule(name).state_dict()}
        missing = sorted(wanted - _tensor_names(checkpoint_files)) if checkpoint_files else []
        if missing:
            raise CorruptArtifact(
                f"The checkpoint lacks {len(missing)} tensors of the model, such as {missing[0]!r}. Fetch or write it again."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> None:
        """The weights are ordinary numbers: casting and training need not be refused, as they are for quantized models."""
        model.is_quantized = False
        model.config._is_quantized = False


def _tensor_names(files: Sequence[str]) -> set[str]:
    names: set[str] = set()
    for path in files:
        with safe_open(Path(path), framework="pt") as file:
            names |= set(file.keys())
    return names


class CheckpointConfig(PreTrainedConfig):
    """Reads a checkpoint's config.json as the configuration of the dense architecture with a quantization."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options):
        """The dense architecture's configuration, with the low-rank layers as its quantization."""
        dense_type = cls.model_type.removeprefix(f"{METHOD}_")
        dense = {key: value for key, value in config_dict.items() if key not in ("auto_map", METHOD)}
        quantization = {"quant_method": METHOD, "layers": (config_dict.get(METHOD) or {}).get("layers", {})}
        dense |= {"model_type": dense_type, "quantization_config": quantization}
        return CONFIG_MAPPING[dense_type].from_dict(dense, **options)


def _register() -> None:
    for dense_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        name = f"{METHOD}_{dense_type}"
        AutoConfig.register(name, type("CheckpointConfig", (CheckpointConfig,), {"model_type": name}))


_register()
