"""What is read ahead: the bytes of the part that comes next, forward and backward, and nothing that changes a bit."""

import os

import pytest
import torch
from tiny import random_ids, save_tiny

from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.streamed_model import StreamedModel
from fisherfold.network.weights_on_call import read_on_call
from fisherfold.run import read_ahead
from fisherfold.run.checkpoint import StoredTensor, read_tensors, write_tensors


class AtOnce:
    """In the place of a thread: what it would do, done."""

    def __init__(self, target, args, daemon):
        self.start = lambda: target(*args)


@pytest.fixture
def asked(monkeypatch):
    """The parts that were read ahead, by the names of their tensors."""
    found = []
    monkeypatch.setattr(read_ahead, "Thread", AtOnce)
    monkeypatch.setattr(read_ahead, "read_ahead", lambda tensors: found.append({t.place for t in tensors}))
    return found


def test_a_place_is_where_the_bytes_are(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16()}
    write_tensors(tmp_path, {name: StoredTensor.of(values) for name, values in tensors.items()})
    for name, stored in read_tensors(tmp_path).items():
        path, begin = stored.place
        held = path.read_bytes()[begin : begin + stored.bytes]
        assert held == tensors[name].view(torch.uint8).numpy().tobytes()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")
def test_all_bytes_are_asked_for_in_pieces_that_the_system_takes(tmp_path, monkeypatch):
    write_tensors(tmp_path, {"a": StoredTensor.of(torch.zeros(1000)), "b": StoredTensor.of(torch.zeros(300))})
    pieces = []
    monkeypatch.setattr(read_ahead, "CHUNK", 1024)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, at, size, advice: pieces.append((at, size)))
    stored = read_tensors(tmp_path)
    read_ahead.read_ahead([stored["a"], StoredTensor.of(torch.zeros(3)), stored["b"]])
    first, second = stored["a"].place[1], stored["b"].place[1]
    assert pieces == [(first + 1024 * i, 1024) for i in range(3)] + [
        (first + 3072, 928),
        (second, 1024),
        (second + 1024, 176),
    ]


def test_a_file_that_is_gone_is_no_fault_of_who_reads_ahead(tmp_path):
    write_tensors(tmp_path, {"a": StoredTensor.of(torch.zeros(10))})
    stored = read_tensors(tmp_path)
    stored["a"].place[0].unlink()
    read_ahead.read_ahead(stored.values())  # does not raise, in a thread that nobody listens to


UNTIED = "mistral"


def parts_of(streamed: StreamedModel) -> dict[str, set]:
    return {name: {tensor.place for tensor in part} for name, part in zip(("in", "0", "1", "out"), streamed._parts())}


def test_the_next_part_forward_and_backward(tmp_path, asked):
    model = read_on_call(save_tiny(tmp_path / "m", UNTIED), torch.float32)
    parts = parts_of(model._streamed)
    assert len(parts) == 4 and all(parts.values())
    gradient_pass(model, random_ids(2, 12))
    assert asked == [parts[name] for name in ("0", "1", "out", "0", "in")]
    with torch.inference_mode():
        model(input_ids=random_ids(2, 12), use_cache=False)
    assert asked[5:] == [parts[name] for name in ("0", "1", "out")]


def test_the_parts_of_a_streamed_capture(tmp_path, asked):
    """What its units read: embedding, blocks forward with what surrounds them, head, blocks backward."""
    streamed = StreamedModel(save_tiny(tmp_path / "m", UNTIED), torch.float32)
    with streamed.surroundings(embedding=True):
        pass
    for number in (0, 1):
        with streamed.block(number), streamed.surroundings():
            pass
    with streamed.surroundings(head=True):
        pass
    for number in (1, 0):
        with streamed.block(number), streamed.surroundings():
            pass
    parts = parts_of(streamed)
    assert asked == [parts[name] for name in ("0", "1", "out", "0", "in")]


def test_an_embedding_that_is_also_the_head_is_one_part(tmp_path):
    streamed = StreamedModel(save_tiny(tmp_path / "m", "llama"), torch.float32)
    assert len(streamed._parts()) == len(streamed.names) + 1
