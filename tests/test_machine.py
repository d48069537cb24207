"""What is asked of the machine is what it does: memory is kept, or goes back at once."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wsi_brush.machine import on_cores, side_by_side

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


def test_side_by_side_is_in_order_by_threads_that_share_the_cores() -> None:
    with on_cores(4):
        both = threading.Barrier(2)

        def work(item: int) -> int:
            both.wait(30)
            time.sleep(0.02 * (item % 2 == 0))  # the second of two ends first
            return torch.get_num_threads()

        assert list(side_by_side(work, range(6), threads=2, cores=None)) == [(item, 2) for item in range(6)]
        assert list(side_by_side(lambda item: torch.get_num_threads(), range(6))) == [(item, 1) for item in range(6)]
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as later:  # what begins afterwards has all of them
            assert later.submit(torch.get_num_threads).result() == 4


def test_side_by_side_takes_no_more_items_than_it_works_on() -> None:
    taken = itertools.count()
    results = side_by_side(lambda item: item, (next(taken) for _ in range(100)), threads=2)
    assert next(results) == (0, 0)
    assert next(taken) == 4  # two threads, one item that waits, one that is done
    results.close()


@pytest.mark.parametrize("patient", [True, False])
def test_after_an_error_only_the_patient_wait(patient: bool) -> None:
    ended, may_end, may_fail = threading.Event(), threading.Event(), threading.Event()

    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            may_fail.wait(30)
            raise KeyboardInterrupt
        may_fail.set()
        may_end.wait(0.5 if patient else 30)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(work, range(4), threads=2, patient=patient))
    assert ended.is_set() == patient
    may_end.set()
    assert ended.wait(30)
    assert 3 not in begun
