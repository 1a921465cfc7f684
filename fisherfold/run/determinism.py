"""What a process needs so that the same parameters give the same bits, wherever it runs.

The order in which floats are added up depends on the number of threads and not on the number of cores: on two cores or on
one, N threads give the same bits. So N is a parameter of every stage that computes (tests/fisherfold/run/test_determinism.py).
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from fisherfold.run.errors import ParameterError
from fisherfold.run.freed_memory import give_back_freed

if TYPE_CHECKING:
    import torch
    from threadpoolctl import ThreadpoolController

DEVICE_VARIABLE = (
    "FISHERFOLD_DEVICE"  # cpu, cuda, cuda:1, mps, auto (spread over the node's GPUs); unset: the best there is
)
DEVICES = re.compile(r"cpu|cuda(:\d+)?|mps|auto")
WHOLE, STREAMED = "whole", "streamed"
"""Placements of models: all weights in memory, or those of one decoder block and one embedding at a time. The bits are the same."""
LIBRARIES = ("torch", "numpy", "scipy", "transformers")
"""Packages whose version can change a bit of what a unit computes."""


def asked_device() -> str | None:
    """The environment's choice, if it makes one.

    Raises:
        ParameterError: it is no device.
    """
    asked = os.environ.get(DEVICE_VARIABLE) or None
    if asked and not DEVICES.fullmatch(asked):
        raise ParameterError(f"{DEVICE_VARIABLE}={asked!r} is no device: cpu, cuda, cuda:1, mps or auto.")
    return asked


def chosen_device() -> str:
    """Where this process computes: the environment's choice, else cuda, else mps, else cpu."""
    if asked := asked_device():
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device() -> str:
    """`chosen_device`, if it is there.

    Raises:
        ParameterError: torch does not reach it.
    """
    import torch

    device = chosen_device()
    kind, _, number = device.partition(":")
    counts = {"cuda": torch.cuda.is_available() and torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    count = int(counts.get(kind, 1))
    if int(number or 0) >= count:
        raise ParameterError(
            f"{DEVICE_VARIABLE}={device} and torch {torch.__version__} reaches {count} {kind} devices. Unset {DEVICE_VARIABLE}, or see "
            "`fisherfold doctor`."
        )
    return device


_placement: ContextVar[str] = ContextVar("placement", default=WHOLE)


def chosen_placement() -> str:
    """Of the models that this process loads."""
    return _placement.get()


@contextmanager
def placed(placement: str) -> Iterator[None]:
    """Inside, models are loaded so; streamed, the process holds no more than it needs."""
    if placement == STREAMED:
        give_back_freed()
    before = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(before)


def describe_machine() -> dict[str, str]:
    """What this process computes with: device, instruction set and LIBRARIES. Where one of them differs, bits may."""
    return {"device": _device_name(chosen_device())} | _versions()


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


@cache
def _device_name(device: str) -> str:
    import torch

    if device == "mps":
        return device
    if device == "cpu" or not torch.cuda.is_available():
        return f"{device} {torch.backends.cpu.get_cpu_capability()}"
    spread = range(torch.cuda.device_count()) if device == "auto" else [torch.device(device).index or 0]
    return f"{device.partition(':')[0]} {', '.join(torch.cuda.get_device_name(number) for number in spread)}"


def compute_deterministically() -> None:
    """Choose deterministic algorithms for the rest of this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.manual_seed(0)
    # use_deterministic_algorithms does no more, for this, and imports the compiler
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def named_seed(seed: int, name: str) -> int:
    """A seed that `seed` and `name` determine: what is drawn for one thing depends on no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1


def seeded_generator(seed: int, name: str) -> "torch.Generator":
    """A generator on the CPU of that `named_seed`."""
    import torch

    return torch.Generator().manual_seed(named_seed(seed, name))


@contextmanager
def computing_threads(threads: int | None) -> Iterator[None]:
    """Inside, torch (OpenMP, MKL) and the BLAS of NumPy and SciPy compute with exactly `threads` threads.

    None leaves everything as it is, for stages that compute nothing.
    """
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _blas().limit(limits=threads):
            yield
    finally:
        torch.set_num_threads(before)


def has_bfloat16_units() -> bool:
    """Whether the chosen device multiplies bfloat16 in units made for it; elsewhere it may take many times as long as float32."""
    import torch

    kind = chosen_device().partition(":")[0]
    if kind == "cpu":
        found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return kind != "mps" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def multiplying(products: str | None) -> Iterator[None]:
    """Inside, products of float32 matrices may be of numbers rounded to bfloat16 and summed in float32, if `products` says so, where the processor
    has units for them (AMX; a GPU takes TF32, which is more precise; for training see `fisherfold.network.rounded_products`). Elsewhere, and with
    "float32", they are as ever. None leaves everything as it is.
    """
    if products is None:
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if products == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _blas() -> "ThreadpoolController":
    """The loaded BLAS libraries; NumPy and SciPy bring one each, and what is loaded later would be missed."""
    import numpy  # noqa: F401
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
