"""Every causal language model of the installed transformers, tiny and random, through the whole pipeline."""

import pytest
import torch
from tiny_families import EMBEDDED, tiny_family

SAMPLE = ("llama", "gpt2", "gpt_neox", "qwen3_moe", "gemma3n_text", "mamba2", "deepseek_v3", "nemotron_h")


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_can_be_made_tiny(family):
    model = tiny_family(family)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    logits = model(input_ids=torch.arange(3, 15)[None]).logits
    assert logits.shape == (1, 12, EMBEDDED) and logits.isfinite().all() and logits.std() > 0.01
