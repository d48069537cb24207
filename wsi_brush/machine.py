"""What the machine lends: memory that is kept, memory that was used, and Ctrl-C at a good moment."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


def keep_memory(largest: int | None = None) -> None:
    """Ask glibc to keep activations instead of handing each back to the kernel: 2 to 3 x on CPUs.

    Kept memory falls into pieces that the next activation does not fit. With `largest` bytes, blocks above it go back
    at once: that costs time for each page of them and saves half of what is held, where most activations are small.
    For the whole process, so only programs call it (the command line does), never a library function.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_padding, mapped_from, mappings, arenas = (
        -1,
        -2,
        -3,
        -4,
        -8,
    )  # the arenas of threads keep nothing
    options = {trim_threshold: 2**31 - 1, top_padding: 256 * 2**20, mappings: 0, arenas: 1}
    if largest is not None:
        options |= {top_padding: 16 * 2**20, mapped_from: largest, mappings: 65536}
    for option, value in options.items():
        mallopt(option, value)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def free_memory() -> int | None:
    """Bytes that programs may still take here, within the limit of a container; None where the system does not say."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, StopIteration):
        limit, used, facts = (
            Path("/sys/fs/cgroup", name).read_text("ascii") for name in ("memory.max", "memory.current", "memory.stat")
        )
        if limit.strip() != "max":  # files that were read count as used, and go when memory is asked for
            cached = next(int(line.split()[1]) for line in facts.splitlines() if line.startswith("inactive_file "))
            found.append(max(int(limit) - int(used) + cached, 0))
    return min(found, default=None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block is over; a second one does not.

    For writing with zarr, whose own thread goes on writing while the main one is already clearing up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    waiting: list[tuple[int, FrameType | None]] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or not Python's to handle
        yield
        return

    def wait(number: int, frame: FrameType | None) -> None:
        if waiting:
            before(number, frame)
        waiting.append((number, frame))

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        before(*waiting[0])
