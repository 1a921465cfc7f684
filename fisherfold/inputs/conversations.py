"""Conversations of a corpus, and their text in the format of the model that they are for.

Two layouts are known: messages with `role` and `content`, and those of ShareGPT with `from` and `value`. A message keeps its other
fields, which templates may ask for (`name`, `tool_calls`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fisherfold.run.errors import InputError

FIELDS = ("messages", "conversations", "conversation")
"""Where a record that has no text may hold a conversation."""
LAYOUTS = (("role", "content"), ("from", "value"))
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Other names of the roles that chat templates know."""

Message = Mapping[str, Any]


def read_messages(entries: Sequence[Any], where: str) -> tuple[Message, ...]:
    """The messages of one record, with `role` and `content`.

    Raises:
        InputError: one is of neither layout, or holds no text.
    """
    return tuple(_message(entry, f"{where}, message {number}") for number, entry in enumerate(entries, start=1))


def _message(entry: Any, where: str) -> Message:
    layout = next((names for names in LAYOUTS if isinstance(entry, Mapping) and set(names) <= set(entry)), None)
    if layout is None:
        raise InputError(f"{where} has neither role and content nor from and value, but is {entry!r:.60}.")
    role, content = (entry[name] for name in layout)
    if isinstance(content, list):  # parts: text, images; a language model reads the text
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if content is None and entry.get("tool_calls"):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(f"{where} has no role or no text: {entry!r:.60}.")
    others = {name: value for name, value in entry.items() if name not in layout and value is not None}
    return {**others, "role": ROLES.get(role, role), "content": content}


def has_chat_format(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model has a chat template, and so is made for conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str, answer_follows: bool = False
) -> list[int]:
    """Token ids of a conversation `in_chat_format`."""
    text = in_chat_format(tokenizer, messages, name, answer_follows)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def in_chat_format(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str, answer_follows: bool = False
) -> str:
    """A conversation as ``apply_chat_template`` gives it.

    Args:
        tokenizer: the model's.
        messages: see `read_messages`.
        name: of the conversation, for errors.
        answer_follows: end where the model's answer begins.

    Raises:
        InputError: the model has no chat template, or its template refuses the conversation.
    """
    if not has_chat_format(tokenizer):
        raise InputError(
            f"The corpus holds conversations ({name}), but the model has no chat template, so there is no format to read them in. "
            "Choose a chat model, put its chat_template.jinja beside the tokenizer, or name a field of text in prepare.text_field."
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_follows
            )
        )
    except Exception as error:  # a template is a program; of several without a default one none is chosen
        raise InputError(
            f"The model's chat template refuses a conversation of the corpus ({name}): {error}. Its roles are "
            f"{', '.join(message['role'] for message in messages)}; take it out, or bring it into the order that the model knows; or "
            "set prepare.self_written and prepare.held_out_prompts to 0, if it is a prompt."
        ) from None
