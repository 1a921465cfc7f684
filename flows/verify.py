"""`fisherfold verify`: is every byte what was written, and is every output made from what lies here now?"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fisherfold.export.lineage import damaged_files, read_lineage
from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.files import file_fault, read_manifest
from fisherfold.run.pointers import pointer_file
from fisherfold.run.workspace import STAGES, Workspace
from flows.staleness import NEVER, stale_reasons, summary
from flows.tables import print_table

TOLD = {"name": "–", "origin": "–", "licence": "not stated"}
"""What is told of a source, and what stands for it where nothing is known."""
DIGITS, WIDTH = 12, 80


class Checked(NamedTuple):
    """What was found of one output: how many files, what is wrong with them, and what they were not made from any more."""

    name: str
    files: int
    faults: list[str]
    outdated: str = ""

    @property
    def sound(self) -> bool:
        """Whether every file is as it was written."""
        return not self.faults

    def row(self) -> tuple[str, str, str, str]:
        """Its row of the table."""
        told = "; ".join(self.faults[:3]) + (f" and {len(self.faults) - 3} more" if len(self.faults) > 3 else "")
        return self.name, str(self.files), told or "as written", self.outdated or "from what lies here"


def check_outputs(workspace: Workspace) -> Iterator[Checked]:
    """Every published output: its digests, and whether DVC would make it again."""
    reasons = stale_reasons(workspace)
    for stage in STAGES:
        folder = workspace.out(stage)
        if not folder.exists() and reasons.get(stage) == [NEVER]:
            continue
        try:
            listed = read_manifest(folder)["files"]
        except CorruptArtifact as error:
            yield Checked(stage, 0, [str(error)])
            continue
        here = {name: entry for name, entry in listed.items() if not pointer_file(folder / name).exists()}
        faults = damaged_files(folder, here)
        faults += [
            f"{name} {fault}"
            for name in sorted(listed.keys() - here.keys())
            if (fault := file_fault(folder / name, listed[name]))
        ]
        yield Checked(stage, len(listed), faults, summary(reasons.get(stage, [])))


def print_outputs(workspace: Workspace) -> int:
    """Print a row an output; 1 if a byte is wrong."""
    found = list(check_outputs(workspace))
    print_table(("output", "files", "bytes", "made"), [each.row() for each in found], right=("files",))
    if not found:
        print("nothing was written yet: fisherfold run")
    if broken := [each.name for each in found if not each.sound]:
        print(f"write again: {'; '.join(f'dvc repro --force --single-item {name}' for name in broken)}")
    return int(bool(broken))


def print_model(folder: Path) -> int:
    """Print what a model folder was made from, and what is wrong with its files; 1 if anything is.

    Raises:
        CorruptArtifact: it says nothing of itself.
    """
    document = read_lineage(folder)
    faults = damaged_files(folder, document["files"])
    sources = {name: source for name, source in document["lineage"].items() if name != "inputs"}
    rows = [(name, *(str(source.get(key, absent)) for key, absent in TOLD.items())) for name, source in sources.items()]
    print_table(("made from", "name", "origin", "licence"), rows)
    inputs = ", ".join(f"{name} {digest[:DIGITS]}" for name, digest in document["lineage"].get("inputs", {}).items())
    if inputs:
        print(textwrap.fill(f"by the outputs {inputs}", WIDTH))
    for fault in faults:
        print(f"damaged: {fault}")
    print(f"{len(document['files'])} files, {len(faults)} damaged")
    return int(bool(faults))
