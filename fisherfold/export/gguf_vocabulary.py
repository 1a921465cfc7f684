"""The vocabulary of a byte-level BPE tokenizer as GGUF holds it: tokens, merges, how text is split before merging, chat templates.

llama.cpp knows a splitting by a name and has its own code for each, so the name must be that of the model's own: with another one numbers,
contractions and spaces fall apart in other places and the model reads other tokens, without a word. The names here are those that
llama.cpp's converter gives for the same rules; what has none is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from fisherfold.run.errors import InputError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTINGS = {
    ("bytes with words",): "gpt-2",
    ("digits", "bytes with words"): "smollm",
    (WORDS + r"\p{N}{1,3}" + REST, "bytes"): "llama-bpe",
    (WORDS + r"\p{N}" + REST, "bytes"): "qwen2",
}
"""llama.cpp's names, by the steps of tokenizer.json's `pre_tokenizer`."""
WHOLE_WORDS = {"llama-bpe"}  # those with which llama.cpp looks a word up before it merges (`ignore_merges`)
NORMALIZED = {"qwen2": "NFC"}  # what is passed over there: llama.cpp reads text as it comes
SPECIAL_TOKENS = ("bos", "eos", "unk", "pad")
OTHER_TEMPLATES = "additional_chat_templates"


def check_vocabulary(tokenizer: Path) -> None:
    """Refuse what `write_vocabulary` would refuse of the tokenizer in a folder.

    Raises:
        InputError: it is byte-level BPE, and llama.cpp has no name for its rules.
    """
    parsed = _read(tokenizer / "tokenizer.json")
    if _is_byte_level(parsed):
        splitting(parsed)


def write_vocabulary(writer: gguf.GGUFWriter, size: int, tokenizer: Path) -> None:
    """Write the first `size` tokens of the tokenizer in a folder; of one that is no byte-level BPE, that there is no vocabulary.

    Raises:
        InputError: see `check_vocabulary`.
    """
    parsed = _read(tokenizer / "tokenizer.json")
    if not _is_byte_level(parsed):
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(parsed))
    _write_tokens(writer, size, parsed)
    _write_special_tokens(writer, size, tokenizer, parsed)
    templates = _chat_templates(tokenizer)
    if templates:
        only = list(templates) == ["default"]
        writer.add_chat_template(
            templates["default"] if only else [{"name": name, "template": text} for name, text in templates.items()]
        )


def splitting(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a parsed tokenizer.json splits text.

    Raises:
        InputError: it has none.
    """
    name = SPLITTINGS.get(tuple(_steps(tokenizer["pre_tokenizer"])))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    whole = bool(tokenizer["model"].get("ignore_merges"))
    if name is None or normalizer not in (None, NORMALIZED.get(name)) or whole != (name in WHOLE_WORDS):
        raise InputError(
            "Stage 'factorize', factorize.gguf_export: llama.cpp has no name that is known here for how this model's tokenizer splits text "
            f"({', '.join(SPLITTINGS.values())} are), so it would read other tokens. Set factorize.gguf_export to false and "
            "factorize.dense_export to true, and convert that folder with llama.cpp's own script."
        )
    return name


def _steps(step: Mapping[str, Any]) -> list[str]:
    """What a pre-tokenizer does, one after the other."""
    kind = step["type"]
    if kind == "Sequence":
        return [name for part in step["pretokenizers"] for name in _steps(part)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["bytes with words" if step.get("use_regex", True) else "bytes"]
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [step["pattern"].get("Regex", kind)]
    return [kind]


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return tokenizer["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(tokenizer["pre_tokenizer"])


def _write_tokens(writer: gguf.GGUFWriter, size: int, tokenizer: Mapping[str, Any]) -> None:
    model, kinds = tokenizer["model"], gguf.TokenType
    tokens = {index: token for token, index in model["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    types = {
        index: kinds.CONTROL if entry.get("special", True) else kinds.USER_DEFINED for index, entry in added.items()
    }
    words = {index: entry["content"] for index, entry in added.items()}
    writer.add_token_list([words.get(i, tokens.get(i, f"[PAD{i}]")) for i in range(size)])
    writer.add_token_types([types.get(i, kinds.NORMAL if i in tokens else kinds.UNUSED) for i in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def _write_special_tokens(writer: gguf.GGUFWriter, size: int, folder: Path, tokenizer: Mapping[str, Any]) -> None:
    """Their ids, and whether the tokenizer begins every text with the first and ends it with the second."""
    settings = _read(folder / "tokenizer_config.json")
    vocabulary = tokenizer["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    ids: dict[str, int] = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(f"{name}_token")
        index = vocabulary.get(token.get("content") if isinstance(token, dict) else token, size)
        if index < size:
            ids[name] = index
            getattr(writer, f"add_{name}_token_id")(index)
    read = Tokenizer.from_str(json.dumps(tokenizer))
    plain, whole = (read.encode("a", add_special_tokens=more).ids for more in (False, True))
    more = len(whole) > len(plain)
    writer.add_add_bos_token(more and whole[0] == ids.get("bos"))
    writer.add_add_eos_token(more and whole[-1] == ids.get("eos"))


def _chat_templates(folder: Path) -> dict[str, str]:
    """Chat templates by name, the default one first."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / OTHER_TEMPLATES).glob("*.jinja"))}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()}


def _read(path: Path) -> dict[str, Any]:
    """The parsed file; where there is none, that of a tokenizer of no type."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {"type": None}}
