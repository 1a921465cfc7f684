"""Engines: where the units of a stage run. Stages know this protocol and nothing of what lies behind it.

An engine changes no bit of a result, so it is no parameter: the default runs units in this process, others are set by
`flows` for the time of a run.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from fisherfold.run.determinism import describe_machine

Files = dict[str, dict[str, Any]]
"""Size and SHA-256 of every file of a unit, by relative path; see `fisherfold.run.files.describe_files`."""


class Unit(NamedTuple):
    """One idempotent piece of a stage's work.

    Attributes:
        work: a function of a module, called as ``work(folder, *arguments)`` with an empty folder to write into.
        arguments: paths and small values, for they may travel to another host.
        after: names of the units whose results it reads.
    """

    work: Callable[..., None]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


class Engine(Protocol):
    """Runs units.

    Attributes:
        slots: how many units are in work at once, at most.
    """

    slots: int

    def machine(self) -> dict[str, str]:
        """What its units are computed with, see `fisherfold.run.determinism.describe_machine`."""

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        """Call `write(name, unit)` once for every unit that ends well; yield its name and what it returned.

        Units are taken in their order as far as `after` and free slots allow; one that is named in `after` has been
        yielded, and the caller has asked for more, before its dependants start. Names in `after` that are not
        among `units` are finished already.
        """


class Inline:
    """The engine of this process: one unit after the other, in their order."""

    slots = 1

    def machine(self) -> dict[str, str]:
        return describe_machine()

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        """See `Engine.run`."""
        for name, unit in units.items():
            yield name, write(name, unit)


_engine: Engine = Inline()


def current_engine() -> Engine:
    """The engine that units are given to."""
    return _engine


@contextmanager
def use_engine(engine: Engine) -> Iterator[None]:
    """Inside, units are given to `engine`."""
    global _engine
    before, _engine = _engine, engine
    try:
        yield
    finally:
        _engine = before
