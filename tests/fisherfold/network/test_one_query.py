"""Attention of one query gives torch's own numbers, and what has more queries is left to transformers."""

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fisherfold.network import one_query
from fisherfold.network.generation import Decoder
from fisherfold.network.one_query import NAME, attend_once, one_query_products


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("mask", [None, "shared", "by head", "added"])
def test_one_query_attends_as_torch_says(groups, mask):
    torch.manual_seed(groups)
    rows, heads, keys = 3, 6, 7
    query = torch.randn(rows, heads, 1, 4, dtype=torch.float64)
    key, value = torch.randn(rows, groups, keys, 4).double(), torch.randn(rows, groups, keys, 5).double()
    seen = torch.rand(rows, heads if mask == "by head" else 1, 1, keys) < 0.6
    seen[..., -1] = True
    given = None if mask is None else torch.randn(seen.shape).double() if mask == "added" else seen
    found = attend_once(query, key, value, given, 0.3)
    key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=given, scale=0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # scores are float32


def test_only_a_single_query_goes_another_way(monkeypatch):
    model = tiny_model()
    queries = []
    real = one_query.attend_once
    monkeypatch.setattr(one_query, "attend_once", lambda q, *others: queries.append(q.shape[2]) or real(q, *others))
    usual = ALL_ATTENTION_FUNCTIONS[NAME]
    with one_query_products(), torch.no_grad():
        assert ALL_ATTENTION_FUNCTIONS[NAME] is not usual
        ids = torch.arange(5)[None] % VOCABULARY
        model(input_ids=ids)
        assert not queries
        model(input_ids=ids[:, :1])
    assert queries and set(queries) == {1}
    assert ALL_ATTENTION_FUNCTIONS[NAME] is usual


def test_what_torch_has_no_argument_for_is_refused_as_ever():
    query = torch.randn(1, 2, 1, 4)
    with one_query_products(), pytest.raises(ValueError, match="softcap"):
        ALL_ATTENTION_FUNCTIONS[NAME](torch.nn.Identity(), query, query, query, None, softcap=30.0)


def test_a_decoder_reads_its_cache_so(monkeypatch):
    calls = []
    real = one_query.attend_once
    monkeypatch.setattr(one_query, "attend_once", lambda *given: calls.append(1) or real(*given))
    decoder = Decoder(tiny_model(), [])
    assert decoder.caches and calls
    usual = ALL_ATTENTION_FUNCTIONS[NAME]
    decoder.answer([[5, 9, 11], [3]], 4)
    assert ALL_ATTENTION_FUNCTIONS[NAME] is usual
