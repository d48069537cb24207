"""What is done of a long slide, kept beside its store, so that a killed run loses seconds.

Embeddings come in one order. They are kept as files of rows in the work folder of `scratch.working`, which sees to the
lock, the parameters, and that the folder goes when the store is there:

    state-START-DIGEST.rows           float16 (n, dim): the rows from START on; DIGEST is that of the bytes

A file is written beside, flushed and renamed. One that is damaged is as good as none: its rows are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SECONDS = 20.0
"""Of work that a killed run may lose."""
BYTES = 2 << 20
"""Of rows that wait in memory to be written, however few seconds they took."""


class Blocks:
    """The rows in `folder`, of `dim` numbers each; new ones are written every `seconds`, or `BYTES`."""

    def __init__(self, folder: Path, dim: int, *, seconds: float | None = None) -> None:
        self._folder, self._dim = folder, dim
        self._seconds = SECONDS if seconds is None else seconds
        self._room = np.empty((max(1, BYTES // (2 * dim)), dim), np.float16)  # kept: pieces would hold the heap apart
        self._waiting = 0  # rows of it
        self._start, self._written = 0, time.monotonic()

    def load(self) -> Iterator[NDArray[np.float16]]:
        """The rows that were kept, a file at a time from the first one on, without a gap; what cannot be joined to them
        is removed. To the end, before rows are added."""
        for path in sorted(self._folder.glob("state-*")):
            start, digest = (*path.stem.split("-"), "")[1:3]
            rows = self._read(path, digest) if start == _number(self._start) else None
            if rows is None:
                path.unlink()
                continue
            self._start += len(rows)
            yield rows

    def add(self, rows: NDArray[np.float16]) -> None:
        """Rows that follow those that are there."""
        while len(rows):
            part = rows[: len(self._room) - self._waiting]
            self._room[self._waiting : self._waiting + len(part)] = part
            self._waiting, rows = self._waiting + len(part), rows[len(part) :]
            if self._waiting == len(self._room) or time.monotonic() - self._written >= self._seconds:
                self._write(self._room[: self._waiting])
                self._waiting, self._written = 0, time.monotonic()

    def _read(self, path: Path, digest: str) -> NDArray[np.float16] | None:
        data = path.read_bytes()
        if path.suffix != ".rows" or _digest(data) != digest or len(data) % (2 * self._dim):
            return None
        return np.frombuffer(data, "<f2").reshape(-1, self._dim).astype(np.float16)

    def _write(self, rows: NDArray[np.float16]) -> None:
        data = rows.astype("<f2").tobytes()
        path = self._folder / f"state-{_number(self._start)}-{_digest(data)}.rows"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # a file system whose folders cannot be flushed
            folder = os.open(self._folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self._start += len(rows)


def _number(start: int) -> str:
    return f"{start:012d}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
