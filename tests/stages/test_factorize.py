import json
import shutil
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, VOCABULARY, as_truncated, random_ids, tiny_workspace
from tiny_subspace import mixed_ranks, publish_ranks, stacked_weight, subspace_workspace, truncated_weight
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fisherfold.allocators.cost import FORMATS
from fisherfold.export import healing, hidden_states, refined_blocks, sizes
from fisherfold.export.architecture import dense_architecture
from fisherfold.export.lineage import damaged_files, read_lineage
from fisherfold.export.multiplied_out import export
from fisherfold.export.refinement import relative_error
from fisherfold.network import rounded_products
from fisherfold.network.layers import read_layers
from fisherfold.network.sites import read_sites
from fisherfold.run import unit_work
from fisherfold.run.checkpoint import read_tensors
from fisherfold.run.determinism import STREAMED, placed
from fisherfold.run.errors import CorruptArtifact, InputError, NotEnoughDisk
from fisherfold.run.files import digest_file
from fisherfold.run.params import HealParams
from fisherfold.run.store import read_array
from fisherfold.run.tables import read_sequences, write_sequences
from fisherfold.run.workspace import Workspace
from stages import factorize


def compress(root, family="llama", **params):
    """A factorized workspace with every kind of layer, and its factorize.json."""
    workspace = subspace_workspace(root, family)
    publish_ranks(workspace, mixed_ranks(workspace))
    return factorized(workspace, **params)


def factorized(workspace, **params):
    factorize.run(workspace, as_truncated(**params))
    return workspace, facts_of(workspace)


def facts_of(workspace):
    return json.loads((workspace.out("factorize") / "factorize.json").read_text())


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return compress(tmp_path_factory.mktemp("llama"), dense_export=True)


@pytest.fixture
def unfinished(llama, tmp_path):
    """The same workspace before stage `factorize`."""
    for stage in ("prepare", "subspace", "ranks"):
        shutil.copytree(llama[0].out(stage), Workspace(tmp_path).out(stage))
    return Workspace(tmp_path)


