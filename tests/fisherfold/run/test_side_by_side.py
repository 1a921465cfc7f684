"""Pieces computed side by side: in their order, few at a time, with the same bits however many there are at once."""

import threading

import pytest
import torch

from fisherfold.run.side_by_side import side_by_side


@pytest.mark.parametrize(("threads", "pieces", "each"), [(1, 4, 1), (2, 2, 1), (2, 4, 1), (4, 2, 2), (2, 1, 2)])
def test_they_have_the_threads_between_them(threads, pieces, each):
    before = torch.get_num_threads()
    with side_by_side(threads, pieces) as apply:
        assert list(apply(lambda piece: (piece, torch.get_num_threads()), range(7))) == [(n, each) for n in range(7)]
    assert torch.get_num_threads() == before


def test_two_are_at_work_at_once_and_results_keep_their_order():
    met = threading.Barrier(2, timeout=60)

    def work(piece):
        met.wait()  # passes only if two are here
        return piece

    with side_by_side(2, 2) as apply:
        assert list(apply(work, iter(range(4)))) == [0, 1, 2, 3]


def test_pieces_are_taken_few_at_a_time():
    taken = []

    def pieces():
        for number in range(100):
            taken.append(number)
            yield number

    with side_by_side(2, 2) as apply:
        found = apply(lambda piece: piece, pieces())
        next(found)
        assert len(taken) == 3
        assert [*found][-1] == 99


def test_what_a_piece_raises_is_raised_here():
    def fail(piece):
        raise ValueError(piece)

    with pytest.raises(ValueError, match="1"), side_by_side(2, 2) as apply:
        list(apply(fail, [1, 2, 3]))


def test_bits_do_not_depend_on_how_many_are_at_once():
    x = torch.randn(8, 64, 200, generator=torch.Generator().manual_seed(0))
    digests = []
    for lanes in (1, 2, 3):
        with side_by_side(lanes, lanes) as apply:
            digests.append(torch.stack(list(apply(lambda piece: torch.linalg.svd(piece)[0] @ piece, x))))
    assert all(torch.equal(found, digests[0]) for found in digests)
