"""What dvc.lock says, and one that says nothing."""

import pytest

from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.workspace import Workspace
from flows.repository import recorded


def test_stages_that_have_run(tmp_path):
    (tmp_path / "params.yaml").write_text("")
    assert recorded(Workspace(tmp_path)) == {}
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {prepare: {cmd: fisherfold stage prepare}}\n")
    assert recorded(Workspace(tmp_path)) == {"prepare": {"cmd": "fisherfold stage prepare"}}


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b"[1]", b"stages: 5", b"stages: {prepare: 5}"])
def test_what_dvc_did_not_write_is_named(tmp_path, text):
    (tmp_path / "dvc.lock").write_bytes(text)
    with pytest.raises(CorruptArtifact, match=r"dvc\.lock is not what DVC writes"):
        recorded(Workspace(tmp_path))
