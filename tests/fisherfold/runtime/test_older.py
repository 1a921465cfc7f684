"""A checkpoint that commit 26f1304 wrote, of a model type of its own: it loads, and computes what it did then."""

import torch
from project import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fisherfold.runtime  # noqa: F401

FOLDER = ROOT / "tests" / "support" / "checkpoint_26f1304"
"""A tiny llama with factors, both pivoted sides and a layer of rank 0; `logits` as its own file gave them for IDS."""
IDS = torch.arange(3, 21).view(2, 9)


def test_it_computes_what_it_did(tmp_path):
    then = load_file(FOLDER / "logits.safetensors")["logits"]
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, then, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, then, rtol=1e-5, atol=1e-6
        )
