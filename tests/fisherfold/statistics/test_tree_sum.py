import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.run.store import array_names, read_array, write_arrays
from fisherfold.statistics.tree_sum import Part, Step, add_parts, parts_at_once, summation_tree


@given(st.integers(1, 300))
def test_every_shard_is_summed_once_with_few_parts_waiting(shards):
    waiting: set[Part] = set()
    most = 0
    for part, terms, after in summation_tree(shards):
        assert set(after) <= waiting
        most = max(most, len(waiting) + 1)
        if terms:
            left, right = terms
            assert left in waiting and right in waiting
            assert left.last + 1 == right.first and part == Part(left.first, right.last)
        waiting = waiting - set(terms) | {part}
    assert waiting == {Part(0, shards - 1)}
    assert most == parts_at_once(shards)


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_waves_make_the_same_parts_with_a_bounded_number_waiting(shards, at_once, random):
    """`at_once` workers take the first step that is possible; whichever ends next is drawn."""
    pending = list(summation_tree(shards, at_once))
    assert [step[:2] for step in pending] == [step[:2] for step in summation_tree(shards)]
    made: set[Part] = set()
    waiting: set[Part] = set()
    working: list[Step] = []
    while pending or working:
        while (possible := [step for step in pending if made.issuperset(step.after)]) and len(working) < at_once:
            pending.remove(possible[0])
            working.append(possible[0])
        assert len(waiting) + len(working) <= parts_at_once(shards, at_once)
        part, terms, _ = working.pop(random.randrange(len(working)))
        made.add(part)
        waiting = waiting - set(terms) | {part}
    assert waiting == {Part(0, shards - 1)}


def test_parts_are_added_array_by_array(tmp_path):
    arrays = {"a/x": torch.arange(6.0).view(2, 3), "b/y": torch.ones(4)}
    for name, factor in (("left", 1.0), ("right", 10.0)):
        write_arrays(tmp_path / name, {key: factor * values for key, values in arrays.items()})
    add_parts(tmp_path / "sum", tmp_path / "left", tmp_path / "right")
    assert array_names(tmp_path / "sum") == ["a/x", "b/y"]
    for key, values in arrays.items():
        assert torch.equal(read_array(tmp_path / "sum", key), 11 * values)
