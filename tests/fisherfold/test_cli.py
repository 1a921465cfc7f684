"""Which code the command `fisherfold` runs: that of the project it stands in, whatever else is called `flows`."""

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny
from project import ROOT, clone, command

import fisherfold.cli as cli
from fisherfold.run.files import describe_files

HOSTILE = "raise ImportError('a foreign package was imported')"
TELL = """
import sys
from fisherfold.cli import main
status = main()
import flows, stages, fisherfold
print(*(module.__file__ for module in (flows, stages, fisherfold)), sep="\\n")
"""


def foreign(folder: Path) -> Path:
    """A folder with packages of our drivers' names that cannot be imported."""
    for name in ("flows", "stages"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(HOSTILE)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project in a folder that holds a foreign `flows`."""
    above = foreign(tmp_path_factory.mktemp("above"))
    return clone(above / "project")


@pytest.mark.parametrize("where", [".", "data/models"])
def test_the_project_s_own_code_runs_whatever_else_has_its_name(project, tmp_path, where):
    path = os.pathsep.join([str(foreign(tmp_path / "environment")), str(ROOT)])
    result = command(project / where, sys.executable, "-c", TELL, "plan", "--help", environment={"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    found = [Path(line) for line in result.stdout.splitlines()[-3:]]
    assert found == [project / name / "__init__.py" for name in ("flows", "stages", "fisherfold")]


def test_children_find_the_same_code(project, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(project), ""]))
    monkeypatch.setattr(sys, "path", ["", str(project), "elsewhere"])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    cli.use_code_of(project)
    assert sys.path == [str(project), "", "elsewhere"]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(project), str(tmp_path)]
    assert not [name for name in sys.modules if name.partition(".")[0] in ("flows", "stages", "fisherfold")]


def test_workers_of_ray_find_the_same_code():
    pytest.importorskip("prefect_ray", reason="needs the extra `cluster`")
    from flows.cluster.ray_cluster import environment

    assert environment()["env_vars"]["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_a_folder_that_only_looks_like_a_project_is_none(tmp_path):
    (tmp_path / "params.yaml").touch()
    (tmp_path / "dvc.yaml").touch()
    assert cli.find_project(tmp_path) is None
    for name in ("flows", "stages"):
        (tmp_path / name).mkdir()
    (tmp_path / "below").mkdir()
    assert cli.find_project(tmp_path / "below") == tmp_path


def test_a_folder_that_is_gone_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main() == 1
    assert capsys.readouterr().err.startswith("error: the folder that this command was started in is gone")


def test_the_wheel_carries_nothing_at_top_level_but_fisherfold(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"fisherfold"}


def test_the_wheel_carries_all_of_our_code(installed):
    def code(folder: Path, inside: Path) -> dict:
        files = {name: file for name, file in describe_files(folder).items() if name.endswith(".py")}
        return {(inside / name).as_posix(): file for name, file in files.items()}

    ours = code(ROOT / "fisherfold", Path())
    ours |= {
        name: file
        for each in ("flows", "stages")
        for name, file in code(ROOT / each, Path("_orchestration", each)).items()
    }
    assert code(installed / "fisherfold", Path()) == ours


def test_the_wheel_alone_says_its_version_and_how_to_get_a_project(wheel_alone, tmp_path):
    isolated = {"PYTHONPATH": ""}
    version = command(tmp_path, str(wheel_alone / "fisherfold"), "--version", environment=isolated)
    assert version.stdout.strip().endswith(metadata.version("fisherfold"))
    refused = command(tmp_path, str(wheel_alone / "fisherfold"), "run", environment=isolated)
    assert refused.returncode != 0
    (line,) = refused.stderr.strip().splitlines()
    assert "git clone" in line


@pytest.mark.slow
@pytest.mark.parametrize("words", [("plan", "--model", "model"), ("doctor",)])
def test_commands_that_need_no_project_work_from_the_wheel_alone(wheel_alone, tmp_path, words):
    tiny.tiny_model().config.save_pretrained(tmp_path / "model")
    result = command(tmp_path, str(wheel_alone / "fisherfold"), *words, environment={"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    assert {"plan": "capture", "doctor": "project"}[words[0]] in result.stdout


OPENS = """
import os, sys
from fisherfold.cli import open_streams
open_streams()
with open("written", "w") as file:
    os.write(2, b"by a library\\n")
    print(len(sys.stdin.read()), "to nobody", flush=True)
    file.write(f"{file.fileno() > 2} {os.get_inheritable(1)}")
"""


def test_what_is_written_to_closed_streams_reaches_no_file(tmp_path):
    words = ("sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, OPENS)
    assert command(tmp_path, *words).returncode == 0
    assert (tmp_path / "written").read_text() == "True True"
