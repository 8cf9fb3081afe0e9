"""What a process gives back to the system, in one of its own: the settings stay as long as it does."""

import subprocess
import sys

import pytest

SCRIPT = """
import platform, sys
import torch
from operators.sharing import heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) << 12

def left(size):
    \"\"\"Bytes that stay of tensors between others, when these are freed.\"\"\"
    before = resident()
    tensors = [torch.ones(size // 4) for _ in range(64)]
    kept = tensors[1::2]
    del tensors
    return (resident() - before) / (len(kept) * size)

assert platform.libc_ver()[0] == "glibc"
with heap.mapped():
    inside = left(2 << 20)
heap.keep()
print(inside, left(2 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_what_training_frees_goes_back_and_what_else_frees_is_kept():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    inside, after = map(float, ended.stdout.split())
    assert 0.9 < inside < 1.3  # of what is kept
    assert after > 1.7  # and as much again that is free
