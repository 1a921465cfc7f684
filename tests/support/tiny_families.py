"""A tiny random model of any causal model type that transformers knows, made from its own configuration class.

    model = tiny_family("qwen3_moe")
    python tests/support/tiny_families.py qwen3_moe FOLDER

Sizes come from names: `SIZES` says how large an integer of the default configuration becomes by what it is called, in nested
configurations too; of layers of several kinds one of each kind is kept. `RELATED` has what names do not tell: sizes that must fit others.
"""

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import VOCABULARY, tiny_bytes_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SPECIAL = 16  # ids above the tokenizer's: images, sounds and what else no text holds
EMBEDDED = VOCABULARY + SPECIAL
NOISE = 0.02  # added to every parameter, so that none is left at zero or one and its loss would show
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
SIZES = {
    r".*vocab_size.*|.*_vocab|vocab_offset": EMBEDDED,
    r"codebook_size": 64,
    r".*position_embeddings|position_embedding_size|n_positions|n_ctx|max_seq_len|model_max_length|max_(source|target)_positions|context_length": 128,
    r"(conf_)?(num_(hidden_|decoder_)?layers|n_layers?|decoder_layers|num_blocks|depth)|num_layers_per_stack": 2,
    r"(num_)?encoder_layers|num_global_layers|num_residual_layers|num_lstm_layers|n_(input|recurrent|output)_layers": 1,
    r".*(key_value_heads|kv_n_heads|num_kv_heads|num_key_heads)|index_n_heads": 2,
    r".*(attention_heads|num_heads|n_heads?|linear_num_value_heads)": 4,
    r"rotary_dim": 4,
    r"qk_head_dim": 16,
    r".*(head_dim|dim_head|d_head|headdim|head_size|d_kv|kv_channels)": 8,
    r".*(q_lora_rank|kv_lora_rank|o_lora_rank|lowrank|laurel_rank|norm_rank|gate_rank|adapter_rank|lora_dim)": 16,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k": 2,
    r"n_group|topk_group|num_expert_group|(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers": 1,
    r"moe_.*intermediate_size|expert_ffn_hidden_size|shared.*intermediate_size": 24,
    r".*intermediate_size.*|.*ffn_dim|ffn_hidden_size|mlp_dim|dim_ff|dff|d_ff|d_inner|feed_forward_size|n_inner": 48,
    r".*(hidden_size|hidden_size_global|d_model|n_embd|emb_dim|embedding_dim|embed_dim|embedding_size|lru_width|hidden_dim)": 32,
    r".*sliding_window|sliding_window_size|.*window_size|.*window_len|local_attention|.*chunk_(size|length)|block_size": 8,
    r"index_topk|index_block_size|index_topk_blocks|chunk_size": 4,
    r".*(d_state|state_size)|vocab_size_per_layer_input|hidden_size_per_layer_input": 8,
    r"time_step_rank|mamba_dt_rank": 4,
    r"mamba_n_groups|n_groups|mamba_ngroups": 1,
    r"patch_size": 8,
    r"image_size|crop_size": 32,
    r"num_filters|.*_channels?": 8,
}
"""Size by what a name is, first match; integers that match none keep their value."""


INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
DOTS3_ADAPTERS = {
    "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
}
RELATED: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "mamba2": {"num_heads": 8},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "dory": {"num_hidden_layers": 3, "n_recurrent_layers": 1, "layer_types": None},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron": {"num_key_value_heads": 2},
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"per_layer_config": {2: {"head_dim": 16}}},
    "dots3_note": {"text_config": {"per_layer_config": {2: {"head_dim": 16}}}, **DOTS3_ADAPTERS},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "attn_layers": ("local", "lsh"),
        "num_buckets": 2,
    },
    "xlm": {"causal": True},  # its own name for is_decoder
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4": {"text_config": {"global_head_dim": 16, "num_kv_shared_layers": 2}},
    "gemma4_text": {
        "global_head_dim": 16,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
        }
    },
    "gemma4_unified": {"text_config": {"global_head_dim": 16, "num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"global_head_dim": 16},
}
"""What names do not tell, by model type: arguments beside those made small."""
REFUSES_DEFAULTS = {"gemma4_assistant"}
"""Configurations that refuse their own default values."""
TWICE = {"zamba", "zamba2", "gemma3n_text", "gemma4_text", "gemma4", "gemma4_unified", "gemma4_unified_text"}
"""Families in which one layer uses what another made: two of each kind are kept."""
DECODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "reformer", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Families that read what comes after a token unless they are told that they are decoders."""


def causal_families() -> list[str]:
    """Every model type with a causal language model."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration with a width of 32 and a layer of every kind."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class(**RELATED[model_type] if model_type in REFUSES_DEFAULTS else {})
    arguments = _shrunk(default, copies=2 if model_type in TWICE else 1)
    for key, value in RELATED.get(model_type, {}).items():
        nested = isinstance(value, dict) and isinstance(arguments.get(key), dict)
        arguments[key] = {**arguments[key], **value} if nested else value
    return config_class(**arguments, **({"is_decoder": True} if model_type in DECODERS else {}))


def _shrunk(default: PreTrainedConfig, copies: int = 1) -> dict:
    """Arguments that make a small configuration of the default one."""
    names, ids = _depth_names(default), iter(range(EMBEDDED - 1, VOCABULARY - 1, -1))
    chosen = _one_of_each_kind(default, getattr(default, names[0]), copies) if names else []
    values: dict = {}
    for key, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            values[key] = _shrunk(value, copies)
        elif isinstance(value, list | tuple) and chosen and len(value) == getattr(default, names[0]):
            values[key] = [_size(key, value[index]) for index in chosen]
        elif re.fullmatch(".*token_(id|index)", key) and isinstance(value, int | list):
            values[key] = TOKENS[key] if key in TOKENS else next(ids)
        elif _size(key, value) != value and not key.startswith("_"):
            values[key] = _size(key, value)
    if "vocab_size" in values:
        values = {**TOKENS, **values}
    if vars(default).get("num_key_value_heads", 0) == vars(default).get("num_attention_heads"):
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | (dict.fromkeys(names, len(chosen)) if chosen else {})


def _size(key: str, value: object) -> object:
    """What becomes of a value: small if it is an integer that `SIZES` knows and larger than that."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return next((min(size, value) for name, size in SIZES.items() if re.fullmatch(name, key)), value)


def _depth_names(config: PreTrainedConfig) -> list[str]:
    """What the number of layers is called here."""
    return [name for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in vars(config)]


def _one_of_each_kind(config: PreTrainedConfig, depth: int, copies: int) -> list[int]:
    """Indices of layers, one for every combination of what lists of words say of a layer; none if there are no such lists."""
    kinds = [value for value in vars(config).values() if _names_layers(value, depth)]
    if not kinds:
        return []
    first: dict[tuple, int] = {}
    for index, kind in enumerate(zip(*kinds)):
        first.setdefault(kind, index)
    chosen = sorted(first.values()) * copies
    return chosen if len(chosen) > 1 else [0, min(1, depth - 1)]


def _names_layers(value: object, depth: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == depth > 0 and all(isinstance(v, str) for v in value)


@torch.no_grad()
def tiny_family(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 and evaluation mode; no parameter is left at a value that a class sets by itself."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter += NOISE * torch.randn_like(parameter)
    return model


def save_family(folder: Path, model_type: str, seed: int = 0) -> Path:
    """A Hugging Face folder with a tiny model and tokenizer. A family that transformers cannot build here has no weights in it."""
    try:
        model = tiny_family(model_type, seed)
        model.save_pretrained(folder)
        if model.config.model_type != model_type:  # that of its text part alone, where checkpoints have the whole
            tiny_config(model_type).save_pretrained(folder)
    except (ImportError, AttributeError):  # a package is missing; a model is not made of its configuration alone
        CONFIG_MAPPING[model_type]().save_pretrained(folder)
        save_file({}, folder / "model.safetensors")
    tiny_bytes_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save_family(Path(sys.argv[2]), sys.argv[1])
