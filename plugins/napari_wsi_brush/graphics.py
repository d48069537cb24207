"""torch in a process that draws."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress


def load_torch() -> None:
    """Load Triton so that it lives beside the graphics; call it before anything that imports torchvision.

    Mesa's drivers and torch's Triton each bring an LLVM of their own. The second one that is loaded calls into the
    first and crashes, where it is not bound to itself (seen with Mesa's software renderer, Triton 3.8).
    """
    if "triton" in sys.modules or not hasattr(os, "RTLD_DEEPBIND"):
        return
    before = sys.getdlopenflags()
    sys.setdlopenflags(before | os.RTLD_DEEPBIND)
    try:
        with suppress(ImportError):  # only some builds of torch have it
            importlib.import_module("triton")
    finally:
        sys.setdlopenflags(before)
