"""How long the stages took, and how fast the models are: figures that no two runs share, kept beside the outputs and never in one.

    artifacts/times.json    {"stages": {STAGE: {OUTPUT: TAKEN}}, "unfinished": {STAGE: TAKEN}, "speed": {OUTPUT: …}}
    TAKEN                   {"seconds", "cpu_seconds", "peak_bytes", "written_bytes"}

OUTPUT is the digest of what was computed, so an output that DVC restores has the figures of the run that made it. TAKEN counts the
processes that ended by themselves or were interrupted, from their start: seconds by the clock and of all their threads, the largest
memory of one of them, and bytes that they wrote to files (0 where the system does not count them).
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.files import digest_json, read_manifest
from fisherfold.run.workspace import STAGES, Workspace

DIGITS = 16
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def read_times(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What is known; empty parts where nothing is, or where the file cannot be read."""
    try:
        found = json.loads((workspace.artifacts / "times.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return {part: found.get(part) or {} for part in ("stages", "unfinished", "speed")}


def output_digest(workspace: Workspace, stage: str) -> str | None:
    """What identifies the output of a stage; None if there is none."""
    try:
        return digest_json(read_manifest(workspace.out(stage))["files"])[:DIGITS]
    except CorruptArtifact:
        return None


@contextmanager
def timed(workspace: Workspace, stage: str) -> Iterator[None]:
    """Inside, this process runs a stage; what it took is noted, for its output if it ends well, else for its next process."""
    ended = False
    try:
        yield
        ended = True
    finally:
        _note_stage(workspace, stage, ended)


def _note_stage(workspace: Workspace, stage: str, ended: bool) -> None:
    times = read_times(workspace)
    before, now = times["unfinished"].pop(stage, {}), _of_this_process()
    taken = {name: round(before.get(name, 0) + value, 1) for name, value in now.items()}
    taken["peak_bytes"] = max(
        before.get("peak_bytes", 0), RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    if not ended:
        times["unfinished"][stage] = taken
    elif digest := output_digest(workspace, stage):
        known = times["stages"].setdefault(stage, {})
        if taken["seconds"] >= known.get(digest, taken)["seconds"]:  # to publish a finished output again takes no time
            known[digest] = taken
    _write(workspace, times)


def _of_this_process() -> dict[str, float]:
    process, spent = psutil.Process(), os.times()
    counters = process.io_counters() if hasattr(process, "io_counters") else None
    return {
        "seconds": time.time() - process.create_time(),
        "cpu_seconds": spent.user + spent.system + spent.children_user + spent.children_system,
        "written_bytes": getattr(counters, "write_chars", 0),
    }


def note_speed(workspace: Workspace, figures: dict[str, Any]) -> None:
    """Remember how fast the compressed model that lies in artifacts/factorize is, and the dense one beside it."""
    times = read_times(workspace)
    if digest := output_digest(workspace, "factorize"):
        times["speed"][digest] = figures
        _write(workspace, times)


def _write(workspace: Workspace, times: dict[str, dict[str, Any]]) -> None:
    target = workspace.artifacts / "times.json"
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(times, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(partial, target)


def stage_times(workspace: Workspace) -> dict[str, dict[str, float]]:
    """What each output that lies in artifacts/ took, by stage; without those of which nothing is known."""
    stages = read_times(workspace)["stages"]
    found = {stage: stages.get(stage, {}).get(output_digest(workspace, stage)) for stage in STAGES}
    return {stage: taken for stage, taken in found.items() if taken}


def speed(workspace: Workspace) -> dict[str, Any] | None:
    """Of the models that lie in artifacts/, what `note_speed` was told; None if nothing was."""
    digest = output_digest(workspace, "factorize")
    return read_times(workspace)["speed"].get(digest) if digest else None


def gain(pair: Mapping[str, float]) -> float:
    """Tokens a second of the compressed model by those of the dense one, of one use in what `speed` gives."""
    return pair["compressed"] / pair["dense"]
