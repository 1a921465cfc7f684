"""Causal language models of the installed transformers, tiny and random, through the whole pipeline (see family_sweep.py)."""

import pytest
from family_sweep import read_results, sweep, table
from tiny_families import causal_families

SAMPLE = ("qwen3_moe", "gemma3n_text", "mamba2", "zaya", "moshi", "xlstm")
"""Experts, layers without gradients, weights read by others, one token a sequence, tokens read and never written, no bfloat16."""
MORE = ("gpt_neox", "laguna", "minimax", "blt")
"""Names on disk that differ, renamed when saved, a cache of its own, patches of tokens."""
REFUSED = {
    "emu3": "no causal language model for the configuration 'emu3_text_model'",
    "gemma3n": "timm",
    "musicgen": "not a causal language model",
    "xlnet": "cannot be measured",
}


@pytest.mark.parametrize("sample", [SAMPLE, pytest.param(MORE, marks=pytest.mark.slow)], ids=",".join)
def test_a_sample_passes_all_stages_and_its_checkpoints_load_anywhere(sample, tmp_path):
    lines = sweep(sample, tmp_path)
    assert {line["family"]: line["why"] for line in lines} == {family: [] for family in sample}
    assert {line["result"] for line in lines} == {"passes"}


def test_what_cannot_be_compressed_is_refused_in_stage_prepare(tmp_path):
    for line in sweep(REFUSED, tmp_path):
        assert line["result"] == "refused"
        assert REFUSED[line["family"]] in line["why"][0]


def test_the_table_has_every_family_of_the_results(tmp_path):
    file = tmp_path / "sweep.jsonl"
    file.write_text(
        '{"family": "b", "result": "refused", "why": ["No. Because."]}\n{"family": "a", "result": "fails", "why": ["x"]}\n'
        '{"family": "a", "result": "passes", "why": [], "coverage": {"model_parameters": 200, "targeted_parameters": 50, "dense": '
        '[{"reason": "they choose (routers)", "names": ["h.*.gate"]}]}}\n'
    )
    text = table(read_results(file))
    assert "1 pass all eight stages, 1 are refused in stage `prepare`" in text
    assert "| `a` | passes | 25 % | they choose (routers): `h.*.gate` |" in text
    assert "| `b` | refused | | No. Because. |" in text


@pytest.mark.families
@pytest.mark.parametrize("family", [family for family in causal_families() if family not in (*SAMPLE, *MORE, *REFUSED)])
def test_every_other_family_passes_or_is_refused(family, tmp_path):
    (line,) = sweep([family], tmp_path)
    assert line["result"] in ("passes", "refused"), line["why"]
