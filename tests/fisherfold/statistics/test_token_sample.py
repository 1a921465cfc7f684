import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from toy_model import VOCABULARY, ToyModel

from fisherfold.network.layers import find_layers
from fisherfold.statistics.layer_sums import ModelSums
from fisherfold.statistics.token_sample import TokenSample, pick_rows, sample_positions


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 50), st.integers())
def test_positions_ascend_and_do_not_depend_on_the_batch(sequences, length, count, seed):
    positions = sample_positions(sequences, length, count, seed)
    assert positions.shape == (len(sequences), min(count, length))
    assert (positions.diff() > 0).all() and positions.min() >= 0 and positions.max() < length
    for sequence, own in zip(sequences, positions):
        assert torch.equal(own, sample_positions([sequence], length, count, seed)[0])


def test_positions_are_uniform():
    counts = torch.bincount(sample_positions(range(4000), 10, 3, 0).flatten(), minlength=10)
    assert ((counts - 1200).abs() < 5 * (1200 * 0.7) ** 0.5).all()  # five standard deviations


def test_a_position_without_a_row_is_zero():
    values = torch.randn(2, 3, 4)
    positions = torch.tensor([[0, 2, 5], [1, 3, 4]])
    picked = pick_rows(values, positions)
    assert torch.equal(picked[0, :2], values[0, [0, 2]]) and torch.equal(picked[1, 0], values[1, 1])
    assert not picked[0, 2].any() and not picked[1, 1:].any()
    assert not pick_rows(values[:, :0], positions).any()


def test_uses_take_turns_and_a_layer_without_one_is_zero():
    sample, positions = TokenSample(4, torch.float64, torch.device("cpu")), torch.tensor([[0, 1, 2]])
    rows = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    uses = [sample.use(), sample.use()]
    for use in reversed(uses):  # a backward pass comes to the last one first
        sample.see(use, rows[use], positions)
    sample.end_pass(positions)
    sample.end_pass(positions)
    assert torch.equal(sample.kept[0], rows[[0, 1, 0], :, [0, 1, 2]].movedim(0, 1))
    assert not sample.kept[1].any()


def test_every_layer_of_an_awkward_model_has_its_tokens():
    model, ids = ToyModel().requires_grad_(False), torch.arange(10).view(2, 5) % VOCABULARY
    layers = find_layers(model)
    sums = ModelSums(model, layers, None, 0, 0, torch.float32)
    for sequence in ids:
        sums.add(sequence[None], torch.arange(5)[None])
    kept = dict(sums.take_gradients())
    assert torch.equal(kept["positions"], torch.arange(5).int().expand(2, 5))
    assert not kept["idle/x"].any() and not kept["idle/d"].any()
    experts = kept["expert/x"]
    assert experts[0, :3].any() and not experts[0, 3:].any()  # 0, 2, 4 are even
    torch.testing.assert_close(torch.einsum("bti,btj->ij", experts, experts), sums.inputs["expert"].gram)


def test_bfloat16_keeps_three_digits():
    model, ids = tiny_model().requires_grad_(False), random_ids(2, 12)
    positions = sample_positions([0, 1], 12, 4, 0)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        sums = ModelSums(model, find_layers(model), None, 0, 0, dtype)
        sums.add(ids, positions)
        found[dtype] = dict(sums.take_gradients())
    for name, values in found[torch.bfloat16].items():
        torch.testing.assert_close(values.float(), found[torch.float32][name].float(), rtol=2**-8, atol=0)
