"""Where things lie in a project folder, and what identifies them.

A published output is a folder with a ``manifest.json`` that lists every file with its size and SHA-256. The digest of
an output, or of a part of it, is the digest of that list, so naming an input costs no second read of the data.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stages import pointers
from stages.errors import CorruptArtifact

MANIFEST = "manifest.json"
CODE = Path(__file__).parent
INFRASTRUCTURE = frozenset(
    {
        "disk",
        "engine",
        "errors",
        "object_group",
        "objects",
        "params",
        "pointers",
        "progress",
        "registry",
        "scratch",
        "workspace",
    }
)
"""Modules of this package that carry stages along but cannot change a number, so no result depends on their text."""


@dataclass(frozen=True)
class Workspace:
    """A project folder: `root` holds params.yaml, data and artifacts."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def out(self, stage: str) -> Path:
        """The published output folder of a stage."""
        return self.artifacts / stage

    @property
    def model(self) -> Path:
        """The prepared dense model, a Hugging Face folder."""
        return self.out("prepare") / "model"

    def table(self, name: str) -> Path:
        """A prepared Parquet table: calibration, tuning, evaluation or questions."""
        return self.root / "data" / "prepared" / f"{name}.parquet"

    def recipes(self, kind: str) -> Path:
        """The folder of recipes of one kind: models, corpora, questions or tasks."""
        return self.root / "data" / kind


def read_manifest(folder: Path) -> dict:
    """The manifest of a published output.

    Raises:
        CorruptArtifact: there is none, or it is not readable.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CorruptArtifact(
            f"{folder} has no {MANIFEST}: stage {folder.name!r} has not finished. {_cure(folder)}"
        ) from None
    except ValueError as error:
        raise CorruptArtifact(f"{folder / MANIFEST} is not readable ({error}). {_cure(folder)}") from None


def verify_output(folder: Path, prefix: str = "") -> str:
    """Check that every listed file below `prefix` is there in full, and return the digest of that part.

    Sizes are compared, not contents: a flipped bit is caught by the checksum of the array when it is read. A pointer must
    name what the manifest lists; the object itself is not asked for.

    Raises:
        CorruptArtifact: a file is missing or has another size, or a pointer names another file.
    """
    files = {name: entry for name, entry in read_manifest(folder)["files"].items() if name.startswith(prefix)}
    for name, entry in files.items():
        if state := file_fault(folder / name, entry):
            raise CorruptArtifact(f"{folder / name} {state}. {_cure(folder)}")
    return digest_json(files)


def file_fault(path: Path, entry: dict) -> str | None:
    """What is wrong with a file that a manifest lists as `entry`, by its size or its pointer; None if nothing is."""
    pointer = pointers.pointer_file(path)
    if path.is_file():
        found = path.stat().st_size
        return None if found == entry["bytes"] else f"has {found} bytes instead of {entry['bytes']}"
    if not pointer.exists():
        return "is missing"
    return None if pointers.describe_pointer(pointer) == entry else f"is another one by {pointer.name}"


def _cure(folder: Path) -> str:
    return f"Restore it with `dvc checkout`, or write it again with `dvc repro --force --single-item {folder.name}`."


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        CorruptArtifact: there is no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing. Write it with `dvc repro`.") from None


def digest_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict]:
    """Size and SHA-256 of every file below `folder` (or of `names`), by relative path, sorted; a pointer is listed as its file."""
    found = (
        names
        if names is not None
        else (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    )
    return dict(_describe_file(folder, name) for name in sorted(found))


def _describe_file(folder: Path, name: str) -> tuple[str, dict]:
    path = folder / name
    if name.endswith(pointers.SUFFIX):
        return name.removesuffix(pointers.SUFFIX), pointers.describe_pointer(path)
    return name, {"bytes": path.stat().st_size, "sha256": digest_file(path)}


@cache
def code_modules(stage: str) -> tuple[str, ...]:
    """The modules of this package that can change the result of `stage`: its import closure, sorted."""
    seen: set[str] = set()
    pending = [stage]
    while pending:
        name = pending.pop()
        if name in seen or name in INFRASTRUCTURE:
            continue
        seen.add(name)
        pending += _imported_modules((CODE / f"{name}.py").read_text())
    return tuple(sorted(seen))


def _imported_modules(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            submodule = node.module.split(".")[1:2]
            names += submodule or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stages.")]
    return names


@cache
def code_digest(stage: str) -> str:
    """Digest of the source text that can change the result of `stage`."""
    return digest_json({name: digest_file(CODE / f"{name}.py") for name in code_modules(stage)})
