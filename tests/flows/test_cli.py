"""The command line: help at once, mistakes named, exit statuses, and where a project is found."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from project import ROOT, command

from fisherfold.run.errors import CorruptArtifact, ParameterError
from flows import cli
from flows.commands import looking, options

HEAVY = {"pydantic", "rich", "torch", "transformers", "prefect", "dvc", "ray", "pyarrow", "matplotlib"}
SHOW_IMPORTS = """
import json, sys
from fisherfold.cli import main
status = main()
print(json.dumps([status, sorted({name.partition('.')[0] for name in sys.modules})]))
"""
COMMANDS = ("run", "sweep", "serve", "stage", "status", "plan", "doctor", "store")


def test_help_is_there_at_once_for_it_imports_nothing_heavy():
    result = command(ROOT, sys.executable, "-c", SHOW_IMPORTS, "--help")
    status, imported = json.loads(result.stdout.splitlines()[-1])
    assert status == 0 and all(f"  {name} " in result.stdout for name in COMMANDS)
    assert HEAVY.isdisjoint(imported)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fisherfold 0.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["plna"], "Did you mean 'plan'?"),
        (["run", "--unitl", "ranks"], "--until"),
        (["run", "--until", "rank"], "'ranks'"),
        (["stage", "prepares"], "'prepare'"),
        (["serve", "--cron", "* * * * *", "--interval", "3"], "exclude each other"),
        (["sweep", "--ratios", "0.2,much"], "expected numbers"),
        (["plan", "--gpus", "0"], "expected positive numbers"),
    ],
)
def test_a_bad_command_line_ends_with_2_and_says_what_was_meant(words, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell):
    environment = {"_FISHERFOLD_COMPLETE": f"source_{shell}"}
    script = command(ROOT, sys.executable, "-m", "fisherfold", environment=environment).stdout
    assert "_FISHERFOLD_COMPLETE" in script


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ParameterError("no such key"), 2, "error: no such key\n"),
        (CorruptArtifact("a file is gone"), 1, "error: a file is gone\n"),
        (OSError(28, "No space left on device"), 1, "error: the disk is full"),
        (PermissionError(13, "Permission denied", "artifacts/.lock"), 1, f"error: user {os.getuid()} may not do that"),
        (OSError(30, "Read-only file system", "artifacts"), 1, "error: the file system cannot be written"),
        (
            FileExistsError(17, "File exists", "artifacts"),
            1,
            "error: something else lies where a file or a folder belongs",
        ),
        (OSError(24, "Too many open files"), 1, "error: a process may not open more files"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            1,
            "error: the disk is full",
        ),
        (
            MemoryError(),
            1,
            "error: the memory of this machine, or what a process may have of it, is used up (MemoryError)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            1,
            "error: the memory of this machine",
        ),
        (
            UnicodeEncodeError("ascii", "/data/ü", 6, 7, "ordinal not in range(128)"),
            1,
            "error: the name '/data/ü' cannot be written",
        ),
    ],
)
def test_an_error_of_the_users_is_one_line(error, status, says, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(looking, "workspace_here", fail)
    assert cli.main(["status"]) == status
    assert capsys.readouterr().err.startswith(says)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(looking, "workspace_here", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["status"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_with_130_and_gives_the_handlers_back(number, monkeypatch, capsys):
    before = signal.getsignal(number)
    monkeypatch.setattr(looking, "workspace_here", lambda: (os.kill(os.getpid(), number), time.sleep(5)))
    assert cli.main(["status"]) == 130
    assert "finished units are kept" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_without_a_project_one_line_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["run"], ["status"], ["serve"], ["stage", "ranks"], ["store", "check"], ["plan"]):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert "git clone" in told and told.count("\n") == 1, words


def test_a_project_is_found_from_below(tmp_path, monkeypatch):
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "data" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data" / "models")
    assert options.workspace_here().root == tmp_path


def test_a_terminal_without_our_signs_ends_nothing(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(looking, "workspace_here", lambda: print("0.2 → 0.4") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["status"])
    terminal.flush()
    assert terminal.buffer.getvalue() == b"0.2 ? 0.4\n"


def test_a_closed_pipe_is_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "fisherfold", "run", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()
