"""Layers that share one right factor, against the dense products in float64: the fast ones compute it once a pass, and none is stale."""

import copy
import threading

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from fisherfold.runtime import fast_cpu
from fisherfold.runtime import modeling_fisherfold as plain

KINDS = ["shared_factors", "shared_pivoted_inputs"]
RUNTIMES = {"plain": plain, "fast": fast_cpu}
INPUTS, RANK = 16, 5
OUTPUTS = {"q": 16, "k": 8, "v": 8}


class Block(nn.Module):
    """Three layers that read one tensor."""

    def __init__(self, kind, runtime):
        super().__init__()
        torch.manual_seed(0)
        for name, n in OUTPUTS.items():
            self.add_module(name, nn.Linear(INPUTS, n))
        RUNTIMES[runtime].replace_layers(self, sharing(kind, "q", ["k", "v"], RANK))
        self.double()
        self.once = runtime == "fast"
        self.calls = []
        getattr(self.q.down, "rest", self.q.down).register_forward_hook(lambda *_: self.calls.append(1))

    def forward(self, x):
        return tuple(self.get_submodule(name)(x) for name in OUTPUTS)


def sharing(kind, first, others, rank):
    member = {"kind": "shared_member", "rank": rank, "source": first}
    return {first: {"kind": kind, "rank": rank}} | dict.fromkeys(others, member)


def right_factor(layer):
    """The dense right factor [r, m] of a site's first layer."""
    if isinstance(layer.down, nn.Linear):
        return layer.down.weight
    right = torch.empty(RANK, INPUTS, dtype=torch.float64)
    right[:, layer.down.order] = torch.cat([torch.eye(RANK).double(), layer.down.rest.weight], dim=1)
    return right


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return request.param


@pytest.fixture(params=KINDS)
def block(request, runtime):
    block = Block(request.param, runtime)
    if request.param == "shared_pivoted_inputs":
        block.q.down.order.copy_(torch.randperm(INPUTS))
    return block


def in_no_pass(block):
    return not getattr(block.q, "passes", None)


def inputs(*shape, requires_grad=False):
    x = torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1)).double()
    return x.requires_grad_(requires_grad)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 100)])
def test_each_layer_computes_its_product_from_one_shared(block, shape):
    x, right = inputs(*shape), right_factor(block.q)
    ups = [block.get_submodule(name).up for name in OUTPUTS]
    for passes in (1, 2):
        assert_same(block(x), [nn.functional.linear(x, up.weight @ right, up.bias) for up in ups])
        assert len(block.calls) == passes * (1 if block.once else len(OUTPUTS))
        assert in_no_pass(block)


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 100)])
def test_without_gradients_too(block, shape):
    """One token and many have ways of their own, when no hook is on the inner layers."""
    getattr(block.q.down, "rest", block.q.down)._forward_hooks.clear()
    x, right = inputs(*shape), right_factor(block.q)
    ups = [block.get_submodule(name).up for name in OUTPUTS]
    with torch.no_grad():
        assert_same(block(x), [nn.functional.linear(x, up.weight @ right, up.bias) for up in ups])
    assert in_no_pass(block)


def test_the_shared_factor_is_stored_once(block):
    names = [name for name, _ in block.named_parameters()]
    assert sum(".down." in name for name in names) == 1
    assert len(names) == len(set(names)) == 7


def test_gradients_are_those_of_separate_layers(block):
    x, right = inputs(4, requires_grad=True), right_factor(block.q).detach()
    sum(y.square().sum() for y in block(x)).backward()
    weights = [block.get_submodule(name).up for name in OUTPUTS]
    again = inputs(4, requires_grad=True)
    sum(nn.functional.linear(again, up.weight @ right, up.bias).square().sum() for up in weights).backward()
    torch.testing.assert_close(x.grad, again.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_under_gradient_checkpointing(block, reentrant):
    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        block.zero_grad()
        x = inputs(4, requires_grad=True)
        sum(y.square().sum() for y in run(x)).backward()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in block.parameters())])
    assert_same(*gradients)


def doing(action):
    """A hook that does something and changes no output."""

    def hook(*_):
        action()

    return hook


