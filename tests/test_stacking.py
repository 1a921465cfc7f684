"""Stacked right factors in a checkpoint: the same numbers, in fewer tensors."""

import pytest
import torch

from stages.checkpoint import StoredTensor
from stages.stacking import stack_layers, stack_tensors

M = 6


def checkpoint(kinds):
    """Layers of rank 1, 2, … and their right factors; every number of layer i is i."""
    layers = {name: {"kind": kind, "rank": rank} for rank, (name, kind) in enumerate(kinds.items(), start=1)}
    values = {f"{name}.down.weight": torch.full((layer["rank"], M), layer["rank"]) for name, layer in layers.items()}
    return layers, {name: StoredTensor(tuple(v.shape), v.dtype, lambda v=v: v) for name, v in values.items()}


@pytest.mark.parametrize(
    ("kind", "first", "other"),
    [
        ("factors", "shared_factors", "shared_member"),
        ("pivoted_outputs", "shared_pivoted_outputs", "shared_pivoted_member"),
    ],
)
def test_right_factors_of_one_input_are_stacked(kind, first, other):
    layers, tensors = checkpoint({"q": kind, "k": kind, "v": kind, "o": kind})
    layers = stack_layers([["q", "k", "v"], ["o"]], layers)
    tensors = stack_tensors(layers, tensors)
    assert layers == {
        "q": {"kind": first, "rank": 1, "height": 6, "start": 0},
        "k": {"kind": other, "rank": 2, "source": "q", "start": 1},
        "v": {"kind": other, "rank": 3, "source": "q", "start": 3},
        "o": {"kind": kind, "rank": 4},
    }
    assert tensors.keys() == {"q.down.weight", "o.down.weight"}
    stack = tensors["q.down.weight"]
    assert stack.read()[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
    assert (stack.shape, stack.dtype) == (tuple(stack.read().shape), stack.read().dtype)


def test_layers_of_other_kinds_stay_as_they_are():
    """Dense ones are not listed, rank 0 has no factor, pivoted inputs are not read as they are; one alone is no stack."""
    kinds = {"q": "zero", "k": "pivoted_inputs", "v": "factors"}
    layers, tensors = checkpoint(kinds)
    assert stack_layers([["q", "k", "v", "dense"]], layers) == layers
    assert stack_tensors(layers, tensors) == tensors


def test_either_kind_stacks_with_the_other():
    layers, _ = checkpoint({"gate": "pivoted_outputs", "up": "factors"})
    layers = stack_layers([["gate", "up"]], layers)
    assert [layer["kind"] for layer in layers.values()] == ["shared_pivoted_outputs", "shared_member"]
