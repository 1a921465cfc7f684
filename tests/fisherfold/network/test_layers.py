import json

import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import nn
from toy_model import ToyModel
from transformers.pytorch_utils import Conv1D

from fisherfold.network.layers import find_layers, linear_modules, read_layers, write_layers
from fisherfold.run.errors import CorruptArtifact, InputError

GROUPED = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_linear_layer_but_the_head(family):
    model = tiny_model(family)
    modules = dict(model.named_modules())
    expected = [
        name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    ]
    layers = find_layers(model)
    assert [layer.name for layer in layers] == expected
    for layer in layers:
        weight = modules[layer.name].weight.T if layer.transposed else modules[layer.name].weight
        assert weight.shape == (layer.outputs, layer.inputs)
        assert layer.bias == (modules[layer.name].bias is not None)
        assert layer.transposed == (family == "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_layers_that_read_the_same_tensor(family):
    for layer in find_layers(tiny_model(family)):
        block, own = layer.name.rsplit(".", 1)
        assert layer.group == f"{block}.{GROUPED.get(own, own)}"


def test_groups_do_not_come_from_names():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.add_module("zz", attention.k_proj)  # the same module under a name that says nothing
    del attention.k_proj
    attention.k_proj = lambda x: attention.zz(x)
    groups = {layer.name: layer.group for layer in find_layers(model)}
    assert groups["model.layers.0.self_attn.zz"] == "model.layers.0.self_attn.q_proj"


def test_layers_used_twice_sometimes_or_never():
    layers = {layer.name: layer for layer in find_layers(ToyModel())}
    assert list(layers) == ["twice", "expert", "back", "idle"]
    assert all(layer.group == name for name, layer in layers.items())


def test_tied_weights_are_not_targeted():
    model = ToyModel()
    model.idle = nn.Linear(6, 12)
    model.idle.weight = model.embedding.weight
    assert "idle" not in linear_modules(model)


def test_refuses_models_without_linear_layers_and_names_that_are_no_paths():
    model = ToyModel()
    model.idle = nn.ModuleDict({"a b": nn.Linear(2, 2)})
    with pytest.raises(InputError, match=r"'idle\.a b'"):
        find_layers(model)
    for name in ("twice", "expert", "back", "idle"):
        setattr(model, name, nn.Identity())
    with pytest.raises(InputError, match="no linear layers"):
        find_layers(model)


def test_layers_survive_the_file(tmp_path):
    layers = find_layers(tiny_model("gpt2"))
    write_layers(tmp_path, layers)
    assert read_layers(tmp_path) == layers


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".a", "a..b", "a b", "-a"])
def test_refuses_files_with_names_that_are_no_paths(tmp_path, name):
    fields = {"name": name, "outputs": 1, "inputs": 1, "bias": False, "transposed": False, "group": "a"}
    (tmp_path / "layers.json").write_text(json.dumps([fields]))
    with pytest.raises(CorruptArtifact, match="not the name of a module"):
        read_layers(tmp_path)


@pytest.mark.parametrize("text", [None, "[", "[1]", '[{"name": "a"}]'])
def test_refuses_files_that_are_no_list_of_layers(tmp_path, text):
    if text is not None:
        (tmp_path / "layers.json").write_text(text)
    with pytest.raises(CorruptArtifact, match="not readable"):
        read_layers(tmp_path)


def test_finding_layers_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
