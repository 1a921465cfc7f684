"""Tiny random models of every supported family, and workspaces around them, made in the test."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fisherfold.network.layers import find_layers, write_dense_layers, write_layers
from fisherfold.run.params import FactorizeParams, PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import ANSWERS, QUESTIONS, write_sequences, write_table
from fisherfold.run.workspace import Workspace

VOCABULARY = 96
FACTS = {"name": "/somewhere/tiny", "origin": "local", "licence": None, "digest": "0" * 64}
CHAT = "{% for message in messages %}w{{ 1 if message.role == 'user' else 2 }} {{ message.content }} {% endfor %}w2"
FAMILIES = {
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2},  # biases on q, k, v
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "mistral": {"num_key_value_heads": 1},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},  # Conv1D, biases
}
COMMON = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def as_truncated(**params: object) -> FactorizeParams:
    """Of stage factorize, without training, which takes longer than the rest."""
    return FactorizeParams(**{"refine": {"passes": 0}, "heal": {"passes": 0}, **params})


def tiny_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model of two blocks, hidden size 16, in float32 and evaluation mode."""
    torch.manual_seed(seed)
    sizes = {} if family == "gpt2" else COMMON
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=2, **{**sizes, **FAMILIES[family]}
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Splits on white space; words w3 … w95 and three special tokens."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_bytes_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the same size, which knows w, digits and spaces: what model types with a class of their own load, too."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = ["<unk>", "<s>", "</s>", "w", "Ġ", *map(str, range(10)), "Ġw", *map(str, range(10, VOCABULARY - 6))]
    pairs = [("Ġ", "w"), *(tuple(word) for word in words if word.isdigit() and len(word) == 2)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
    )


def save_tiny(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A Hugging Face folder with a tiny model and tokenizer."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_ids(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def tiny_workspace(root: Path, family: str = "llama", sequences: int = 8, length: int = 12) -> Workspace:
    """A workspace as stage `prepare` leaves it: model, sequences, four-choice questions."""
    workspace = Workspace(root)
    with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
        save_tiny(out / "model", family)
        write_layers(out, find_layers(tiny_model(family)))
        write_dense_layers(out, {})
        (out / "prepare.json").write_text(json.dumps({"model": FACTS}))
    for seed, split in enumerate(("calibration", "tuning", "evaluation")):
        ids = random_ids(sequences, length, seed)
        write_sequences(workspace.table(split), ids.numpy(), [[f"{split}-{i}"] for i in range(sequences)], VOCABULARY)
    write_sequences(workspace.table("training"), random_ids(0, length).numpy(), [], VOCABULARY)
    generator = np.random.default_rng(0)
    rows = [
        {
            "question": f"w{generator.integers(3, 90)} w{generator.integers(3, 90)}",
            "choices": [f"w{10 * c + generator.integers(3, 9)}" for c in range(4)],
            "answer": int(generator.integers(4)),
            "article": f"question-{i}",
        }
        for i in range(6)
    ]
    write_table(workspace.table("questions"), pa.Table.from_pylist(rows, schema=QUESTIONS), VOCABULARY)
    write_table(workspace.table("answers"), tiny_answers(), VOCABULARY)
    return workspace


def tiny_answers(count: int = 6) -> pa.Table:
    """Prompts of different lengths and answers to them, as stage `prepare` writes them (the answers are of no model)."""
    generator = np.random.default_rng(1)
    draw = lambda length: generator.integers(3, VOCABULARY, length).tolist()  # noqa: E731
    rows = [
        {
            "prompt": f"prompt {i}",
            "prompt_ids": draw(2 + i),
            "sampled_ids": [*draw(1 + i % 3), 2],
        }
        for i in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=ANSWERS)
