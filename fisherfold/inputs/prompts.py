"""Lists of prompts: of ``data/prompts``, or a text file of one prompt a line."""

from dataclasses import dataclass

from fisherfold.inputs.recipes import Source, find_path
from fisherfold.inputs.records import open_text
from fisherfold.run.errors import InputError
from fisherfold.run.workspace import Workspace


@dataclass(frozen=True)
class PromptList:
    """Prompts, and where they come from."""

    source: Source
    texts: tuple[str, ...]


def find_prompts(workspace: Workspace, name: str) -> PromptList:
    """What ``prepare.prompts`` means.

    Raises:
        InputError: it is neither a list of data/prompts nor a file of text, or holds no prompt.
    """
    shipped = workspace.recipes("prompts") / f"{name}.txt"
    path = shipped if shipped.is_file() else find_path(workspace, name)
    if path is None or not path.is_file():
        known = ", ".join(sorted(one.stem for one in workspace.recipes("prompts").glob("*.txt"))) or "none"
        raise InputError(
            f"prepare.prompts = {name!r} is neither a list in data/prompts ({known}) nor a text file with one prompt a line. Without "
            "prompts: prepare.self_written=0 and prepare.held_out_prompts=0."
        )
    with open_text(path) as lines:
        texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise InputError(f"prepare.prompts = {name!r}: {path} holds no prompt.")
    return PromptList(Source.from_files(name, [path]), texts)
