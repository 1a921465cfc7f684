"""Mixtures whose experts come in mxfp4 or fp8: prepared as the numbers that they stand for, or refused with what would help."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_bytes_tokenizer
from tiny_families import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from fisherfold.inputs.pretrained import check_model, find_model, write_model
from fisherfold.network.experts import unfold_experts
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4 = torch.cat((FP4, -FP4))


def saved(folder: Path, family: str, **changed) -> PreTrainedModel:
    """A tiny random model in the hub's format."""
    config = tiny_config(family)
    for name, value in changed.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tiny_bytes_tokenizer().save_pretrained(folder)
    return model


def quantised(folder: Path, method: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


def prepared(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the model as stage prepare writes it."""
    workspace = Workspace(tmp_path)
    source = find_model(workspace, PrepareParams(model=str(folder)))
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", source, "float32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    return load_file(tmp_path / "out" / "model" / "model.safetensors")


def test_mxfp4_experts_are_what_their_codes_stand_for(tmp_path):
    folder, generator = tmp_path / "model", torch.Generator().manual_seed(0)
    saved(folder, "gpt_oss", intermediate_size=32)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [
        name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj")
    ]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] + 16 * codes[..., 1::2]
        tensors[f"{name}_scales"] = scales
        values = FP4[codes.long()] * torch.exp2(scales.float() - 127)[..., None]
        expected[name] = values.reshape(experts, outputs, inputs).mT
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantised(folder, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    found = prepared(folder, tmp_path)
    assert len(expected) == 4
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)
    unfold_experts(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model"))


def test_fp8_experts_are_what_their_codes_stand_for(tmp_path):
    folder, generator = tmp_path / "model", torch.Generator().manual_seed(0)
    saved(folder, "qwen3_moe")
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        codes = tensors[name].mul(8).to(torch.float8_e4m3fn)
        scales = torch.rand(codes.shape[0] // 8, codes.shape[1] // 8, generator=generator)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        expected[name] = codes.float() * scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    others = ["lm_head", "self_attn", "mlp.gate"]
    quantised(folder, {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": others})
    found = prepared(folder, tmp_path)
    gate, up, down = (expected[f"model.layers.1.mlp.experts.3.{part}_proj.weight"] for part in ("gate", "up", "down"))
    own = "model.layers.1.mlp.experts"
    torch.testing.assert_close(found[f"{own}.gate_up_proj"][3], torch.cat((gate, up)), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found[f"{own}.down_proj"][3], down, rtol=1e-2, atol=1e-3)


def test_other_quantised_weights_are_refused(tmp_path):
    saved(tmp_path / "model", "qwen3_moe")
    quantised(tmp_path / "model", {"quant_method": "awq", "bits": 4})
    with pytest.raises(InputError, match=r"quantised \(awq\).*mxfp4, fp8 can.*in bfloat16 or float32"):
        check_model(find_model(Workspace(tmp_path), PrepareParams(model=str(tmp_path / "model"))), 16)
