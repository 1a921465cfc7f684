import contextlib
import csv
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from project import ROOT
from safetensors.torch import load_file, save_file
from tiny import COMMON, FAMILIES, VOCABULARY, random_ids, save_tiny, tiny_model, tiny_tokenizer, tiny_workspace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fisherfold.evaluation import harness, knowledge, losses, model_run, tasks
from fisherfold.evaluation.harness import SharedContextModel, run_tasks
from fisherfold.evaluation.losses import compare_tokens
from fisherfold.evaluation.scores import summarise_losses, tidy_results
from fisherfold.evaluation.verdict import UNKNOWN_ANSWERS, verdict
from fisherfold.network.generation import Decoder
from fisherfold.run.errors import CorruptArtifact, InputError, NumericalError, ParameterError
from fisherfold.run.params import EvaluateParams, FactorizeParams, PrepareParams
from fisherfold.run.scratch import Scratch, scratch_folder
from fisherfold.run.tables import ANSWERS, QUESTIONS, read_sequences, read_table, write_sequences, write_table
from fisherfold.run.times import speed
from fisherfold.run.workspace import Workspace
from stages import evaluate

UNITS = ("measure_losses", "compare_answers", "answer_prompts", "answer_questions", "run_task", "find_zero_layers")
SHIPPED_TASKS = ROOT / "data" / "tasks"
TOKENIZER = tiny_tokenizer()


def factorized(workspace: Workspace, seed: int = 1, **size: int) -> Workspace:
    """Publish another tiny model as the compressed one."""
    with Scratch(workspace, "factorize", FactorizeParams(), {"seed": str(seed)}) as scratch, scratch.publish() as out:
        save_tiny(out / "model", seed=seed)
        numbers = dict.fromkeys(evaluate.SIZES, 10) | size
        (out / "factorize.json").write_text(json.dumps(numbers))
    return workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return factorized(tiny_workspace(tmp_path))


