"""One stage in this process, its units on the engine that the settings name."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fisherfold.run.engine import use_engine
from fisherfold.run.errors import EngineError
from fisherfold.run.registry import Registry
from flows.cluster.unit_channel import engine_of_run
from flows.settings import Settings, read_settings, variable

ENGINES: Registry[Callable[[str, Callable[[], None], Settings, int | None], None]] = Registry("FISHERFOLD_ENGINE")
"""Functions of a stage's name, the stage as a call without arguments, the settings and the stage's `threads`."""


def run_on_engine(stage: str, work: Callable[[], None], settings: Settings, threads: int | None) -> None:
    """Run one stage.

    Raises:
        EngineError: the engine cannot be used as asked; and whatever the stage raises.
    """
    ENGINES.lookup(settings.engine)(stage, work, settings, threads)


@ENGINES.register("inline")
def run_inline(stage: str, work: Callable[[], None], settings: Settings, threads: int | None) -> None:
    """Units in this process, one after the other; needs neither Prefect nor Ray."""
    work()


@ENGINES.register("ray")
def run_on_ray(stage: str, work: Callable[[], None], settings: Settings, threads: int | None) -> None:
    """Units as Prefect tasks on a Ray cluster: by the process of the run that this stage belongs to, else by this one."""
    if settings.units:
        with engine_of_run(settings.units, stage, threads) as engine, use_engine(engine):
            work()
        return
    require_engine(settings)
    from flows.cluster.ray_engine import run_stage_flow

    run_stage_flow(stage, work, settings, threads)


@contextmanager
def offered_engine(stage: str) -> Iterator[dict[str, str]]:
    """Around a process of a stage: the variables by which it hands its units to this process, if the engine is one for a whole run.

    Raises:
        EngineError: the engine cannot be used as asked.
    """
    settings = read_settings()
    if settings.engine == "inline":
        yield {}
        return
    require_engine(settings)
    from flows.cluster.ray_engine import taking_stage

    with taking_stage(stage, settings) as address:
        yield {variable("units"): address}


@contextmanager
def ending_engine() -> Iterator[None]:
    """Around a run: the engine that its stages have been offered ends with the block."""
    try:
        yield
    finally:
        if ray := sys.modules.get("ray"):
            ray.shutdown()


def require_engine(settings: Settings) -> None:
    """Raise EngineError unless what the engine needs is installed here."""
    if settings.engine != "ray":
        return
    try:
        import prefect_ray  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"Engine 'ray' needs what is not installed here ({error}): pip install 'fisherfold[cluster]', on every node."
        ) from None
