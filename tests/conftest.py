import os

from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("steady", deadline=None, derandomize=True)  # a busy machine fails no test
settings.load_profile("steady")

pytest_plugins = ["object_storage", "prefect_server", "tiny_project"]

LAST = ("test_pipeline", "test_demo")  # whole runs come after what can fail in a second


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: LAST.index(_name(item)) if _name(item) in LAST else -1)


def _name(item) -> str:
    return item.module.__name__.rpartition(".")[2]
