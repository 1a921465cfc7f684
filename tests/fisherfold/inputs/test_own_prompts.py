"""Prompts that a chat model writes itself: where a message begins and ends in its chat format."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from fisherfold.inputs.own_prompts import LONGEST, message, user_turn, write_prompts
from tests.support.tiny import save_tiny, tiny_tokenizer


def chatting(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        ("w5 {{ messages[0]['content'] }} </s> {% if add_generation_prompt %}w6{% endif %}", ([5], 2)),
        ("w5 w6 {{ messages[0]['content'] }} w7 w8", ([5, 6], 7)),
        ("{{ messages[0]['content'] }} w7", None),
        ("w5 {{ messages[0]['content'] }}", None),
        ("w5 {{ messages[0]['content'] | lower }} w6", None),
    ],
)
def test_a_message_stands_between_what_is_before_and_the_next_token(
    template: str, turn: tuple[list[int], int] | None
) -> None:
    assert user_turn(chatting(template)) == turn


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([10, 11, 12, 7], "w10 w11 w12"),
        ([10, 11, 12], None),  # no end
        ([10, 1, 12, 7], None),  # a token of the format
        ([9, 7], None),  # nearly nothing
        ([7], None),
    ],
)
def test_a_message_is_whole(ids: list[int], text: str | None) -> None:
    assert message(tiny_tokenizer(), ids, end=7) == text


def test_prompts_end_and_come_once(tmp_path) -> None:
    save_tiny(tmp_path / "model")
    chatting("w5 {{ messages[0]['content'] }} w7 w6").save_pretrained(tmp_path / "model")
    found = []
    for seed in (0, 0, 1):
        write_prompts(tmp_path, tmp_path / "model", 64, seed, "float32")
        found.append(json.loads((tmp_path / "prompts.json").read_text()))
    assert found[0] == found[1] != found[2] and found[0]
    assert len(set(found[0])) == len(found[0]) < 64
    assert all("w7" not in text.split() and len(text.split()) < LONGEST for text in found[0])


def test_a_format_that_shows_no_message_gives_none(tmp_path) -> None:
    save_tiny(tmp_path / "model")
    chatting("w5 w6").save_pretrained(tmp_path / "model")
    write_prompts(tmp_path, tmp_path / "model", 4, 0, "float32")
    assert json.loads((tmp_path / "prompts.json").read_text()) == []


@pytest.mark.parametrize(("before", "after", "room"), [(40, 20, 2), (80, 1, 0)])
def test_no_prompt_is_longer_than_the_model_has_positions(tmp_path, before: int, after: int, room: int) -> None:
    """Of a model with one embedding a position, 64 of them, which knows none beyond."""
    save_tiny(tmp_path / "model", "gpt2")
    template = "w5 " * before + "{{ messages[0]['content'] }} w7" + " w6" * after
    chatting(template).save_pretrained(tmp_path / "model")
    write_prompts(tmp_path, tmp_path / "model", 64, 0, "float32")
    assert all(len(text.split()) <= room for text in json.loads((tmp_path / "prompts.json").read_text()))
