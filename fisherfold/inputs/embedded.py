"""Tokens that a tokenizer has and the model does not embed: an image's place, a `[PAD]` added later. They do no harm until a text holds one."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from fisherfold.run.errors import InputError


def require_embedded(ids: Iterable[int], embeddings: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """
    Raises:
        InputError: one of `ids` has no row of the `embeddings`; names the token and `where` it is.
    """
    beyond = next((int(index) for index in ids if index >= embeddings), None)
    if beyond is not None:
        token = tokenizer.convert_ids_to_tokens(beyond)
        raise InputError(
            f"{where} holds {token!r}, token {beyond} of the model's tokenizer, but the model embeds the tokens 0 to {embeddings - 1} alone. "
            "Take it out of the text, or resize the model's embedding (`resize_token_embeddings`) before it is compressed."
        )
