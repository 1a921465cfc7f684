"""Models that stay in memory from unit to unit."""

import gc
import weakref

from fisherfold.network.models import PLACES, StaysLoaded


class Model:
    pass


def test_all_loaders_share_a_few_places_and_the_oldest_goes_before_the_next_is_loaded():
    alive: weakref.WeakSet[Model] = weakref.WeakSet()
    found = []

    def make(name: str, half: bool = False) -> Model:
        gc.collect()
        found.append((name, len(alive)))
        model = Model()
        alive.add(model)
        return model

    first, second = StaysLoaded(make), StaysLoaded(lambda name: make(name))
    StaysLoaded.cache_clear()
    kept = weakref.ref(first("a"))
    assert first("a") is kept() and first("a", half=True) is not kept()
    first("a")  # the other is the oldest now
    second("b")
    assert first("a") is kept()
    assert found == [("a", 0), ("a", 1), ("b", PLACES - 1)]
    second.cache_clear()
    gc.collect()
    assert kept() is None and not alive
