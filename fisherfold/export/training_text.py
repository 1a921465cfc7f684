"""What refinement and healing read: text for training has two halves, and healing's is new to it.

A block that was refined on a text has lost the least of it already: healing on the same text lowers perplexity elsewhere by half as much
(docs/developers/log.md). A split is an even mix of its sources (`interleave`), so each half is one, too.

Shapes: S sequences of T tokens.
"""

import torch

from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace


def text_sizes(calibration: int, training: int) -> tuple[int, int]:
    """How many sequences blocks are refined on, and how many all factors together, of so many for calibration and for training."""
    first = training // 2
    return calibration + first, (training - first) or calibration


def block_text(workspace: Workspace, vocabulary: int) -> torch.Tensor:
    """Sequences [S, T] that blocks are refined on: those for calibration and the first half of those for training."""
    calibration, training = _read(workspace, vocabulary)
    count, _ = text_sizes(len(calibration), len(training))
    return torch.cat([calibration, training])[:count] if len(training) else calibration


def healing_text(workspace: Workspace, vocabulary: int) -> torch.Tensor:
    """Sequences [S, T] that all factors are trained on together: the other half; those for calibration, where there are none for training."""
    calibration, training = _read(workspace, vocabulary)
    _, count = text_sizes(len(calibration), len(training))
    return (training if len(training) else calibration)[-count:]


def _read(workspace: Workspace, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        read_sequences(workspace.table("calibration"), vocabulary),
        read_sequences(workspace.table("training"), vocabulary),
    )
