"""Experts as linear layers: the unfolded model is the same function, and its layers are nearly all of it."""

import pytest
import torch
from tiny_families import tiny_family

from fisherfold.inputs.targeting import open_experts
from fisherfold.network.coverage import describe_coverage, measure_coverage
from fisherfold.network.experts import unfold_experts, unknown_stacks
from fisherfold.network.layers import read_layers, write_layers
from fisherfold.network.models import read_weight
from fisherfold.network.sites import BUNDLE, bundles
from fisherfold.network.targets import CHOOSES, find_targets
from fisherfold.run.errors import InputError

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "gemma4_text", "granitemoe", "llama4_text", "olmoe")
IDS = torch.arange(3, 35)[None]


def frozen(family: str):
    return tiny_family(family).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfolded_experts_are_layers_of_the_same_function(family):
    model = frozen(family)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logits = model(input_ids=IDS, use_cache=False).logits
    unfold_experts(model)
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, logits, rtol=0, atol=1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    targets = find_targets(model, IDS)
    coverage = measure_coverage(model, targets)
    embedded = sum(p.numel() for name, p in model.named_parameters() if "embed" in name or "lm_head" in name)
    assert coverage["targeted_parameters"] >= 0.95 * (parameters - embedded)
    assert coverage["stacked_matrices"] == 0
    assert len({layer.stack for layer in targets.layers if layer.stack}) >= 2


def test_routers_stay_dense():
    model = frozen("gemma4_text")
    unfold_experts(model)
    reasons = find_targets(model, IDS).dense
    assert {name for name in reasons if "router" in name} and set(reasons.values()) == {CHOOSES}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_expert_s_weight_is_its_slice(family, tmp_path):
    model = frozen(family)
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    stacks = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    unfold_experts(model)
    write_layers(tmp_path, find_targets(model, IDS).layers)
    layers = [layer for layer in read_layers(tmp_path) if layer.stack]
    assert {layer.transposed for layer in layers} == {family == "gpt_oss"}
    for layer in layers:
        matrix = stacks[layer.stack][layer.expert]
        expected = matrix.T if layer.transposed else matrix
        assert (layer.outputs, layer.inputs) == tuple(expected.shape)
        assert torch.equal(read_weight(tmp_path / "model", layer), expected)


def test_a_layout_that_is_not_known_stays_dense_or_is_refused():
    model = frozen("jetmoe")
    unknown = unknown_stacks(model)
    assert unknown and set(unknown.values()) == {4}
    with pytest.raises(InputError, match=r"layout that is not known here: model\.layers\.0.*prepare\.experts: layers"):
        open_experts(model, "all")
    open_experts(model, "layers")
    targets = find_targets(model, IDS)
    lines = list(describe_coverage(measure_coverage(model, targets, unknown)))
    assert not any(layer.stack for layer in targets.layers)
    assert "not known here: model.layers.*" in lines[-1]


def test_experts_of_one_stack_share_units_of_work():
    model = frozen("mixtral")
    unfold_experts(model)
    layers = find_targets(model, IDS).layers
    units = bundles(layers)
    assert sorted(layer.name for some in units.values() for layer in some) == sorted(layer.name for layer in layers)
    assert all(len({layer.stack for layer in some}) == 1 and len(some) <= BUNDLE for some in units.values())
    assert len(units) < len(layers) and all(len(some) == 1 for some in units.values() if not some[0].stack)
