"""The tiles of a slide, read ahead by processes of their own; damage costs a tile.

A file can make OpenSlide abort, hang or take all memory. So a reader is another Python that imports this module and
no more: it is no fork of a process that computes (which would copy held locks, and a GPU's context), it knows no torch,
and it ends when its stdin does. A line says which window to read; the tiles come back through shared memory, which has
no name and is gone with the last process that holds it. Each reader is asked for a few windows ahead, so memory does
not grow with the slide.

A window that cannot be read is read again tile by tile, and the tile that fails is *bad*: it has a reason and no
pixels. So it is where a reader dies of a window: then in fresh processes.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .errors import MachineError, SlideError
from .grid import Grid
from .machine import limit_memory, shown_cores
from .slide import Level, Slide, open_slide
from .tiles import WINDOW, Read, Window, read_window

SECONDS, MEMORY = 60, 4 << 30
"""What a reader may take for one window: seconds, and bytes beyond what it needs to run."""
DEATHS = 20
"""Readers that may die of one slide; with more, it is not the tiles."""

_AHEAD = 3  # windows that a reader is asked for at a time
_NO_MEMORY = 77  # the exit code of a reader that was refused memory
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from wsi_brush.reading import serve; serve()"
COMMAND = (sys.executable, "-c", _START)
"""What starts a reader; it is given the places of modules (JSON)."""


def default_count(*, gpu: bool) -> int:
    """How many readers serve an encoder here: one keeps up with any that shares the processor's cores with it."""
    return min(8, max(1, shown_cores() - 1)) if gpu else 1


class Readers:
    """`count` processes that read one slide; with none, it is read in this process, where what a file does to it is
    done to us. They start when this is made; close it, or use it as a context. `tile`: pixels a side of the largest."""

    def __init__(
        self, slide: Slide, count: int = 0, *, tile: int = 0, seconds: int = SECONDS, memory: int = MEMORY
    ) -> None:
        if slide.reader == "image":
            count = min(count, 1)  # each would decode the whole picture
        self._slide, deaths = slide, [DEATHS]
        self._readers = [_Reader(slide, tile, seconds, memory, deaths) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for reader in self._readers:
            reader.close()

    def read(self, wanted: Iterable[Window]) -> Iterator[Read]:
        """The windows, read, in their order; the same for any number of processes.

        Raises:
            SlideError: if the slide can no longer be opened, or too many readers die of it.
            MachineError: if readers cannot be started.
        """
        for read in self._ahead(iter(wanted)) if self._readers else map(self._here, wanted):
            if len(read.bad) == len(read.window):  # damaged, or a disk that is gone?
                open_slide(self._slide.path, force_mpp=self._slide.mpp)
            yield read

    def _here(self, window: Window) -> Read:
        tiles = np.empty((len(window), window.tile, window.tile, 3), np.uint8)
        return Read(window, tiles, read_window(self._slide, window, tiles))

    def _ahead(self, wanted: Iterator[Window]) -> Iterator[Read]:
        turns = cycle(self._readers)
        asked: deque[_Reader] = deque()
        try:
            while True:
                for window in islice(wanted, _AHEAD * len(self._readers) - len(asked)):
                    asked.append(next(turns))
                    asked[-1].ask(window)
                if not asked:
                    return
                yield asked.popleft().answer()
        finally:
            if asked:  # nobody will take these answers
                for reader in self._readers:
                    reader.stop()


class _Reader:
    """One process after the other that reads windows, in the order in which it is asked."""

    def __init__(self, slide: Slide, tile: int, seconds: int, memory: int, deaths: list[int]) -> None:
        self._slide, self._seconds, self._memory, self._deaths = slide, seconds, memory, deaths
        self._asked: deque[tuple[Window, int]] = deque()  # and where in the memory the tiles are to be put
        self._slot, self._turn = 3 * max(WINDOW, tile) ** 2, 0
        self._file = _unnamed_file(_AHEAD * self._slot)
        self._shared = mmap.mmap(self._file, _AHEAD * self._slot)
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._start()

    def ask(self, window: Window) -> None:
        """Have a window read; at most `_AHEAD` may be without an answer."""
        self._asked.append((window, self._turn))
        self._send(*self._asked[-1])
        self._turn = (self._turn + 1) % _AHEAD

    def answer(self) -> Read:
        """What came of the first window without an answer."""
        window, place = self._asked[0]
        found = self._receive(window, place)
        if found is None:
            self._bury()
            tiles = np.zeros((len(window), window.tile, window.tile, 3), np.uint8)
            bad: dict[int, str] = {}
            for number in range(len(window)):
                alone = window.at(number)
                self._send(alone, place)
                one = self._receive(alone, place)
                if one is None:
                    bad[number] = f"{self._slide.path}: {_said(alone.grid)} cannot be read ({self._bury()})"
                elif one.bad:
                    bad[number] = one.bad[0]
                else:
                    tiles[number] = one.tiles[0]
            found = Read(window, tiles, bad)
            for later in islice(self._asked, 1, None):  # they went down with the process
                self._send(*later)
        self._asked.popleft()
        return found

    def stop(self) -> None:
        """End the process and forget what it was asked for."""
        self._asked.clear()
        self._end(patience=0)

    def close(self) -> None:
        """End the process and give the memory back."""
        self.stop()
        self._shared.close()
        os.close(self._file)

    def _start(self) -> None:
        quiet = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} | {"MALLOC_ARENA_MAX": "2"}
        command = [*COMMAND, json.dumps(sys.path)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                pass_fds=(self._file,), env=os.environ | quiet,
            )  # fmt: skip
        except OSError as error:
            raise MachineError(f"{command[0]}: cannot be started ({error.strerror}); use --workers 0") from None
        self._ready = False
        limits = {"seconds": self._seconds, "memory": self._memory}
        self._tell({"slide": _as_json(self._slide), "file": self._file, "size": len(self._shared), **limits})

    def _send(self, window: Window, place: int) -> None:
        if self._process is None:
            self._start()
        grid = window.grid
        about = [grid.mpp, grid.top, grid.left, grid.height, grid.width]
        self._tell({"grid": about, "tile": window.tile, "places": window.places.tolist(), "at": place * self._slot})

    def _tell(self, line: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which its missing answer will say
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, window: Window, place: int) -> Read | None:
        """The answer of the process, or None if it has died."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not self._ready:
            self._ready = self._process.stdout.readline() == b"ready\n"
            if not self._ready:
                raise MachineError(f"{COMMAND[0]}: a reader ends before it has begun; use --workers 0")
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            return None
        said = json.loads(line)
        if "stopped" in said:
            raise SlideError(f"{self._slide.path}: {said['stopped']}")
        tiles = _tiles_in(self._shared, place * self._slot, len(window), window.tile).copy()
        return Read(window, tiles, dict.fromkeys(said["bad"], said["why"]))

    def _bury(self) -> str:
        """Start another process in place of one that has died; what it died of.

        Raises:
            SlideError: if too many have.
        """
        code = self._end(patience=5)
        word = {
            -signal.SIGALRM: f"it takes more than {self._seconds} s",
            _NO_MEMORY: f"it takes more than {self._memory / 1e9:.2g} GB",
        }
        why = word.get(
            code, f"the reader dies of it, by signal {-code}" if code < 0 else f"the reader ends with {code}"
        )
        self._deaths[0] -= 1
        if self._deaths[0] < 0:
            raise SlideError(f"{self._slide.path}: {DEATHS} readers have died of it, the last one so: {why}")
        self._start()
        return why

    def _end(self, patience: float) -> int:
        """End the process, which is given so many seconds to do it itself; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        with contextlib.suppress(OSError):  # what it was not yet told
            process.stdin.close()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a disk that does not answer keeps it from ending
            process.wait(5)
        return process.returncode or 0


