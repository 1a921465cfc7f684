import pytest

from fisherfold.evaluation.verdict import SEEN_ALONE, UNKNOWN_ANSWERS, verdict


def measured(**changes: object) -> dict:
    """metrics.json of a model that is close; `changes` are figures of the compressed model."""
    dense = {"perplexity": 20.0, "knowledge_accuracy": 0.5, "empty_answers": 0, "looping_answers": 6}
    compressed = dense | {
        "perplexity": 21.0,
        "kl_to_dense": 0.05,
        "own_answers_kl": 0.08,
        "knowledge_change_error": 0.02,
        "zero_layers": 0,
    }
    sources = {
        "leads": {"dense": 20.0, "compressed": 21.0, "calibrated": True},
        "news": {"dense": 30.0, "compressed": 33.0, "calibrated": False},
    }
    return {
        "dense": dense,
        "compressed": compressed | changes,
        "answers": {"prompts": 32, "tokens": 900},
        "by_source": sources,
    }


def test_a_model_that_lost_next_to_nothing_is_close():
    found = verdict(measured())
    assert found.level == "close"
    assert found.lines[0].startswith("Verdict: close. ")
    assert any("Perplexity on news is 1.10 times" in sentence for sentence in found.sentences)
    assert UNKNOWN_ANSWERS not in found.sentences


@pytest.mark.parametrize(("change", "level", "named"), [
    ({"own_answers_kl": 0.31}, "changed", "0.310 nats"),
    ({"own_answers_kl": 0.41}, "damaged", "0.410 nats"),
    ({"empty_answers": 1}, "changed", "1 of 32 answers are empty"),
    ({"empty_answers": 3}, "damaged", "3 of 32 answers are empty"),
    ({"empty_answers": 32}, "damaged", "32 of 32 answers are empty"),
    ({"looping_answers": 9}, "close", "9 of 32 answers repeat"),
    ({"looping_answers": 30}, "damaged", "30 of 32 answers repeat"),
    ({"knowledge_accuracy": 0.47}, "close", "47.0 % right"),
    ({"knowledge_accuracy": 0.44}, "changed", "44.0 % right"),
    ({"knowledge_accuracy": 0.3}, "damaged", "30.0 % right"),
    ({"zero_layers": 1}, "damaged", "1 layer holds nothing but zeros"),
    ({"own_answers_kl": float("nan")}, "damaged", "nan nats"),
])  # fmt: skip
def test_one_bad_figure_decides(change, level, named):
    found = verdict(measured(**change))
    assert found.level == level
    assert named in (found.sentences[1] if level != "close" else " ".join(found.sentences))


def test_empty_answers_are_never_fine_even_where_the_dense_model_has_them():
    metrics = measured(empty_answers=4)
    metrics["dense"]["empty_answers"] = 4
    assert verdict(metrics).level == "changed"


@pytest.mark.parametrize(("times", "level"), [(1.14, "close"), (1.45, "changed"), (1.6, "damaged")])
def test_sources_that_calibration_did_not_see_decide(times, level):
    metrics = measured()
    metrics["by_source"]["news"]["compressed"] = 30.0 * times
    assert verdict(metrics).level == level
    metrics["by_source"]["news"]["calibrated"] = True
    found = verdict(metrics)
    assert found.level == level and SEEN_ALONE in found.sentences  # with no other, all count


def test_a_source_that_calibration_saw_does_not_decide_beside_one_that_it_did_not():
    metrics = measured()
    metrics["by_source"]["leads"]["compressed"] = 60.0
    assert verdict(metrics).level == "close"


def test_without_prompts_sources_or_questions_the_perplexity_decides_and_the_gap_is_named():
    metrics = {
        "dense": {"perplexity": 20.0, "knowledge_accuracy": None},
        "compressed": {"perplexity": 50.0, "knowledge_accuracy": None, "kl_to_dense": 1.0},
    }
    found = verdict(metrics)
    assert found.level == "damaged"
    assert found.sentences[1].startswith("Perplexity on the evaluation text is 2.50 times")
    assert found.sentences[-1] == UNKNOWN_ANSWERS
    assert verdict({"dense": {}, "compressed": {}}).level == "close"


def test_the_worst_finding_comes_first():
    sentences = verdict(measured(own_answers_kl=0.2, knowledge_accuracy=0.1, empty_answers=1)).sentences
    assert "knowledge questions" in sentences[1]
    assert {"empty" in sentences[2], "nats" in sentences[3]} == {True}
