"""The command `fisherfold`: finds the project folder it stands in, and hands over to that project's own `flows`.

The wheel carries the library alone. `flows` and `stages` are the project's (the clone's), whatever else of that name is installed
or lies on PYTHONPATH; processes that this one starts, Ray's workers and Prefect's runs among them, find the same by PYTHONPATH.
Outside a project, commands that need none work from a copy of `flows` that the wheel carries out of Python's sight.
"""

import importlib
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
BUNDLE = PACKAGE / "_orchestration"
"""Of a wheel: holds `flows`, `stages` and what `plan` reads of `data`."""


def main() -> int:
    """Run the command line; return its exit status."""
    open_streams()
    try:
        here = Path.cwd()
    except FileNotFoundError:
        print(
            "error: the folder that this command was started in is gone. Go to the project's and run again.",
            file=sys.stderr,
        )
        return 1
    use_code_of(find_project(here) or own_code())
    return importlib.import_module("flows.cli").main()


def open_streams() -> None:
    """Let standard streams that the caller has closed lead nowhere: files opened next would take their numbers, and what is written there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def find_project(folder: Path) -> Path | None:
    """The nearest folder upwards that is a project: params.yaml beside dvc.yaml, and the code of both drivers."""
    for place in (folder, *folder.parents):
        if is_project(place) and (place / "flows").is_dir() and (place / "stages").is_dir():
            return place
    return None


def is_project(folder: Path) -> bool:
    """Whether it holds what `Workspace` and DVC need."""
    return (folder / "params.yaml").exists() and (folder / "dvc.yaml").exists()


def own_code() -> Path:
    """Where `flows` and `stages` lie that came with this library: the checkout it was installed from, or the wheel's copy."""
    checkout = PACKAGE.parent
    return checkout if is_project(checkout) else BUNDLE


def use_code_of(root: Path) -> None:
    """Make `flows` and `stages` those below `root`, and `fisherfold` its library if it has one; here and in child processes."""
    path = str(root)
    sys.path[:] = [path, *(entry for entry in sys.path if entry != path)]
    paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != path]
    os.environ["PYTHONPATH"] = os.pathsep.join([path, *paths])
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("flows", "stages", "fisherfold") and _foreign(module, root):
            del sys.modules[name]


def _foreign(module: object, root: Path) -> bool:
    """Whether a loaded module is shadowed by one of the project: the checkout's own library stays where `root` has none."""
    name = module.__name__.partition(".")[0] if hasattr(module, "__name__") else ""
    file = getattr(module, "__file__", None)
    return (root / name).is_dir() and not (file and Path(file).is_relative_to(root))
