"""Which code the command `fisherfold` runs: that of the project it stands in, whatever else is called `flows`."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
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


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what the wheel installs, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("wheel")
    source = clone(folder / "source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    built = command(
        folder, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "built", "./source"
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    return folder / "installed"


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


OUTSIDE = """
import json, sys
from pathlib import Path
import fisherfold.cli
statuses = {}
for words in (["--version"], ["plan", "--model", "llama-7b", "--set", "ranks.ratio=0.4"], ["doctor"], ["run"]):
    sys.argv = ["fisherfold", *words]
    statuses[words[0]] = fisherfold.cli.main()

import fisherfold.runtime, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 12)[None]
model = AutoModelForCausalLM.from_pretrained(sys.argv[0] and Path("model"))
model.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved")
import flows
places = [fisherfold.__file__, flows.__file__]
print(json.dumps([statuses, places, type(model).__module__, torch.equal(model(ids).logits, again(ids).logits)]))
"""


def test_from_the_wheel_alone_checkpoints_load_and_commands_without_a_project_work(installed, finished, tmp_path):
    import json

    (tmp_path / "model").symlink_to(finished / "artifacts" / "factorize" / "model")
    environment = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    result = command(tmp_path, sys.executable, "-c", OUTSIDE, environment=environment)
    assert result.returncode == 0, result.stderr
    statuses, places, module, same = json.loads(result.stdout.splitlines()[-1])
    assert statuses == {"--version": 0, "plan": 0, "doctor": 0, "run": 2}
    assert all(Path(place).is_relative_to(installed) for place in places)
    assert module.startswith("fisherfold.runtime") and same
    assert "git clone" in result.stderr and "llama-7b" in result.stdout
