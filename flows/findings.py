"""What a check of `fisherfold doctor` found, and what is done with it: shown, or a run is refused."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.text import Text

from fisherfold.run.errors import EngineError
from flows.tables import print_table

Level = Literal["ok", "warn", "fail"]


class Outcome(NamedTuple):
    """What a check found: nothing (ok), something to know (warn), something that stops a run (fail)."""

    level: Level
    says: str
    cure: str = ""


class Finding(NamedTuple):
    """An outcome with the name of its check."""

    check: str
    level: Level
    says: str
    cure: str = ""


def require(findings: Sequence[Finding]) -> None:
    """Raise EngineError if one of the findings stops a run; it holds all of them, with their cures."""
    stops = [f"{finding.check}: {finding.says}. {finding.cure}." for finding in findings if finding.level == "fail"]
    if stops:
        raise EngineError("; ".join(stops) + " `fisherfold doctor` checks again.")


def any_stops(findings: Sequence[Finding]) -> bool:
    """Whether one of the findings stops a run."""
    return any(finding.level == "fail" for finding in findings)


def print_findings(findings: Sequence[Finding]) -> int:
    """Print a table; return the exit status, 1 if something stops a run."""
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    rows = [(check, Text(level, styles[level]), says, cure) for check, level, says, cure in findings]
    print_table(("check", "", "what", "cure"), rows)
    return int(any_stops(findings))
