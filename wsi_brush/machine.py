"""What the machine lends: a device that computes, cores and threads, memory that is kept or was used, Ctrl-C at a good
moment."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from .errors import MachineError, UsageError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""
Precision = Literal["float32", "bfloat16"]
"""Of products: float32 as it is said, or bfloat16 with sums in float32."""


def find_device(name: str) -> torch.device:
    """The device that computes; where it is a GPU, float32 means float32 on it from then on, for the whole process.

    PyTorch gives convolutions on GPUs 10 bits of mantissa (TF32) by default; it is one switch for all threads.

    Raises:
        UsageError: if the name is not cpu, cuda or cuda:N.
        MachineError: if it is not there.
    """
    import torch

    try:
        found = torch.device(name)
    except (RuntimeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"{name!r} is no device; expected cpu, cuda or cuda:N")
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MachineError(f"{name}: no CUDA device is available to PyTorch here; use cpu")
    index = torch.cuda.current_device() if found.index is None else int(name.partition(":")[2])  # torch's wraps at 128
    if index >= (count := torch.cuda.device_count()):
        raise MachineError(f"{name}: the CUDA devices here are numbered from 0 to {count - 1}; use one of them")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a newer way to say it, which releases before 2.9 do not know
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", index)


def name_of(device: torch.device) -> str:
    """What a card or a catalogue calls it: a GPU's own name, or the processor's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def check_precision(precision: str, device: torch.device) -> None:
    """Whether a device has that arithmetic.

    Raises:
        UsageError: if the name is neither float32 nor bfloat16.
        MachineError: if the device has no bfloat16.
    """
    import torch

    if precision not in get_args(Precision):
        raise UsageError(f"{precision!r} is no precision; expected {' or '.join(get_args(Precision))}")
    if precision == "float32":
        return
    if device.type == "cuda":
        there = torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    else:
        facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        there = any(facts.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    if not there:
        raise MachineError(f"{device}: computes no bfloat16; use float32")


def products(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """In this thread matrix products and convolutions on the device are of that precision, sums and norms float32."""
    import torch

    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def full_device_said(name: str, advice: str) -> Iterator[None]:
    """A GPU without memory for what is asked of it becomes one line.

    Raises:
        MachineError: then.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0].split(". ")[0]
        raise MachineError(f"{name}: {line}; {advice}, or use cpu") from None


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU has."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """PyTorch computes on so many cores in this thread, and in those that begin meanwhile."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None, cores: int | None = 1,
    patient: bool = True,
) -> Iterator[tuple[Item, Result]]:  # fmt: skip
    """`work` on every item, in order, by so many threads, by default as PyTorch has cores; each has so many cores, or
    an equal share of them (None).

    Two threads with an item each do more than two cores inside every operator (1.6 times as much of a painting), for
    they never wait for each other, nor both for what else runs on a core. Errors of `work` and of `items` come out as
    they are; then, and after Ctrl-C, only the `patient` wait for work that is under way, whose result is nobody's (the
    end of Python waits for it too).
    """
    import torch

    there = torch.get_num_threads()
    count = threads or there
    cores = cores or max(1, there // count)
    with on_cores(cores):
        if count == 1 and threads is None:
            yield from ((item, work(item)) for item in items)
            return
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(cores,))
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > count + 1:  # no more results than are being written
                    yield _first_of(waiting)
            while waiting:
                yield _first_of(waiting)
        finally:
            pool.shutdown(wait=patient, cancel_futures=True)


def _first_of(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, result = waiting.popleft()
    return item, result.result()


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


def release_memory() -> None:
    """Have glibc hand back to the kernel what it keeps and nobody uses, in whatever pieces it is."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


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
            (CGROUP / name).read_text("ascii") for name in ("memory.max", "memory.current", "memory.stat")
        )
        if limit.strip() != "max":  # files that were read count as used, and go when memory is asked for
            cached = next(int(line.split()[1]) for line in facts.splitlines() if line.startswith("inactive_file "))
            found.append(max(int(limit) - int(used) + cached, 0))
    return min(found, default=None)


def shown_cores() -> int:
    """Cores that this process may run on, as the system shows them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lent_cores() -> float:
    """The same within the quota of a container, which may lend fewer than it shows."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text("ascii").split()
        return min(shown_cores(), int(quota) / int(period))
    except (OSError, ValueError):  # no such limit, or it is "max"
        return shown_cores()


def limit_memory(more: int) -> None:
    """This process may have so many bytes more than it has, and leaves no core when it dies of it.

    What is limited are addresses: what is held would have to be watched, and a fast eater is faster. Where the system
    does not say what is in use (no Linux), nothing is limited.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):
        size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize() + more
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


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
