"""Sizes of a compressed checkpoint, counted from what was saved and checked against what was planned."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherfold.export.expert_tensors import Stack, stored_numbers
from fisherfold.export.packed import count_stored
from fisherfold.network.layers import LinearLayer
from fisherfold.run.checkpoint import StoredTensor, count_bytes, count_numbers, read_tensors
from fisherfold.run.errors import CorruptArtifact


def count_sizes(
    model: Path,
    dense: Mapping[str, StoredTensor],
    plan: Mapping[str, dict[str, Any]],
    layers: Sequence[LinearLayer],
    stacks: Sequence[Stack],
    gone: Collection[str] = (),
) -> dict[str, Any]:
    """Parameters and bytes of the dense and of the saved model, of all of it and of the targeted layers, from the headers of what was saved.

    Args:
        model: the saved folder.
        dense: the dense model's tensors.
        plan: rows of ranks.parquet by module.
        layers: the targeted layers.
        stacks: those of them that are experts, as they are stored together.
        gone: the layers that went with their experts.

    Raises:
        CorruptArtifact: a layer stores another count than was planned.
    """
    saved = read_tensors(model)
    experts = stored_numbers(layers, stacks, saved)
    experts |= dict.fromkeys(gone, 0)
    stored = {name: experts[name] if name in experts else _targeted_numbers(name, saved) for name in plan}
    for name, row in plan.items():
        if stored[name] != row["stored_parameters"]:
            raise CorruptArtifact(
                f"Stage 'factorize', module {name!r}: stores {stored[name]} numbers where stage 'ranks' planned {row['stored_parameters']}. "
                "The two stages ran on different inputs: run `dvc repro --force ranks factorize`."
            )
    return {
        "dtype": str(next(tensor.dtype for tensor in saved.values() if tensor.dtype.is_floating_point)).removeprefix(
            "torch."
        ),
        "targeted_parameters_dense": sum(row["dense_parameters"] for row in plan.values()),
        "targeted_parameters_compressed": sum(stored.values()),
        "model_parameters_dense": count_numbers(dense),
        "model_parameters_compressed": count_stored(saved),
        "model_bytes_dense": count_bytes(dense),
        "model_bytes_compressed": count_bytes(saved),
    }


def _targeted_numbers(module: str, saved: Mapping[str, StoredTensor]) -> int:
    """Stored numbers of one layer without its bias."""
    own = {
        name: tensor for name, tensor in saved.items() if name.startswith(f"{module}.") and not name.endswith(".bias")
    }
    return count_stored(own)
