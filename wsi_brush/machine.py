"""What the machine lends: memory that is kept, threads, and what was used."""

from __future__ import annotations

import ctypes
import resource
import sys


def keep_memory() -> None:
    """Ask glibc to keep large activations instead of handing each back to the kernel: 2 to 3 x on CPUs.

    For the whole process, so only programs call it (the command line does), never a library function.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    no_mapping, trim_threshold, top_padding = -4, -1, -2
    for option, value in ((no_mapping, 0), (trim_threshold, 2**31 - 1), (top_padding, 256 * 2**20)):
        mallopt(option, value)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
