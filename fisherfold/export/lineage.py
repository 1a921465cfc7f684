"""What a model folder says of itself: the digest of every file, and from what it was made. It stays checkable wherever the folder goes.

<folder>/fisherfold.json      {"files": {name: {bytes, sha256}}, "lineage": {"model": …, "corpus": …, "inputs": {stage's output: digest}}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.files import describe_files
from fisherfold.run.workspace import Workspace

FILE = "fisherfold.json"
CARD = "README.md"  # not listed: that of stage report takes its place
SOURCE = ("name", "origin", "digest", "licence")


def write_lineage(folder: Path, workspace: Workspace, inputs: Mapping[str, str]) -> None:
    """Describe a finished model folder.

    Args:
        folder: holds all its files.
        workspace: the project folder; what stage `prepare` recorded of its sources is taken over.
        inputs: digest of every output that the model was made from.
    """
    facts = json.loads((workspace.out("prepare") / "prepare.json").read_text(encoding="utf-8"))
    sources = {name: _source(entry) for name, entry in facts.items() if isinstance(entry, dict) and "digest" in entry}
    _describe(folder, sources | {"inputs": dict(inputs)})


def _describe(folder: Path, lineage: Mapping[str, Any]) -> None:
    files = {name: entry for name, entry in describe_files(folder).items() if name not in (CARD, FILE)}
    document = {"files": files, "lineage": lineage}
    (folder / FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def pass_on_lineage(source: Path, folder: Path) -> None:
    """Describe a folder that was made from another model folder, which may say nothing of itself."""
    try:
        lineage = read_lineage(source)["lineage"]
    except CorruptArtifact:
        lineage = {}
    _describe(folder, lineage)


def _source(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in SOURCE if entry.get(key) is not None}


def read_lineage(folder: Path) -> dict[str, Any]:
    """The content of fisherfold.json.

    Raises:
        CorruptArtifact: there is none, or it is not readable.
    """
    try:
        document = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if all(isinstance(entry, dict) for part in ("files", "lineage") for entry in document[part].values()):
            return dict(document)
    except FileNotFoundError:
        raise CorruptArtifact(
            f"{folder} holds no {FILE}: it is no model of Fisherfold, or was saved again by something else."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{folder / FILE} is not readable ({error!r}).") from None
    raise CorruptArtifact(f"{folder / FILE} is not readable: it lists no files.")


def damaged_files(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the listed files of a folder, one text each; every byte is read. Further files are no fault."""
    faults = []
    for name, entry in sorted(listed.items()):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            faults.append(f"{name} is outside of the folder")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif describe_files(folder, [name])[name] != dict(entry):
            faults.append(f"{name} has other bytes than were written")
    return faults
