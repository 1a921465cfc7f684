"""How fast both models are where they were evaluated: tokens a second of reading a text, and of writing an answer.

    reading      one pass over READ tokens, one sequence, as a prompt is read
    answering    WRITTEN tokens after a prompt of PROMPT, one at a time, with a cache where the model has one

Both models take turns, so that what else the machine does meets both; the figure is the median of at most REPEATS turns, after one
that warms up, and of fewer (the first, if need be) where they would take longer than PATIENCE. Both compute in `evaluate.dtype`; times are no
result, so they go to ``artifacts/times.json`` and into no output.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from fisherfold.evaluation.model_run import ModelRun
from fisherfold.run.tables import read_table

READ, PROMPT, WRITTEN = 512, 32, 16
REPEATS = 3
PATIENCE = 5.0  # seconds of both models and one use, the turn that warms up included
FILE = "speed.json"


def measure_speed(folder: Path, models: dict[str, ModelRun], table: Path) -> None:
    """Unit: tokens a second by use and model, and what they were measured with."""
    ids = read_table(table)["input_ids"].combine_chunks().flatten().to_pylist()[:READ]
    positions = [run.positions for run in models.values() if run.positions]
    ids = ids[: min([READ, *positions])]
    prompt = ids[: min(PROMPT, max(1, len(ids) // 2))]
    written = min([WRITTEN, *(room - len(prompt) for room in positions)])
    figures = {
        "reading": _tokens_a_second(models, lambda run: _read(run, ids), len(ids)),
        "answering": _tokens_a_second(models, lambda run: _write(run, prompt, written), written)
        if written > 0
        else None,
        "tokens": {"read": len(ids), "prompt": len(prompt), "written": written},
        "dtype": models["dense"].dtype,
        "device": str(models["dense"].model.device),
        "threads": torch.get_num_threads(),
    }
    (folder / FILE).write_text(json.dumps(figures, sort_keys=True), encoding="utf-8")


def _tokens_a_second(models: dict[str, ModelRun], use: Callable[[ModelRun], None], tokens: int) -> dict[str, float]:
    first = {name: _seconds(use, run) for name, run in models.items()}
    turns = min(REPEATS, int(PATIENCE / sum(first.values())) - 1)
    later = [{name: _seconds(use, run) for name, run in models.items()} for _ in range(turns)]
    return {name: tokens / median([turn[name] for turn in later or [first]]) for name in models}


def _seconds(use: Callable[[ModelRun], None], run: ModelRun) -> float:
    start = time.perf_counter()
    use(run)
    return time.perf_counter() - start


@torch.inference_mode()
def _read(run: ModelRun, ids: list[int]) -> None:
    logits = run.model(input_ids=torch.tensor([ids], device=run.model.device), use_cache=False).logits
    logits[0, -1].max().item()  # waits for the device


def _write(run: ModelRun, prompt: list[int], count: int) -> None:
    run.decoder.answer([prompt], count, ends=())
