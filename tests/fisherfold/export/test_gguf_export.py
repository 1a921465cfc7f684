"""The GGUF file against the dense export, read again by transformers."""

import json
import random

import gguf
import pytest
import torch
from tiny import COMMON, FAMILIES, as_truncated, random_ids
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from fisherfold.export.gguf_export import check_gguf, gguf_format, write_gguf
from fisherfold.export.gguf_vocabulary import splitting
from fisherfold.export.multiplied_out import export
from fisherfold.run.checkpoint import StoredTensor
from fisherfold.run.errors import InputError
from stages import factorize


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("qwen2", "float32"), ("gemma3_text", "float32"), ("llama", "bfloat16")],
)
def test_it_computes_what_the_dense_export_computes(tmp_path, family, dtype):
    workspace = subspace_workspace(tmp_path, family)
    publish_ranks(workspace, mixed_ranks(workspace))
    factorize.run(workspace, as_truncated(dtype=dtype, dense_export=True, gguf_export=True))
    out = workspace.out("factorize")
    dense = AutoModelForCausalLM.from_pretrained(out / "dense", dtype=torch.float32)
    # which GGUF has no key for: transformers takes 256, llama.cpp head_dim
    unsaid = {"query_pre_attn_scalar": 8} if family == "gemma3_text" else {}
    again = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32, **unsaid)
    with torch.no_grad():
        torch.testing.assert_close(again(random_ids(2, 9)).logits, dense(random_ids(2, 9)).logits, atol=1e-6, rtol=1e-5)
    card = (out / "model" / "README.md").read_text()
    assert "`model.gguf`: for llama.cpp" in card
    export(out / "model", tmp_path / "again.gguf", "gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (out / "model.gguf").read_bytes()
    assert "the folder `dense`" in card


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"query_pre_attn_scalar": 256},
        {"rope_parameters": {"full_attention": {"rope_type": "linear"}, "sliding_attention": {}}},
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 1e6}}},
    ],
)
def test_what_it_cannot_hold_is_refused(change):
    with pytest.raises(InputError, match=r"factorize\.gguf_export"):
        gguf_format({"model_type": "llama", "head_dim": 64} | change)


TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "added_tokens": [
        {
            "id": 3,
            "content": "<end>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        },
        {
            "id": 4,
            "content": "<think>",
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        },
    ],
}
BEGINS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<end>": {"id": "<end>", "ids": [3], "tokens": ["<end>"]}},
}


