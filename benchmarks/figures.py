"""How benchmarks say what they found: one line of JSON a figure, beside what it should be."""

import json
from pathlib import Path


def figure(name: str, value: object, unit: str, target: object, holds: bool) -> str:
    """The line; fractions are rounded."""
    value = round(value, 4) if isinstance(value, float) else value
    return json.dumps({"figure": name, "value": value, "unit": unit, "target": target, "holds": holds})


def at_most(name: str, value: float, unit: str, target: float) -> str:
    """A figure that should not be above its target."""
    return figure(name, value, unit, target, value <= target)


def at_least(name: str, value: float, unit: str, target: float, noise: float = 0.0) -> str:
    """A figure that should not be below its target, less what a repetition moves."""
    return figure(name, value, unit, target, value >= target - noise)


def peak_bytes() -> int:
    """The most that was resident of this process, mapped files included (VmHWM: unlike ru_maxrss it does not count what the parent process held)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
