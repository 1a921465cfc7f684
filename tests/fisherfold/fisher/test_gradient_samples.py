"""Blocks of gradients: their order, their averages."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.fisher.gradient_samples import averaged, regroup


def test_regroup_keeps_every_sequence_in_order() -> None:
    left, right = torch.arange(23.0)[:, None, None].expand(23, 3, 1), torch.arange(23.0)[:, None, None].expand(23, 2, 1)
    for sizes in ([23], [1] * 23, [5, 0, 9, 9], [20, 3]):
        for columns in (1, 4, 7, 23, 40):
            shards = zip(left.split(sizes), right.split(sizes))
            blocks = list(regroup(shards, lambda shard, size=columns: size))
            assert [len(block[0]) for block in blocks[:-1]] == [columns] * (len(blocks) - 1)
            assert torch.equal(torch.cat([block[0] for block in blocks]), left)
            assert torch.equal(torch.cat([block[1] for block in blocks]), right)


@settings(max_examples=30, deadline=None)
@given(
    sequences=st.integers(1, 9),
    together=st.integers(1, 5),
    rank=st.integers(1, 4),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_averages_of_sketches_and_of_gradients_are_the_same(
    sequences: int, together: int, rank: int, outputs: int, inputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(sequences, outputs, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(sequences, inputs, rank, generator=generator, dtype=torch.float64)
    expected = torch.stack([part.mean(0) for part in (left @ right.mT).split(together)])
    sketched, exact = averaged((left, right), together), averaged((left @ right.mT,), together)[0]
    written_out = sketched[0] if len(sketched) == 1 else sketched[0] @ sketched[1].mT
    torch.testing.assert_close(written_out, expected)
    torch.testing.assert_close(exact, expected)
    assert len(sketched) == 1 or together == 1 or sketched[0].shape[2] < min(outputs, inputs)
