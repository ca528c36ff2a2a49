"""Memory that a training step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from paring.pipeline.heap import kept_heap

def use(times):
    for _ in range(times):
        torch.empty(2**26, dtype=torch.uint8).fill_(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(2):
    with kept_heap():
        use(32)  # blocks that are aligned find each other only after some
        before = faults()
        use(8)
        assert faults() - before < 1000, faults() - before  # of 131,072 pages of 4 KiB
        kept = resident()
    assert resident() < kept - 2**25, (resident(), kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's malloc")
def test_what_is_freed_stays_within_and_goes_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
