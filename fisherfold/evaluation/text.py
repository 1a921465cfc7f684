"""Losses and divergence on the evaluation sequences, over all of them and by source.

S sequences of T tokens; position t predicts token t+1.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fisherfold.evaluation.losses import compare_tokens
from fisherfold.evaluation.model_run import ModelRun, common_vocabulary, not_finite
from fisherfold.evaluation.scores import COMPARED, summarise_losses
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.store import read_array
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import MODELS

BATCHES_PER_SHARD = 2


def loss_units(models: dict[str, ModelRun], table: Path, sequences: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of `measure_losses` by name of unit: BATCHES_PER_SHARD batches of sequences on both models."""
    step = models["dense"].batch_size * BATCHES_PER_SHARD
    return {
        f"losses-{shard:05d}": (models, table, start, min(start + step, sequences))
        for shard, start in enumerate(range(0, sequences, step))
    }


def measure_losses(folder: Path, models: dict[str, ModelRun], table: Path, start: int, stop: int) -> None:
    """Unit: losses of sequences `start` to `stop`, by batches.

    Raises:
        InputError: the models and the table do not share one vocabulary.
        NumericalError: a loss is not finite.
    """
    dense, compressed = (models[name] for name in MODELS)
    ids = read_sequences(table, common_vocabulary(dense, compressed))[start:stop]
    batches = [compare_tokens(dense.model, compressed.model, batch) for batch in ids.split(dense.batch_size)]
    losses = {name: torch.cat([batch[name] for batch in batches]) for name in COMPARED}
    for name in MODELS:
        bad = (~losses[name].isfinite()).any(-1).nonzero().flatten().tolist()
        if bad:
            what = f"the loss in evaluation sequence {start + bad[0]}"
            raise not_finite(folder.stem, models[name], what, ids[bad[0]][None])
    write_arrays(folder / "losses", losses)


def read_losses(folders: list[Path]) -> dict[str, np.ndarray]:
    """Losses and divergence [S, T-1] of all sequences, as `compare_tokens` names them."""
    return {
        name: np.concatenate([read_array(folder / "losses", name).numpy() for folder in folders]) for name in COMPARED
    }


def sources(table: pa.Table) -> list[str]:
    """The source of every sequence."""
    return table["source"].to_pylist()


def summarise_sources(
    losses: dict[str, np.ndarray], names: list[str], calibrated: set[str]
) -> dict[str, dict[str, Any]]:
    """Figures of every source by name, sorted, see `summarise_losses`.

    Args:
        names: the source of each sequence.
        calibrated: the sources that calibration draws from; `calibrated` of a source says whether it is one.
    """
    column = np.array(names)
    return {
        source: summarise_losses({name: values[column == source] for name, values in losses.items()})
        | {"calibrated": source in calibrated}
        for source in sorted(set(names))
    }
