"""The commands that look after shared storage: store check, store gc."""

from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from fisherfold.run.workspace import Workspace
from flows.commands.options import workspace_here

store = Typer(
    help="Look after what FISHERFOLD_STORE holds of this project.", rich_markup_mode=None, no_args_is_help=True
)


@store.command()
def check() -> int:
    """Can it be written and read, and is every object that artifacts/ names there in full?"""
    from flows.storage import check_store

    return check_store(workspace_here())


@store.command()
def gc(
    delete: Annotated[bool, Option("--delete", help="Delete them for good.")] = False,
    days: Annotated[float, Option(help="Leave what is younger.")] = 7,
    project: Annotated[list[Path], Option(help="Another project that shares the prefix; again for more.")] = [],  # noqa: B006
) -> int:
    """List objects that neither artifacts/ nor DVC's cache names, or delete them."""
    from flows.storage import clean_store

    return clean_store([workspace_here(), *map(Workspace, project)], days, delete)
