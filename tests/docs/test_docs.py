"""The documentation: what is Python in it runs, every command in it can be typed, every link in it leads somewhere."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import typer
from project import ROOT
from tiny_project import copy, fisherfold

from flows.cli import app
from flows.overrides import given

PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
WRITTEN = ("python", "bash", "text")
ROOMS = ("fisherfold", "stages", "flows")


def blocks(path: Path) -> Iterator[tuple[bool, str, str]]:
    """Whether a block is marked as not run, its language, its text."""
    return (
        (bool(marked), language, text) for marked, language, text in BLOCK.findall(path.read_text(encoding="utf-8"))
    )


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in PAGES if any(b[1] == "python" and not b[0] for b in blocks(p))], ids=name)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(f"w{3 + (7 * i + j * j) % 90}" for j in range(40)) for i in range(24)]
    known = {"model": tiny.save_tiny(tmp_path / "tiny-model"), "texts": texts}
    for marked, language, text in blocks(path):
        if language == "python" and not marked:
            exec(compile(text, name(path), "exec"), known)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=name)
def test_commands_can_be_typed(path: Path) -> None:
    """Each `fisherfold …` of a bash block parses, and its parameters are valid; nothing is run."""
    group = typer.main.get_command(app)
    for _, language, text in blocks(path):
        typed = re.findall(r"^(?:.*&& )?((?:\S*/)?fisherfold .*)$", text.replace("\\\n", " "), re.M)
        for line in typed if language == "bash" else ():
            for words in [shlex.split(re.sub(r"\$\w+", "", line), comments=True)]:
                if Path(words[0]).name == "fisherfold":
                    context = group.commands[words[1]].make_context(words[1], words[2:])
                    given([setting for setting in context.params.get("set") or context.params.get("assignments") or ()])


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert [link for link in LINK.findall(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()] == []


def test_a_block_that_does_not_run_says_why() -> None:
    """Pages hold Python, which runs; commands of `fisherfold`, which are parsed; text; and what is marked."""
    unmarked = [(path, language, text) for path in PAGES for marked, language, text in blocks(path) if not marked]
    other = [(name(path), text) for path, language, text in unmarked if language not in WRITTEN]
    other += [
        (name(path), line)
        for path, language, text in unmarked
        for line in (text.replace("\\\n", " ").splitlines() if language == "bash" else ())
        if not line.startswith(("fisherfold ", "#"))
    ]
    assert other == []


def test_the_messages_that_troubleshooting_explains_are_those_of_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # a message in several literals
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    messages = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 25 and [text for text in messages if text not in joined] == []


def test_the_notebook_runs_and_gives_what_it_shows(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "python.ipynb", as_version=4)
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert any(shown) and list(map(_printed, found)) == list(map(_printed, shown))


def _printed(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_tutorial_can_be_typed_line_by_line(finished: Path, tmp_path: Path) -> None:
    """On a tiny project whose stages have run; the tutorial's first block, which is not typed, ends with the same command."""
    project = copy(finished, tmp_path)
    typed = ["fisherfold run"]
    typed += [
        line
        for marked, language, text in blocks(ROOT / "docs" / "tutorial.md")
        for line in (text.splitlines() if language == "bash" and not marked else ())
    ]
    assert len(typed) > 5
    for line in typed:
        result = fisherfold(project, *shlex.split(line, comments=True)[1:])
        assert (result.returncode, "Traceback" in result.stderr) == (0, False), (line, result.stderr)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "compress" in (tmp_path / "reference" / "python" / "index.html").read_text(encoding="utf-8")
