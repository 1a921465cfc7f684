"""Stage `factorize` with `bits`: the checkpoint loads by compressed-tensors, with code from its folder and with `fisherfold.runtime`, as one model."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, as_truncated, random_ids, tiny_tokenizer
from tiny_subspace import publish_ranks, publish_subspace
from transformers import AutoConfig, AutoModelForCausalLM

from fisherfold.export.multiplied_out import export
from fisherfold.export.packed import matrices, pack, packed_tensors, unpacked
from fisherfold.linalg.group_grid import round_nearest
from fisherfold.network.divergence import divergence
from fisherfold.network.layers import find_layers, write_dense_layers, write_layers
from fisherfold.network.models import load_model
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import KroneckerParams, PrepareParams, RanksParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import read_sequences, write_sequences
from fisherfold.run.workspace import Workspace
from flows import foresight
from stages import factorize, ranks

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def workspace_of(root) -> Workspace:
    """As `subspace_workspace`, of a model wide enough for groups of 32."""
    workspace = Workspace(root)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **SIZES)
    with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out / "model")
        tiny_tokenizer().save_pretrained(out / "model")
        write_dense_layers(out, {})
        (out / "prepare.json").write_text(
            json.dumps({"model": {"name": "tiny", "origin": "local", "licence": None, "digest": "0"}})
        )
    write_sequences(workspace.table("tuning"), random_ids(2, 12).numpy(), [["a"], ["b"]], VOCABULARY)
    write_sequences(workspace.table("training"), random_ids(0, 12).numpy(), [], VOCABULARY)
    layers = find_layers(load_model(workspace.model, torch.float32))
    write_layers(workspace.out("prepare"), layers)
    publish_subspace(workspace, layers, {}, False, "svd")
    (workspace.out("capture") / "capture.json").write_text("{}")
    with Scratch(workspace, "kronecker", KroneckerParams(), {}) as scratch, scratch.publish():
        pass  # nothing of either is read for metric svd
    return workspace


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_matrix_is_what_was_packed_and_what_compressed_tensors_reads(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rounded = round_nearest(np.random.default_rng(0).standard_normal((5, 64)), bits)
    tensors = packed_tensors(rounded)
    np.testing.assert_allclose(unpacked(tensors).numpy(), rounded.values, rtol=1e-3)
    assert torch.equal(
        torch.from_numpy(pack(rounded.codes, bits)), helpers.pack_to_int32(torch.from_numpy(rounded.codes), bits)
    )


def test_the_checkpoint_loads_in_both_ways_as_what_was_rounded(tmp_path):
    pytest.importorskip("compressed_tensors")
    workspace = workspace_of(tmp_path)
    chosen = {
        "model.layers.0.mlp.up_proj": 32,
        "model.layers.0.mlp.down_proj": 32,
        "model.layers.0.self_attn.q_proj": 0,
    }
    publish_ranks(workspace, chosen, "factors")
    factorize.run(workspace, as_truncated(bits=8, dense_export=True))
    out = workspace.out("factorize")
    facts = json.loads((out / "factorize.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(out / "dense").eval()
    saved = load_file(out / "model" / "model.safetensors")
    layer = "model.layers.0.self_attn.k_proj"
    torch.testing.assert_close(matrices(saved)[f"{layer}.weight"].float(), dense.get_submodule(layer).weight.data)
    assert facts["targeted_parameters_compressed"] == 64 * 64 * 3 + 64 * 96 + 2 * 32 * (64 + 96)
    assert facts["model_bytes_compressed"] == sum(tensor.numel() * tensor.itemsize for tensor in saved.values())
    assert all(0 < record["rounding_loss"] < 1e-3 for record in facts["layers"].values() if record["rank"])
    export(out / "model", tmp_path / "dense", "dense")
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == (out / "dense" / "model.safetensors").read_bytes()
    ids = random_ids(2, 9)
    for options in ({"trust_remote_code": True}, {}):
        model = AutoModelForCausalLM.from_pretrained(out / "model", **options).eval()
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=2e-4, rtol=1e-3)


def test_a_head_of_its_own_is_stored_in_8_bits_and_read_by_transformers(tmp_path):
    """To nearest: every number of the head within half a step; the checkpoint loads in both ways as what was rounded."""
    pytest.importorskip("compressed_tensors")
    workspace = workspace_of(tmp_path)
    publish_ranks(workspace, {"model.layers.0.mlp.up_proj": 32}, "factors")
    factorize.run(workspace, as_truncated(head_bits=8, dense_export=True))
    out = workspace.out("factorize")
    stored = load_file(out / "model" / "model.safetensors")
    assert stored["lm_head.weight_packed"].shape == (VOCABULARY, 64 // 4) and "lm_head.weight" not in stored
    exact = load_model(workspace.model, torch.float32).lm_head.weight
    head = AutoModelForCausalLM.from_pretrained(out / "dense").lm_head.weight
    steps = stored["lm_head.weight_scale"].float().repeat_interleave(32, dim=1)
    assert ((head - exact).abs() <= steps * 0.51).all() and not torch.equal(head, exact)
    ids = random_ids(2, 9)
    expected = AutoModelForCausalLM.from_pretrained(out / "dense").eval()(ids).logits
    for options in ({"trust_remote_code": True}, {}):
        model = AutoModelForCausalLM.from_pretrained(out / "model", **options).eval()
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-3)


def test_a_tied_or_uneven_head_is_refused_before_the_run(tmp_path):
    workspace = workspace_of(tmp_path)
    foresight.check_head(workspace.model)
    config = json.loads((workspace.model / "config.json").read_text())
    for change, message in (
        ({"tie_word_embeddings": True}, "is its input embedding"),
        ({"hidden_size": 60}, "60 inputs"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ParameterError, match=message):
            foresight.check_head(tmp_path)


def test_ranks_and_bits_are_chosen_together_and_kept_to_the_byte(tmp_path):
    pytest.importorskip("compressed_tensors")
    workspace = workspace_of(tmp_path)
    params = {"budget": "model_bytes", "widths": (8, 4), "round_to": 32, "storage": "factors"}
    losses, kept = [], set()
    for ratio in (0.45, 0.68):
        ranks.run(workspace, RanksParams(ratio=ratio, **params))
        budget = json.loads((workspace.out("ranks") / "budget.json").read_text())
        assert budget["spent"] <= budget["budget"]
        losses.append(budget["predicted_loss_increase"])
        assert [(rival["bits"], rival["ranks"]) for rival in budget["rivals"]] == [(8, False), (4, False), (32, True)]
        fitting = [rival["loss"] for rival in budget["rivals"] if rival["bytes"] <= budget["budget"]]
        assert fitting and losses[-1] <= min(fitting) * (1 + 1e-12)
        widths = {row["bits"] for row in pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()}
        kept |= widths
        factorize.run(workspace, as_truncated())
        facts = json.loads((workspace.out("factorize") / "factorize.json").read_text())
        most = (1 - ratio) * facts["model_bytes_dense"]
        assert 0.9 * most < facts["model_bytes_compressed"] <= most
        model = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "model", trust_remote_code=True)
        card = (workspace.out("factorize") / "model" / "README.md").read_text(encoding="utf-8")
        assert all(f" in {bits} bits" in card for bits in widths - {None})
        assert model(random_ids(2, 9)).logits.isfinite().all()
    assert losses[0] < losses[1]
    assert len(kept) > 1


def test_losses_of_either_kind_are_measured_by_group_and_weigh_in_the_choice(tmp_path, monkeypatch):
    """`corrected`: what a model says whose weights have the errors; predicted losses are then in nats, and the bytes are kept to."""
    workspace = workspace_of(tmp_path)
    params = RanksParams(
        ratio=0.6, budget="model_bytes", widths=(8, 4), round_to=32, storage="factors", allocator="corrected"
    )
    drawn, draw = {}, ranks.DrawnErrors.__call__

    def keep(self, site, ranks_, bits):
        drawn[site.name] = draw(self, site, ranks_, bits)
        return drawn[site.name]

    monkeypatch.setattr(ranks.DrawnErrors, "__call__", keep)
    ranks.run(workspace, params)
    table = pq.read_table(workspace.out("ranks") / "corrections.parquet").to_pylist()
    assert len(table) == 3 * 7
    dense = load_model(workspace.model, torch.float32)
    ids = read_sequences(workspace.table("tuning"), VOCABULARY)
    for row in table:
        name = row["kind"].replace("*", "0")
        changed = load_model(workspace.model, torch.float32)
        weight = changed.get_submodule(name).weight.data
        weight += torch.from_numpy(drawn[name][row["error"]]).float()
        expected = divergence(dense(ids).logits, changed(ids).logits).mean().item()
        assert row["measured"] == pytest.approx(expected, rel=0.05, abs=1e-7)
    (weight,) = {row["weight"] for row in table if row["kind"].endswith("up_proj") and row["error"] == "rounding"}
    budget = json.loads((workspace.out("ranks") / "budget.json").read_text())
    assert budget["spent"] <= budget["budget"]
    rounded = sum(row["weight"] * row["predicted"] for row in table if row["error"] == "rounding")
    (four,) = [rival["loss"] for rival in budget["rivals"] if rival["bits"] == 4]
    assert weight > 0 and four == pytest.approx(rounded, rel=0.01)


def test_ranks_that_may_not_be_cut_get_few_bits(tmp_path):
    """`ranks.floor` of nearly one: every layer whole, in the bits that the file has room for; what not even 4 bits meet is refused."""
    workspace = workspace_of(tmp_path)
    params = {"budget": "model_bytes", "widths": (8, 4), "round_to": 32, "floor": 0.99}
    ranks.run(workspace, RanksParams(ratio=0.6, **params))
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    assert {row["storage"] for row in rows} == {"dense"} and {row["bits"] for row in rows} <= {8, 4}
    assert 4 in {row["bits"] for row in rows}
    with pytest.raises(ParameterError, match="smallest possible allocation"):
        ranks.run(workspace, RanksParams(ratio=0.95, **params))
