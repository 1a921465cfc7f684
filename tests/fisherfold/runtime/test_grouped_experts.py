"""Grouped products of low-rank experts against each expert's matrix, row by row."""

import copy

import pytest
import torch

from fisherfold.export.gauges import gauge, product
from fisherfold.runtime.modeling_fisherfold_experts import ExpertStack

E, N, M = 5, 9, 7
CLASSES = {
    "one": ([("factors", 3)], [0] * E),
    "pivoted": ([("pivoted_outputs", 2), ("pivoted_outputs", 5)], [1, 0, 0, 1, 0]),
    "mixed": ([("dense", 7), ("factors", 2), ("pivoted_inputs", 4), ("zero", 0)], [2, 1, 3, 0, 2]),
}


def filled(name: str) -> tuple[ExpertStack, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    classes, of = CLASSES[name]
    stack = ExpertStack(N, M, [{"kind": kind, "rank": rank} for kind, rank in classes], of).double()
    matrices, places = [], [0] * len(classes)
    for c in of:
        kind, rank = classes[c]
        left = torch.randn(N, rank, generator=generator).double()
        right = torch.randn(rank, M, generator=generator).double()
        if kind == "dense":
            W, parameters = left @ right, {"weight": left @ right}
        else:
            layer = gauge(left.numpy(), right.numpy(), kind, torch.float64)
            assert layer.kind == kind
            W = torch.from_numpy(product(kind, layer.parameters, N, M))
            parameters = {key.removesuffix(".weight"): torch.from_numpy(v) for key, v in layer.parameters.items()}
        for key, values in parameters.items():
            getattr(stack[c], key).data[places[c]] = values
        places[c] += 1
        matrices.append(W)
    return stack, matrices


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_every_row_goes_through_its_expert(name, rows):
    stack, matrices = filled(name)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, M, generator=generator).double()
    experts = torch.randint(E, (rows,), generator=generator)
    expected = torch.stack([matrices[e] @ row for e, row in zip(experts.tolist(), x)]) if rows else x.new_zeros(0, N)
    torch.testing.assert_close(stack(x, experts), expected)
    torch.testing.assert_close(copy.deepcopy(stack)(x, experts), expected)


def test_factors_are_trained_as_any_parameter():
    stack, matrices = filled("mixed")
    x = torch.randn(6, M, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([0, 1, 2, 3, 4, 0])
    stack(x, experts).sum().backward()
    torch.testing.assert_close(x.grad, torch.stack([matrices[e].sum(0) for e in experts.tolist()]))
    assert all(parameter.grad.abs().sum() > 0 for parameter in stack.parameters())