def read_json(workspace: Workspace, name: str) -> dict:
    return json.loads((workspace.out("evaluate") / name).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """log p [B, T, V] in float64."""
    with torch.no_grad():
        return model.double()(input_ids=ids).logits.log_softmax(-1)


# Text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_bytes", [losses.CHUNK_BYTES, 4 * VOCABULARY * 3])
def test_losses_and_divergence_equal_the_oracle(family, chunk_bytes, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    dense, compressed, ids = tiny_model(family), tiny_model(family, seed=1), random_ids(3, 11)
    found = compare_tokens(dense, compressed, ids)
    p, q = log_probabilities(dense, ids)[:, :-1], log_probabilities(compressed, ids)[:, :-1]
    expected = {
        "dense": -p.gather(-1, ids[:, 1:, None])[..., 0],
        "compressed": -q.gather(-1, ids[:, 1:, None])[..., 0],
        "divergence": (p.exp() * (p - q)).sum(-1),
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=2e-6)


def test_labels_are_shifted_exactly_once():
    model, ids = tiny_model(), random_ids(4, 13)
    with torch.no_grad():
        own_loss = model(input_ids=ids, labels=ids).loss  # transformers shifts the labels itself
        shifted_twice = model(input_ids=ids[:, :-1], labels=ids[:, 1:]).loss
    mean = compare_tokens(model, model, ids)["dense"].mean()
    torch.testing.assert_close(mean, own_loss, rtol=1e-5, atol=1e-6)
    assert abs(float(mean - shifted_twice)) > 1e-4


def test_a_model_does_not_diverge_from_itself():
    model = tiny_model()
    assert torch.equal(compare_tokens(model, model, random_ids(3, 9))["divergence"], torch.zeros(3, 8))


def test_bfloat16_models_give_float32_probabilities():
    ids = random_ids(2, 9)
    half = compare_tokens(tiny_model().bfloat16(), tiny_model(seed=1).bfloat16(), ids)
    full = compare_tokens(tiny_model(), tiny_model(seed=1), ids)
    assert all(values.dtype == torch.float32 for values in half.values())
    torch.testing.assert_close(half["dense"], full["dense"], rtol=0.02, atol=0.02)


def test_standard_errors_take_sequences_as_draws():
    rng = np.random.default_rng(0)
    by_sequence = rng.normal(3, 1, (20, 1))
    values = {
        "dense": by_sequence.repeat(50, 1),
        "compressed": by_sequence.repeat(50, 1) + 1,
        "divergence": rng.random((20, 50)),
    }
    summary = summarise_losses(values)
    assert summary["standard_error"]["dense"] == pytest.approx(by_sequence.std(ddof=1) / math.sqrt(20))
    assert summary["standard_error"]["difference"] == pytest.approx(0, abs=1e-12)
    assert summary["perplexity"]["compressed"] == pytest.approx(math.e * summary["perplexity"]["dense"])
    assert summary["predicted_tokens"] == 1000


# Log-likelihoods through lm-eval


def oracle_likelihood(model: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation and whether it is greedy, by one pass over the pair alone."""
    ids = torch.tensor([context + continuation])
    log_p = log_probabilities(model, ids)[0, len(context) - 1 : -1]
    tokens = torch.tensor(continuation)
    return float(log_p.gather(-1, tokens[:, None]).sum()), bool((log_p.argmax(-1) == tokens).all())


def random_requests(model: torch.nn.Module, contexts: int = 7) -> list:
    """Pairs of tokens as lm-eval hands them over; lengths differ, contexts repeat, one continuation is greedy."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(contexts):
        context = rng.integers(3, VOCABULARY, rng.choice([3, 3, 5, 9])).tolist()
        greedy = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
        choices = [rng.integers(3, VOCABULARY, rng.integers(1, 6)).tolist() for _ in range(rng.integers(1, 5))]
        requests += [(("text", "text"), context, choice) for choice in [greedy, *choices]]
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pass_tokens", "worth_sharing"), [(1, 0), (40, 4), (1000, 0), (1000, 99)])
def test_passes_change_no_log_likelihood(family, pass_tokens, worth_sharing, monkeypatch):
    monkeypatch.setattr(harness, "WORTH_SHARING", worth_sharing)
    monkeypatch.setattr(harness, "WORTH_A_PASS", 10)
    model = tiny_model(family)
    requests = random_requests(model)
    found = SharedContextModel(model, TOKENIZER, pass_tokens, batch_size=2)._loglikelihood_tokens(requests)
    for (value, greedy), (_, context, continuation) in zip(found, requests, strict=True):
        expected, is_greedy = oracle_likelihood(tiny_model(family), context, continuation)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy


def mamba2() -> torch.nn.Module:
    """Its `forward` takes a cache by name and swallows what it does not know."""
    config = AutoConfig.for_model(
        "mamba2", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8,
        n_groups=1, chunk_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def forgetful() -> torch.nn.Module:
    """A llama whose `forward` swallows the cache it is given."""
    model = tiny_model()
    forward = model.forward
    model.forward = lambda input_ids=None, cache=None, use_cache=None, **options: forward(
        input_ids, use_cache=use_cache, **options
    )
    return model


@pytest.mark.parametrize(("make", "shares"), [(mamba2, None), (forgetful, False), (tiny_model, True)])
def test_contexts_are_shared_only_where_that_reproduces_plain_passes(make, shares, monkeypatch):
    monkeypatch.setattr(harness, "WORTH_SHARING", 0)
    model, requests = make(), random_requests(tiny_model())
    asked = SharedContextModel(model, TOKENIZER, 1000, batch_size=2)
    found = asked._loglikelihood_tokens(requests)
    expected = [oracle_likelihood(make(), context, continuation)[0] for _, context, continuation in requests]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    assert shares in (None, asked.shares_contexts)


class Output(dict):
    """A model's output, by key and by attribute."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_handed_over_by_the_name_that_forward_knows(name, monkeypatch):
    """transformers renamed it: `past_key_values` before, `cache` from 5.24 on and alone from 5.40 on."""
    model = tiny_model()
    forward, given = model.forward, []

    def old(input_ids=None, past_key_values=None, use_cache=None):
        given.append(past_key_values)
        output = forward(input_ids, cache=past_key_values, use_cache=use_cache)
        return Output(logits=output.logits, past_key_values=output.cache)

    if name == "past_key_values":
        monkeypatch.setattr(model, "forward", old)
    asked = SharedContextModel(model, TOKENIZER, 1000, batch_size=2)
    assert (asked.cache_name, asked.shares_contexts) == (name, True)
    assert name == "cache" or any(given)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_tokenizer_without_a_begin_an_end_and_padding(unknown):
    """As one is whose tokenizer_config.json is not there."""
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, unk_token=unknown)
    asked = SharedContextModel(tiny_model(), bare, 1000, batch_size=2)
    requests = [Instance("loglikelihood", {}, ("w5 w6", " w7"), 0), Instance("loglikelihood", {}, ("w8", " w9 w10"), 1)]
    expected = [oracle_likelihood(tiny_model(), *ids)[0] for ids in (([5, 6], [7]), ([8], [9, 10]))]
    assert [value for value, _ in asked.loglikelihood(requests)] == pytest.approx(expected, abs=1e-4)
    (written,) = asked.generate_until(
        [Instance("generate_until", {}, ("w5 w6", {"until": ["w3"], "max_gen_toks": 3}), 0)]
    )
    assert set(written.split()) <= set(bare.get_vocab())
    assert bare.pad_token == unknown


def test_contexts_longer_than_a_sliding_window(monkeypatch):
    monkeypatch.setattr(harness, "WORTH_SHARING", 0)
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", vocab_size=VOCABULARY, **COMMON, **FAMILIES["mistral"], sliding_window=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    requests = random_requests(model)
    found = SharedContextModel(model, TOKENIZER, 1000, batch_size=2)._loglikelihood_tokens(requests)
    expected = [oracle_likelihood(model, context, continuation)[0] for _, context, continuation in requests]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)


def test_pairs_longer_than_the_model_are_cut_from_the_left():
    model = tiny_model()  # 64 positions
    long, short = random_ids(1, 80)[0].tolist(), [5, 6, 7]
    requests = [(("", ""), long, short), (("", ""), short, short)]
    found = SharedContextModel(model, TOKENIZER, 1000, batch_size=2)._loglikelihood_tokens(requests)
    assert found[0][0] == pytest.approx(oracle_likelihood(tiny_model(), long[-62:], short)[0], abs=1e-4)
    assert found[1][0] == pytest.approx(oracle_likelihood(tiny_model(), short, short)[0], abs=1e-4)


def test_a_continuation_without_a_token_is_refused():
    with pytest.raises(InputError, match="no token of its own"):
        SharedContextModel(tiny_model(), TOKENIZER, 10, 1)._loglikelihood_tokens([(("w5", ""), [5], [])])


def test_results_are_read_by_metric_and_rule():
    values = {
        "alias": "x",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "f1,strict": 1,
        "f1_stderr,strict": 0.1,
    }
    assert tidy_results(values) == {
        "documents": 4,
        "metrics": {
            "acc": {"value": 0.5, "standard_error": None},
            "f1 (strict)": {"value": 1.0, "standard_error": 0.1},
        },
    }


# The stage


def test_figures_equal_the_oracle(workspace):
    evaluate.run(workspace, EvaluateParams(batch_size=3))
    metrics = read_json(workspace, "metrics.json")
    assert set(metrics) == {"dense", "compressed", "size", "answers", "by_source"}
    assert {"perplexity", "knowledge_accuracy"} < set(metrics["dense"]) < set(metrics["compressed"])
    assert metrics["size"] == dict.fromkeys(evaluate.SIZES, 10)

    ids = read_sequences(workspace.table("evaluation"), VOCABULARY)
    log_p = {name: log_probabilities(tiny_model(seed=seed), ids)[:, :-1] for seed, name in enumerate(evaluate.MODELS)}
    for name, values in log_p.items():
        loss = -values.gather(-1, ids[:, 1:, None]).mean()
        assert metrics[name]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-6)
        assert metrics[name]["knowledge_accuracy"] == pytest.approx(
            oracle_accuracy(workspace, tiny_model(seed=name == "compressed"))
        )
    divergence = (log_p["dense"].exp() * (log_p["dense"] - log_p["compressed"])).sum(-1).mean()
    assert metrics["compressed"]["kl_to_dense"] == pytest.approx(float(divergence), rel=1e-4)


def test_speed_is_measured_and_no_result(workspace):
    evaluate.run(workspace, EvaluateParams())
    found = speed(workspace)
    assert all(found[use][model] > 0 for use in ("reading", "answering") for model in evaluate.MODELS)
    assert 1 <= found["tokens"]["written"] <= 32 and found["device"] == "cpu"
    assert not any("speed" in path.name for path in workspace.out("evaluate").iterdir())


def oracle_accuracy(workspace: Workspace, model: torch.nn.Module) -> float:
    """Share of questions whose right choice has the largest log-likelihood."""
    right = []
    for row in read_table(workspace.table("questions")).to_pylist():
        context = TOKENIZER(row["question"])["input_ids"]
        values = [oracle_likelihood(model, context, TOKENIZER(choice)["input_ids"])[0] for choice in row["choices"]]
        right.append(int(np.argmax(values)) == row["answer"])
    return sum(right) / len(right)


def test_every_answer_is_published(workspace):
    evaluate.run(workspace, EvaluateParams())
    table = pq.read_table(workspace.out("evaluate") / "questions.parquet")
    questions = read_table(workspace.table("questions"))
    assert table["answer"].to_pylist() == questions["answer"].to_pylist()
    assert table["article"].to_pylist() == questions["article"].to_pylist()
    right = np.mean(np.array(table["compressed"]) == np.array(table["answer"]))
    assert read_json(workspace, "metrics.json")["compressed"]["knowledge_accuracy"] == right
    assert {len(values) for values in table["dense_log_likelihoods"].to_pylist()} == {4}


def test_losses_by_position(workspace):
    evaluate.run(workspace, EvaluateParams())
    rows = list(csv.DictReader((workspace.out("evaluate") / "losses.csv").open()))
    assert [float(row["position"]) for row in rows] == [float(i) for i in range(1, 12)]
    mean = np.mean([float(row["compressed"]) for row in rows])
    compressed = read_json(workspace, "metrics.json")["compressed"]
    assert math.exp(mean) == pytest.approx(compressed["perplexity"])
    assert np.mean([float(row["divergence"]) for row in rows]) == pytest.approx(compressed["kl_to_dense"])


def test_the_same_model_twice(tmp_path):
    workspace = factorized(tiny_workspace(tmp_path), seed=0)
    evaluate.run(workspace, EvaluateParams())
    metrics, facts = read_json(workspace, "metrics.json"), read_json(workspace, "evaluation.json")
    same, compressed = metrics["dense"], metrics["compressed"]
    assert {name: compressed[name] for name in same} == same
    assert compressed["kl_to_dense"] == compressed["own_answers_kl"] == compressed["zero_layers"] == 0
    assert (compressed["greedy_agreement"], compressed["agreeing_prefix"]) == (1, 32)
    assert (
        facts["text"]["standard_error"]["difference"] == facts["knowledge"]["standard_error"]["acc"]["difference"] == 0
    )


@pytest.mark.parametrize("empty", [True, False])
def test_without_questions(workspace, empty):
    workspace.table("questions").unlink()
    if empty:
        write_table(workspace.table("questions"), QUESTIONS.empty_table(), VOCABULARY)
    evaluate.run(workspace, EvaluateParams())
    metrics = read_json(workspace, "metrics.json")
    assert metrics["dense"]["knowledge_accuracy"] is None and metrics["compressed"]["knowledge_accuracy"] is None
    assert read_json(workspace, "evaluation.json")["knowledge"] is None
    assert pq.read_table(workspace.out("evaluate") / "questions.parquet").num_rows == 0


def test_interrupted_anywhere_it_ends_with_the_same_bytes(workspace, task_folder, monkeypatch):
    monkeypatch.setattr(knowledge, "QUESTIONS_PER_UNIT", 4)
    params = EvaluateParams(batch_size=2, answer_tokens=6, tasks=["tiny"], task_folder=str(task_folder))
    evaluate.run(workspace, params)
    expected = contents(workspace.out("evaluate"))
    shutil.rmtree(workspace.out("evaluate"))
    shutil.rmtree(scratch_folder(workspace, "evaluate"))

    calls = []
    for name in UNITS:
        monkeypatch.setattr(evaluate, name, interrupted(getattr(evaluate, name), calls))
    interruptions = 0
    while not workspace.out("evaluate").exists():
        with contextlib.suppress(KeyboardInterrupt):
            evaluate.run(workspace, params)
        interruptions += 1
    assert contents(workspace.out("evaluate")) == expected
    units = [unit for unit, stopped in calls if not stopped]
    assert len(units) == len(set(units)) == interruptions - 1  # no finished unit is computed again
    assert {unit.partition("-")[0] for unit in units} == {"losses", "own", "answers", "knowledge", "task", "weights"}


def interrupted(work, calls: list):
    """`work`, stopped before its end at every first call with the same unit."""

    @functools.wraps(work)
    def stopping(folder: Path, *arguments: object) -> None:
        stop = (folder.name, True) not in calls
        calls.append((folder.name, stop))
        work(folder, *arguments)
        if stop:
            raise KeyboardInterrupt

    return stopping


def test_a_finished_stage_is_published_again(workspace, monkeypatch):
    evaluate.run(workspace, EvaluateParams())
    expected = contents(workspace.out("evaluate"))
    shutil.rmtree(workspace.out("evaluate"))
    monkeypatch.setattr(model_run, "load_model", None)
    evaluate.run(workspace, EvaluateParams())
    assert contents(workspace.out("evaluate")) == expected


def test_bad_inputs_are_named(workspace, tmp_path):
    with pytest.raises(ParameterError, match=r"evaluate\.task_folder = 'nowhere'"):
        evaluate.run(workspace, EvaluateParams(task_folder="nowhere"))
    write_sequences(workspace.table("evaluation"), random_ids(2, 5).numpy(), [["a"], ["b"]], VOCABULARY + 1)
    with pytest.raises(InputError, match="vocabulary of 97"):
        evaluate.run(workspace, EvaluateParams())
    workspace.table("evaluation").unlink()
    with pytest.raises(CorruptArtifact, match=r"evaluation\.parquet is missing"):
        evaluate.run(workspace, EvaluateParams())
    shutil.rmtree(workspace.out("factorize"))
    with pytest.raises(CorruptArtifact, match="stage 'factorize' has not finished"):
        evaluate.run(workspace, EvaluateParams())


def test_sizes_that_are_missing(workspace):
    with Scratch(workspace, "factorize", FactorizeParams(), {}) as scratch, scratch.publish() as out:
        save_tiny(out / "model", seed=1)
        (out / "factorize.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"factorize.json does not give the models' sizes"):
        evaluate.run(workspace, EvaluateParams())


def test_losses_that_are_not_finite_name_model_and_sequence(workspace):
    with Scratch(workspace, "factorize", FactorizeParams(), {}) as scratch, scratch.publish() as out:
        model = tiny_model(seed=1)
        model.model.norm.weight.data[:] = float("nan")
        model.save_pretrained(out / "model")
        TOKENIZER.save_pretrained(out / "model")
        (out / "factorize.json").write_text(json.dumps(dict.fromkeys(evaluate.SIZES, 1)))
    named = r"evaluation sequence 0 is not finite with the model in .*factorize.* begins in 'model.norm'.*largest weight is nan"
    with pytest.raises(NumericalError, match=named):
        evaluate.run(workspace, EvaluateParams())
    assert not workspace.out("evaluate").exists()


# Damage


def sharp_workspace(root: Path, sequences: int = 12) -> Workspace:
    """Both models are one whose layers matter: large weights, and text that it wrote itself, so that it predicts it well."""
    workspace = tiny_workspace(root, sequences=sequences)
    model = sharp_model()
    with Scratch(workspace, "prepare", PrepareParams(), {"sharp": ""}) as scratch, scratch.publish() as out:
        model.save_pretrained(out / "model")
        TOKENIZER.save_pretrained(out / "model")
    prompts = [[3 + 7 * i % 90, 5 + i] for i in range(sequences)]
    written = Decoder(model, ends=[]).answer(prompts, 12)
    ids = np.array([[*prompt, *answer] for prompt, answer in zip(prompts, written, strict=True)])
    write_sequences(workspace.table("evaluation"), ids, [["a"]] * sequences, VOCABULARY)
    rows = [
        {"prompt": f"p{i}", "prompt_ids": prompt, "sampled_ids": answer}
        for i, (prompt, answer) in enumerate(zip(prompts, written, strict=True))
    ]
    write_table(workspace.table("answers"), pa.Table.from_pylist(rows, schema=ANSWERS), VOCABULARY)
    return workspace


def sharp_model() -> torch.nn.Module:
    model = tiny_model()
    for parameter in model.model.layers.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(20)
    model.get_output_embeddings().weight.data.mul_(30)
    return model


def with_damage(workspace: Workspace, damage) -> Workspace:
    """Publish the same model as the compressed one, after `damage(model)`."""
    with (
        Scratch(workspace, "factorize", FactorizeParams(), {"damage": damage.__name__}) as scratch,
        scratch.publish() as out,
    ):
        model = sharp_model()
        damage(model)
        model.save_pretrained(out / "model")
        TOKENIZER.save_pretrained(out / "model")
        (out / "factorize.json").write_text(json.dumps(dict.fromkeys(evaluate.SIZES, 10)))
    return workspace


def nothing(model) -> None:
    """The same model."""


def a_zero_layer(model) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.zero_()


def test_damage_is_called_damage(tmp_path):
    workspace = sharp_workspace(tmp_path)
    found = {}
    for damage in (nothing, a_zero_layer):
        evaluate.run(with_damage(workspace, damage), EvaluateParams(answer_tokens=8))
        found[damage] = read_json(workspace, "metrics.json")
    assert verdict(found[nothing]).level == "close"
    assert verdict(found[a_zero_layer]).level == "damaged"
    assert found[a_zero_layer]["compressed"]["zero_layers"] == 1
    assert read_json(workspace, "evaluation.json")["zero_layers"] == ["model.layers.1.mlp.down_proj"]
    found[a_zero_layer]["compressed"]["zero_layers"] = 0
    assert verdict(found[a_zero_layer]).level == "damaged"  # the figures alone say so too


def test_sources_and_answers_are_published(workspace):
    table = read_table(workspace.table("evaluation"))
    metadata = table.schema.metadata
    named = (
        table.drop_columns("source")
        .append_column("source", pa.array(["news"] * 3 + ["leads"] * 5))
        .replace_schema_metadata(metadata)
    )
    pq.write_table(named, workspace.table("evaluation"))
    table = read_table(workspace.table("calibration"))
    pq.write_table(
        table.drop_columns("source").append_column("source", pa.array(["leads"] * 8)), workspace.table("calibration")
    )
    evaluate.run(workspace, EvaluateParams(answer_tokens=5))
    found = read_json(workspace, "metrics.json")
    assert {name: (row["sequences"], row["calibrated"]) for name, row in found["by_source"].items()} == {
        "leads": (5, True),
        "news": (3, False),
    }
    ids = read_sequences(workspace.table("evaluation"), VOCABULARY)[:3]
    expected = log_probabilities(tiny_model(seed=1), ids)[:, :-1].gather(-1, ids[:, 1:, None]).mean().neg().exp()
    assert found["by_source"]["news"]["compressed"] == pytest.approx(float(expected), rel=1e-5)
    samples = pq.read_table(workspace.out("evaluate") / "answers.parquet").to_pylist()
    prompts = read_table(workspace.table("answers")).to_pylist()
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in prompts]
    answer = Decoder(tiny_model(seed=1), [2]).answer([prompts[3]["prompt_ids"]], 5)[0]
    assert samples[3]["compressed"] == TOKENIZER.decode(answer, skip_special_tokens=True)
    assert found["answers"] == {"prompts": 6, "tokens": sum(len(row["sampled_ids"]) for row in prompts)}


@pytest.mark.parametrize("empty", [True, False])
def test_without_prompts(workspace, empty):
    workspace.table("answers").unlink()
    if empty:
        write_table(workspace.table("answers"), ANSWERS.empty_table(), VOCABULARY)
    evaluate.run(workspace, EvaluateParams())
    metrics = read_json(workspace, "metrics.json")
    unknown = ("own_answers_kl", "greedy_agreement", "agreeing_prefix", "empty_answers", "looping_answers")
    assert {metrics["compressed"][name] for name in unknown} == {None}
    assert metrics["answers"] == {"prompts": 0, "tokens": 0}
    assert UNKNOWN_ANSWERS in verdict(metrics).sentences
    assert pq.read_table(workspace.out("evaluate") / "answers.parquet").num_rows == 0


def test_our_checkpoints_are_loaded_without_code_from_their_folder(workspace):
    """A checkpoint whose file would end the test, were it executed."""
    with Scratch(workspace, "factorize", FactorizeParams(), {"code": ""}) as scratch, scratch.publish() as out:
        folder, name = save_tiny(out / "model", seed=1), "model.layers.0.mlp.up_proj"
        right, left = torch.randn(3, 16), torch.randn(24, 3)
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
        tensors |= {f"{name}.down.weight": right, f"{name}.up.weight": left, f"{name}.weight": torch.empty(0)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "fisherfold_llama",
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
            "fisherfold": {"layers": {name: {"kind": "factors", "rank": 3}}},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text("raise SystemExit('code from the folder ran')\n")
        (out / "factorize.json").write_text(json.dumps(dict.fromkeys(evaluate.SIZES, 10)))
    evaluate.run(workspace, EvaluateParams())
    model = tiny_model(seed=1)
    model.get_submodule(name).weight.data = left @ right
    ids = read_sequences(workspace.table("evaluation"), VOCABULARY)
    expected = log_probabilities(model, ids)[:, :-1].gather(-1, ids[:, 1:, None]).mean().neg().exp()
    assert read_json(workspace, "metrics.json")["compressed"]["perplexity"] == pytest.approx(float(expected), rel=1e-5)


# Further tasks


TINY_TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def task_folder(tmp_path) -> Path:
    """A folder with one task over local JSON lines, and MMLU-like CSV files of two subjects."""
    folder = tmp_path / "tasks"
    (folder / "val").mkdir(parents=True)
    (folder / "tiny.yaml").write_text(TINY_TASK.replace("CACHE", str(tmp_path / "cache")))
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w7 w8", "w9"], "answer": i % 2} for i in range(3, 9)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "val" / "deep_sea_val.csv").write_text('"w3, w4",1,2.50,None,NA,D\nw5,4,"3,5",2,1,B\n')
    (folder / "val" / "sky_val.csv").write_text("w6,w7,w8,w9,w10,A\n")
    (folder / "val" / "sky_dev.csv").write_text("w60,w7,w8,w9,w10,C\n")
    return folder


def test_local_tasks_run_on_both_models(workspace, task_folder):
    shutil.copytree(SHIPPED_TASKS, workspace.recipes("tasks"))
    evaluate.run(
        workspace, EvaluateParams(tasks=["tiny", "four_choice_val"], task_folder=str(task_folder), task_limit=5)
    )
    found = read_json(workspace, "tasks.json")
    rows = [json.loads(line) for line in (task_folder / "questions.jsonl").read_text().splitlines()][:5]
    for seed, model in enumerate(evaluate.MODELS):
        right = [
            np.argmax([oracle_text(tiny_model(seed=seed), row["question"], choice) for choice in row["choices"]])
            == row["answer"]
            for row in rows
        ]
        entry = found["tiny"][model]["tiny"]
        assert (entry["documents"], entry["metrics"]["acc"]["value"]) == (5, np.mean(right))
        group = found["four_choice_val"][model]
        assert sorted(group) == ["four_choice_val", "four_choice_val::deep_sea", "four_choice_val::sky"]
        parts = [group[f"four_choice_val::{name}"] for name in ("deep_sea", "sky")]
        total = sum(part["metrics"]["acc"]["value"] * part["documents"] for part in parts)
        assert group["four_choice_val"]["metrics"]["acc"]["value"] == pytest.approx(total / 3)


def oracle_text(model: torch.nn.Module, context: str, continuation: str) -> float:
    return oracle_likelihood(model, *(TOKENIZER(text)["input_ids"] for text in (context, continuation)))[0]


def test_four_choice_files_become_mmlu_prompts(task_folder):
    loaded = tasks.load_task("four_choice_val", task_folder, SHIPPED_TASKS)
    deep_sea = loaded["tasks"]["four_choice_val::deep_sea"]
    run_tasks(SharedContextModel(tiny_model(), TOKENIZER, 100, 2), loaded)
    prompt, choice = deep_sea.instances[0].args
    expected = (
        "about deep sea.\n\nw3, w4\nA. 1\nB. 2.50\nC. None\nD. NA\nAnswer:"  # no cell is taken for a number or a gap
    )
    assert prompt == f"The following are multiple choice questions (with answers) {expected}"
    assert choice == " A"
    assert [deep_sea.doc_to_target(doc) for doc in deep_sea.test_docs()] == [3, 1]


def test_examples_come_from_the_subject(task_folder):
    text = (SHIPPED_TASKS / "four_choice_val.yaml").read_text().replace("include: ", f"include: {SHIPPED_TASKS}/")
    (task_folder / "five.yaml").write_text(text.replace("group: four_choice_val", "group: five\nnum_fewshot: 1"))
    (task_folder / "val" / "deep_sea_val.csv").unlink()
    loaded = tasks.load_task("five", task_folder)
    run_tasks(SharedContextModel(tiny_model(), TOKENIZER, 100, 2), loaded)
    (task,) = loaded["tasks"].values()
    assert (
        task.instances[0]
        .args[0]
        .endswith("w60\nA. w7\nB. w8\nC. w9\nD. w10\nAnswer: C\n\nw6\nA. w7\nB. w8\nC. w9\nD. w10\nAnswer:")
    )


@pytest.mark.parametrize("row", ["question,1,2,3,A", "question,1,2,3,4,E", ""])
def test_a_row_of_another_form_is_named(task_folder, row):
    (task_folder / "val" / "sky_val.csv").write_text(f"w1,1,2,3,4,A\n{row}\n")
    with pytest.raises(InputError, match=r"sky_val.csv, row 2: expected a question, four choices"):
        tasks.load_task("four_choice_val", task_folder, SHIPPED_TASKS)


def test_no_files_for_a_task(tmp_path):
    with pytest.raises(InputError, match=r"no file below .* matches .*_test.csv"):
        tasks.load_task("four_choice_test", tmp_path, SHIPPED_TASKS)


def test_an_unknown_task_is_named_before_anything_is_measured(workspace, task_folder, monkeypatch):
    monkeypatch.setattr(tasks, "_lm_eval_tasks", lambda: TaskManager(include_defaults=False))  # reading all takes 5 s
    monkeypatch.setattr(evaluate, "measure_losses", None)
    with pytest.raises(ParameterError, match=r"evaluate.tasks = 'tony': .* Near: tiny"):
        evaluate.run(workspace, EvaluateParams(tasks=["tony"], task_folder=str(task_folder)))
