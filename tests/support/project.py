"""A project folder as a fresh clone has it, in a temporary place."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = (
    "fisherfold",
    "stages",
    "flows",
    "data",
    "dvc.yaml",
    "params.yaml",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
)
QUIET = {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


def clone(folder: Path) -> Path:
    """Copy what git holds of the pipeline into `folder` and make it a git repository."""
    for name in SHIPPED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "prepared"))
        else:
            shutil.copy(source, target)
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


def command(
    folder: Path, *words: str, environment: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess:
    """Run a command of this Python's environment in `folder`, its output captured as text."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **QUIET, "PATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        **options,
    )


def last_line(folder: Path, *words: str, hub: Path, python: str | Path = sys.executable) -> dict:
    """What a fresh Python without a hub prints last, as JSON; a question on the terminal finds no one there."""
    environment = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    process = command(folder, str(python), *words, environment=environment, stdin=subprocess.DEVNULL)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of benchmarks/`name`.py, for as long as the test runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
