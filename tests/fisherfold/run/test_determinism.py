"""What the bits of float sums depend on."""

import os
import subprocess
import sys

import pytest
import torch

from fisherfold.run.determinism import multiplying, usable_device
from fisherfold.run.errors import ParameterError

PRODUCTS = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import numpy, scipy.linalg, torch
from fisherfold.run.determinism import computing_threads, multiplying
def digest():
    A = torch.randn(700, 1536, generator=torch.Generator().manual_seed(0))
    B = A.T @ A
    with multiplying("bfloat16"):
        D = A.T @ A
    C = B[:300, :300].double()
    results = B, D, A.sum(), torch.linalg.eigh(C)[1], numpy.linalg.eigh(C.numpy())[1], scipy.linalg.qr(C.numpy())[0]
    return hashlib.sha256(b"".join(numpy.ascontiguousarray(x).tobytes() for x in results)).hexdigest()
for threads in map(int, sys.argv[2:]):
    with computing_threads(threads):
        print(digest())
"""


def said(script: str, *arguments: str) -> str:
    """What a fresh Python prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    words = [sys.executable, "-c", script, *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_bits_depend_on_threads_and_not_on_cores():
    two, one = said(PRODUCTS, "2", "2", "1").split()
    assert said(PRODUCTS, "1", "2") == two != one


def test_rounded_products_are_those_of_training_alone():
    A = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain = A @ A
    with multiplying("bfloat16"):
        torch.testing.assert_close(A @ A, plain, rtol=0, atol=8 * 64**0.5 * 2**-9)
    assert torch.equal(A @ A, plain)
    with multiplying("float32"):
        assert torch.equal(A @ A, plain)


def test_a_stage_that_loads_no_model_starts_without_what_loads_one():
    """Each process of a stage, on every worker, would spend seconds on imports that it does not need."""
    script = (
        "import sys; from fisherfold.run.determinism import compute_deterministically; compute_deterministically()\n"
        "from stages import kronecker, ranks, report, subspace\n"
        "print({'transformers', 'torch._dynamo', 'datasets'} & sys.modules.keys() or '')"
    )
    assert said(script) == ""


@pytest.mark.parametrize("device", ["gpu", "cuda:", "CPU", "cuda:99", "mps:0"])
def test_a_device_that_is_none_or_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setenv("FISHERFOLD_DEVICE", device)
    with pytest.raises(ParameterError, match=f"FISHERFOLD_DEVICE='?{device}"):
        usable_device()


def test_the_cpu_is_always_there(monkeypatch):
    monkeypatch.setenv("FISHERFOLD_DEVICE", "cpu")
    assert usable_device() == "cpu"
