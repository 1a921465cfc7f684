"""A streamed model's process keeps nothing of what it has freed."""

import platform
import subprocess
import sys

import pytest

CREEP = """
import torch
from fisherfold.run.determinism import STREAMED, WHOLE, placed

def resident():
    return 1024 * int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

first = torch.ones(6 * 2**20)
del first  # 24 MiB: what is smaller comes from the heap from now on
for placement in (WHOLE, STREAMED):
    with placed(placement):
        before, kept = resident(), []
        for _ in range(16):
            large = [torch.ones(2 * 2**20) for _ in range(4)]  # 8 MiB each
            kept.append(torch.ones(2**14))  # lies behind them
            del large
        print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no such threshold")
def test_a_streamed_model_s_process_holds_no_holes():
    found = subprocess.run([sys.executable, "-c", CREEP], check=True, stdout=subprocess.PIPE, text=True)
    whole, streamed = map(int, found.stdout.split())
    assert streamed < 8e6 < 3e7 < whole
