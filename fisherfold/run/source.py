"""Which source text can change the numbers of a stage: its import closure in `stages` and `fisherfold`, and a digest of it."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fisherfold.run.files import digest_file, digest_json

LIBRARY = Path(__file__).parents[1]
CARRIERS = frozenset(
    f"fisherfold.run.{name}"
    for name in (
        "disk",
        "engine",
        "errors",
        "files",
        "locks",
        "object_group",
        "objects",
        "params",
        "pointers",
        "progress",
        "registry",
        "scratch",
        "source",
        "unit_work",
        "workspace",
    )
)
"""Modules that carry stages along but cannot change a number, so no result depends on their text."""
ALWAYS = ("fisherfold.run.determinism",)
"""What every stage computes under, whoever imports it."""


@cache
def code_modules(stage: str) -> tuple[str, ...]:
    """The modules that can change the result of `stage`, by dotted name, sorted: its imports, theirs, and so on."""
    seen: set[str] = set()
    pending = [f"stages.{stage}", *ALWAYS]
    while pending:
        name = pending.pop()
        if name not in seen and name not in CARRIERS:
            seen.add(name)
            pending += imported_modules(module_file(name).read_text(encoding="utf-8"))
    return tuple(sorted(seen))


def imported_modules(source: str) -> Iterator[str]:
    """The modules of ours that a source text imports, wherever in it; packages whose `__init__` holds no code are left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in ("stages", "fisherfold") and _has_code(name):
                yield name


def module_file(name: str) -> Path:
    """The file of one of our modules, a package's `__init__` for a package; it need not exist."""
    package, *rest = name.split(".")
    path = _package(package).joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _package(name: str) -> Path:
    """The folder of `fisherfold`, this one, or of the project's `stages`."""
    if name == "fisherfold":
        return LIBRARY
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No package {name!r}: it belongs to the project folder, see `fisherfold --help`.")
    return Path(next(iter(spec.submodule_search_locations)))


def _has_code(name: str) -> bool:
    """Whether it is a module, and not a package of a docstring alone, nor a name inside a module."""
    path = module_file(name)
    if not path.is_file():
        return False
    return path.name != "__init__.py" or len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


@cache
def code_digest(stage: str) -> str:
    """Digest of the source text that can change the result of `stage`."""
    return digest_json({name: digest_file(module_file(name)) for name in code_modules(stage)})