def written(folder, tokenizer, settings, vocabulary=6):
    """Fields of a GGUF file without tensors."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = dict.fromkeys(("max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"), 4)
    config = sizes | {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    write_gguf(folder / "x.gguf", config | {"vocab_size": vocabulary}, folder, {}, torch.float32)
    fields = gguf.GGUFReader(folder / "x.gguf").fields
    return {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}


def test_a_byte_level_vocabulary_is_written(tmp_path):
    found = written(tmp_path, TOKENIZER, {"eos_token": "<end>"})
    assert found["ggml.tokens"] == ["a", "b", "ab", "<end>", "<think>", "[PAD5]"]
    assert found["ggml.token_type"] == [1, 1, 1, 3, 4, 5]
    assert found["ggml.merges"] == ["a b"]
    assert found["ggml.eos_token_id"] == 3
    assert found["ggml.pre"] == "gpt-2" and not found["ggml.add_bos_token"] and not found["ggml.add_eos_token"]
    assert "chat_template" not in found


def test_the_first_token_and_the_chat_templates_are_written(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    settings = {"bos_token": {"content": "<end>"}, "eos_token": "b"}
    found = written(tmp_path, TOKENIZER | {"post_processor": BEGINS}, settings)
    assert found["ggml.bos_token_id"] == 3 and found["ggml.add_bos_token"] and not found["ggml.add_eos_token"]
    assert found["chat_template"] == "{{ 1 }}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ 2 }}")
    found = written(tmp_path, TOKENIZER, settings)
    assert found["chat_template"] == "{{ 1 }}" and found["chat_template.tools"] == "{{ 2 }}"


LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def isolated(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("steps", "more", "name"),
    [
        (sequence({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}), {}, "smollm"),
        (sequence(isolated(LLAMA_3), BYTES), {"ignore_merges": True}, "llama-bpe"),
        (sequence(isolated(LLAMA_3.replace("{1,3}", "")), BYTES), {}, "qwen2"),
    ],
)
def test_text_is_split_as_the_tokenizer_does(steps, more, name):
    tokenizer = TOKENIZER | {"pre_tokenizer": steps, "model": TOKENIZER["model"] | more}
    assert splitting(tokenizer) == name


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": sequence(isolated(r"\p{N}{1,2}"), BYTES)},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"normalizer": {"type": "NFKC"}},
        {"model": TOKENIZER["model"] | {"ignore_merges": True}},
    ],
)
def test_a_splitting_without_a_name_is_refused_before_the_work(tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | change))
    with pytest.raises(InputError, match=r"llama.cpp has no name.*own script"):
        check_gguf({"model_type": "llama"}, tmp_path)


PIECES = (
    "a", "b", "S", "'s", "'S", "'ll", "'LL", "'ve", "1", "23", "٣", "४", "²", "½", "Ⅷ", " ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0",
    "\u2028", "\u3000", "\u200d", "\u200b", "é", "e\u0301", "ß", "İ", "ı", "東", "京", "。", "😀", "👨‍👩‍👧", "\ufeff", "\x01", "\x7f", "-", "_", "...",
    "!?", "<s>", "</s>", "Ω", "א", "ب", "ไ", "한", "\u0378", "ǅ", "ª", "ـ", "ˈ", "़", "\ue000", "\U000e0001",
)  # fmt: skip
TEXTS = (
    "It's 1990, and we've 12345 apples;  two   spaces\tand\n\nlines. ",
    "Größe naïve 東京 Ωμέγα 😀 don't DON'T I'll",
    "def f(x):\n    return x**2  # ²½\r\n\r\n  end",
    "",
    " leading and trailing  ",
)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_reads_the_same_tokens(tmp_path, name):
    from llama_cpp import Llama

    tokenizer = trained(tmp_path, name)
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    written(
        tmp_path,
        json.loads((tmp_path / "tokenizer.json").read_text()),
        {"bos_token": "<s>"},
        tokenizer.get_vocab_size(),
    )
    read = Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    assert read.metadata["tokenizer.chat_template"] == "{{ 1 }}"
    assert read.metadata["tokenizer.ggml.add_bos_token"] == "true" and read.token_bos() == tokenizer.token_to_id("<s>")
    for text in (*TEXTS, *odd_texts(300)):
        assert read.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids, ascii(text)


def odd_texts(count):
    """Random strings of what splittings treat each in their own way."""
    draw = random.Random(0)
    return ["".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 9))) for _ in range(count)]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_llama_cpp_computes_what_transformers_compute(tmp_path, family):
    from llama_cpp import Llama

    tokenizer = trained(tmp_path, "llama-bpe")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    config = AutoConfig.for_model(family, vocab_size=tokenizer.get_vocab_size(), **COMMON, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {name: StoredTensor.of(weight.detach()) for name, weight in model.named_parameters()}
    write_gguf(tmp_path / "x.gguf", config.to_dict(), tmp_path, tensors, torch.float32)
    read = Llama(str(tmp_path / "x.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ids = tokenizer.encode(TEXTS[0]).ids[:40]
    read.eval(ids)
    expected = model(torch.tensor([ids])).logits[0].detach()
    torch.testing.assert_close(torch.tensor(read.scores[: len(ids)]), expected, atol=1e-4, rtol=1e-3)


def trained(folder, name):
    """A byte-level tokenizer that splits text as llama.cpp's `name` does, trained on texts with merges of every kind, that begins with <s>."""
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    number = {"llama-bpe": "{1,3}", "qwen2": ""}.get(name, "")
    regex = [
        pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", number)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps.get(name, regex))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
