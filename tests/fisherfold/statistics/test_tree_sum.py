import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherfold.run.group_writer import write_arrays
from fisherfold.run.store import array_names, read_array
from fisherfold.statistics.tree_sum import ADDED_BYTES, add_leaves, cut_leaves, portions


@given(st.integers(1, 300), st.integers(1, 40))
def test_leaves_hold_every_shard_once_and_are_about_equal(shards, leaves):
    cut = cut_leaves(shards, leaves)
    assert [shard for leaf in cut for shard in range(leaf.first, leaf.last + 1)] == list(range(shards))
    lengths = [leaf.shards for leaf in cut]
    assert len(cut) == min(shards, leaves) and max(lengths) - min(lengths) <= 1 and min(lengths) > 0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("of", [1, 2])
def test_portions_add_up_every_array_in_a_fixed_tree(tmp_path, count, of):
    arrays = [{f"{name}/x": torch.randn(7) for name in "abc"} for _ in range(count)]
    for number, leaf in enumerate(arrays):
        write_arrays(tmp_path / str(number) / "sums", leaf)
    leaves = [tmp_path / str(number) for number in range(count)]
    for portion in range(of):
        add_leaves(tmp_path / f"whole-{portion}", "sums", leaves, portion, of)
    groups = [tmp_path / f"whole-{portion}" / "sums" for portion in range(of)]
    assert sorted(name for group in groups for name in array_names(group)) == sorted(arrays[0])
    for group in groups:
        for name in array_names(group):
            terms = [leaf[name] for leaf in arrays]
            torch.testing.assert_close(read_array(group, name), torch.stack(terms).sum(0))
            if count == 5:  # two on the left, three on the right
                expected = (terms[0] + terms[1]) + (terms[2] + (terms[3] + terms[4]))
                assert torch.equal(read_array(group, name), expected)


def test_what_one_unit_adds_up_is_bounded():
    assert [portions(size) for size in (1, ADDED_BYTES, ADDED_BYTES + 1, 59 * ADDED_BYTES)] == [1, 1, 2, 59]
