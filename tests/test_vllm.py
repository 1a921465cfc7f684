"""Compressed checkpoints in vLLM, which has an environment of its own: the same greedy tokens as in transformers.

FISHERFOLD_VLLM_PYTHON=…/bin/python pytest -m serve tests/test_vllm.py
FISHERFOLD_SERVED=artifacts/factorize/model FISHERFOLD_VLLM_PYTHON=…/bin/python pytest -m serve tests/test_vllm.py -k own
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from project import ROOT
from served_models import FAMILIES, OTHERS, STORAGES, served_model
from tiny import CHAT, tiny_tokenizer
from transformers import AutoModelForCausalLM
from vllm_server import INTERPRETER, ask, ask_at_once, environment, serving

OWN = "FISHERFOLD_SERVED"
REQUESTS = [[3, 4, 5, 6, 7], [10, 20, 30, 40, 50, 60, 70, 80, 90]]
TOKENS = 12
CLOSE = 1e-3  # of a sum of TOKENS log-probabilities; float32, in another order
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # one engine after another, in one process
Answers = list[tuple[list[int], float]]
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(INTERPRETER not in os.environ, reason=f"{INTERPRETER} names no interpreter with vLLM"),
]


def answers(folders: list[Path], processes: int = 1, compiled: bool = False) -> dict[str, Answers | str]:
    """What vLLM adds to the requests and how probable that was, by folder, each layer split over so many processes."""
    script = ROOT / "tests" / "support" / "vllm_tokens.py"
    asked = map(json.dumps, (REQUESTS, TOKENS, processes, compiled))
    command = [os.environ[INTERPRETER], "-I", script, *asked, *folders]
    process = subprocess.run(
        command, env=environment() | IN_PROCESS, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """Checkpoints of a family by storage."""
    root = tmp_path_factory.mktemp(request.param)
    return {storage: served_model(root / storage, request.param, storage) for storage in STORAGES}


@pytest.fixture(scope="module")
def served(folders):
    return answers(list(folders.values()))


@torch.no_grad()
def greedy(folder: Path, requests: list[list[int]] = REQUESTS) -> Answers:
    """What transformers adds, one request at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    found = []
    for request in requests:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
        whole = model.generate(torch.tensor([request]), **options)
        added = whole[0, len(request) :]
        logits = model(whole[:, :-1]).logits[0, len(request) - 1 :]
        found.append((added.tolist(), float(logits.log_softmax(-1).gather(-1, added[:, None]).sum())))
    return found


def same(found: Answers | str, expected: Answers) -> bool:
    """Whether the tokens are equal and about as probable."""
    assert not isinstance(found, str), found
    pairs = list(zip(found, expected, strict=True))
    return all(here[0] == there[0] and abs(here[1] - there[1]) < CLOSE for here, there in pairs)


@pytest.mark.parametrize("storage", STORAGES)
def test_two_requests_at_once_get_the_tokens_of_transformers(folders, served, storage):
    found = served[str(folders[storage])]
    assert same(found, greedy(folders[storage]))
    assert len({token for tokens, _ in found for token in tokens}) > TOKENS // 2  # what says one thing shows nothing


def test_other_families(tmp_path):
    made = {family: served_model(tmp_path / family, family, "pivoted") for family in OTHERS}
    found = answers(list(made.values()))
    assert [family for family, folder in made.items() if not same(found[str(folder)], greedy(folder))] == []


def test_compiled_by_vllm(tmp_path):
    folder = served_model(tmp_path, "llama", "pivoted")
    assert same(answers([folder], compiled=True)[str(folder)], greedy(folder))


def test_two_processes_that_share_each_layer_get_the_same_tokens(tmp_path):
    made = [served_model(tmp_path / "plain", "llama", "plain"), served_model(tmp_path / "shared", "qwen2", "shared")]
    found = answers(made, processes=2)
    assert all(same(found[str(folder)], greedy(folder)) for folder in made)


def test_what_cannot_be_split_is_refused(tmp_path):
    folder = served_model(tmp_path, "llama", "pivoted")
    assert "initialization failed" in answers([folder], processes=2)[str(folder)]  # the reason is in the worker's log


def test_factors_of_few_bits(tmp_path):
    """vLLM reads the packed factors; of its kernels for CPUs none has 8 bits."""
    made = {storage: served_model(tmp_path / storage, "llama", storage, bits=4) for storage in ("plain", "pivoted")}
    wider = served_model(tmp_path / "wider", "llama", "plain", bits=8)
    found = answers([*made.values(), wider])
    assert [storage for storage, folder in made.items() if not same(found[str(folder)], greedy(folder))] == []
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in found[str(wider)]


def test_the_server(tmp_path):
    """`vllm serve`: two requests at once and a talk get the tokens of transformers, and it stops when it is told to."""
    folder = served_model(tmp_path, "llama", "pivoted")
    (folder / "chat_template.jinja").write_text(CHAT)
    said = [{"role": "user", "content": "w7 w8"}]
    exact = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    with serving(folder, tmp_path / "log") as address:
        choices = ask_at_once(address, "/v1/completions", [exact | {"prompt": ids} for ids in REQUESTS])
        talk = ask(address, "/v1/chat/completions", messages=said, **exact)
    assert [choice["token_ids"] for choice in choices] == [tokens for tokens, _ in greedy(folder)]
    words = tiny_tokenizer().apply_chat_template(said, chat_template=CHAT, add_generation_prompt=True)["input_ids"]
    assert talk["token_ids"] == greedy(folder, [words])[0][0]


@pytest.mark.skipif(OWN not in os.environ, reason=f"{OWN} names no folder")
def test_a_checkpoint_of_ones_own():
    folder = Path(os.environ[OWN])
    assert same(answers([folder])[str(folder)], greedy(folder))
