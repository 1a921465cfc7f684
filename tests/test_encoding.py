"""Every file is read and written as UTF-8, whatever the locale: no call leaves the encoding to the machine."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT, command

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


ALL_STAGES = """
import json, locale, sys
from importlib import import_module
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from family_sweep import PARAMS, workspace_of
from fisherfold.run.params import Params
from fisherfold.run.workspace import STAGES
workspace = workspace_of("llama", Path(sys.argv[1]))
texts = [{"title": f"Größe {i} 東京", "text": f"w{i} é " * 20} for i in range(3, 20)]
(workspace.root / CORPUS).write_text(
    "\\n".join(json.dumps(row, ensure_ascii=False) for row in texts), encoding="utf-8"
)
params = Params.model_validate({**PARAMS, "prepare": {**PARAMS["prepare"], "corpus": CORPUS}})
for stage in STAGES:
    import_module(f"stages.{stage}").run(workspace, getattr(params, stage))
print(json.dumps(locale.getpreferredencoding(False)))
"""


def latin_1(folder: Path) -> dict[str, str]:
    """A real locale whose text is Latin 1, made here; where none can be made, that of C, whose text is ASCII."""
    if shutil.which("localedef"):
        made = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
        if subprocess.run(made, capture_output=True).returncode == 0:
            return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}
    return {"LC_ALL": "C"}


@pytest.mark.slow
@pytest.mark.parametrize(("locale", "corpus"), [("latin 1", "texte-ü.jsonl"), ("ascii", "texte.jsonl")])
def test_all_stages_under_a_locale_that_is_not_utf_8(locale, corpus, tmp_path):
    """ASCII knows no file of another name; what is in files is text all the same."""
    if locale == "latin 1" and not shutil.which("localedef"):
        corpus = "texte.jsonl"
    chosen = latin_1(tmp_path) if locale == "latin 1" else {"LC_ALL": "C"}
    environment = {**chosen, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "project"
    folder.mkdir()
    script = tmp_path / "run.py"
    script.write_text(ALL_STAGES.replace("CORPUS", repr(corpus)), encoding="utf-8")
    result = command(
        ROOT, sys.executable, str(script), str(folder), str(ROOT / "tests" / "support"), environment=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) in ("ISO-8859-1", "ANSI_X3.4-1968")
    titles = (folder / "artifacts" / "report" / "index.html").read_bytes()
    assert corpus.encode() in titles
