"""What stage `capture` has published, bit by bit."""

from pathlib import Path

import torch

from fisherfold.run.group_writer import SUFFIX
from fisherfold.run.store import array_names, read_array
from fisherfold.run.workspace import Workspace


def groups(workspace: Workspace) -> list[Path]:
    """All groups of arrays that were published."""
    out = workspace.out("capture")
    found = sorted(path.name.removesuffix(SUFFIX) for path in out.glob(f"gradients/*{SUFFIX}"))
    return [out / "statistics", *(out / "gradients" / name for name in found)]


def bits(workspace: Workspace) -> dict:
    """Every published array and fact, whatever the order in which they were written."""
    out = workspace.out("capture")
    arrays = {
        (group.name, name): read_array(group, name).flatten().view(torch.uint8).numpy().tobytes()
        for group in groups(workspace)
        for name in array_names(group)
    }
    return arrays | {name: (out / name).read_text() for name in ("capture.json", "layers.json")}


def assert_same_bits(one: Workspace, other: Workspace) -> None:
    found, expected = bits(one), bits(other)
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert found.keys() == expected.keys()
