"""Ledger: what is known of a cohort, on disk, where many processes write into one folder.

For people: `slides.csv` (a row a slide), `manifest.json` (parameters, versions, counts, start and end), `log.jsonl`
(one JSON object a line: time, host, process, slide, event). They name slides and their paths as the user gave them.
`.wsi-brush-cohort` has what they are made from: a row a slide, written by whoever has the slide's claim.

A claim is an advisory lock (flock) on a file. The kernel ends it with the process that has it, however that dies, and
so does an NFS server that a machine no longer answers: a dead claimant needs no clock to be known. Where a file system
has no locks between machines (NFS mounted `nolock`, Lustre `localflock`), give each machine its own `--shard`.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import importlib.metadata
import io
import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__
from .commit import differences, fingerprint, full_disk_said, write_json
from .errors import MachineError, RefusedError

FOLDER = ".wsi-brush-cohort"
TABLE, MANIFEST, LOG = "slides.csv", "manifest.json", "log.jsonl"
COLUMNS = ("id", "path", "status", "tiles", "bad_tiles", "mpp", "mpp_source", "seconds", "error")
"""Of `slides.csv`. `status` is done, empty or failed; `seconds` are those of the run that made the store. What a later
run refuses of a finished store stands in the log alone."""
KIND = "cohort"
_PACKAGES = ("numpy", "torch", "timm", "zarr", "openslide-python", "openslide-bin", "tiffslide", "tifffile")

_PUBLISH = 15.0  # seconds after which the table is written anew

_held: set[int] = set()  # open files of claims


def _let_go() -> None:
    """A forked child would keep its parent's claims alive after that one's death."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class Ledger:
    """The ledger of the cohort in `out`; `parameters` are those that hold for all of its slides.

    `since` (nanoseconds of the file system's own clock): when the run began that this process belongs to; what was
    written down after it is not done again.

    Raises:
        RefusedError: if the folder's cohort was made with other parameters and `overwrite` is off, or a file of one of
            the three names is not ours.
        MachineError: if the folder cannot be written to, or the disk is full.
    """

    def __init__(
        self, out: Path, parameters: dict[str, Any], *, about: dict[str, Any], overwrite: bool = False,
        since: int | None = None,
    ) -> None:  # fmt: skip
        self.out, self._box = out, out / FOLDER
        self._parameters, self._about = json.loads(json.dumps(parameters)), about
        self._published = time.monotonic()
        try:
            for name in ("rows", "claims"):
                (self._box / name).mkdir(parents=True, exist_ok=True)
            self.since = self._now() if since is None else since
        except OSError as error:
            raise MachineError(f"{out}: cannot be written to ({error.strerror}); choose another output") from None
        with full_disk_said(out), self._alone("table"):
            self._begin(overwrite=overwrite)

    def _begin(self, *, overwrite: bool) -> None:
        path, before = self.out / MANIFEST, None
        if path.exists():
            with contextlib.suppress(OSError, ValueError):
                before = json.loads(path.read_text("utf-8"))
            if not isinstance(before, dict) or before.get("kind") != KIND:
                raise RefusedError(f"{path}: not a cohort's of wsi-brush; it stays as it is, choose another output")
        elif any((self.out / name).exists() for name in (TABLE, LOG)) and not any((self._box / "rows").iterdir()):
            raise RefusedError(
                f"{self.out}: has a {TABLE} or {LOG} that wsi-brush did not write; choose another output"
            )
        made = (before or {}).get("parameters", {})
        changed = differences(made, self._parameters)
        if before is not None and changed and not overwrite:
            raise RefusedError(
                f"{self.out}: a cohort made otherwise ({'; '.join(changed)}); choose another output or pass --overwrite"
            )
        same = before is not None and not changed
        self._started = before["started"] if before is not None and same else _time()
        if not same:
            write_json(path, self._manifest([], ended=None))

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the slide is this process's alone until the block ends; nobody waits for it."""
        path = self._box / "claims" / name
        lock = _lock(path, wait=False)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                path.unlink(missing_ok=True)
                _unlock(lock)

    def put(self, row: dict[str, Any]) -> None:
        """Write down what came of a slide; the caller has its claim."""
        write_json(self._row(row["id"]), row)

    def row(self, name: str) -> dict[str, Any] | None:
        """What is written down of a slide."""
        return _read(self._row(name))

    def ended(self, name: str) -> dict[str, Any] | None:
        """What is written down of a slide since the run began, by whatever process."""
        try:
            fresh = self._row(name).stat().st_mtime_ns > self.since
        except OSError:
            return None
        return self.row(name) if fresh else None

    def log(self, event: str, slide: str | None = None, **more: Any) -> None:
        """Append a line to the log."""
        line = {"time": _time(), "host": socket.gethostname(), "process": os.getpid(), "slide": slide, "event": event}
        text = json.dumps({**line, **more}, ensure_ascii=False) + "\n"
        with full_disk_said(self.out), self._alone("log"):  # two NFS clients know different ends of one file
            file = os.open(self.out / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, text.encode("utf-8", "backslashreplace"))
            finally:
                os.close(file)

    def publish_in_time(self) -> None:
        """As `publish`, if that was not done of late."""
        if time.monotonic() - self._published > _PUBLISH:
            self.publish()

    def publish(self, *, ended: bool = False) -> None:
        """Write the table and the manifest anew, from all rows that are there."""
        with full_disk_said(self.out), self._alone("table"):  # who comes last has seen every row
            rows = [row for path in sorted((self._box / "rows").glob("*.json")) if (row := _read(path)) is not None]
            text = io.StringIO()
            table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            partial = self._box / TABLE
            partial.write_text(text.getvalue(), "utf-8", "backslashreplace")
            os.replace(partial, self.out / TABLE)
            write_json(self.out / MANIFEST, self._manifest(rows, ended=_time() if ended else None))
        self._published = time.monotonic()

    def _manifest(self, rows: list[dict[str, Any]], *, ended: str | None) -> dict[str, Any]:
        return {
            "kind": KIND,
            "wsi_brush": __version__,
            "versions": {name: _version(name) for name in _PACKAGES},
            **self._about,
            "parameters": self._parameters,
            "parameters_fingerprint": fingerprint(self._parameters),
            "slides": dict(sorted(Counter(str(row["status"]) for row in rows).items())),
            "tiles": sum(int(row["tiles"]) for row in rows),
            "bad_tiles": sum(int(row["bad_tiles"]) for row in rows),
            "started": self._started,
            "ended": ended,
        }

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """One process after the other."""
        lock = _lock(self._box / f"{what}.lock", wait=True)
        try:
            yield
        finally:
            if lock is not None:
                _unlock(lock)

    def _row(self, name: str) -> Path:
        return self._box / "rows" / f"{name}.json"

    def _now(self) -> int:
        """The file system's clock, which all who write there share."""
        path = self._box / f"clock-{uuid.uuid4().hex}"
        path.touch()
        try:
            return path.stat().st_mtime_ns
        finally:
            path.unlink()


def _lock(path: Path, *, wait: bool) -> int | None:
    """An open, locked file; None if another has it. A file system that knows no locks grants every one."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            _unlock(file)
            return None
        except OSError:
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        _unlock(file)  # whoever had it has removed the file meanwhile


def _unlock(file: int) -> None:
    _held.discard(file)
    os.close(file)


def _read(path: Path) -> dict[str, Any] | None:
    """A row, or None where there is none that can be read: what it says is then found out again."""
    try:
        row = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and set(COLUMNS) <= row.keys() else None


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
