"""Model folders, the hub and its cache; and every model that cannot be used."""

import io
import json
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from tiny_families import tiny_family
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fisherfold.export.architecture import copy_companions
from fisherfold.inputs import hub, pretrained
from fisherfold.inputs.hub import HubEntry, HubUnknown
from fisherfold.inputs.pretrained import check_model, count_parameters, find_model, write_model
from fisherfold.run.checkpoint import read_tensors
from fisherfold.run.determinism import STREAMED, placed
from fisherfold.run.errors import FisherfoldError, InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 96}


def prepare(tmp_path, name="model", dtype="float32", length=16, **params):
    """Find, check and write a model; return the written folder."""
    model = find_model(Workspace(tmp_path), PrepareParams(model=name, **params))
    check_model(model, length)
    out = tmp_path / "unit"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_model(out, model, dtype)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_families_survive_unchanged(tmp_path, family):
    save_tiny(tmp_path / "model", family)
    out = prepare(tmp_path)
    dense = tiny_model(family)
    written = AutoModelForCausalLM.from_pretrained(out / "model")
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in written.state_dict().items())
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab() == tiny_tokenizer().get_vocab()
    facts = json.loads((out / "facts.json").read_text())
    assert (
        facts["parameters"]
        == dense.num_parameters()
        == count_parameters(find_model(Workspace(tmp_path), PrepareParams(model="model")))
    )
    assert not list((out / "model").glob("*.bin")) and (out / "model" / "generation_config.json").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_streamed_it_goes_from_file_to_file(tmp_path, monkeypatch, family):
    """Also what lies in another form on the disk: names, parts, dtype. No weight is in memory with another one's shard."""
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 1000)
    model = tiny_model(family) if family in FAMILIES else tiny_family(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded, load = [], pretrained._load_weights
    monkeypatch.setattr(pretrained, "_load_weights", lambda *a: (loaded.append(load(*a)), loaded[-1])[1])
    whole = prepare(tmp_path).rename(tmp_path / "whole")
    with placed(STREAMED):
        streamed = prepare(tmp_path)
    one, other = (
        {name: tensor.read() for name, tensor in read_tensors(out / "model").items()} for out in (whole, streamed)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(list((streamed / "model").glob("*.safetensors"))) > 2
    assert all(parameter.is_meta for parameter in loaded[1].parameters())
    assert {path.name for path in streamed.iterdir()} == {"model", "facts.json"}
    for name in ("facts.json", "model/config.json", "model/tokenizer.json", "model/generation_config.json"):
        assert (whole / name).read_bytes() == (streamed / name).read_bytes()


def test_nothing_of_this_machine_is_written(tmp_path):
    save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "_model_name_or_path": "/home/me/model"}))
    out = prepare(tmp_path)
    for file in (out / "model").glob("*.json"):
        text = file.read_text()
        assert "/home/me" not in text and str(tmp_path) not in text and "local_files_only" not in text


