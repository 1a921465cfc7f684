"""A discrete simulation of units over workers: list scheduling, as the engines do it.

Whenever a worker is free it takes the first unit, in their order, whose predecessors are all done (Graham 1966: at most
2 - 1/W times as long as the best schedule for W workers).
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """One unit: how long it takes, and which units must be done before it."""

    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    makespan: seconds until the last unit is done.
    work: Σ seconds of all units.
    longest_chain: seconds of the longest path of units that wait for each other.
    units: how many.
    """

    makespan: float
    work: float
    longest_chain: float
    units: int


def simulate(tasks: Mapping[str, Task], workers: int, start: float = 0.0) -> Schedule:
    """Schedule tasks over workers, each of which takes `start` seconds before its first unit.

    Raises:
        ValueError: a task waits for one that does not exist, or in a circle.
    """
    order = {name: index for index, name in enumerate(tasks)}
    names = list(tasks)
    missing = {name: len(set(task.after)) for name, task in tasks.items()}
    dependants: dict[str, list[str]] = {name: [] for name in tasks}
    for name, task in tasks.items():
        for before in set(task.after):
            if before not in tasks:
                raise ValueError(f"{name} waits for {before}, which is not there")
            dependants[before].append(name)
    ready = [order[name] for name in names if not missing[name]]
    running: list[tuple[float, int]] = []
    now, fresh, idle = 0.0, workers, 0
    chains: dict[str, float] = {}  # of the units that are done, in the order in which they were
    while ready or running:
        while ready and fresh + idle:
            index, first = heapq.heappop(ready), not idle
            idle, fresh = (idle, fresh - 1) if first else (idle - 1, fresh)
            heapq.heappush(running, (now + tasks[names[index]].seconds + (start if first else 0.0), index))
        now, index = heapq.heappop(running)
        idle += 1
        done = names[index]
        chains[done] = tasks[done].seconds + max((chains[before] for before in tasks[done].after), default=0.0)
        for name in dependants[done]:
            missing[name] -= 1
            if not missing[name]:
                heapq.heappush(ready, order[name])
    if len(chains) < len(tasks):
        raise ValueError("units wait for each other in a circle")
    return Schedule(now, sum(task.seconds for task in tasks.values()), max(chains.values(), default=0.0), len(tasks))
