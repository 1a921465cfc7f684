"""One stage in this process, its units on the engine that the settings name."""

from collections.abc import Callable

from flows.settings import Settings, set_environment
from stages.errors import EngineError
from stages.registry import Registry

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
    """Units as Prefect tasks on a Ray cluster."""
    require_engine(settings)
    from flows.ray_engine import run_stage_flow

    run_stage_flow(stage, work, settings, threads)


def offer_cluster(settings: Settings) -> None:
    """Before stages run in processes of their own: start the Ray of this host that they share, if they are to have one.

    It ends with this process.
    """
    if settings.engine == "ray" and settings.ray_address is None:
        from flows.cluster import start_here

        set_environment(ray_address=start_here())


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
