"""The dense model as one GGUF file, for llama.cpp and the tools built on it.

GGUF has a name for every tensor of an architecture, and its readers compute that architecture alone: there is none for a low-rank
layer, so products are multiplied out. Its llama readers pair the two halves of a head's rotated features by neighbours, so the rows
of q and k are interleaved; Gemma's norms, which multiply by 1 + w, are written as 1 + w; matrices keep the checkpoint's dtype, vectors are float32.

The vocabulary is written for byte-level BPE tokenizers (``gguf_vocabulary``). With any other the file says that it has none, and tokens
come from the tokenizer beside the dense export.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fisherfold.export.gguf_vocabulary import check_vocabulary, write_vocabulary
from fisherfold.run.checkpoint import StoredTensor
from fisherfold.run.errors import InputError

TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


@dataclass(frozen=True)
class Format:
    """How GGUF holds an architecture: its name there, whether the rows of q and k are interleaved, and what a norm's weight is less by."""

    architecture: gguf.MODEL_ARCH
    interleaved: bool = False
    norm_shift: float = 0.0


FORMATS = {
    "llama": Format(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Format(gguf.MODEL_ARCH.QWEN2),
    "gemma3_text": Format(gguf.MODEL_ARCH.GEMMA3, norm_shift=1.0),
}
"""By model_type. Others (transposed weights …) would need conversions of their own."""
LOCAL_THETA = 10000.0
"""Of rotary embeddings under a sliding window: llama.cpp takes no other for Gemma 3."""


def gguf_format(config: Mapping[str, Any]) -> Format:
    """How to write the model of this config.json.

    Raises:
        InputError: its architecture, or its rotary embedding, is none that is written here.
    """
    kind, ropes = config["model_type"], _ropes(config)
    scaled = {name for rope in ropes.values() if (name := rope.get("rope_type", "default")) != "default"}
    local = ropes.get("sliding_attention", {}).get("rope_theta", LOCAL_THETA)
    scores = config.get("query_pre_attn_scalar")
    if kind not in FORMATS or scaled or local != LOCAL_THETA or (scores and scores != head_size(config)):
        raise InputError(
            f"Stage 'factorize', factorize.gguf_export: {kind!r} with rotary embedding {', '.join(sorted(scaled)) or 'default'!r} cannot be "
            f"written as GGUF here (only {', '.join(FORMATS)}, unscaled, with scores over √head_dim). Convert artifacts/factorize/dense with llama.cpp's own script."
        )
    return FORMATS[kind]


def _ropes(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rotary embeddings, by the kind of attention where there are several."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return dict(rope) if any(isinstance(own, Mapping) for own in rope.values()) else {"full_attention": rope}


def check_gguf(config: Mapping[str, Any], tokenizer: Path) -> None:
    """Refuse what `write_gguf` would refuse of a model with this config.json and of the tokenizer in a folder.

    Raises:
        InputError: see `gguf_format` and `check_vocabulary`.
    """
    gguf_format(config)
    check_vocabulary(tokenizer)


def write_gguf(
    path: Path, config: Mapping[str, Any], tokenizer: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> None:
    """Write the dense `tensors` (names as in transformers) with what `config` says of them; `tokenizer` is its folder."""
    form = gguf_format(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[form.architecture], use_temp_file=True)
    _write_sizes(writer, config, dtype)
    write_vocabulary(writer, config["vocab_size"], tokenizer)
    names = gguf.get_tensor_name_map(form.architecture, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        values = tensor.read()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and form.interleaved:
            values = _interleave(values, config[heads])
        if values.dim() == 1 and name.endswith("norm.weight"):
            values = values.float() + form.norm_shift
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(
                f"Stage 'factorize', tensor {name!r}: GGUF has no name for it. Set factorize.gguf_export: false."
            )
        _write_tensor(writer, target, values, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads, 2, half] -> [heads, half, 2]."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    kind = TYPES[dtype if values.dim() > 1 else torch.float32]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values.float().numpy()), kind), raw_dtype=kind)


def head_size(config: Mapping[str, Any]) -> int:
    """Dimensions of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _write_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    head = head_size(config)
    rope = _ropes(config)["full_attention"] or config
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "sliding_attention" in config.get("layer_types", ()):
        writer.add_sliding_window(config["sliding_window"])
