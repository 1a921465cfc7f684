"""A model quantised by llama.cpp's own quantiser, its layers read back as ordinary matrices.

Wants `pip install llama-cpp-python`. The embedding and the head stay as they are, as in every other row; matrices whose rows are no multiple
of 256 get what llama.cpp falls back to (Q5_0, Q8_0, IQ4_NL), which is counted as it is.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from fisherfold.export.gguf_export import gguf_format, write_gguf
from fisherfold.run.checkpoint import StoredTensor

FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15, "Q2_K": 10}
"""llama.cpp's numbers of its mixtures (enum llama_ftype)."""
UNROUNDED = 0
"""F32, in enum ggml_type."""


def write_whole(path: Path, model: PreTrainedModel, tokenizer: Path) -> None:
    """The model in float32, as llama.cpp reads it."""
    tensors = {name: StoredTensor.of(value) for name, value in model.state_dict().items()}
    write_gguf(path, model.config.to_dict(), tokenizer, tensors, torch.float32)


def quantise(whole: Path, path: Path, mixture: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Let llama.cpp quantise a file.

    Args:
        whole: the file in float32.
        path: the file to be written.
        mixture: a name of FILE_TYPES.
        importance: mean square of every input, by GGUF's name of a layer's weight: an importance matrix.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[mixture], torch.get_num_threads()
    params.token_embedding_type = params.output_tensor_type = UNROUNDED
    kept = _importance_data(llama_cpp, importance or {})
    if importance:
        params.imatrix = kept
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {whole} to {mixture}.")


def _importance_data(llama_cpp, importance: Mapping[str, np.ndarray]):
    """An array of llama_model_imatrix_data that ends with an empty entry; it keeps what its pointers point to."""
    entry = llama_cpp.llama_model_imatrix_data
    found = (entry * (len(importance) + 1))()
    found.kept = [np.ascontiguousarray(values, np.float32) for values in importance.values()]
    for place, name, values in zip(found, importance, found.kept):
        place.name, place.size = name.encode(), values.size
        place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return found


def layer_names(config, modules) -> dict[str, str]:
    """GGUF's name of the weight of each layer."""
    names = gguf.get_tensor_name_map(gguf_format(config.to_dict()).architecture, config.num_hidden_layers)
    return {module: names.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}


def read_layers(path: Path, config, modules) -> dict[str, tuple[np.ndarray, int, str]]:
    """(weight [n, m], bytes, type) of every layer, as transformers has them."""
    interleaved = gguf_format(config.to_dict()).interleaved
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for module, name in layer_names(config, modules).items():
        tensor = stored[name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        if heads and interleaved:
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        found[module] = weight, int(tensor.n_bytes), tensor.tensor_type.name
    return found
