"""Moments of x and g against autograd on the shared input itself."""

import pytest
import torch
from tiny import FAMILIES, random_ids, tiny_model, tiny_workspace

from fisherfold.network.layers import by_group, find_layers, input_gradient_hooks
from fisherfold.network.models import load_model
from fisherfold.run.errors import InputError
from fisherfold.run.params import CaptureParams
from fisherfold.statistics.input_gradients import input_gradient_shards, input_moments, stacked_weight
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.layer_sums import ModelSums
from stages import capture

ALL = CaptureParams(
    products="float32",
    labels="data",
    batch_size=2,
    sequences_per_shard=2,
    gradients="exact",
    tokens_per_sequence=99,
    token_dtype="float32",
)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_equal_autograd_on_the_input(tmp_path, family):
    workspace = tiny_workspace(tmp_path, family, sequences=5)
    capture.run(workspace, ALL)
    statistics = Statistics(workspace.out("capture"))
    oracle = inputs_and_gradients(workspace)
    for name, group in by_group(statistics.layers).items():
        x, g = oracle[name]
        moments = input_moments(statistics, workspace.model, group)
        for found, expected in ((moments.xx, x.T @ x), (moments.xg, x.T @ g), (moments.gg, g.T @ g)):
            assert_near(found, expected / len(x))
        shards = list(input_gradient_shards(statistics, workspace.model, group))
        assert_near(torch.cat([x for x, _ in shards]).flatten(0, 1), x)
        assert_near(torch.cat([g for _, g in shards]).flatten(0, 1), g)
        assert len(stacked_weight(workspace.model, group)) == sum(layer.outputs for layer in group)


def inputs_and_gradients(workspace) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """x and g [N, m] of every group, float64; in these models nothing else reads a group's input."""
    model, seen = load_model(workspace.model, torch.float32).double(), {}
    modules = dict(model.named_modules())
    for layer in find_layers(model):
        if layer.group == layer.name:
            modules[layer.name].register_forward_pre_hook(note(seen.setdefault(layer.name, [])))
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    for ids in random_ids(5, 12):
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
    return {
        name: tuple(map(torch.cat, zip(*((x[0].detach(), x.grad[0]) for x in inputs)))) for name, inputs in seen.items()
    }


def note(inputs: list[torch.Tensor]):
    def before(module, arguments):
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    return before


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_what_other_readers_send_is_left_out():
    x = torch.randn(4, 3, requires_grad=True)
    first, second, seen = torch.nn.Linear(3, 2), torch.nn.Linear(3, 5), []
    with input_gradient_hooks({"first": [first, second]}, lambda group, g: seen.append((group, g))):
        (first(x).sum() + second(input=x).sum() + 7 * x.sum()).backward()
    expected = first.weight.sum(0) + second.weight.sum(0)
    assert [group for group, _ in seen] == ["first"]
    torch.testing.assert_close(seen[0][1], expected.expand(4, 3))
    torch.testing.assert_close(x.grad, 7 + expected.expand(4, 3))
    assert not first._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_views_change_no_sum(family):
    model, ids = tiny_model(family).requires_grad_(False), random_ids(4, 12)
    sums = [ModelSums(model, find_layers(model), None, 0, 0) for _ in range(2)]
    sums[1].shared = {}
    for each in sums:
        each.add(ids)
    with_views, without = (dict(each.arrays()) for each in sums)
    assert all(torch.equal(with_views[name], values) for name, values in without.items() if "gradient" not in name)


def test_needs_gradients_and_tokens(tmp_path):
    workspace = tiny_workspace(tmp_path, sequences=2)
    capture.run(workspace, CaptureParams(labels="data", gradients="none", tokens_per_sequence=0))
    statistics = Statistics(workspace.out("capture"))
    group = next(iter(by_group(statistics.layers).values()))
    with pytest.raises(InputError, match=r"capture\.gradients"):
        input_moments(statistics, workspace.model, group)
    with pytest.raises(InputError, match=r"capture\.tokens_per_sequence"):
        next(input_gradient_shards(statistics, workspace.model, group))