def test_nothing_outlives_a_pass(block):
    """Neither one that failed half-way, nor layers called by themselves, leave anything behind."""
    x = inputs(4)
    handle = block.k.up.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        block(x)
    handle.remove()
    assert in_no_pass(block)
    block.q(x)
    assert in_no_pass(block)


@torch.no_grad()
def test_nothing_stale_is_read_within_a_pass(block):
    """What is changed between the first reader and the others counts: the input, and the gradient mode."""
    x, y = inputs(4), inputs(4) * 2
    expected = block(x)[0], *block(y)[1:]
    handle = block.q.register_forward_hook(doing(lambda: x.mul_(2)))
    assert_same(block(x), expected)
    handle.remove()

    block.q.register_forward_hook(doing(lambda: torch.set_grad_enabled(True)))
    assert block(x)[1].requires_grad


@pytest.mark.parametrize("place", ["down", "order", "up"])
@torch.no_grad()
def test_what_is_written_between_passes_counts(block, place):
    x, before = inputs(4), block(inputs(4))
    tensors = block.q.state_dict() | {"up": block.k.up.weight}
    name = next((name for name in tensors if name.endswith(place) or (place in name and "weight" in name)), None)
    if name is None:
        pytest.skip("no order")
    tensors[name].data.copy_(tensors[name].flip(0))
    right = right_factor(block.q)
    ups = [block.get_submodule(name).up for name in OUTPUTS]
    found = block(x)
    assert_same(found, [nn.functional.linear(x, up.weight @ right, up.bias) for up in ups])
    assert not all(map(torch.equal, found, before))


def test_inference_mode(block):
    x = inputs(4)
    with torch.no_grad():
        expected = block(x)
    with torch.inference_mode():
        assert_same(block(x.clone()), expected)


def test_threads_do_not_mix(block):
    xs = [inputs(3) * factor for factor in range(4)]
    with torch.no_grad():
        expected, found = [block(x) for x in xs], {}
        barrier = threading.Barrier(len(xs))

        def work(index):
            with torch.no_grad():
                barrier.wait()
                for _ in range(50):
                    found[index] = block(xs[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(xs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, outputs in found.items():
        assert_same(outputs, expected[index])


def test_a_copy_shares_with_itself(block):
    x = inputs(4)
    block(x)
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.q.down.parameters():
            parameter.mul_(2)
    assert other.k.site[0] is other.q
    assert not torch.equal(other(x)[1], block(x)[1])
    assert_same(block(x)[1:2], [block.k.up(block.q.down(x))])
    other.calls.clear()
    assert_same(other(x)[1:2], [other.k.up(other.q.down(x))])
    assert in_no_pass(other)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_whole(block, grad):
    """No state of a pass breaks the graph."""
    getattr(block.q.down, "rest", block.q.down)._forward_hooks.clear()
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert_same(compiled(inputs(4)), block(inputs(4)))


def test_in_a_language_model(runtime):
    """Generates the same as with separate factors, statically cached too."""
    model, plain_model = tiny_model(), tiny_model()
    for block in range(2):
        base = f"model.layers.{block}"
        q, k, v = (f"{base}.self_attn.{name}_proj" for name in "qkv")
        RUNTIMES[runtime].replace_layers(model, sharing("shared_pivoted_inputs", q, [k, v], 7))
        for name in (q, k, v):
            dense, layer = plain_model.get_submodule(name), model.get_submodule(name)
            with torch.no_grad():
                dense.weight.copy_(layer.up.weight @ (model.get_submodule(q).down(torch.eye(16)).T))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = plain_model.generate(random_ids(2, 5), **options)
    assert torch.equal(model.generate(random_ids(2, 5), **options), expected)
    static = model.generate(random_ids(2, 5), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


def test_the_innermost_module_that_holds_them_all():
    assert fast_cpu.common_parent(["a.b.attn.q", "a.b.attn.k"]) == "a.b.attn"
    assert fast_cpu.common_parent(["a.b.attn.q", "a.b.mlp.up"]) == "a.b"
    assert fast_cpu.common_parent(["q", "k"]) == ""
