"""Every file is read and written as UTF-8, whatever the locale: no call leaves the encoding to the machine."""

import ast
from collections.abc import Iterator

import pytest
from project import ROOT

SOURCES = [
    path for name in ("fisherfold", "stages", "flows", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))
]
BINARY_OPENERS = {"os", "webbrowser", "wheel", "zipfile"}  # their `open` knows no text


def undecided(source: str) -> Iterator[str]:
    """The calls that read or write text and name no encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("read_text", "write_text") or (called == "open" and _opens_text(node)):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def _opens_text(call: ast.Call) -> bool:
    method = isinstance(call.func, ast.Attribute)
    if method and ast.unparse(call.func.value) in BINARY_OPENERS:
        return False
    mode = call.args[0 if method else 1 :][:1]
    return not mode or (isinstance(mode[0], ast.Constant) and "b" not in str(mode[0].value))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_names_its_encoding(path):
    assert list(undecided(path.read_text(encoding="utf-8"))) == []


def test_the_rule_finds_what_it_forbids():
    found = undecided(
        "path.read_text()\nopen(path)\npath.open('a')\npath.open('rb')\nos.open(path, 0)\nopen(path, 'rb')"
    )
    assert [text.partition(":")[0] for text in found] == ["line 1", "line 2", "line 3"]
