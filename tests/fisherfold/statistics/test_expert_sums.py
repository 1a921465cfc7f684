"""Statistics of single experts against autograd on each expert's slice, and token by token, in float64."""

import pytest
import torch
from tiny_families import tiny_family
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fisherfold.network.experts import unfold_experts
from fisherfold.network.layers import LinearLayer
from fisherfold.network.targets import find_targets
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.stored_sums import restored

SEQUENCES, LENGTH = 3, 10
IDS = torch.randint(3, 90, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[0, 4, 9], [1, 2, 3], [0, 5, 8]])


def expert_sums(family: str, batch: int) -> tuple[list[LinearLayer], dict[str, torch.Tensor]]:
    model = tiny_family(family).double().eval().requires_grad_(False)
    unfold_experts(model)
    layers = [layer for layer in find_targets(model, IDS[:1]).layers if layer.stack]
    sums = ModelSums(model, layers, GRADIENT_FORMS.lookup("exact"), 4, 0, torch.float32)
    for low in range(0, SEQUENCES, batch):
        sums.add(IDS[low : low + batch], POSITIONS[low : low + batch])
    arrays = {name: restored(name.rpartition("/")[2], values) for name, values in sums.arrays()}
    return layers, arrays | dict(sums.take_gradients())


def slice_gradients(family: str, layer: LinearLayer, cache: dict) -> torch.Tensor:
    """G [S, n, m] of one expert, from the gradient of its stack in the model as it is."""
    if family not in cache:
        model = tiny_family(family).double().eval()
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the only one that knows float64
        cache[family] = {name: [] for name, _ in model.named_parameters()}
        for sequence in IDS:
            model.zero_grad()
            logits = model(input_ids=sequence[None], use_cache=False).logits
            nn.functional.cross_entropy(logits[0, :-1], sequence[1:]).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    cache[family][name].append(parameter.grad.clone())
    own = torch.stack(cache[family][layer.stack])[:, layer.expert]
    return own.mT if layer.transposed else own


CACHE: dict = {}


OTHERS = ("mixtral", "deepseek_v3", "gemma4_text", "granitemoe", "olmoe", "ernie4_5_moe")
BATCHES = [(family, batch) for family in ("qwen3_moe", "gpt_oss", "llama4_text") for batch in (1, 3)]


@pytest.mark.parametrize(("family", "batch"), [*BATCHES, *((family, 3) for family in OTHERS)])
def test_gradients_are_those_of_the_expert_s_slice(family, batch):
    layers, found = expert_sums(family, batch)
    for layer in layers:
        G = slice_gradients(family, layer, CACHE).float()
        torch.testing.assert_close(found[f"{layer.name}/gradient"], G, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[f"{layer.name}/gradient_sum"], G.sum(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[f"{layer.name}/norm"], G.square().sum((1, 2)), rtol=1e-4, atol=1e-9)


def one_by_one(seen: list):
    """Experts run token by token as their definition says; `seen` gets (stack, expert, token, x, y) of every product."""

    def product(module: nn.Module, name: str, expert: int, token: int, x: torch.Tensor) -> torch.Tensor:
        W = getattr(module, name)[expert]
        y = x @ W if module.is_transposed else W @ x
        y = y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y + 0
        y.retain_grad()
        seen.append((module, name, expert, token, x, y))
        return y

    def forward(module, hidden_states, top_k_index, top_k_weights):
        rows = []
        for token, x in enumerate(hidden_states):
            parts = [
                weight
                * product(
                    module,
                    "down_proj",
                    int(expert),
                    token,
                    module._apply_gate(product(module, "gate_up_proj", int(expert), token, x)[None])[0],
                )
                for expert, weight in zip(top_k_index[token], top_k_weights[token])
            ]
            rows.append(sum(parts))
        return torch.stack(rows)

    return forward


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_sums_are_those_of_the_tokens_routed_to_the_expert(family, monkeypatch):
    layers, found = expert_sums(family, batch=3)
    seen: list = []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "one_by_one", one_by_one(seen))
    model = tiny_family(family).double().eval()
    model.set_experts_implementation("one_by_one")
    names = {id(module): name for name, module in model.named_modules()}
    tokens: dict[str, list] = {layer.name: [] for layer in layers}
    for number, sequence in enumerate(IDS):
        seen.clear()
        logits = model(input_ids=sequence[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        for module, name, expert, token, x, y in seen:
            tokens[f"{names[id(module)]}.{name}.{expert}"].append((number, token, x.detach(), y.grad))
    for layer in layers:
        own = tokens[layer.name]
        X, D = (torch.stack([entry[i] for entry in own]) if own else torch.zeros(0, 1) for i in (2, 3))
        assert found[f"{layer.name}/routed"].item() == len(own)
        if not own:
            assert not found[f"{layer.name}/input_gram"].any()
            continue
        torch.testing.assert_close(found[f"{layer.name}/input_gram"], (X.T @ X).float(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[f"{layer.name}/input_abs"], X.abs().sum(0).float(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[f"{layer.name}/output_gram"], (D.T @ D).float(), rtol=1e-4, atol=1e-9)
        sample = torch.zeros(SEQUENCES, POSITIONS.shape[1], layer.inputs)
        for number, token, x, _ in own:
            for place in (POSITIONS[number] == token).nonzero()[:, 0]:
                sample[number, place] = x.float()
        torch.testing.assert_close(found[f"{layer.name}/x"], sample)
