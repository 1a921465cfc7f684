import torch
from tiny import tiny_workspace

from fisherfold.evaluation.stored_weights import find_zero_layers, read_zero_layers, zero_layers
from fisherfold.run.checkpoint import StoredTensor, read_tensors


def stored(**tensors: torch.Tensor) -> dict[str, StoredTensor]:
    return {
        name.replace("__", "."): StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


def test_a_factor_of_zeros_is_found_by_its_layer():
    some, none = torch.ones(4, 3), torch.zeros(4, 3)
    dense = stored(a__weight=some, b__weight=some, c__weight=none, d__weight=some, norm__weight=torch.zeros(3))
    compressed = stored(
        a__weight=torch.zeros(0), a__down__weight=some, a__up__weight=none, a__order=torch.zeros(4, 4, dtype=torch.int64),
        b__down__weight=some, b__up__weight=some[:0], c__up__weight=none, c__down__weight=none, d__weight=none,
        norm__weight=torch.zeros(3),
    )  # fmt: skip
    assert zero_layers(dense, compressed) == ["a", "d"]  # c was zero before, b's left factor is the identity alone


def test_a_whole_model_against_itself(tmp_path):
    workspace = tiny_workspace(tmp_path)
    find_zero_layers(tmp_path, workspace.model, workspace.model)
    assert read_zero_layers(tmp_path) == []
    assert read_tensors(workspace.model)
