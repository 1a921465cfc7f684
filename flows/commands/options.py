"""Options and places that several commands share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from fisherfold.run.errors import ParameterError
from fisherfold.run.workspace import STAGES, Workspace

if TYPE_CHECKING:
    from flows.settings import Settings

PARAMS_FILE = "params.yaml"
StageName = Literal[STAGES]
Until = Annotated[StageName, Option(help="Stop after this stage.")]
Assignments = Annotated[
    list[str], Option("--set", metavar="STAGE.KEY=VALUE", help="A parameter, e.g. ranks.ratio=0.4; again for more.")
]
Json = Annotated[bool, Option("--json", help="For machines.")]


@dataclass(frozen=True)
class EngineOptions:
    """Where work runs; the same as FISHERFOLD_ENGINE and so on (`flows.settings`). Changes no result."""

    engine: Annotated[
        Literal["inline", "ray"] | None, Option(help="Where units run: this process (default), or Ray.")
    ] = None
    address: Annotated[
        str | None, Option(metavar="HOST:PORT", help="Of a running Ray; without it one of this host is started.")
    ] = None
    num_cpus: Annotated[
        str | None, Option(metavar="N", help="Ray: cores of a unit (default: the stage's `threads`).")
    ] = None
    num_gpus: Annotated[str | None, Option(metavar="N", help="Ray: GPUs of a unit (default: 0).")] = None
    memory: Annotated[str | None, Option(metavar="BYTES", help="Ray: memory of a unit, such as 16GB.")] = None

    def settings(self) -> "Settings":
        """The settings of the environment with these on top; child processes see them too.

        Raises:
            ParameterError: one has a value that cannot be.
        """
        from flows.settings import read_settings, set_environment

        set_environment(
            engine=self.engine,
            ray_address=self.address,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            memory=self.memory,
        )
        return read_settings()

    def require(self, workspace: Workspace) -> None:
        """Refuse before anything starts what the engine lacks.

        Raises:
            EngineError: names it, with the cure.
        """
        settings = self.settings()
        if settings.engine == "inline":
            return
        from flows.cluster.cluster_checks import check_cluster
        from flows.engine_choice import require_engine
        from flows.findings import require

        require_engine(settings)
        require(check_cluster(settings, workspace))


def with_engine(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `EngineOptions`; it gets them together, as its argument `engine_options`."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "engine_options"]
    added = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=field.type)
        for field in fields(EngineOptions)
    ]

    @wraps(command)
    def called(**values: Any) -> Any:
        chosen = EngineOptions(**{each.name: values.pop(each.name) for each in added})
        return command(engine_options=chosen, **values)

    called.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in (*own, *added)}
    return called


def workspace_here() -> Workspace:
    """The project folder: the nearest one upwards that holds params.yaml and dvc.yaml.

    Raises:
        ParameterError: there is none; says how to get one.
    """
    found = project_here()
    if found is None:
        raise ParameterError(
            f"{Path.cwd()} is not inside a Fisherfold project (no {PARAMS_FILE} beside a dvc.yaml here or above). {GET_ONE}"
        )
    return found


GET_ONE = (
    "Get one: `git clone` Fisherfold's repository and `cd` into it; `plan --model`, `doctor` and `--version` need none."
)


def project_here() -> Workspace | None:
    """The project folder that this process stands in, if it does."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PARAMS_FILE).exists() and (folder / "dvc.yaml").exists():
            return Workspace(folder)
    return None


def shipped_data() -> Workspace:
    """Where `data` lies that came with this code; for commands that work outside a project."""
    return Workspace(Path(__file__).parents[2])


def stages_until(last: str) -> tuple[str, ...]:
    """The stages up to this one, in their order."""
    return STAGES[: STAGES.index(last) + 1]