def test_bfloat16(tmp_path):
    save_tiny(tmp_path / "model")
    out = prepare(tmp_path, dtype="bfloat16")
    assert {value.dtype for value in load_file(out / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_digest_follows_the_bytes(tmp_path):
    save_tiny(tmp_path / "model")
    before = find_model(Workspace(tmp_path), PrepareParams(model="model")).source
    (tmp_path / "model" / "README.md").write_text("not part of the model")
    assert find_model(Workspace(tmp_path), PrepareParams(model="model")).source == before
    save_tiny(tmp_path / "model", seed=1)
    assert find_model(Workspace(tmp_path), PrepareParams(model="model")).source != before


def test_hub_model_is_loaded_at_its_commit(tmp_path, monkeypatch):
    """A folder in the current directory stands in for the hub: transformers reads both alike."""
    save_tiny(tmp_path / "owner")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "resolve_model", lambda name, revision: HubEntry(f"commit-of-{revision}", "mit"))
    workspace = Workspace(tmp_path / "elsewhere")
    model = find_model(workspace, PrepareParams(model="owner", revision="v1"))
    assert (model.revision, model.source.digest, model.source.licence) == ("commit-of-v1", "commit-of-v1", "mit")
    assert model.options == {"trust_remote_code": False, "revision": "commit-of-v1"}
    assert check_model(model, 16).model_type == "llama"


def test_hub_cache_serves_without_a_network(tmp_path, monkeypatch):
    base = tmp_path / "models--owner--tiny"
    save_tiny(base / "snapshots" / "c0ffee")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_resolve", unreachable)
    monkeypatch.chdir(tmp_path / "models--owner--tiny")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    assert (prepare(workspace, "owner/tiny") / "model" / "model.safetensors").exists()
    assert find_model(Workspace(workspace), PrepareParams(model="owner/tiny")).source.digest == "c0ffee"


def unreachable(*_):
    raise HubUnknown("the hub cannot be asked (no network)")


def test_unknown_name_gives_the_nearest_recipe(tmp_path, monkeypatch):
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "models" / "smollm2-135m-instruct.yaml").write_text("")
    monkeypatch.setattr(hub, "_resolve", unreachable)
    with pytest.raises(
        InputError,
        match=r"prepare.model = 'smollm2-135m' is no recipe .*no network.*Did you mean 'smollm2-135m-instruct'",
    ):
        find_model(Workspace(tmp_path), PrepareParams(model="smollm2-135m"))
    monkeypatch.undo()
    with pytest.raises(InputError, match="cannot be a name on the hub"):
        find_model(Workspace(tmp_path), PrepareParams(model="../a/folder that/is not there"))


def test_revision_is_for_the_hub(tmp_path):
    save_tiny(tmp_path / "model")
    with pytest.raises(InputError, match=r"prepare.revision = 'v1' is for models of the hub"):
        find_model(Workspace(tmp_path), PrepareParams(model="model", revision="v1"))


def break_no_config(folder):
    (folder / "config.json").unlink()


def break_no_weights(folder):
    (folder / "model.safetensors").unlink()


def break_truncated(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)


def break_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def break_missing_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_shape(folder):
    edit_config(folder, intermediate_size=32)


