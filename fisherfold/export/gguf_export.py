"""The dense model as one GGUF file, for llama.cpp and the tools built on it.

GGUF has a name for every tensor of an architecture, and its readers compute that architecture alone: there is none for a low-rank
layer, so products are multiplied out. Its llama readers pair the two halves of a head's rotated features by neighbours, so the rows
of q and k are interleaved; matrices keep the checkpoint's dtype, vectors are float32.

The vocabulary is written for byte-level BPE tokenizers. With any other the file says that it has none, and tokens come from the
tokenizer beside the dense export.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

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
    """How GGUF holds an architecture: its name there, and whether the rows of q and k are interleaved."""

    architecture: gguf.MODEL_ARCH
    interleaved: bool


FORMATS = {
    "llama": Format(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Format(gguf.MODEL_ARCH.QWEN2, False),
}
"""By model_type. Others (norms shifted by one, transposed weights …) would need conversions of their own."""


def gguf_format(config: Mapping[str, Any]) -> Format:
    """How to write the model of this config.json.

    Raises:
        InputError: its architecture, or its rotary embedding, is none that is written here.
    """
    kind = config["model_type"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind not in FORMATS or rope.get("rope_type", "default") != "default":
        raise InputError(
            f"Stage 'factorize', factorize.gguf_export: {kind!r} with rotary embedding {rope.get('rope_type', 'default')!r} cannot be "
            f"written as GGUF here (only {', '.join(FORMATS)}, unscaled). Convert artifacts/factorize/dense with llama.cpp's own script."
        )
    return FORMATS[kind]


def write_gguf(
    path: Path, config: Mapping[str, Any], tokenizer: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> None:
    """Write the dense `tensors` (names as in transformers) with what `config` says of them; `tokenizer` is its folder."""
    form = gguf_format(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[form.architecture], use_temp_file=True)
    _write_sizes(writer, config, dtype)
    _write_vocabulary(writer, config, tokenizer / "tokenizer.json")
    names = gguf.get_tensor_name_map(form.architecture, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        values = tensor.read()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and form.interleaved:
            values = _interleave(values, config[heads])
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


def _write_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
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


def _write_vocabulary(writer: gguf.GGUFWriter, config: Mapping[str, Any], path: Path) -> None:
    """Tokens, their types and merges of a byte-level BPE tokenizer; of another, that there are none."""
    model = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {"type": None}}
    if model["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(model["pre_tokenizer"]):
        writer.add_tokenizer_model("no_vocab")
        return
    tokens = {index: token for token, index in model["model"]["vocab"].items()}
    added = {entry["id"]: entry["content"] for entry in model["added_tokens"]}
    words = [added.get(i, tokens.get(i, f"[PAD{i}]")) for i in range(config["vocab_size"])]
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([control if i in added else normal if i in tokens else unused for i in range(len(words))])
    writer.add_token_merges(merges)
    for add, key in ((writer.add_bos_token_id, "bos_token_id"), (writer.add_eos_token_id, "eos_token_id")):
        if isinstance(config.get(key), int):
            add(config[key])
