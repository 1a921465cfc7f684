"""Kinds of layers that stay dense, in models made for it and in families that have them."""

import math

import pytest
import torch
from tiny import COMMON, VOCABULARY, tiny_model
from tiny_families import tiny_family
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fisherfold.network.coverage import describe_coverage, measure_coverage
from fisherfold.network.targets import (
    CHOOSES,
    NARROW,
    NO_GRADIENT,
    READ_ELSEWHERE,
    STRANGE,
    UNUSED,
    find_targets,
)
from fisherfold.run.errors import InputError

IDS = torch.arange(3, 35)[None]
MLP = "model.layers.0.mlp"


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Experts(nn.Module):
    """Every token to the better of two experts, of eight: most are idle on a short text."""

    def __init__(self, width=16, count=8):
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        nn.init.zeros_(self.gate.weight)

    def forward(self, x):
        shares, best = self.gate(x).softmax(-1).topk(1)
        return shares * (self.experts[0](x) * (best == 0) + self.experts[1](x) * (best > 0))


def dense_reasons(model, **options):
    return find_targets(model.requires_grad_(False), IDS, **options).dense


def with_layer(change):
    model = tiny_model("llama")
    change(model.model.layers[0].mlp)
    return model


def test_every_layer_of_a_plain_model_is_a_target():
    assert dense_reasons(tiny_model("llama")) == {}


@pytest.mark.parametrize(
    ("family", "layer", "reason"),
    [
        ("gemma3", "model.vision_tower.encoder.layers.0.mlp.fc1", UNUSED),
        ("glm_moe_dsa", "model.layers.0.self_attn.indexer.wk", NO_GRADIENT),
        ("llama4_text", "model.layers.0.feed_forward.router", STRANGE),
        ("mamba2", "backbone.layers.0.mixer.out_proj", READ_ELSEWHERE),
        ("dbrx", "transformer.blocks.0.ffn.router.layer", CHOOSES),
    ],
)
def test_families_have_layers_that_stay_dense(family, layer, reason):
    assert dense_reasons(tiny_family(family))[layer] == reason


def test_subclasses_are_tried_and_not_believed():
    def scale(mlp):
        mlp.gate_proj.__class__ = Scaled

    assert dense_reasons(with_layer(scale)) == {f"{MLP}.gate_proj": STRANGE}


def test_a_layer_with_one_output_stays_dense_unless_it_is_asked_for():
    def gate(mlp):
        mlp.gate, own = nn.Linear(16, 1), mlp.forward
        mlp.forward = lambda x: own(x) * mlp.gate(x).sigmoid()

    assert dense_reasons(with_layer(gate)) == {f"{MLP}.gate": NARROW}
    assert dense_reasons(with_layer(gate), gates=["*.mlp.gate"]) == {}
    with pytest.raises(InputError, match=r"no linear layer of the model is called '\*.mlp.gaet'; one is"):
        dense_reasons(with_layer(gate), gates=["*.mlp.gaet"])


def test_idle_experts_are_targets_and_their_router_is_not():
    def route(mlp):
        layers, own = Experts(), mlp.forward
        mlp.moe = layers
        mlp.forward = lambda x: own(x) + layers(x)

    targets = find_targets(with_layer(route).requires_grad_(False), IDS)
    assert targets.dense == {f"{MLP}.moe.gate": CHOOSES}
    assert sum("experts" in layer.name for layer in targets.layers) == 8


def test_a_weight_that_other_code_reads_in_training_alone():
    def read(mlp):
        own = mlp.forward
        mlp.forward = lambda x: own(x) + (mlp.up_proj.weight.sum() * 0 if mlp.training else 0)

    assert dense_reasons(with_layer(read)) == {f"{MLP}.up_proj": READ_ELSEWHERE}


def test_trying_leaves_the_model_as_it_was():
    model = tiny_model("llama").requires_grad_(False)
    before, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    random = torch.random.get_rng_state()
    find_targets(model, IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_model_that_reads_ahead_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(lambda module, arguments, y: y + 3 * y.mean(1, keepdim=True))
    with pytest.raises(InputError, match=r"reads what comes after a token.*Choose a causal model\.$"):
        dense_reasons(model)


@pytest.mark.parametrize(("family", "switch"), [("bert", "is_decoder"), ("xlm", "causal")])
def test_an_untrained_encoder_is_refused_too(family, switch):
    encoder, decoder = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{switch: reads_back}, vocab_size=VOCABULARY, **COMMON)
        ).eval()
        for reads_back in (False, True)
    )
    with pytest.raises(InputError, match=f"reads what comes after a token.*set `{switch}: true`"):
        dense_reasons(encoder)
    assert not dense_reasons(decoder).keys() & {
        "bert.encoder.layer.0.intermediate.dense",
        "transformer.ffns.0.lin1",
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"no finite loss.*\(in its config.json: rms_norm_eps = nan\)"),
        (math.inf, r"no gradient that is not zero.*rms_norm_eps = inf"),
    ],
)
def test_a_model_that_computes_no_loss_or_nothing_that_hangs_on_text_is_refused(value, message):
    model = tiny_model("llama")
    model.config.rms_norm_eps = value
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = value
    with pytest.raises(InputError, match=message):
        dense_reasons(model)


def test_a_model_of_zeros_is_refused():
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(InputError, match=r"every number of lm_head.weight is zero"):
        dense_reasons(model)


def test_a_model_that_cannot_read_text_alone_is_refused():
    with pytest.raises(InputError, match="inputs_embeds and shared_kv_states"):
        dense_reasons(tiny_family("gemma4_unified_assistant"))


def test_coverage_adds_up():
    model = tiny_family("glm_moe_dsa").requires_grad_(False)
    coverage = measure_coverage(model, find_targets(model, IDS))
    parts = [coverage[key] for key in ("targeted_parameters", "embeddings", "stacked_matrices", "other")]
    parts += [row["parameters"] for row in coverage["dense"]]
    assert sum(parts) == coverage["model_parameters"] == model.num_parameters()
    assert coverage["stacked_matrices"] > 0
    assert {"model.layers.*.self_attn.indexer.wk"} <= {name for row in coverage["dense"] for name in row["names"]}
    lines = list(describe_coverage(coverage))
    assert "will be compressed" in lines[0] and any("experts" in line for line in lines)
