"""A process that ends in the middle of its work."""

import itertools
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest

from fisherfold.run import disk


class Killed(BaseException):
    """Stands for the end of the process; nothing that handles errors takes it for one."""


def killed_again_and_again(
    run: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    folders: Sequence[ModuleType],
    trees: Sequence[ModuleType] = (),
) -> int:
    """Run, ended at the 1st, (1 + every)th, … durable step, each run going on from the one before, until one comes to its end.

    Args:
        folders: modules whose `sync_folder` is such a step.
        trees: modules whose `sync_tree` is none.

    Returns:
        The number of the step that the last run did not reach.
    """
    sync = disk.sync_folder
    for fatal in itertools.count(1, every):
        calls = itertools.count(1)

        def deadly(path, fatal=fatal, calls=calls):
            if next(calls) == fatal:
                raise Killed
            sync(path)

        with monkeypatch.context() as patch:
            for module in folders:
                patch.setattr(module, "sync_folder", deadly)
            for module in trees:
                patch.setattr(module, "sync_tree", lambda folder: None)
            patch.setattr(os, "fsync", lambda descriptor: None)  # dozens of runs should not wait for the disk
            try:
                run()
                return fatal
            except Killed:
                continue
    raise AssertionError("unreachable")