def test_every_kind_of_layer_is_in_the_test_model(llama):
    kinds = {record["kind"] for record in llama[1]["layers"].values()}
    assert kinds == {"factors", "pivoted_outputs", "pivoted_inputs", "zero"}
    assert len(llama[1]["layers"]) < len(read_layers(llama[0].out("ranks")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_export_is_the_truncated_model(tmp_path, family):
    workspace, facts = compress(tmp_path, family, dense_export=True)
    dense = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "dense").eval()
    assert type(dense).__module__.startswith("transformers.")
    for layer in read_layers(workspace.out("ranks")):
        rank = facts["layers"].get(layer.name, {"rank": min(layer.outputs, layer.inputs)})["rank"]
        weight = dense.get_submodule(layer.name).weight.double()
        expected = truncated_weight(workspace, layer, rank)
        torch.testing.assert_close(weight.T if layer.transposed else weight, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", FORMATS)
def test_shared_right_factors_are_stored_once(tmp_path, family, storage):
    """Every layer of a site is its part of the truncated stacked weight; the right factor is with the first."""
    workspace = subspace_workspace(tmp_path, family, shared=True)
    sites = read_sites(workspace.out("subspace"))
    publish_ranks(
        workspace, {site.name: rank for site, rank in zip(sites, np.resize([6, 3, 5, 0], len(sites)).tolist())}, storage
    )
    workspace, facts = factorized(workspace, dense_export=True)
    saved = load_file(workspace.out("factorize") / "model" / "model.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "dense").eval()
    for site in sites:
        own = {layer.name: facts["layers"][layer.name] for layer in site.layers}
        rank = own[site.name]["rank"]
        left, sigma, right = torch.linalg.svd(stacked_weight(workspace, site), full_matrices=False)
        expected = ((left[:, :rank] * sigma[:rank]) @ right[:rank]).split([layer.outputs for layer in site.layers])
        for layer, wanted in zip(site.layers, expected, strict=True):
            weight = dense.get_submodule(layer.name).weight.double()
            torch.testing.assert_close(weight.T if layer.transposed else weight, wanted, atol=2e-6, rtol=1e-5)
        if rank and len(site.layers) > 1:
            assert [record.get("source") for record in own.values()] == [None] + [site.name] * (len(own) - 1)
            for layer in site.layers[1:]:
                stored = [name for name in saved if name.startswith(layer.name) and not name.endswith("bias")]
                assert stored == [f"{layer.name}.up.weight"]
    assert facts["targeted_parameters_compressed"] < facts["targeted_parameters_dense"]
    compressed = AutoModelForCausalLM.from_pretrained(workspace.out("factorize") / "model", trust_remote_code=True)
    ids = random_ids(2, 9)
    torch.testing.assert_close(compressed.eval()(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_multiplied_out_afterwards_has_the_same_bits(tmp_path, family, shared):
    workspace = subspace_workspace(tmp_path, family, shared=shared)
    sites = read_sites(workspace.out("subspace"))
    ranks = np.resize([6, 3, 5, 0], len(sites)).tolist()
    publish_ranks(workspace, {site.name: rank for site, rank in zip(sites, ranks)}, "pivoted")
    out = factorized(workspace, dense_export=True)[0].out("factorize")
    export(out / "model", tmp_path / "dense", "dense")
    found, wanted = digests(tmp_path / "dense"), digests(out / "dense")
    assert found["model.safetensors"] == wanted["model.safetensors"]
    assert (
        found.keys() == wanted.keys() - {"README.md"}
        and damaged_files(tmp_path / "dense", read_lineage(tmp_path / "dense")["files"]) == []
    )
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).__module__.startswith("transformers.")
    for source, target, says in (
        (out / "model", "dense", "exists already"),
        (tmp_path / "dense", "other", "is not a model that"),
    ):
        with pytest.raises(InputError, match=says):
            export(source, tmp_path / target, "dense")


def test_counts_come_from_the_saved_tensors(llama):
    workspace, facts = llama
    saved = load_file(workspace.out("factorize") / "model" / "model.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(workspace.model)
    assert facts["model_parameters_dense"] == sum(parameter.numel() for parameter in dense.parameters())  # tied: once
    assert facts["model_parameters_compressed"] == sum(tensor.numel() for tensor in saved.values())
    assert facts["model_bytes_compressed"] == sum(tensor.numel() * tensor.itemsize for tensor in saved.values())
    untouched = facts["model_parameters_dense"] - facts["targeted_parameters_dense"]
    assert facts["model_parameters_compressed"] - facts["targeted_parameters_compressed"] == untouched
    assert facts["targeted_parameters_compressed"] < facts["targeted_parameters_dense"]


def test_errors_and_coefficients_are_recorded(llama):
    workspace, facts = llama
    layers = {layer.name: layer for layer in read_layers(workspace.out("ranks"))}
    for name, record in facts["layers"].items():
        weight = truncated_weight(workspace, layers[name], min(layers[name].outputs, layers[name].inputs))
        cut = truncated_weight(workspace, layers[name], record["rank"])
        assert record["reconstruction_error"] == pytest.approx(float((weight - cut).norm() / weight.norm()), abs=1e-6)
        assert record["rounding_error"] < 1e-6
        assert record["largest_coefficient"] <= 2
        assert (record["largest_coefficient"] > 0) == record["kind"].startswith("pivoted")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(unfinished, dtype):
    """Stored in 16 bits, pivoted layers reconstruct the weight as well as plain factors do."""
    errors = {}
    for storage in ("factors", "pivoted"):
        publish_ranks(unfinished, dict.fromkeys(mixed_ranks(unfinished), 7), storage)
        _, facts = factorized(unfinished, dtype=dtype)
        saved = load_file(unfinished.out("factorize") / "model" / "model.safetensors")
        floating = {tensor.dtype for name, tensor in saved.items() if not name.endswith(".order")}
        assert floating == {getattr(torch, dtype)}
        assert facts["dtype"] == dtype
        assert facts["model_bytes_dense"] == 4 * facts["model_parameters_dense"]
        errors[storage] = {name: record["reconstruction_error"] for name, record in facts["layers"].items()}
    assert len(errors["factors"]) > 5  # of the others, plain factors of this rank would outgrow the matrix
    for name, error in errors["factors"].items():
        assert errors["pivoted"][name] <= error * 1.0001


def test_companions_and_card(llama):
    workspace, _ = llama
    for folder in (workspace.out("factorize") / "model", workspace.out("factorize") / "dense"):
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("w5 w6").input_ids == [5, 6]
        assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
        card = (folder / "README.md").read_text()
        assert "ranks.ratio: 0.5" in card
        assert "subspace.metric: svd" in card
        assert "/somewhere" not in card
    config = json.loads((workspace.out("factorize") / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == {"quant_method": "fisherfold"}
    path = workspace.out("factorize") / "model" / "modeling_fisherfold.py"
    code = path.read_text()
    assert "from stages" not in code
    assert [path.name for path in path.parent.glob("*.py")] == [path.name]  # a mixture's has one more


def test_the_template_takes_the_names_of_each_family(tmp_path):
    workspace, _ = compress(tmp_path, "gemma3_text")
    code = (workspace.out("factorize") / "model" / "modeling_fisherfold.py").read_text()
    assert "from transformers import Gemma3TextConfig as DenseConfig" in code
    assert "from transformers import Gemma3ForCausalLM as DenseForCausalLM" in code
    assert "Llama" not in code


@pytest.mark.parametrize("stop_after", [0, 5])
def test_a_killed_run_resumes_to_the_same_bytes(llama, unfinished, monkeypatch, stop_after):
    monkeypatch.setattr(unit_work, "SMALL", 1)  # a unit each
    work, calls = factorize.factorize_site, []

    def killed(*arguments):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(arguments)
        work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(factorize, "factorize_site", killed)
        with pytest.raises(KeyboardInterrupt):
            factorized(unfinished, dense_export=True)
    factorized(unfinished, dense_export=True)
    assert digests(unfinished.out("factorize")) == digests(llama[0].out("factorize"))


def test_a_run_killed_while_it_writes_keeps_its_layers(llama, unfinished, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(factorize, "write_dense", killed)
        with pytest.raises(KeyboardInterrupt):
            factorized(unfinished, dense_export=True)
    monkeypatch.setattr(factorize, "factorize_site", killed)  # must not be called again
    factorized(unfinished, dense_export=True)
    assert digests(unfinished.out("factorize")) == digests(llama[0].out("factorize"))


def test_shards_hold_the_same_tensors(llama, unfinished, monkeypatch):
    monkeypatch.setattr(factorize, "write_model", partial(factorize.write_model, shard_bytes=4000))
    workspace, facts = factorized(unfinished)
    folder, single = workspace.out("factorize") / "model", llama[0].out("factorize") / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == facts["model_bytes_compressed"]
    assert all(path.stat().st_size < 8000 for path in folder.glob("*.safetensors"))
    expected = load_file(single / "model.safetensors")
    found = {name: tensor.read() for name, tensor in read_tensors(folder).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sharded_dense_models_are_read(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama[0].model).save_pretrained(tmp_path, max_shard_size="5KB")
    tensors = read_tensors(tmp_path)
    expected = read_tensors(llama[0].model)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor.read(), expected[name].read()) for name, tensor in tensors.items())


def test_models_with_code_of_their_own_are_refused(unfinished):
    path = unfinished.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    with pytest.raises(InputError, match="code of its own"):
        dense_architecture(unfinished.model)
    with pytest.raises(CorruptArtifact, match=r"config\.json has .* bytes instead of"):
        factorized(unfinished)


def test_ranks_of_another_plan_are_noticed(unfinished, monkeypatch):
    monkeypatch.setattr(sizes, "_targeted_numbers", lambda *_: 1)
    with pytest.raises(CorruptArtifact, match=r"stores 1 numbers where stage 'ranks' planned"):
        factorized(unfinished)


def test_a_flipped_bit_in_a_basis_is_noticed(unfinished):
    name = "model.layers.0.mlp.down_proj/left"
    stored = read_array(unfinished.out("subspace") / "bases", name).numpy().tobytes()
    for path in unfinished.out("subspace").rglob("*"):
        if path.is_file() and stored in (content := path.read_bytes()):
            path.write_bytes(content.replace(stored, bytes([stored[0] ^ 1]) + stored[1:]))
    with pytest.raises(CorruptArtifact, match=name):
        factorized(unfinished)


def test_missing_inputs_are_named(tmp_path):
    workspace = tiny_workspace(tmp_path)
    with pytest.raises(CorruptArtifact, match="has not finished"):
        factorize.run(workspace, as_truncated())


def test_too_little_disk_is_noticed_before_the_start(unfinished, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(NotEnoughDisk, match="1000 are free"):
        factorized(unfinished)


REFINE = {"products": "float32", "passes": 3, "min_steps": 0, "rate": 1e-3, "batch_size": 2}


def with_sequences(workspace):
    """The same with calibration and tuning sequences."""
    for table, seed in (("calibration", 1), ("tuning", 2)):
        ids = random_ids(6, 12, seed).numpy()
        write_sequences(workspace.table(table), ids, [["a"]] * 6, VOCABULARY)
    write_sequences(workspace.table("training"), ids[:0], [], VOCABULARY)
    return workspace


@pytest.fixture
def calibrated(unfinished):
    return with_sequences(unfinished)


def hidden_errors(workspace):
    """Relative error of the compressed network's hidden states after every block on the tuning sequences."""
    ids = read_sequences(workspace.table("tuning"), VOCABULARY)
    dense, compressed = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        for folder in (workspace.model, workspace.out("factorize") / "model")
    )
    pairs = zip(compressed(ids, output_hidden_states=True).hidden_states[1:-1], dense(ids, output_hidden_states=True).hidden_states[1:-1], strict=True)  # fmt: skip
    return [relative_error(found, wanted).item() for found, wanted in pairs]


def test_refined_blocks_are_what_is_saved(calibrated):
    """The last block but one of the saved checkpoint has the held-out error that refinement.parquet says; orders stay."""
    plain, _ = factorized(calibrated)
    before, orders = hidden_errors(plain), orders_of(plain)
    refined, _ = factorized(calibrated, refine=REFINE)
    rows = pq.read_table(refined.out("factorize") / "refinement.parquet").to_pylist()
    assert [row["block"] for row in rows] == ["model.layers.0", "model.layers.1"]
    assert rows[0]["accepted"] and rows[0]["held_out_after"] < rows[0]["held_out_before"]
    assert rows[0]["held_out_before"] == pytest.approx(before[0], rel=1e-3)
    assert hidden_errors(refined)[0] == pytest.approx(rows[0]["held_out_after"], rel=1e-3)
    assert {name: order.tolist() for name, order in orders_of(refined).items()} == {
        n: o.tolist() for n, o in orders.items()
    }


def digests_and_nothing_left(workspace):
    """Of the published output; that, and every unit, is removed."""
    found = digests(workspace.out("factorize"))
    shutil.rmtree(workspace.out("factorize"))
    shutil.rmtree(workspace.artifacts / "factorize.partial")
    return found


def orders_of(workspace):
    saved = load_file(workspace.out("factorize") / "model" / "model.safetensors")
    return {name: tensor for name, tensor in saved.items() if name.endswith("order")}


@pytest.mark.parametrize("held", [hidden_states.HELD, 0], ids=["in memory", "on the disk"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_kill_between_blocks_changes_no_bit(tmp_path, monkeypatch, family, held):
    """A block that is done is not trained again, wherever hidden states were; biases and experts come back with it."""
    monkeypatch.setattr(refined_blocks, "HELD", held)
    monkeypatch.setenv("FISHERFOLD_SAVE_SECONDS", "0")
    workspace = with_sequences(subspace_workspace(tmp_path, family))
    publish_ranks(workspace, mixed_ranks(workspace))
    whole, _ = factorized(workspace, refine=REFINE)
    expected = digests_and_nothing_left(whole)
    real, calls = refined_blocks.refine_block, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(refined_blocks, "refine_block", killed)
    with pytest.raises(KeyboardInterrupt):
        factorized(workspace, refine=REFINE)
    again, _ = factorized(workspace, refine=REFINE)
    assert len(calls) == 3
    assert digests(again.out("factorize")) == expected


def test_refined_with_one_dense_block_in_memory_the_files_are_the_same(calibrated, tmp_path):
    whole, _ = factorized(calibrated, refine=REFINE)
    found = digests(whole.out("factorize"))
    shutil.rmtree(whole.artifacts / "factorize.partial")
    with placed(STREAMED):
        streamed, _ = factorized(calibrated, refine=REFINE)
    assert digests(streamed.out("factorize")) == found


def test_threads_that_share_out_a_batch_change_no_bit(calibrated):
    """One thread computes the sequences of a batch in turn, two at once."""
    found = []
    for threads in (1, 2):
        workspace, _ = factorized(calibrated, refine=REFINE | {"threads": threads}, heal=HEAL | {"threads": threads})
        found.append(digests_and_nothing_left(workspace)["model/model.safetensors"])
    assert found[0] == found[1]


def test_products_in_bfloat16_train_as_well(calibrated, monkeypatch):
    monkeypatch.setattr(rounded_products, "has_bfloat16_units", lambda: True)
    losses = {}
    for products in ("float32", "bfloat16"):
        workspace, facts = factorized(
            calibrated, refine=REFINE | {"products": products}, heal=HEAL | {"products": products}
        )
        rows = pq.read_table(workspace.out("factorize") / "refinement.parquet").to_pylist()
        losses[products] = [*(row["held_out_after"] for row in rows), facts["healing"]["held_out_after"]]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_refined_blocks_of_layers_with_biases(tmp_path):
    workspace = with_sequences(subspace_workspace(tmp_path, "gpt2"))
    publish_ranks(workspace, mixed_ranks(workspace))
    refined, _ = factorized(workspace, refine=REFINE)
    rows = pq.read_table(refined.out("factorize") / "refinement.parquet").to_pylist()
    assert rows[0]["accepted"]
    assert hidden_errors(refined)[0] == pytest.approx(rows[0]["held_out_after"], rel=1e-3)


@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_block_of_which_no_layer_was_cut_is_left_as_it_is(calibrated, cut):
    """The other is trained as ever, and the hidden states after both are those of the saved checkpoint."""
    ranks = {name: rank for name, rank in mixed_ranks(calibrated).items() if f"layers.{cut}." in name}
    publish_ranks(calibrated, ranks)
    plain, _ = factorized(calibrated)
    before = hidden_errors(plain)
    refined, _ = factorized(calibrated, refine=REFINE)
    rows = pq.read_table(refined.out("factorize") / "refinement.parquet").to_pylist()
    trained, left = (rows[int(cut)], rows[1 - int(cut)])
    assert (left["steps"], left["accepted"]) == (0, False) and left["held_out_after"] == left["held_out_before"]
    assert trained["steps"] > 0 and trained["accepted"] and trained["held_out_after"] < trained["held_out_before"]
    if cut == "1":
        assert left["held_out_after"] == 0 and before[0] == 0  # nothing was lost yet
    else:
        assert left["held_out_after"] > 0
    dense, saved = (read_tensors(folder) for folder in (refined.model, refined.out("factorize") / "model"))
    own = [name for name in dense if f"layers.{1 - int(cut)}." in name]
    assert len(own) > 8 and all(torch.equal(saved[name].read(), dense[name].read()) for name in own)


HEAL = {"threads": 1, "products": "float32", "passes": 6, "rate": 1e-3, "batch_size": 2}


def held_out_divergence(workspace):
    ids = read_sequences(workspace.table("tuning"), VOCABULARY)
    dense, compressed = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        for folder in (workspace.model, workspace.out("factorize") / "model")
    )
    return float(healing.held_out(dense, compressed, ids, HealParams(**HEAL)).mean())


@pytest.mark.parametrize("refined", [False, True])
def test_healed_factors_are_what_is_saved(calibrated, refined):
    options = {"refine": REFINE} if refined else {}
    before, orders = held_out_divergence(factorized(calibrated, **options)[0]), orders_of(calibrated)
    workspace, facts = factorized(calibrated, heal=HEAL, **options)
    found = facts["healing"]
    assert found["accepted"] and found["share"] == 1 and found["held_out_after"] < 0.98 * found["held_out_before"]
    assert found["held_out_before"] == pytest.approx(before, rel=0.02)
    assert found["held_out_after"] == pytest.approx(held_out_divergence(workspace), rel=0.02)
    assert {name: order.tolist() for name, order in orders_of(workspace).items()} == {
        name: order.tolist() for name, order in orders.items()
    }


def test_text_for_training_is_what_trains(calibrated):
    write_sequences(calibrated.table("training"), random_ids(4, 12, 9).numpy(), [["a"]] * 4, VOCABULARY)
    workspace, facts = factorized(calibrated, refine=REFINE, heal=HEAL)
    assert facts["healing"]["steps"] == HEAL["passes"] * 2 / HEAL["batch_size"]
    rows = pq.read_table(workspace.out("factorize") / "refinement.parquet").to_pylist()
    once = REFINE["passes"] * (6 + 2) / REFINE["batch_size"]
    assert {row["steps"] / once for row in rows} <= {1, 2}  # 2: a second, calmer try


def test_healing_that_helps_nobody_is_not_kept(calibrated):
    plain, _ = factorized(calibrated)
    expected = digests(plain.out("factorize") / "model")["model.safetensors"]
    workspace, facts = factorized(calibrated, heal=HEAL | {"rate": 30.0})
    assert not facts["healing"]["accepted"]
    assert digests(workspace.out("factorize") / "model")["model.safetensors"] == expected


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ([-0.1, -0.1], False),
        ([0.0], False),
        ([0.01], True),
        ([0.03, -0.02, 0.03, -0.02], False),  # 0.005 ± 0.014
        ([0.03, 0.02, 0.03, 0.02], True),
        ([float("nan"), 0.0], True),
    ],
)
def test_a_rise_beyond_its_standard_error_is_harm(rises, expected):
    before = torch.full((len(rises),), 0.2)
    assert healing.harmful(before, before + torch.tensor(rises)) is expected


@pytest.mark.parametrize(("noise", "expected"), [(0.5, 1.0), (1.2, 0.75), (1.5, 0.5), (3.0, 0.25), (5.0, 0.25)])
def test_the_largest_share_of_the_way_that_harms_nothing(noise, expected):
    """The loss falls by the share and rises by noise times its square: no more than it was up to 1 / noise, for all sequences alike."""
    begun, factor = torch.tensor([1.0, 2.0]), torch.nn.Parameter(torch.tensor([3.0, 1.0]), requires_grad=False)
    before = torch.tensor([0.2, 0.4])

    def judged():
        share = float(factor[0] - 1) / 2
        return before + 0.1 * (noise * share**2 - share)

    share, after = healing.share_of_way({"f": factor}, {"f": begun}, before, judged)
    assert share == expected
    assert torch.equal(factor.data, torch.tensor([1 + 2 * share, 2 - share]))
    assert healing.harmful(before, after) is (noise > 4)


def test_a_way_too_far_is_gone_in_part(calibrated):
    """At a rate between one that helps and one that helps nobody; what is saved is what was judged."""
    workspace, facts = factorized(calibrated, heal=HEAL | {"rate": 0.014})
    found = facts["healing"]
    assert found["accepted"] and found["share"] < 1
    assert found["held_out_after"] == pytest.approx(held_out_divergence(workspace), rel=0.02)


def test_where_every_cut_layer_has_rank_0_there_is_nothing_to_heal(tmp_path):
    workspace = with_sequences(subspace_workspace(tmp_path, "llama"))
    publish_ranks(workspace, {site.name: 0 for site in read_sites(workspace.out("subspace"))}, "pivoted")
    _, facts = factorized(workspace, heal=HEAL)
    found = facts["healing"]
    assert (found["accepted"], found["steps"]) == (False, 0) and found["held_out_after"] == found["held_out_before"]


def test_a_killed_healing_goes_on_with_the_same_bits(calibrated, monkeypatch):
    whole, _ = factorized(calibrated, heal=HEAL)
    expected = digests_and_nothing_left(whole)
    real, calls = healing.divergence, []
    held, steps = (len(pq.read_table(calibrated.table(name))) for name in ("tuning", "calibration"))

    def killed(*arguments):
        calls.append(1)
        if len(calls) == held + 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setenv("FISHERFOLD_SAVE_SECONDS", "0")
    monkeypatch.setattr(healing, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        factorized(calibrated, heal=HEAL)
    calls.clear()
    monkeypatch.setattr(healing, "divergence", lambda *arguments: calls.append(1) or real(*arguments))
    again, _ = factorized(calibrated, heal=HEAL)
    assert digests(again.out("factorize")) == expected
    assert 0 < len(calls) < HEAL["passes"] * steps + 2 * held  # sequences of a whole one
