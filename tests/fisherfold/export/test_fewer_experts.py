"""Whole experts taken out of a model: what is left are the others' rows, in the shapes of the same architecture with fewer experts."""

import pytest
import torch
from tiny_families import tiny_family

from fisherfold.export.architecture import dense_architecture
from fisherfold.export.fewer_experts import spread_shares, without_experts
from fisherfold.network.experts import expert_modules
from fisherfold.network.layers import LinearLayer
from fisherfold.run.checkpoint import read_tensors
from fisherfold.run.errors import InputError

FAMILIES = (
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "gemma4_text",
    "granitemoe",
    "llama4_text",
    "olmoe",
    "ernie4_5_moe",
)


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    model = tiny_family(request.param)
    model.save_pretrained(tmp_path, save_original_format=False)
    return model, tmp_path


def test_the_others_rows_are_left_in_the_architecture_s_shapes(saved):
    model, folder = saved
    modules = {name: module for name, module, _ in expert_modules(model)}
    dropped = {name: [number % 3] for number, name in enumerate(modules)}
    architecture, tensors = without_experts(dense_architecture(folder), read_tensors(folder), dropped)
    empty = architecture.empty_model()
    empty.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, assign=True, strict=False)
    missing = [name for name, parameter in empty.named_parameters() if parameter.is_meta and name in tensors]
    assert not missing
    for name in modules:
        (gone,) = dropped[name]
        kept = [expert for expert in range(4) if expert != gone]
        for own, stack in modules[name].named_parameters():
            assert torch.equal(tensors[f"{name}.{own}"].read(), stack[kept])
    changed = [name for name, tensor in tensors.items() if tensor.shape != tuple(model.state_dict()[name].shape)]
    assert len(changed) > len([own for module in modules.values() for own, _ in module.named_parameters()]), "no router"


def test_a_number_of_experts_that_the_configuration_does_not_have_is_refused(tmp_path):
    tiny_family("mixtral").save_pretrained(tmp_path, save_original_format=False)
    architecture = dense_architecture(tmp_path)
    tensors = read_tensors(tmp_path)
    with pytest.raises(InputError, match="no one number of experts"):
        without_experts(architecture, tensors, {"model.layers.0.mlp.experts": [0]})  # not the other block's


def test_tokens_of_experts_that_go_are_spread_over_the_others():
    layers = [LinearLayer(f"e.up.{e}", 3, 5, False, False, f"e.up.{e}", "e.up") for e in range(3)]
    found = spread_shares({"e.up.0": 0.5, "e.up.1": 0.3, "e.up.2": 0.2}, layers, {"e.up.2"})
    assert found["e.up.0"] == pytest.approx(0.625) and found["e.up.1"] == pytest.approx(0.375)