def break_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def stored(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


def break_huge(folder):
    stored(folder, lambda weights: weights | {"model.norm.weight": torch.full((16,), 1e30)})


def break_integers(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    stored(folder, lambda weights: weights | {key: (100 * weights[key]).to(torch.int8)})


def break_eight_bits(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    stored(folder, lambda weights: weights | {key: weights[key].to(torch.float8_e4m3fn)})


def break_truths(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    stored(folder, lambda weights: weights | {key: weights[key] > 0})


def break_complex(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    stored(folder, lambda weights: weights | {key: weights[key].to(torch.complex64)})


def pickled(folder, change):
    torch.save(change(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def break_pickled_integers(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    pickled(folder, lambda weights: weights | {key: (100 * weights[key]).to(torch.int8)})


def break_bias(folder):
    stored(folder, lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})


def break_adapted(folder):
    stored(folder, lambda weights: weights | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)})


def break_names(folder):
    stored(folder, lambda weights: {f"module.{name}": weight for name, weight in weights.items()})


def break_adapter_beside(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


def break_generation(folder):
    (folder / "generation_config.json").write_text("[]")


def break_rope(folder):
    edit_config(folder, rope_parameters={"rope_type": "mine", "rope_theta": 1e4})


def break_architectures(folder):
    edit_config(folder, architectures=5)


def break_quantised_elsewhere(folder):
    edit_config(folder, compression_config={"quant_method": "compressed-tensors"})


def break_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def break_tokenizer_file(folder):
    (folder / "tokenizer.json").unlink()


def break_vocabulary(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"new{i}": 96 + i for i in range(4)}
    path.write_text(json.dumps(tokenizer))


def break_quantised(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def break_config(folder):
    (folder / "config.json").write_text('{"model_type":')


def break_value(folder):
    edit_config(folder, hidden_size="wide")


def break_heads(folder):
    edit_config(folder, num_attention_heads=0)


def break_list(folder):
    (folder / "config.json").write_text("[1, 2]")


def break_tokenizer_settings(folder):
    (folder / "tokenizer_config.json").write_text("[1]")


def break_tokenizer_text(folder):
    (folder / "tokenizer.json").write_text("{}")


def break_type(folder):
    edit_config(folder, model_type="unheard-of")


def break_base_model(folder):
    edit_config(folder, architectures=["LlamaModel"])


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_no_config, "no config.json, so it is not a Hugging Face model folder"),
        (break_no_weights, "holds no weights"),
        (break_truncated, "its weights cannot be read"),
        (break_pointer, "its weights cannot be read"),
        (break_missing_weight, "lacks 1 of its weights.*model.layers.1.mlp.up_proj.weight"),
        (
            break_shape,
            r"6 of its weights in another shape .* the first model.layers.0.mlp.down_proj.weight: \[16, 24\] in the file, \[16, 32\]",
        ),
        (break_nan, "weight 'model.layers.1.mlp.up_proj.weight' .* holds the value nan"),
        (break_huge, r"weight 'model.norm.weight' .* holds the value 1e\+30"),
        (break_integers, "quantised: 'model.layers.0.mlp.up_proj.weight' is stored as I8"),
        (break_eight_bits, "quantised: 'model.layers.0.mlp.up_proj.weight' is stored as F8_E4M3"),
        (break_truths, "quantised: 'model.layers.0.mlp.up_proj.weight' is stored as BOOL"),
        (break_complex, "quantised: 'model.layers.0.mlp.up_proj.weight' is stored as C64"),
        (break_pickled_integers, "quantised: 'model.layers.0.mlp.up_proj.weight' is stored as torch.int8"),
        (break_quantised_elsewhere, r"quantised \(compressed-tensors\)"),
        (break_bias, "holds 'model.layers.0.self_attn.q_proj.bias', for which the layer .* has no place"),
        (break_adapted, "holds 'model.layers.0.self_attn.q_proj.lora_A.weight', for which .* merge it"),
        (break_names, "lacks .* of its weights.* It holds .* others, the first module."),
        (break_adapter_beside, "is an adapter of 'owner/base'.*take adapter_config.json away"),
        (break_generation, r"generation_config.json is no JSON object, but \[\]"),
        (break_architectures, "not a causal language model"),
        (break_tokenizer, "tokenizer"),
        (break_tokenizer_file, "tokenizer"),
        (break_vocabulary, "tokenizer .* has 100 tokens, but the model embeds 96"),
        (break_quantised, r"quantised \(gptq\)"),
        (break_config, "its configuration cannot be read"),
        (break_type, "its configuration cannot be read"),
        (break_value, "its configuration cannot be read"),
        (break_rope, "its weights cannot be read .*KeyError: 'mine'.* transformers .* loads by itself"),
        (break_heads, "cannot be read"),
        (break_list, "config.json is no JSON object"),
        (break_tokenizer_settings, "tokenizer_config.json is no JSON object"),
        (break_tokenizer_text, "its tokenizer cannot be read"),
        (break_base_model, r"LlamaModel\) is not a causal language model"),
    ],
)
def test_damaged_folder(tmp_path, damage, message):
    folder = save_tiny(tmp_path / "model")
    damage(folder)
    with pytest.raises(FisherfoldError, match=message):
        prepare(tmp_path)


@pytest.mark.parametrize(
    "called",
    [
        {"return_dict": False, "output_attentions": True, "output_hidden_states": True, "use_cache": False},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_how_somebody_called_a_model_is_no_part_of_it(tmp_path, called):
    edit_config(save_tiny(tmp_path / "model"), **called)
    again = AutoModelForCausalLM.from_pretrained(prepare(tmp_path) / "model")
    found = again(torch.tensor([[3, 4]]))
    assert found.attentions is None and found.hidden_states is None
    torch.testing.assert_close(found.logits, tiny_model()(torch.tensor([[3, 4]])).logits)


def test_pickled_tensors_may_be_one_another_or_turned(tmp_path):
    def change(weights):
        weights |= {name: weights[name.replace(".1.", ".0.")] for name in weights if ".layers.1." in name}
        return weights | {"model.layers.0.mlp.up_proj.weight": weights["model.layers.0.mlp.up_proj.weight"].T.clone().T}

    pickled(save_tiny(tmp_path / "model"), change)
    written = load_file(prepare(tmp_path) / "model" / "model.safetensors")
    dense = tiny_model().state_dict()
    for name in (name for name in written if ".layers.0." in name):
        assert torch.equal(written[name], dense[name])
        assert torch.equal(written[name.replace(".0.", ".1.")], dense[name])


def test_tensors_that_are_no_part_of_the_model_are_told(tmp_path, capsys):
    stored(save_tiny(tmp_path / "model"), lambda weights: weights | {"vision.patch.weight": torch.ones(2, 2)})
    prepare(tmp_path)
    assert (
        "1 tensors of the checkpoint are no part of this model and are left out, the first vision.patch"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("files", "asked", "hint"),
    [
        (("m-Q4.gguf",), "model", "It holds m-Q4.gguf: name that file"),
        (("checkpoint-9/config.json",), "model", "checkpoint-9 is one"),
        (("consolidated.00.pth", "params.json"), "model", "in their makers' own format"),
        (("config.json", "model.safetensors"), "model/model.safetensors", "The folder of this one is .*model"),
        ((), "model", "it is not a Hugging Face model folder.$"),
    ],
)
def test_other_folders_and_files(tmp_path, files, asked, hint):
    (tmp_path / "model").mkdir()
    for name in files:
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(InputError, match=hint):
        prepare(tmp_path, asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tokenizer_in_any_family(tmp_path, family):
    break_tokenizer(save_tiny(tmp_path / "model", family))
    with pytest.raises(InputError, match="tokenizer"):
        prepare(tmp_path)


def test_other_kinds_of_models(tmp_path):
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=96)).save_pretrained(
        tmp_path / "t5"
    )
    for name in ("bert", "t5"):
        with pytest.raises(InputError, match="not a causal language model"):
            prepare(tmp_path, name)


def test_sequence_longer_than_the_positions(tmp_path):
    save_tiny(tmp_path / "model")
    save_tiny(tmp_path / "gpt2", "gpt2")
    for name in ("model", "gpt2"):
        with pytest.raises(InputError, match=r"prepare.sequence_length = 65 is more than the 64 positions"):
            prepare(tmp_path, name, length=65)


def test_code_in_the_checkpoint_never_runs(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "modeling_own.py").write_text("raise SystemError('it has run')\n")
    mapping = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=mapping)
    with pytest.raises(
        InputError, match=r"its configuration cannot be read.*comes with code of its own.*only architectures"
    ):
        prepare(tmp_path)


def test_code_of_transformers_own_types_is_left_out(tmp_path):
    folder = save_tiny(tmp_path / "model")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    out = prepare(tmp_path)
    assert "auto_map" not in json.loads((out / "model" / "config.json").read_text())


def test_a_tokenizer_with_code_of_its_own_is_refused_with_the_cure(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"its tokenizer cannot be .* code of its own.*tokenizer\.json"):
        prepare(tmp_path)


def test_a_sentencepiece_model_is_tokenizer_enough(tmp_path):
    folder, model = save_tiny(tmp_path / "model"), io.BytesIO()
    words = [f"w{i} w{i + 1}" for i in range(3, 90)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    tokenizer = AutoTokenizer.from_pretrained(prepare(tmp_path) / "model")
    assert tokenizer.decode(tokenizer("w5 w61", add_special_tokens=False)["input_ids"]) == "w5 w61"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "files"])
def test_every_chat_template_comes_along(tmp_path, place):
    folder, templates = save_tiny(tmp_path / "model"), {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
    if place == "files":
        (folder / "chat_template.jinja").write_text(templates["default"])
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text(templates["tools"])
    else:
        path = folder / place
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    out = prepare(tmp_path)
    (tmp_path / "result").mkdir()
    copy_companions(out / "model", tmp_path / "result")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "result").chat_template == templates


def test_an_adapter_is_called_an_adapter(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (tmp_path / "model" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"an adapter of 'owner/base'.*merge"):
        prepare(tmp_path)


def test_a_compressed_model_is_not_compressed_again(tmp_path):
    save_tiny(tmp_path / "model")
    edit_config(tmp_path / "model", model_type="fisherfold_llama", architectures=["FisherfoldForCausalLM"])
    with pytest.raises(InputError, match=r"compressed by Fisherfold already \(fisherfold_llama\).*dense_export"):
        prepare(tmp_path)
