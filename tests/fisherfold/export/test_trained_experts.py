"""Low-rank experts put into a copy of the dense model, and taken out of it, tensor by tensor."""

import json

import numpy as np
import pytest
import torch
from tiny_families import tiny_family

from fisherfold.export.expert_tensors import find_stacks
from fisherfold.export.gauges import gauge_site
from fisherfold.export.refined_blocks import compress_block
from fisherfold.export.stored_layer import StoredLayer, stored_site
from fisherfold.export.trained_experts import factor_names, take_experts
from fisherfold.network.experts import unfold_experts
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.network.targets import find_targets
from fisherfold.run.checkpoint import StoredTensor, read_tensors, write_tensors

IDS = torch.arange(3, 35)[None]
BLOCK = "model.layers.0"


def factorized(folder, model, storage: str, shared: bool) -> tuple[list[LinearLayer], dict[str, StoredLayer]]:
    """The experts of a family with rank 6, but for the first of each stack, which stays dense if it shares nothing."""
    unfolded = type(model)(model.config).eval().requires_grad_(False)
    unfolded.load_state_dict(model.state_dict())
    unfold_experts(unfolded)
    layers = [layer for layer in find_targets(unfolded, IDS).layers if layer.stack]
    stacks: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        stacks.setdefault(layer.stack, []).append(layer)
    sites = [Site(own[0].name, tuple(own)) for own in stacks.values()]
    if not shared:
        sites = [Site(layer.name, (layer,)) for own in stacks.values() for layer in own[1:]]
    generator, found = np.random.default_rng(0), {}
    for site in sites:
        lefts = [generator.normal(size=(layer.outputs, 6)) / 6 for layer in site.layers]
        right = generator.normal(size=(6, site.inputs)) / 6
        for layer, own in zip(site.layers, gauge_site(lefts, right, storage, torch.float32), strict=True):
            place = folder / layer.name
            place.mkdir(parents=True)
            write_tensors(place, {name: StoredTensor.of(torch.from_numpy(values).float() if values.dtype != np.int64 else torch.from_numpy(values))
                                  for name, values in own.parameters.items()})  # fmt: skip
            record = {"kind": own.kind, "rank": 6} | ({"source": site.name} if own.kind == "shared_member" else {})
            (place / "layer.json").write_text(json.dumps(record))
        found |= stored_site(site, folder)
    return layers, found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_block_computes_its_factors_products_and_gives_them_back(family, storage, shared, tmp_path):
    model = tiny_family(family).eval().requires_grad_(False)
    layers, found = factorized(tmp_path / "before", model, storage, shared)
    stacks = find_stacks(layers, found)
    compressed = compress_block(model, "", {}, stacks)
    rebuilt = tiny_family(family).eval().requires_grad_(False)
    for stored in found.values():
        W = torch.from_numpy(stored.product()).float()
        rebuilt.get_parameter(stored.layer.stack).data[stored.layer.expert] = W.T if stored.layer.transposed else W
    torch.testing.assert_close(compressed(input_ids=IDS).logits, rebuilt(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    state = compressed.state_dict()
    assert any(name.startswith(tuple(factor_names(stacks))) for name in state)
    mixed = take_experts(tmp_path / "after", state, "", model, stacks)
    assert set(mixed) == (set() if shared else {stack.name for stack in stacks})
    assert not any("_classes" in name for name in state)
    for name, matrices in mixed.items():
        assert torch.equal(matrices, model.get_parameter(name))
    for name, stored in found.items():
        again = read_tensors(tmp_path / "after" / name)
        assert again.keys() == stored.tensors.keys()
        for key, tensor in stored.tensors.items():
            assert torch.equal(again[key].read(), tensor.read())


def test_a_part_of_the_model_has_its_own_stacks_alone(tmp_path):
    model = tiny_family("qwen3_moe").eval().requires_grad_(False)
    layers, found = factorized(tmp_path / "before", model, "factors", False)
    stacks = [stack for stack in find_stacks(layers, found) if stack.name.startswith(f"{BLOCK}.")]
    block = compress_block(model, BLOCK, {}, stacks)
    names = {name for name, _ in block.named_parameters() if "_classes" in name}
    assert names and all(name.startswith("mlp.experts.") for name in names)
    state = block.state_dict()
    mixed = take_experts(tmp_path / "after", state, f"{BLOCK}.", model.get_submodule(BLOCK), stacks)
    assert set(mixed) == {stack.name for stack in stacks} and "mlp.gate.weight" in state