def serve() -> None:
    """What a reader does: it puts windows into shared memory, one for each line of stdin, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    told = json.loads(sys.stdin.buffer.readline())
    slide = _from_json(told["slide"])
    shared = mmap.mmap(told["file"], told["size"])
    os.nice(10)  # it is ahead, so it can wait for who computes on the same cores, whose threads wait for one another
    limit_memory(told["memory"])
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        window = Window(Grid(*asked["grid"]), asked["tile"], np.array(asked["places"], np.intp), (0, 0))
        signal.alarm(told["seconds"])  # nobody handles it: it ends us also in the middle of C
        try:
            bad = read_window(slide, window, _tiles_in(shared, asked["at"], len(window), window.tile))
            answer: dict[str, Any] = {"bad": list(bad), "why": next(iter(bad.values()), "")}
        except OSError as error:
            answer = {"stopped": error.strerror or str(error)}
        except MemoryError:
            os._exit(_NO_MEMORY)
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _unnamed_file(size: int) -> int:
    """An open file that no folder shows, in memory where the system can; pages that nobody touches take no room."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("wsi-brush-tiles")
    else:
        with tempfile.TemporaryFile() as there:
            file = os.dup(there.fileno())
    os.ftruncate(file, size)
    return file


def _tiles_in(shared: mmap.mmap, start: int, count: int, tile: int) -> NDArray[np.uint8]:
    return np.frombuffer(shared, np.uint8, count * tile * tile * 3, start).reshape(count, tile, tile, 3)


def _said(grid: Grid) -> str:
    return f"rows {grid.top}-{grid.bottom}, columns {grid.left}-{grid.right} at {grid.mpp:g} µm/px"


def _as_json(slide: Slide) -> dict[str, Any]:
    """A slide without what is open of it."""
    return {
        "path": str(slide.path), "mpp": slide.mpp, "mpp_source": slide.mpp_source, "reader": slide.reader,
        "shape": slide.grid.shape, "levels": slide.levels, "pixel": slide.pixel,
    }  # fmt: skip


def _from_json(said: dict[str, Any]) -> Slide:
    height, width = said["shape"]
    tall, broad = said["pixel"]
    levels = tuple(Level(*level) for level in said["levels"])
    grid = Grid(said["mpp"], 0, 0, height, width)
    return Slide(Path(said["path"]), said["mpp"], said["mpp_source"], said["reader"], grid, levels, (tall, broad))
