"""The tokenizer that a model came with: whether it belongs to it, and its files."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fisherfold.run.errors import InputError

LOCAL_TOKENIZER_KEYS = ("is_local", "local_files_only", "name_or_path")  # of this machine, not of the tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_same_tokens(name: str, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """
    Raises:
        InputError: the tokenizer of model `name` knows more tokens than the model embeds, those that were added to it apart.
    """
    added = set(
        tokenizer.get_added_vocab().values()
    )  # an image's place, padding: they do no harm until a text holds one
    beyond = [index for index in tokenizer.get_vocab().values() if index >= embeddings and index not in added]
    if beyond:
        raise InputError(
            f"The tokenizer of model {name!r} has {vocabulary_size(tokenizer)} tokens, but the model embeds {embeddings}: "
            "they do not belong together. Use the tokenizer that the model was trained with."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write it, without what is of this machine."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in LOCAL_TOKENIZER_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
