"""Models that read their weights when they are called, against the same models in memory: the same bits, one block at a time."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, as_truncated, random_ids, save_tiny
from tiny_families import tiny_family
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace

import fisherfold.runtime  # noqa: F401  loads compressed checkpoints
from fisherfold.inputs.targeting import open_experts
from fisherfold.network.coverage import measure_coverage
from fisherfold.network.experts import unfold_experts
from fisherfold.network.generation import Decoder
from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import forward_hooks, linear_modules
from fisherfold.network.models import load_model
from fisherfold.network.sites import read_sites
from fisherfold.network.streamed_model import StreamedModel, _Stored, is_stand_in
from fisherfold.network.targets import find_targets
from fisherfold.run.determinism import STREAMED, placed
from fisherfold.run.errors import CorruptArtifact
from stages import factorize

MIXTURES = ("qwen3_moe", "gpt_oss")
IDS = random_ids(2, 12)


def both(folder, dtype=torch.float32):
    """The model in memory, and the one that reads."""
    whole = load_model(folder, dtype)
    with placed(STREAMED):
        return whole, load_model(folder, dtype)


def saved(folder, family):
    if family in FAMILIES:
        return save_tiny(folder, family)
    tiny_family(family).save_pretrained(folder, save_original_format=False)  # as stage prepare does
    return folder


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_and_answers_have_the_same_bits(tmp_path, family, dtype):
    models = both(saved(tmp_path / "m", family), dtype)
    assert torch.equal(*map(logits, models))
    prompts = [IDS[0, :5].tolist(), IDS[1, :8].tolist()]
    one, other = (Decoder(model, []) for model in models)
    assert one.answer(prompts, 6) == other.answer(prompts, 6) and one.caches == other.caches


def compressed(root, family, storage):
    """The folder of a compressed model with every kind of layer; with `storage`, of layers that share right factors."""
    workspace = subspace_workspace(root, family, shared=storage is not None)
    sites = read_sites(workspace.out("subspace"))
    ranks = mixed_ranks(workspace) if storage is None else {site.name: 3 + i % 3 for i, site in enumerate(sites)}
    publish_ranks(workspace, ranks, *([storage] if storage else []))
    factorize.run(workspace, as_truncated())
    return workspace.out("factorize") / "model"


@pytest.mark.parametrize(
    ("family", "storage"),
    [("llama", None), ("gpt2", None), ("llama", "factors"), ("qwen2", "pivoted"), ("gpt_oss", None)],
)
def test_compressed_models(tmp_path, family, storage):
    models = both(compressed(tmp_path, family, storage))
    assert torch.equal(*map(logits, models))


def gradients(model):
    """∂L/∂y of every linear layer."""
    found = {}

    def after(name, x, y):
        if y.requires_grad:
            y.register_hook(lambda d: found.__setitem__(name, d))

    with forward_hooks(linear_modules(model), after):
        gradient_pass(model, IDS)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_gradients(tmp_path, family):
    models = both(saved(tmp_path / "m", family))
    for model in models:
        unfold_experts(model)
    one, other = map(gradients, models)
    assert one.keys() == other.keys() and len(one) > 7
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_targets(tmp_path, family):
    models = both(saved(tmp_path / "m", family))
    found = []
    for model in models:
        open_experts(model, "layers")
        targets = find_targets(model, IDS[:1])
        found.append((targets, measure_coverage(model, targets)))
    assert found[0] == found[1] and len(found[0][0].layers) > 7


def test_one_block_or_one_embedding_has_weights_at_a_time(tmp_path, monkeypatch):
    """Forward and backward."""
    held, (_, model) = [], both(save_tiny(tmp_path / "m"))
    fill, read = StreamedModel.fill, _Stored.__call__

    def parts():
        names = [name for name, weight in model.named_parameters() if not is_stand_in(weight)]
        return {name.rpartition(".layers.")[2][:1] if ".layers." in name else name for name in names}

    monkeypatch.setattr(
        StreamedModel, "fill", lambda *a: (lambda restore: (held.append(parts()), restore)[1])(fill(*a))
    )
    monkeypatch.setattr(_Stored, "__call__", lambda self: (held.append(parts()), read(self))[1])
    gradient_pass(model, IDS)
    seen = {frozenset(names) - {"model.norm.weight"} for names in held}
    assert seen == {frozenset(part) for part in ([], ["0"], ["1"], ["model.embed_tokens.weight"], ["lm_head.weight"])}
    assert parts() == {"model.norm.weight"}


def test_a_weight_that_is_read_without_its_module_is_nan(tmp_path):
    _, model = both(save_tiny(tmp_path / "m"))
    block = model.model.layers[0]
    assert block.mlp.up_proj(torch.ones(16)).isnan().all() and block.mlp.up_proj.weight.shape == (24, 16)


def test_a_missing_weight_is_named(tmp_path):
    folder = save_tiny(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with placed(STREAMED), pytest.raises(CorruptArtifact, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, torch.float32)
