"""An engine that ends units in a drawn order."""

import random
from collections.abc import Callable, Iterator, Mapping

from fisherfold.run.determinism import describe_machine
from fisherfold.run.engine import Files, Unit


class Shuffled:
    """Runs units as a cluster of `slots` workers could: any of those in work ends next. Records what was given out."""

    def __init__(self, slots: int, seed: int) -> None:
        self.slots = slots
        self.given_out: list[str] = []
        self._random = random.Random(seed)

    def machine(self) -> dict[str, str]:
        return describe_machine()

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        waiting, unfinished, working = dict(units), set(units), []
        while unfinished:
            while len(working) < self.slots and (
                possible := [n for n in waiting if unfinished.isdisjoint(units[n].after)]
            ):
                working.append(possible[0])
                self.given_out.append(possible[0])
                del waiting[possible[0]]
            name = working.pop(self._random.randrange(len(working)))
            yield name, write(name, units[name])
            unfinished.discard(name)
