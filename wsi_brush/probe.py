"""probe: what a slide's header says, found out in another process.

A damaged file of some hundred kilobytes can make a C library ask for terabytes and end the process it is in. So a slide
is opened first in a child, which has a limit of memory and of time. One child serves many slides in turn; where it
dies, that slide is refused with one line, and the next gets a fresh child. After the header, the middle of every level
is read there: what a library does to the process, it does in the child. A tile that is only damaged is no matter here.

The child is started anew, not forked: a process with torch's threads cannot be forked safely. What it answers is JSON.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import MachineError, PixelSizeError, RefusedError, SlideError, UsageError, WsiBrushError
from .machine import limit_memory

SECONDS = 60.0
"""A slide that is not open by then is given up."""
MEMORY = 2 << 30
"""Bytes that a child may have beyond those of the slide's file, which is mapped while it is looked through."""
SIDE, AREA = 1 << 22, 1 << 40
"""Pixels a side, and pixels, that no slide has: 0.4 m at 0.1 µm."""

_WINDOW = 64  # pixels a side of what is read of each level
_START = 120.0  # seconds a child may take to begin, on a machine that is busy
_GRACE = 5.0  # seconds that the child's own alarm has before it is killed from here
_ERRORS: dict[str, type[WsiBrushError]] = {
    error.__name__: error for error in (SlideError, PixelSizeError, UsageError, MachineError, RefusedError)
}


@dataclass(frozen=True)
class Header:
    """What a slide's header says. `height` and `width` are those of level 0, `levels` (height, width) of each."""

    mpp: float
    mpp_source: str
    reader: str
    height: int
    width: int
    levels: tuple[tuple[int, int], ...]
    pixel: tuple[float, float]
    """Height and width of a level-0 pixel, µm."""
    synthetic: bool


def probe(path: Path | str, *, assume_mpp: float | None = None, force_mpp: float | None = None) -> Header:
    """Open a slide in another process, and say what its header says.

    Raises:
        SlideError: as `open_slide`, and if the process that opens it dies, or needs more than `SECONDS` or `MEMORY`.
        PixelSizeError, UsageError: as `open_slide`.
        MachineError: if no process can be started.
    """
    return _header(apart("wsi_brush.probe:look", path, assume_mpp=assume_mpp, force_mpp=force_mpp))


def apart(work: str, path: Path | str, **more: Any) -> dict[str, Any]:
    """What the function `work` (MODULE:NAME) says of a path, as JSON values, found out in another process.

    Raises:
        WsiBrushError: as that function, and as `probe`.
    """
    with _LOCK:
        return _child().ask(Path(path), {"work": work, "path": str(path), **more})


class _Child:
    """A process that opens slides."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # what the libraries say before they end the process
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread would take of the memory
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from wsi_brush.probe import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True,
                env={**os.environ, **threads, "PYTHONPATH": path},
            )  # fmt: skip
        except OSError as error:
            raise MachineError(f"no process to open slides in can be started ({error.strerror})") from None
        if self._line(_START) != b"ready\n":
            self.end()
            raise MachineError(f"the process to open slides in ended at once ({self._last_words()})")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: Path, question: dict[str, Any]) -> dict[str, Any]:
        question |= {"seconds": SECONDS, "memory": MEMORY}
        assert self._process.stdin is not None
        line = b""
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(SECONDS + _GRACE)
        except BrokenPipeError:
            pass
        finally:
            if not line.endswith(b"\n"):  # it died, or Ctrl-C came between: its answer is not the next one's
                self.end()
        if not line.endswith(b"\n"):
            raise SlideError(f"{path}: {self._death()}; the file is damaged, or too large for this machine")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise _ERRORS[said["error"]](said["message"])
        return said

    def _line(self, seconds: float) -> bytes:
        """The next line of the child; less than a line if it died or took longer."""
        assert self._process.stdout is not None
        self._late = False
        found, file = b"", self._process.stdout.fileno()
        while not found.endswith(b"\n"):
            if not select.select([file], [], [], seconds)[0]:
                self._late = True
                return b""
            part = os.read(file, 1 << 16)
            if not part:
                return b""
            found += part
        return found

    def _death(self) -> str:
        code = self._process.returncode
        if code is None or code == -signal.SIGALRM or self._late:
            return f"not open after {SECONDS:g} seconds"
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return f"opening it ended its process ({how}: {self._last_words()})"

    def _last_words(self) -> str:
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 4096))
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else "nothing said"

    def forget(self) -> None:
        """End it, and what it said is gone."""
        self.end()
        self._said.close()

    def end(self) -> None:
        """The child is no more; one that hangs in the kernel (a network that is gone) is left there."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.wait(0.5)
        with suppress(OSError, subprocess.TimeoutExpired):
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(_GRACE)


