"""The layers alone, plain and fast, against the dense product in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fisherfold.export.gauges import gauge, product
from fisherfold.export.stored_layer import OWN_BIAS
from fisherfold.runtime import fast_cpu
from fisherfold.runtime import modeling_fisherfold as plain

CASES = [
    ("factors", 12, 20, 3),
    ("pivoted", 12, 20, 7),
    ("pivoted", 20, 12, 7),
    ("pivoted", 16, 16, 15),
    ("pivoted", 9, 5, 0),
]
SHAPES = [(), (1, 1), (3,), (2, 3), (2, 100)]


def placed(dense, replace_layers, kind, rank):
    """The layer that replaces `dense`."""
    model = nn.ModuleDict({"layer": dense})
    replace_layers(model, {"layer": {"kind": kind, "rank": rank}})
    return model["layer"]


@pytest.fixture(params=[plain.replace_layers, fast_cpu.replace_layers], ids=["plain", "fast"])
def low_rank(request):
    """Makes a layer of random content, with the product that it stands for and its bias."""

    def make(storage, n, m, rank, bias):
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(*shape, generator=generator).double().numpy() for shape in ((n, rank), (rank, m)))
        stored = gauge(left, right, storage, torch.float64)
        torch.manual_seed(0)
        dense = nn.Linear(m, n, bias=bias, dtype=torch.float64)
        layer = placed(dense, request.param, stored.kind, rank).double()
        state = {name: torch.from_numpy(values.copy()) for name, values in stored.parameters.items()}
        if bias:
            state["bias" if stored.kind in OWN_BIAS else "up.bias"] = dense.bias.data
        layer.load_state_dict({**state, "weight": torch.empty(0, m)})
        return layer, torch.from_numpy(product(stored.kind, stored.parameters, n, m)), dense.bias

    return make


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("storage", "n", "m", "rank"), CASES)
def test_layers_compute_their_product(low_rank, storage, n, m, rank, bias, grad):
    layer, weight, offset = low_rank(storage, n, m, rank, bias)
    for shape in SHAPES:
        x = tokens(*shape, m)
        with torch.set_grad_enabled(grad):
            found = layer(x)
        torch.testing.assert_close(found, nn.functional.linear(x, weight, offset), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12)])
def test_in_the_dtypes_of_checkpoints(low_rank, n, m, dtype, count):
    layer, weight, offset = low_rank("pivoted", n, m, 7, bias=True)
    x = tokens(count, m)
    expected = nn.functional.linear(x, weight, offset)
    with torch.no_grad():
        found = layer.to(getattr(torch, dtype))(x.to(getattr(torch, dtype))).double()
    assert (found - expected).norm() < {"float32": 1e-6, "bfloat16": 2e-2, "float16": 4e-3}[dtype] * expected.norm()


WRITES = {
    "copy_": lambda tensor, values: tensor.copy_(values),
    "data": lambda tensor, values: tensor.data.copy_(values),
    "one number": lambda tensor, values: tensor.data[-1:].copy_(values[-1:]),
    "numpy": lambda tensor, values: tensor.detach().numpy().__setitem__(slice(None), values.numpy()),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("place", ["up.weight", "down.weight", "order", "bias"])
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12)])
@torch.no_grad()
def test_no_layer_answers_from_what_it_held_before(low_rank, n, m, count, place, write):
    """However a weight, an order or a bias is written to: behind autograd's back, too, as adapters do that merge themselves."""
    layer, *_ = low_rank("pivoted", n, m, 7, bias=True)
    twin, *_ = low_rank("pivoted", n, m, 7, bias=True)
    x = tokens(count, m)
    before = layer(x)
    place = "up.bias" if place == "bias" and n > m else place
    old = twin.state_dict()[place].clone()
    new = old.flip(0) if place == "order" else old + 1
    tensor = dict(layer.named_parameters()) | dict(layer.named_buffers())
    WRITES[write](tensor[place], new)
    written = tensor[place].detach().clone()  # a part of the order may now appear twice
    twin.load_state_dict({**twin.state_dict(), place: written})
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize(("storage", "n", "m", "rank"), CASES[:3])
@torch.no_grad()
def test_a_layer_that_something_took_over_is_called_as_it_is(low_rank, storage, n, m, rank, count):
    """An adapter in place of an inner layer, or a hook on it, must see every token, however many."""
    layer, *_ = low_rank(storage, n, m, rank, bias=False)
    x = tokens(count, m)
    pivoted_outputs = storage == "pivoted" and n <= m
    expected = (
        torch.cat((layer.down(x), 2 * layer.up(layer.down(x))), -1)[..., layer.order]
        if pivoted_outputs
        else 2 * layer(x)
    )
    own, layer.up = layer.up, Doubled(layer.up)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    layer.up = own
    layer.up.register_forward_hook(lambda module, arguments, output: 2 * output)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


class Doubled(nn.Module):
    """What an adapter looks like."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features, self.weight = inner.in_features, inner.out_features, inner.weight

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("replace_layers", [plain.replace_layers, fast_cpu.replace_layers])
def test_conv1d_becomes_an_ordinary_layer(replace_layers):
    layer = placed(Conv1D(nf=6, nx=10), replace_layers, "factors", 2)
    assert (layer.down.in_features, layer.up.out_features, layer.up.bias is not None) == (10, 6, True)


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
def test_they_are_traced(low_rank, storage):
    layer, weight, _ = low_rank(storage, 12, 20, 7, bias=False)
    x = tokens(2, 5, 20)
    for traced in (torch.jit.trace(layer, x), torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(traced(x), x @ weight.T, atol=1e-12, rtol=1e-12)
