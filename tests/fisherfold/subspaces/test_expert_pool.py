"""Experts' sums, shrunk by count towards the mean expert."""

import json

import pytest
import torch

from fisherfold.network.layers import LinearLayer, write_layers
from fisherfold.run.group_writer import write_arrays
from fisherfold.run.params import ExpertsParams, SubspaceParams
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.stored_sums import stored
from fisherfold.subspaces.expert_pool import PooledStatistics, few_tokens, pool_experts
from fisherfold.subspaces.metrics import METRICS, MetricSources

COUNTS = (40, 8, 1, 0)
TOKENS = 60
LAYERS = [LinearLayer(f"e.up.{e}", 3, 5, False, False, f"e.up.{e}", "e.up") for e in range(4)]


@pytest.fixture
def capture(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tokens = [(torch.randn(n, 5, generator=generator), torch.randn(n, 3, generator=generator)) for n in COUNTS]
    arrays = {}
    for layer, (x, d) in zip(LAYERS, tokens):
        arrays[f"{layer.name}/input_abs"] = x.abs().sum(0)
        arrays[f"{layer.name}/input_gram"] = stored("input_gram", x.T @ x)
        arrays[f"{layer.name}/output_gram"] = stored("output_gram", d.T @ d)
        arrays[f"{layer.name}/routed"] = torch.tensor([float(len(x))])
    write_arrays(tmp_path / "statistics", arrays)
    write_layers(tmp_path, LAYERS)
    (tmp_path / "capture.json").write_text(json.dumps({"tokens": TOKENS, "sequences": 2, "gradients": "none"}))
    return Statistics(tmp_path), tokens


def test_sums_keep_their_size_and_move_to_the_mean(capture):
    statistics, tokens = capture
    pool = PooledStatistics(statistics, "e.up", ExpertsParams(prior_tokens=8))
    mean = sum(x.T @ x for x, _ in tokens) / sum(COUNTS)
    for layer, count, (x, _) in zip(LAYERS[:3], COUNTS, tokens):
        expected = count * (x.T @ x + 8 * mean) / (count + 8)
        torch.testing.assert_close(pool.input_gram(layer), expected)
    plain = PooledStatistics(statistics, "e.up", ExpertsParams(prior_tokens=0))
    torch.testing.assert_close(plain.input_gram(LAYERS[1]), statistics.input_gram(LAYERS[1]))
    torch.testing.assert_close(plain.input_magnitude(LAYERS[0]), statistics.input_magnitude(LAYERS[0]))


def test_few_tokens_leave_an_expert_dense_or_give_it_the_mean(capture):
    statistics, tokens = capture
    rows: list = []
    _, usable = pool_experts(statistics, [[layer] for layer in LAYERS], ExpertsParams(fewest=5), rows)
    assert [layer.name for (layer,) in usable] == ["e.up.0", "e.up.1"]
    assert [(row["module"], row["dense"]) for row in rows] == [
        ("e.up.2", "the router sent 1 calibration tokens to this expert"),
        ("e.up.3", "the router sent 0 calibration tokens to this expert"),
    ]
    rows = []
    pool, usable = pool_experts(statistics, [[layer] for layer in LAYERS], ExpertsParams(fewest=5, few="mean"), rows)
    assert len(usable) == 4 and not rows
    mean = sum(d.T @ d for _, d in tokens) / sum(COUNTS)
    torch.testing.assert_close(pool.output_gram(LAYERS[3]), mean)


def test_experts_of_few_tokens_are_named_and_counted(capture, capsys):
    statistics, _ = capture
    assert few_tokens(statistics, ExpertsParams(fewest=5)) == {"e.up.2": 1, "e.up.3": 0}
    said = capsys.readouterr().err
    assert "of 4 matrices of experts, 2 had fewer than 5 calibration tokens and stay dense: e.up.2, e.up.3" in said
    assert few_tokens(statistics, ExpertsParams(few="mean")) == {"e.up.3": 0}
    assert "take the mean's metric" in capsys.readouterr().err
    assert not few_tokens(statistics, ExpertsParams(fewest=0)).keys() - {"e.up.3"}


def test_the_metric_counts_how_often_an_expert_is_used_once(capture):
    statistics, tokens = capture
    sources = MetricSources(statistics, statistics.folder, SubspaceParams())
    for layer, (x, d) in zip(LAYERS[:2], tokens):
        A, B = METRICS.lookup("kfac")(sources, layer)
        torch.testing.assert_close(A, x.T @ x / TOKENS)
        torch.testing.assert_close(B, d.T @ d / len(x))
