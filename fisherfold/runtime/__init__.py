"""Loading compressed checkpoints without running code from their folder: `import fisherfold.runtime`, then

    model = AutoModelForCausalLM.from_pretrained(folder)

The import registers a quantizer named "fisherfold" with transformers. A checkpoint then is an ordinary model of the dense architecture
whose listed layers the quantizer replaces before weights are loaded. Without the import transformers refuses the folder's weights,
unless it may run the file that lies in it (`trust_remote_code=True`). `modeling_fisherfold` is that
file, layers as plain as they can be, `modeling_fisherfold_experts` a second one that mixtures carry; `fast_cpu` has the same layers for inference on a CPU, which models loaded in this way get.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fisherfold.run.errors import CorruptArtifact
from fisherfold.runtime.fast_cpu import replace_layers
from fisherfold.runtime.modeling_fisherfold import own_names
from fisherfold.runtime.modeling_fisherfold_experts import replace_experts

METHOD = "fisherfold"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """Says that a checkpoint is one of ours. Its low-rank layers are in `config.fisherfold`; older ones may have them in here."""

    def __init__(self, layers: dict[str, dict[str, Any]] | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.layers = layers or {}


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
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """
        Raises:
            CorruptArtifact: a tensor of a low-rank layer is in none of the files.
        """
        config = model.config
        config.fisherfold = getattr(config, METHOD, None) or {"layers": getattr(self.quantization_config, "layers", {})}
        layers = own_names(model, "layers")
        experts = own_names(model, "experts")
        replace_layers(model, layers)
        replace_experts(model, experts)
        if layers and checkpoint_files:
            _fit_marker(model, min(layers), checkpoint_files)
        wanted = {f"{name}.{key}" for name in (*layers, *experts) for key in model.get_submodule(name).state_dict()}
        missing = _missing(wanted, checkpoint_files, model) if checkpoint_files else []
        if missing:
            raise CorruptArtifact(
                f"The checkpoint lacks {len(missing)} tensors of the model, such as {missing[0]!r}. Fetch or write it again."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """The weights are ordinary numbers: casting and training need not be refused, as they are for quantized models."""
        for marked, flag in ((model, "is_quantized"), (model.config, "_is_quantized")):
            setattr(marked, flag, False)
        vars(model.config).pop("auto_map", None)  # what `save_pretrained` writes holds no code


def _fit_marker(model: PreTrainedModel, name: str, files: Sequence[str]) -> None:
    """Give the empty tensor in the place of a dense weight the shape that it has in the files: [0] in older checkpoints."""
    keys = {f"{name}.weight", f"{model.base_model_prefix}.{name}.weight"}
    for path in files:
        with safe_open(Path(path), framework="pt") as file:
            for key in keys & set(file.keys()):
                module: Any = model.get_submodule(name)
                module.weight = module.weight.new_empty(file.get_slice(key).get_shape())


def _missing(wanted: set[str], files: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Which of the `wanted` tensors are in the files under no name that transformers would find them by."""
    names: set[str] = set()
    for path in files:
        with safe_open(Path(path), framework="pt") as file:
            names |= set(file.keys())
    if wanted - names:
        names |= _module_names(names, model)
    if wanted - names:  # as the base model calls them, which may be loaded by itself
        names |= {name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    return sorted(wanted - names)


def _module_names(names: set[str], model: PreTrainedModel) -> set[str]:
    """Names in a file as the model's modules have them: `save_pretrained` writes those of the architecture's hub format."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return {rename_source_key(name, renamings, converters)[0] for name in names}


class PackedQuantizer(CompressedTensorsHfQuantizer):
    """Checkpoints in few bits, of ours and of others: low-rank layers are put in before compressed-tensors looks for its modules."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **options: Any
    ) -> None:
        if getattr(model.config, METHOD, None) and type(model).__module__.startswith(
            "transformers."
        ):  # not code from a folder
            layers = own_names(model, "layers")
            replace_layers(model, layers)
            if layers and checkpoint_files:
                _fit_marker(model, min(layers), checkpoint_files)
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **options)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_after_weight_loading(model, **options)
        if getattr(model.config, METHOD, None):
            vars(model.config).pop("auto_map", None)  # as above


AUTO_QUANTIZER_MAPPING["compressed-tensors"] = PackedQuantizer


class CheckpointConfig(PreTrainedConfig):
    """Reads an older checkpoint, which has a model type of its own (`fisherfold_llama`), as the dense architecture with a quantization."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The dense architecture's configuration."""
        dense_type = cls.model_type.removeprefix(f"{METHOD}_")
        own = {"model_type": dense_type, "quantization_config": {"quant_method": METHOD}}
        return CONFIG_MAPPING[dense_type].from_dict(config_dict | own, **options)


def _register() -> None:
    for dense_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        name = f"{METHOD}_{dense_type}"
        AutoConfig.register(name, type("CheckpointConfig", (CheckpointConfig,), {"model_type": name}))


_register()
