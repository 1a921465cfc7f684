"""Grouped products of low-rank experts against each expert's matrix, row by row."""

import copy

import pytest
import torch

from fisherfold.export.expert_tensors import NAMES
from fisherfold.export.gauges import gauge, gauge_site, product, right_factor
from fisherfold.runtime.modeling_fisherfold_experts import SHARED, ExpertStack

E, N, M = 5, 9, 7
CLASSES = {
    "one": ([("factors", 3)], [0] * E),
    "pivoted": ([("pivoted_outputs", 2), ("pivoted_outputs", 5)], [1, 0, 0, 1, 0]),
    "shared": ([("shared_factors", 3)], [0] * E),
    "shared and pivoted": ([("shared_pivoted_inputs", 4)], [0] * E),
    "mixed": ([("dense", 7), ("factors", 2), ("pivoted_inputs", 4), ("zero", 0)], [2, 1, 3, 0, 2]),
}


def filled(name: str) -> tuple[ExpertStack, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    classes, of = CLASSES[name]
    stack = ExpertStack(N, M, [{"kind": kind, "rank": rank} for kind, rank in classes], of).double()
    if kind_of_all := next((kind for kind, _ in classes if kind in SHARED), None):
        return stack, fill_shared(stack[0], kind_of_all, generator)
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


def fill_shared(own, kind: str, generator: torch.Generator) -> list[torch.Tensor]:
    """Set the factors of a class whose right one is shared; the matrices that they stand for."""
    lefts = [torch.randn(N, own.rank, generator=generator).double().numpy() for _ in range(E)]
    right = torch.randn(own.rank, M, generator=generator).double().numpy()
    layers = gauge_site(lefts, right, kind.removeprefix("shared_"), torch.float64)
    assert layers[0].kind == kind
    for name, values in right_factor(layers[0].parameters).items():
        getattr(own, NAMES[name]).data[:] = torch.from_numpy(values)
    own.up.data[:] = torch.stack([torch.from_numpy(layer.parameters["up.weight"]) for layer in layers])
    shared = right_factor(layers[0].parameters)
    return [torch.from_numpy(product(kind, shared | layer.parameters, N, M)) for layer in layers]


def run(stack: ExpertStack, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """The rows sorted by expert, and in their places again."""
    order = experts.argsort(stable=True)
    return stack(x[order], torch.bincount(experts, minlength=E).tolist())[order.argsort()]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_every_row_goes_through_its_expert(name, rows):
    stack, matrices = filled(name)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, M, generator=generator).double()
    experts = torch.randint(E, (rows,), generator=generator)
    expected = torch.stack([matrices[e] @ row for e, row in zip(experts.tolist(), x)]) if rows else x.new_zeros(0, N)
    torch.testing.assert_close(run(stack, x, experts), expected)
    torch.testing.assert_close(run(copy.deepcopy(stack), x, experts), expected)


def test_factors_are_trained_as_any_parameter():
    stack, matrices = filled("mixed")
    x = torch.randn(6, M, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([0, 1, 2, 3, 4, 0])
    run(stack, x, experts).sum().backward()
    torch.testing.assert_close(x.grad, torch.stack([matrices[e].sum(0) for e in experts.tolist()]))
    assert all(parameter.grad.abs().sum() > 0 for parameter in stack.parameters())
