"""What refinement and healing read: text for training has two halves, and healing's is new to it.

A block that was refined on a text has lost the least of it already: healing on the same text lowers perplexity elsewhere by half as much
(docs/developers/log.md). A split is an even mix of its sources (`interleave`), so each half is one, too.

Shapes: S sequences of T tokens.
"""

import torch

from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace


def block_text(workspace: Workspace, vocabulary: int) -> torch.Tensor:
    """Sequences [S, T] that blocks are refined on: those for calibration and the first half of those for training."""
    calibration, training = _read(workspace, vocabulary)
    first = training[: len(training) // 2]
    return torch.cat([calibration, first]) if len(first) else calibration


def healing_text(workspace: Workspace, vocabulary: int) -> torch.Tensor:
    """Sequences [S, T] that all factors are trained on together: the other half; those for calibration, where there are none for training."""
    calibration, training = _read(workspace, vocabulary)
    return training[len(training) // 2 :] if len(training) else calibration


def _read(workspace: Workspace, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        read_sequences(workspace.table("calibration"), vocabulary),
        read_sequences(workspace.table("training"), vocabulary),
    )
