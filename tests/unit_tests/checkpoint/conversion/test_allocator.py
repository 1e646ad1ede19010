"""Tensors that are freed leave this process's memory, whatever is kept behind them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import torch
from megatron_trinity.checkpoint.conversion.allocator import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

return_freed_memory()
torch.ones(2**22)  # 16 MiB that are freed: from here on glibc would keep smaller blocks
tensors = [torch.ones(2**21) for _ in range(16)]
before = resident()
del tensors[:-1]
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_tensors_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 15 * 2**23
