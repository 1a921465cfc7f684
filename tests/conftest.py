import os

import pytest
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("steady", deadline=None, derandomize=True)  # a busy machine fails no test
settings.load_profile("steady")

pytest_plugins = ["object_storage", "prefect_server", "tiny_project", "wheel_alone"]

ASKED_FOR = ("slow", "families", "llama_cpp", "serve", "browser")  # markers of what runs only where `-m` names it
LAST = ("test_pipeline", "test_demo")  # whole runs come after what can fail in a second


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """Fast tests first; among several workers (`pytest -n 2 --dist loadfile`) whole runs first, so that none is left alone with them."""
    left_out = [marker for marker in ASKED_FOR if marker not in config.option.markexpr]
    unasked = [item for item in items if any(item.get_closest_marker(marker) for marker in left_out)]
    config.hook.pytest_deselected(items=unasked)
    items[:] = [item for item in items if item not in unasked]
    items.sort(key=lambda item: LAST.index(_name(item)) if _name(item) in LAST else -1)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -LAST.index(_name(item)) - 1 if _name(item) in LAST else 0)


def _name(item) -> str:
    return item.module.__name__.rpartition(".")[2]
