"""Pieces of one computation side by side on the threads of the processor, in one process: what comes out does not depend on how they take turns."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from fisherfold.run.determinism import chosen_device, computing_threads

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Apply(Protocol):
    """A `map`: results in the order of the pieces, which are taken from their iterable by the caller's thread, few at a time."""

    def __call__(self, function: Callable[[Piece], Result], pieces: Iterable[Piece], /) -> Iterator[Result]: ...


@contextmanager
def side_by_side(threads: int, pieces: int) -> Iterator[Apply]:
    """Inside, up to `pieces` at a time have the threads between them, threads // pieces or one each.

    The bits depend on how many threads a piece has, and not on how many are computed at once. Gradient mode and the like are a thread's own: a
    function sets what it needs.

    Args:
        threads: of the CPU.
        pieces: at most at a time.
    """
    lanes = min(threads, pieces)
    with computing_threads(threads // lanes):
        if lanes == 1:
            yield map
            return
        import torch

        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(threads // lanes,)) as pool:

            def apply(function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
                begun: deque[Future[Result]] = deque()
                for piece in pieces:
                    done = [begun.popleft().result()] if len(begun) == lanes else []
                    begun.append(pool.submit(function, piece))
                    yield from done
                while begun:
                    yield begun.popleft().result()

            yield apply


def at_once(sequences: int) -> int:
    """Of so many sequences of a batch, those that make one piece: one on the CPU, whose threads share out the batch; on other devices all."""
    return 1 if chosen_device().partition(":")[0] == "cpu" else sequences


def piece_count(sequences: int) -> int:
    """How many pieces a batch of so many sequences is computed in."""
    return sequences // at_once(sequences)
