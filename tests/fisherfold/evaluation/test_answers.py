"""Own answers and greedy answers: figures against their definitions."""

import json

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_answers, tiny_model, tiny_workspace

from fisherfold.evaluation.greedy_answers import agreeing_tokens, loops, samples_table, summarise_samples
from fisherfold.evaluation.model_run import ModelRun
from fisherfold.evaluation.own_answers import (
    compare_answers,
    conversations,
    own_answer_units,
    summarise_own_answers,
)
from fisherfold.evaluation.scores import ratio_of_sums
from fisherfold.run.errors import InputError
from fisherfold.run.tables import ANSWERS


@pytest.mark.parametrize(("tokens", "expected"), [
    (list(range(40)), False),
    ([*range(10), *[7] * 12], True),  # one token over and over
    ([*range(10), *[7] * 11], False),  # not long enough to be sure
    ([*range(5), *[1, 2, 3, 4] * 3], True),
    ([*range(5), *[1, 2, 3, 4] * 3, 1, 2], True),  # cut within a turn
    ([*range(5), *[1, 2, 3, 4] * 3, 9], False),  # it went on to something else
    ([*range(60), *range(60)], False),  # twice is no loop
    ([*range(20)] * 3, True),
    ([], False),
    ([3], False),
])  # fmt: skip
def test_a_loop_is_an_n_gram_that_repeats_to_the_end(tokens, expected):
    assert loops(tokens) is expected


@pytest.mark.parametrize(("one", "other", "expected"), [
    ([1, 2, 3], [1, 2, 3], 32),
    ([1, 2, 3], [1, 2, 4], 2),
    ([1, 2], [1, 2, 3], 2),
    ([], [1], 0),
    ([], [], 32),
    ([*range(40)], [*range(32), 0, 0], 32),
    ([*range(40)], [*range(31), 0, 0], 31),
])  # fmt: skip
def test_the_agreeing_prefix(one, other, expected):
    assert agreeing_tokens(one, other) == agreeing_tokens(other, one) == expected


def written(folder, **answers: list[dict]) -> dict:
    """Folders as units write them, by unit."""
    folders = {}
    for model, rows in answers.items():
        folders[f"answers-{model}-00000"] = folder / model
        (folder / model).mkdir()
        (folder / model / "answers.json").write_text(json.dumps(rows), encoding="utf-8")
    return folders


def test_samples_count_empty_and_looping_answers(tmp_path):
    def answer(row: int, tokens: list[int], text: str, ended: bool = False) -> dict:
        return {"row": row, "tokens": tokens, "text": text, "ended": ended}

    dense = [answer(1, [5, 6, 2], "b", True), answer(0, [5] * 20, "a"), answer(2, [9, 9], "c")]
    compressed = [answer(0, [5, 5, 2], "a", True), answer(1, [2], " \n", True), answer(2, [9, 9], "c")]
    samples = samples_table(tiny_answers(3), written(tmp_path, dense=dense, compressed=compressed))
    assert samples["prompt"].to_pylist() == ["prompt 0", "prompt 1", "prompt 2"]
    assert samples["agreeing_tokens"].to_pylist() == [2, 0, 32]
    found = summarise_samples(samples)
    assert found["prompts"] == 3
    assert found["greedy_agreement"] == pytest.approx(1 / 3)
    assert found["agreeing_prefix"] == pytest.approx(34 / 3)
    assert found["empty"] == {"dense": 0, "compressed": 1}
    assert found["looping"] == {"dense": 1, "compressed": 0}
    assert summarise_samples(samples.slice(0, 0)) is None


def test_the_error_of_a_ratio_is_that_of_its_draws():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 4000).astype(float)
    values = counts * 0.3 + rng.normal(0, 1, 4000)
    value, error = ratio_of_sums(values, counts)
    assert value == pytest.approx(0.3, abs=5 * error)
    assert error == pytest.approx(1 / (np.sqrt(4000) * counts.mean()), rel=0.1)
    assert ratio_of_sums(values[:1], counts[:1])[1] is None


def model_runs(tmp_path) -> dict[str, ModelRun]:
    workspace = tiny_workspace(tmp_path)
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    folders = {"dense": workspace.model, "compressed": tmp_path / "other"}
    return {name: ModelRun(folder, "float32", 2, 20, "") for name, folder in folders.items()}


def test_divergence_on_own_answers_equals_the_oracle(tmp_path):
    models, table = model_runs(tmp_path), tiny_answers()
    units = own_answer_units(models, conversations(table, positions=64))
    assert len(units) > 1
    folders = [tmp_path / name for name in units]
    for folder, arguments in zip(folders, units.values(), strict=True):
        folder.mkdir()
        compare_answers(folder, *arguments)
    found = summarise_own_answers(folders)

    total = tokens = 0
    for row in table.to_pylist():
        ids = torch.tensor([row["prompt_ids"] + row["sampled_ids"]])
        p, q = (tiny_model(seed=seed).double()(input_ids=ids).logits.log_softmax(-1)[0] for seed in (0, 1))
        where = slice(len(row["prompt_ids"]) - 1, -1)
        total += float((p.exp() * (p - q)).sum(-1)[where].sum().detach())
        tokens += len(row["sampled_ids"])
    assert found["tokens"] == tokens
    assert found["mean"]["divergence"] == pytest.approx(total / tokens, rel=1e-4)
    assert found["standard_error"]["divergence"] > 0


def test_answers_are_cut_where_the_models_positions_end():
    table = tiny_answers(2)
    first = table.to_pylist()[0]
    kept = conversations(table, positions=len(first["prompt_ids"]) + 1)
    assert [(each.row, len(each.answer)) for each in kept] == [(0, 1)]
    assert conversations(ANSWERS.empty_table(), 64) == [] and summarise_own_answers([]) is None


def test_answers_of_another_tokenizer_are_refused(tmp_path):
    models = model_runs(tmp_path)
    rows = conversations(tiny_answers(1), 64)
    wrong = [type(row)(row.row, row.prompt, (VOCABULARY,)) for row in rows]
    with pytest.raises(InputError, match="tokens that the model does not know"):
        compare_answers(tmp_path, models, tuple(wrong))
