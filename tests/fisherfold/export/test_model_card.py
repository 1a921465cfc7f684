"""Model cards: what they say, what the hub reads of them, and that their snippet runs as it is printed."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from tiny import as_truncated
from tiny_subspace import mixed_ranks, publish_ranks, subspace_workspace

from fisherfold.export.architecture import DenseArchitecture
from fisherfold.export.card_results import with_results
from fisherfold.export.model_card import compressed_card
from fisherfold.run.params import FactorizeParams
from fisherfold.run.workspace import Workspace
from stages import factorize

CHAT = "{% for message in messages %}w3 {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
PREPARED = {
    "model": {
        "name": "/home/me/secret/tiny",
        "origin": "local",
        "licence": "Apache-2.0",
        "digest": "0123456789abcdef00",
    },
    "corpus": {"name": "wiki", "origin": "wheel==1 (https://x.org)", "licence": "CC BY-SA 4.0", "digest": "1"},
    "corpus 2": {"name": "/home/me/notes.txt", "origin": "local", "licence": None, "digest": "2"},
    "prompts": {"name": "everyday", "origin": "local", "licence": "CC0-1.0", "digest": "3"},
    "questions": {"name": "q|uiz", "origin": "hub", "licence": "MIT", "digest": "4"},
    "data": {
        "sequence_length": 12,
        "question_count": 7,
        "splits": {
            "calibration": {"sources": {"wiki": 5, "self-written": 3}},
            "evaluation": {"sources": {"wiki": 4, "/home/me/notes.txt": 2}},
        },
    },
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    """A factorized chat model with facts of every kind."""
    found = subspace_workspace(tmp_path_factory.mktemp("card"))
    (found.model / "chat_template.jinja").write_text(CHAT)
    (found.out("prepare") / "prepare.json").write_text(json.dumps(PREPARED))
    manifest = json.loads((found.out("prepare") / "manifest.json").read_text())
    manifest["files"]["prepare.json"]["bytes"] = (found.out("prepare") / "prepare.json").stat().st_size
    (found.out("prepare") / "manifest.json").write_text(json.dumps(manifest))
    publish_ranks(found, mixed_ranks(found))
    factorize.run(found, as_truncated())
    return found


def card_of(workspace: Workspace) -> str:
    return (workspace.out("factorize") / "model" / "README.md").read_text()


def source(dense: float, compressed: float, calibrated: bool) -> dict:
    return {
        "dense": dense, "dense_error": 1.0, "compressed": compressed, "compressed_error": None, "kl_to_dense": 0.2,
        "kl_to_dense_error": 0.01, "sequences": 4, "calibrated": calibrated,
    }  # fmt: skip


def metrics(prompts: int = 5) -> dict:
    dense = {
        "perplexity": 20.0,
        "knowledge_accuracy": 0.5,
        "knowledge_accuracy_error": 0.1,
        "empty_answers": 0,
        "looping_answers": 1,
    }
    return {
        "dense": dense,
        "compressed": dense
        | {"own_answers_kl": 0.5, "own_answers_kl_error": 0.02, "empty_answers": 2, "zero_layers": 0},
        "answers": {"prompts": prompts, "tokens": 99},
        "by_source": {"wiki": source(20.0, 22.0, True), "news": source(30.0, 60.0, False)},
    }


SAMPLES = [{"prompt": f"Why {i}?", "dense": "Because | of <b>this</b>\n# yes", "compressed": " \n"} for i in range(5)]


def test_only_the_settings_that_were_used(workspace):
    card = card_of(workspace)
    assert "- subspace.metric: svd" in card and "- ranks.ratio: 0.5" in card
    assert "damping" not in card and "asvd_alpha" not in card and "threads" not in card


def test_the_engine_it_was_made_for_its_command_and_its_price(workspace, tmp_path):
    shutil.copytree(workspace.root, tmp_path / "served")
    served = Workspace(tmp_path / "served")
    path = served.out("ranks") / "budget.json"
    priced = json.loads(path.read_text()) | {"format": {"storage": "pivoted", "round_to": 32, "price": 0.123}}
    path.write_text(json.dumps(priced))
    facts = json.loads((served.out("factorize") / "factorize.json").read_text())
    architecture = DenseArchitecture("LlamaConfig", "LlamaForCausalLM", {}, served.model)
    card = compressed_card(served, architecture, facts, FactorizeParams(target="vllm"))
    assert "To serve it: `vllm serve . --trust-remote-code`" in card and "the predicted loss is +12.3% against" in card
    assert "predicted loss" not in card_of(workspace)


def test_data_with_licences_and_no_path_of_this_machine(workspace):
    card = card_of(workspace)
    assert "| calibration | wiki, wheel==1 (https://x.org) | CC BY-SA 4.0 | 5 sequences |" in card
    assert (
        "| calibration | written by the dense model, in answer to the prompts everyday | CC0-1.0 | 3 sequences |"
        in card
    )
    assert "| evaluation | notes.txt | not stated | 2 sequences |" in card
    assert r"| questions | q\|uiz | MIT | 7 questions |" in card
    assert "/home/me" not in card


@pytest.mark.parametrize("chat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_snippet_runs_as_printed(workspace, tmp_path, chat):
    folder = shutil.copytree(workspace.out("factorize") / "model", tmp_path / "model")
    if not chat:
        (workspace.model / "chat_template.jinja").rename(tmp_path / "aside")
        (folder / "chat_template.jinja").unlink()
    try:
        facts = json.loads((workspace.out("factorize") / "factorize.json").read_text())
        card = compressed_card(
            workspace,
            DenseArchitecture("LlamaConfig", "LlamaForCausalLM", {}, workspace.model),
            facts,
            FactorizeParams(),
        )
    finally:
        if not chat:
            (tmp_path / "aside").rename(workspace.model / "chat_template.jinja")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("apply_chat_template" in code) is chat
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout.strip().startswith("w") or not chat
    )  # without one, the tiny tokenizer knows no word of the prompt


def test_the_hub_reads_results_and_front_matter(workspace):
    card = ModelCard(with_results(card_of(workspace), metrics(), SAMPLES))
    found = {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {
        ("wiki", "perplexity"): 22.0, ("wiki", "kl"): 0.2, ("news", "perplexity"): 60.0, ("news", "kl"): 0.2,
        ("multiple-choice questions", "accuracy"): 0.5, ("the dense model's own answers", "kl"): 0.5,
    }  # fmt: skip
    errors = {result.metric_type: result.metric_args for result in card.data.eval_results}
    assert errors == {"perplexity": None, "kl": {"standard_error": 0.02}, "accuracy": {"standard_error": 0.1}}
    assert card.data.license == "apache-2.0" and card.data.tags == ["fisherfold", "low-rank"]
    assert card.data.model_name == "tiny, low-rank"


def test_results_stand_in_the_card_with_the_verdict_first(workspace):
    card = with_results(card_of(workspace), metrics(), SAMPLES)
    results = card.partition("## Results\n\n")[2].partition("\n## ")[0]
    assert results.startswith("Verdict: damaged. ")
    assert "- 2 of 5 answers are empty" in results
    assert "| perplexity, news | 30 ± 1 | 60 |" in results
    assert "| perplexity, wiki, a source of the calibration too | 20 ± 1 | 22 |" in results
    assert r"| Why 0? | Because \| of \<b\>this\</b\> \# yes | (empty) |" in results
    assert "Why 3?" in results and "Why 4?" not in results and "first of 5 prompts" in results
    assert "<!--" not in card


def test_without_prompts(workspace):
    unknown = {"own_answers_kl": None, "empty_answers": None, "looping_answers": None, "knowledge_accuracy": None}
    found = metrics(prompts=0)
    found["compressed"] |= unknown
    card = with_results(card_of(workspace), found, [])
    assert "How it answers is not known" in card and "own answers" not in card and "| prompt |" not in card
