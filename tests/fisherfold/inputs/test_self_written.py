"""How many prompts are answered together."""

import pytest

from fisherfold.inputs.sampling import BATCH
from fisherfold.inputs.self_written import Turns, batch_size


def no_more(number: int) -> tuple[str, ...]:
    return ()


def test_without_further_prompts_the_list_comes_again_in_numbered_batches() -> None:
    turns = Turns(["a", "b", "c"], no_more, set(), rounds=2)
    assert [turns.take(2), turns.take(3), turns.take(5), turns.take(1)] == [
        (0, ("a", "b")),
        (1, ("c", "a", "b")),
        (2, ("c",)),
        None,
    ]


def test_further_prompts_follow_the_list_and_none_that_is_taken() -> None:
    taken = {"a", "b", "held out"}
    rounds = [("a", "x", "held out"), ("held out", "b"), ("x", "y")]
    turns = Turns(["a", "b"], rounds.__getitem__, taken)
    assert turns.take(6) == (0, ("a", "b", "x", "a", "b", "y"))
    assert taken == {"a", "b", "held out", "x", "y"}


@pytest.mark.parametrize(
    ("missing", "answered", "held", "expected"),
    [
        (4096, 0, 0, 43),  # of 96 tokens at most
        (100_000, 0, 0, BATCH),
        (88, 43, 4008, 2),  # of 93 tokens, and a tenth more
        (1, 43, 4008, 1),
        (5000, 43, 4008, 60),
        (1_000, 40, 0, BATCH),  # nothing but empty answers
    ],
)
def test_a_batch_is_as_large_as_what_is_missing(missing: int, answered: int, held: int, expected: int) -> None:
    assert batch_size(missing, answered, held, longest=96) == expected
