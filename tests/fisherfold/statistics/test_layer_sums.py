"""Hooks' statistics against autograd on weights, in float64."""

import pytest
import torch
from tiny import FAMILIES, random_ids, tiny_model
from torch import nn
from toy_model import VOCABULARY, ToyModel

from fisherfold.network.labels import drawn_labels
from fisherfold.network.layers import LinearLayer, find_layers
from fisherfold.run.errors import InputError
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.stored_sums import restored

SEQUENCES, LENGTH = 5, 12


def sums_of(model: nn.Module, ids: torch.Tensor, form: str = "exact", batch: int = 2, rank: int = 4) -> ModelSums:
    model.requires_grad_(False)
    sums = ModelSums(model, find_layers(model), GRADIENT_FORMS.lookup(form), rank, 0)
    for some in ids.split(batch):
        sums.add(some)
    return sums


def arrays_of(sums: ModelSums) -> dict[str, torch.Tensor]:
    found = {name: restored(name.rpartition("/")[2], values) for name, values in sums.arrays()}
    return found | dict(sums.take_gradients())


def weight_gradients(model: nn.Module, ids: torch.Tensor, layers: list[LinearLayer]) -> dict[str, torch.Tensor]:
    """G [S, n, m] of every layer, from the gradient of its weight."""
    modules = dict(model.named_modules())
    gradients: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    for sequence in ids:
        model.zero_grad()
        logits = model(input_ids=sequence[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        for layer in layers:
            gradient = modules[layer.name].weight.grad
            gradient = torch.zeros_like(modules[layer.name].weight) if gradient is None else gradient.clone()
            gradients[layer.name].append(gradient.T if layer.transposed else gradient)
    return {name: torch.stack(values) for name, values in gradients.items()}


def tokenwise(model: nn.Module, ids: torch.Tensor, layers: list[LinearLayer]) -> dict[str, list[torch.Tensor]]:
    """x [N, m] and d [N, n] of every layer, by autograd on its output."""
    modules, seen = dict(model.named_modules()), {}
    for sequence in ids:
        uses = []

        def note(module, arguments, output):
            uses.append((module, arguments[0], output))  # noqa: B023
            output.retain_grad()

        handles = [modules[layer.name].register_forward_hook(note) for layer in layers]
        logits = model(input_ids=sequence[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        for handle in handles:
            handle.remove()
        for module, x, output in uses:
            seen.setdefault(module, []).append((x.flatten(0, -2), output.grad.flatten(0, -2)))
    return {
        layer.name: [torch.cat(part).detach() for part in zip(*seen[modules[layer.name]])]
        for layer in layers
        if modules[layer.name] in seen
    }


def check(model: nn.Module, ids: torch.Tensor, sums: ModelSums) -> None:
    """Every array of `sums` against the oracle in float64."""
    layers = find_layers(model)
    found = arrays_of(sums)
    model.double().requires_grad_(True)
    G, tokens = weight_gradients(model, ids, layers), tokenwise(model, ids, layers)
    for layer in layers:
        x, d = tokens.get(layer.name, (torch.zeros(1, layer.inputs), torch.zeros(1, layer.outputs)))
        squares = G[layer.name].square()
        expected = {
            f"{layer.name}/output_gram": d.T @ d,
            f"{layer.name}/gradient_sum": G[layer.name].sum(0),
            f"{layer.name}/fisher_inputs": squares.sum((0, 1)),
            f"{layer.name}/fisher_outputs": squares.sum((0, 2)),
            f"{layer.group}/input_gram": x.T @ x,
            f"{layer.group}/input_abs": x.abs().sum(0),
        }
        if f"{layer.name}/gradient" in found:
            expected |= {f"{layer.name}/gradient": G[layer.name], f"{layer.name}/norm": squares.sum((1, 2))}
        for name, oracle in expected.items():
            scale = oracle.abs().max().item()
            torch.testing.assert_close(
                found[name].double(), oracle.double(), rtol=2e-4, atol=2e-5 * scale + 1e-30, msg=name
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_autograd_on_weights(family):
    model, ids = tiny_model(family), random_ids(SEQUENCES, LENGTH)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    check(model, ids, sums_of(model.double(), ids))


def test_layers_used_twice_sometimes_or_never():
    model, ids = ToyModel(), torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    sums = sums_of(model, ids, batch=1)
    assert sums.unreached() == ["idle"]
    check(model, ids, sums)


def test_tokens_that_cannot_be_told_apart_by_sequence_are_refused():
    model, ids = ToyModel(), torch.arange(10).view(2, 5)
    with pytest.raises(InputError, match=r"layer (back|expert) sees 5 of a batch's 10 tokens.*batch_size: 1"):
        sums_of(model, ids, batch=2)
    sums_of(model, ids, "none", batch=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_changes_nothing_but_rounding(family):
    model, ids = tiny_model(family), random_ids(SEQUENCES, LENGTH)
    alone, together = (arrays_of(sums_of(model, ids, batch=batch)) for batch in (1, SEQUENCES))
    for name, values in alone.items():
        torch.testing.assert_close(values, together[name], rtol=1e-4, atol=1e-6 * values.abs().max().item(), msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_wide_sketch_equals_the_gradient(family):
    model, ids = tiny_model(family), random_ids(SEQUENCES, LENGTH)
    exact = arrays_of(sums_of(model, ids))
    sketched = arrays_of(sums_of(model, ids, "sketch", rank=64))
    for layer in find_layers(model):
        G = sketched[f"{layer.name}/left"] @ sketched[f"{layer.name}/right"].mT
        torch.testing.assert_close(G, exact[f"{layer.name}/gradient"], rtol=1e-4, atol=1e-6)
        assert (sketched[f"{layer.name}/kept"] == 1).all()
        assert torch.equal(sketched[f"{layer.name}/norm"], exact[f"{layer.name}/norm"])


def test_a_narrow_sketch_says_what_it_keeps():
    model, ids = tiny_model(), random_ids(SEQUENCES, LENGTH)
    exact, sketched = arrays_of(sums_of(model, ids)), arrays_of(sums_of(model, ids, "sketch", rank=3))
    for layer in find_layers(model):
        G = exact[f"{layer.name}/gradient"]
        approximation = sketched[f"{layer.name}/left"] @ sketched[f"{layer.name}/right"].mT
        lost = (G - approximation).square().sum((1, 2)) / G.square().sum((1, 2))
        torch.testing.assert_close(1 - sketched[f"{layer.name}/kept"], lost, rtol=1e-3, atol=1e-5)


def test_without_gradients_only_token_wise_sums_are_made():
    model, ids = tiny_model(), random_ids(SEQUENCES, LENGTH)
    alone, full = arrays_of(sums_of(model, ids, "none")), arrays_of(sums_of(model, ids))
    assert {name.split("/")[1] for name in alone} == {
        "input_gram",
        "input_abs",
        "gradient_gram",
        "output_gram",
    }
    assert all(torch.equal(values, full[name]) for name, values in alone.items())


def test_bfloat16_models_are_summed_in_float32():
    ids = random_ids(SEQUENCES, LENGTH)
    single, half = (arrays_of(sums_of(tiny_model().to(dtype), ids)) for dtype in (torch.float32, torch.bfloat16))
    for name, values in half.items():
        assert values.dtype == torch.float32
        error = (values - single[name]).norm() / single[name].norm()
        assert error < 0.05, name


def test_no_hook_is_left_behind_and_inputs_are_freed():
    model = tiny_model()
    sums = sums_of(model, random_ids(2, LENGTH))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(sums._calls.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_draw_of_labels_adds_to_what_comes_back_and_nothing_to_what_goes_in(family):
    """One forward and three backward passes against three passes of one draw each."""
    ids = random_ids(3, LENGTH)
    draws = [drawn_labels(range(3), 0, draw) for draw in range(3)]

    def summed(*labels) -> dict[str, torch.Tensor]:
        model = tiny_model(family).double().requires_grad_(False)
        sums = ModelSums(model, find_layers(model), GRADIENT_FORMS.lookup("exact"), 4, 0, torch.float32)
        sums.add(ids, torch.tensor([[0, 5], [1, 2], [7, 11]]), labels)
        return arrays_of(sums)

    found, single = summed(*draws), [summed(labels) for labels in draws]
    assert any(name.endswith("gradient_gram") for name in found) == (family != "gpt2")  # whose layers share no input
    for name, values in found.items():
        of_draws = [each[name] for each in single]
        sent_back = name.endswith(("output_gram", "gradient_gram"))
        expected = sum(of_draws) if sent_back else of_draws[0]
        near = 1e-6  # sums are float32, and how they are rounded is the processor's
        torch.testing.assert_close(values, expected, rtol=near, atol=near * expected.abs().max().item(), msg=name)
        assert not sent_back or (of_draws[0] - of_draws[1]).norm() > 0.1 * of_draws[0].norm()