_LOCK = threading.Lock()
_KEPT: list[_Child] = []


def _child() -> _Child:
    """The child of this process; a forked process has one of its own."""
    if _KEPT and _KEPT[0].owner != os.getpid():
        _KEPT.clear()
    if _KEPT and not _KEPT[0].alive:
        _KEPT.pop().forget()
    if not _KEPT:
        _KEPT.append(_Child())
    return _KEPT[0]


@atexit.register
def _end() -> None:
    if _KEPT and _KEPT[0].owner == os.getpid():
        _KEPT.pop().forget()


def _header(answer: dict[str, Any]) -> Header:
    levels = tuple((int(height), int(width)) for height, width in answer.pop("levels"))
    height, width = answer.pop("pixel")
    return Header(**answer, levels=levels, pixel=(height, width))


# -- in the child --------------------------------------------------------------------------------------


def serve() -> None:
    """Open the slides that standard input names, a line of JSON each, until it ends."""
    from . import slide  # noqa: F401  # before the clock of the first one runs

    with suppress(ImportError):
        import openslide  # noqa: F401
        import tiffslide  # noqa: F401
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        place, _, name = question.pop("work").partition(":")
        work = getattr(importlib.import_module(place), name)
        limit_memory(question.pop("memory") + _bytes_of(Path(question["path"])))
        signal.setitimer(signal.ITIMER_REAL, question.pop("seconds"))  # ends this process, also inside a C library
        try:
            answer = work(**question)
        except WsiBrushError as error:
            kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _ERRORS)
            answer = {"error": kind, "message": str(error)}
        except OSError as error:
            answer = {"error": "SlideError", "message": f"{question['path']}: {error.strerror or error}"}
        except MemoryError:
            answer = {"error": "SlideError", "message": f"{question['path']}: opening it needs too much memory"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def look(path: str, assume_mpp: float | None, force_mpp: float | None) -> dict[str, Any]:
    """A `Header` as JSON values, once the slide has been open in this process."""
    from .grid import Grid
    from .slide import open_slide

    slide = open_slide(path, assume_mpp=assume_mpp, force_mpp=force_mpp)
    levels = tuple((level.height, level.width) for level in slide.levels)
    for height, width in levels:
        if max(height, width) > SIDE or height * width > AREA:
            raise SlideError(f"{path}: a level of {height} x {width} pixels; no slide is as large, the header is wrong")
    if slide.reader != "image":  # which would be decoded as a whole
        for level in slide.levels:
            mpp = slide.mpp * min(level.tall, level.broad)
            top, left = (int(size * slide.mpp / mpp / 2) for size in slide.grid.shape)
            with suppress(SlideError):
                slide.read(Grid(mpp, top, left, _WINDOW, _WINDOW))
    full = levels[0]
    return asdict(Header(slide.mpp, slide.mpp_source, slide.reader, *full, levels, slide.pixel, slide.synthetic))


def _bytes_of(path: Path) -> int:
    """A file may be mapped, which takes addresses too."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
