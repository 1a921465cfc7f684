"""The GGUF file against the dense export, read again by transformers."""

import json

import gguf
import pytest
import torch
from tiny import random_ids
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace
from transformers import AutoModelForCausalLM

from fisherfold.export.gguf_export import gguf_format, write_gguf
from fisherfold.run.errors import InputError
from fisherfold.run.params import FactorizeParams
from stages import factorize


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen2", "float32"), ("llama", "bfloat16")])
def test_it_computes_what_the_dense_export_computes(tmp_path, family, dtype):
    workspace = subspace_workspace(tmp_path, family)
    publish_ranks(workspace, mixed_ranks(workspace))
    factorize.run(workspace, FactorizeParams(dtype=dtype, dense_export=True, gguf_export=True))
    out = workspace.out("factorize")
    dense = AutoModelForCausalLM.from_pretrained(out / "dense", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(random_ids(2, 9)).logits, dense(random_ids(2, 9)).logits, atol=1e-6, rtol=1e-5)
    card = (out / "model" / "README.md").read_text()
    assert "`model.gguf`: for llama.cpp" in card
    assert "the folder `dense`" in card


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"rope_parameters": {"rope_type": "yarn"}}])
def test_what_it_cannot_hold_is_refused(change):
    with pytest.raises(InputError, match=r"factorize\.gguf_export"):
        gguf_format({"model_type": "llama"} | change)


def test_a_byte_level_vocabulary_is_written(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    added = [{"id": 3, "content": "<end>"}]
    tokenizer = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    sizes = dict.fromkeys(("max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"), 4)
    config = sizes | {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    write_gguf(tmp_path / "x.gguf", config | {"vocab_size": 5, "eos_token_id": 3}, tmp_path, {}, torch.float32)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "ab", "<end>", "[PAD4]"]
    assert fields["tokenizer.ggml.token_type"].contents() == [1, 1, 1, 3, 5]
    assert fields["tokenizer.ggml.merges"].contents() == ["a b"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 3
