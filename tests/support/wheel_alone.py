"""An environment that has the wheel and what it depends on, and no checkout."""

import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from project import ROOT, clone, command


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = clone(folder / "source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    words = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "built", "./source")
    built = command(folder, *words)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "built").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds what the wheel installs, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def wheel_alone(wheel, tmp_path_factory) -> Path:
    """The folder of commands of a fresh environment in which pip has installed the wheel.

    Dependencies are this environment's own: a line of a .pth file adds their folder, but not what that folder's own .pth files name, so
    the checkout, which lies there as an editable installation, is not found.
    """
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder, symlinks=True)
    commands = folder / "bin"
    words = ("--quiet", "install", "--no-deps", "--no-index", "--disable-pip-version-check")
    done = command(folder, sys.executable, "-m", "pip", "--python", str(commands / "python"), *words, str(wheel))
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return commands
