"""What is asked of the machine is what it does: memory is kept, or goes back at once."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MEASURE = """
import sys
import torch
from wsi_brush.machine import keep_memory

def held():
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * 4096 // 2**20

keep_memory(int(sys.argv[1]) or None)
before = held()
block = torch.ones(64 * 2**18)  # 64 MiB
most = held() - before
del block
print(most, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("largest", [0, 4 * 2**20], ids=["kept", "only small blocks are kept"])
def test_memory_is_kept_or_goes_back(largest: int) -> None:
    command = [sys.executable, "-c", MEASURE, str(largest)]
    most, after = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert most > 60
    assert (after < 8) == bool(largest)
