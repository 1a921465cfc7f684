"""The simulation of units over workers, against closed forms, a clock that ticks, and the best schedule of small cases."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.planning.simulation import Task, simulate


@st.composite
def graphs(draw, most: int = 7):
    """Up to `most` tasks of whole seconds, each after some of those before it."""
    count = draw(st.integers(1, most))
    return {
        str(i): Task(
            draw(st.integers(1, 5)), tuple(draw(st.sets(st.sampled_from([str(j) for j in range(i)])))) if i else ()
        )
        for i in range(count)
    }


def ticking(tasks: dict[str, Task], workers: int, start: int = 0) -> int:
    """The same rule, one second at a time."""
    ends: dict[str, int] = {}
    free = [0] * workers  # when each worker is free, in the order in which they are used
    used = [False] * workers
    now = 0
    while len(ends) < len(tasks):
        for name, task in tasks.items():
            idle = [w for w in range(workers) if free[w] <= now]
            open_ = name not in ends and all(ends.get(before, now + 1) <= now for before in task.after)
            if open_ and idle:
                worker = max(idle, key=lambda w: used[w])
                free[worker] = now + task.seconds + (0 if used[worker] else start)
                used[worker] = True
                ends[name] = free[worker]
        now += 1
    return max(ends.values())


def best(tasks: dict[str, Task], workers: int) -> float:
    """The shortest of all list schedules; without waiting on purpose one of them is optimal."""
    orders = (order for order in permutations(tasks))
    return min(simulate({name: tasks[name] for name in order}, workers).makespan for order in orders)


@given(graphs(), st.integers(1, 4), st.integers(0, 3))
def test_it_is_what_a_ticking_clock_gives(tasks, workers, start):
    assert simulate(tasks, workers, start).makespan == ticking(tasks, workers, start)


@given(graphs(5), st.integers(1, 3))
def test_graham_s_bound_and_the_obvious_ones(tasks, workers):
    schedule = simulate(tasks, workers)
    assert schedule.makespan >= max(schedule.work / workers, schedule.longest_chain)
    assert schedule.makespan <= schedule.work / workers + (1 - 1 / workers) * schedule.longest_chain + 1e-9
    assert schedule.makespan <= (2 - 1 / workers) * best(tasks, workers) + 1e-9
    assert simulate(tasks, 1).makespan == schedule.work
    assert simulate(tasks, len(tasks)).makespan == schedule.longest_chain


@given(st.integers(1, 50), st.integers(1, 12), st.floats(0.1, 9))
def test_equal_units_take_rounds(units, workers, seconds):
    tasks = {str(i): Task(seconds) for i in range(units)}
    assert simulate(tasks, workers, 1.0).makespan == pytest.approx(1 + -(-units // workers) * seconds)


@pytest.mark.parametrize("leaves", [1, 3, 8])
def test_what_waits_for_all_leaves_comes_after_the_last(leaves):
    names = tuple(map(str, range(leaves)))
    tasks = {name: Task(7.0) for name in names} | {f"sum-{i}": Task(2.0, names) for i in range(2)}
    assert simulate(tasks, leaves).makespan == 7.0 + (2.0 if leaves > 1 else 4.0)
    assert simulate(tasks, 1).makespan == leaves * 7.0 + 4.0


def test_tasks_that_can_never_start():
    with pytest.raises(ValueError, match="a waits for b, which is not there"):
        simulate({"a": Task(1, ("b",))}, 1)
    with pytest.raises(ValueError, match="in a circle"):
        simulate({"a": Task(1, ("b",)), "b": Task(1, ("a",))}, 1)
    assert simulate({}, 3).makespan == 0
