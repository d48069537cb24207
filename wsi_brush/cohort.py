"""Verb: slides -> stores. One slide that fails costs itself only, and any number of processes may share the work.

Processes that are given the same folder claim slides one by one (see `ledger`), so the same command on a second machine
is a second hand. Each slide is opened first in a process of its own (`probe`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .commit import read_manifest
from .embed import (
    COVER,
    PITCHES,
    SlideReport,
    TileEncoder,
    check_outlines,
    embed_slide,
    terms_of,
)
from .errors import MachineError, RefusedError, SlideError, UsageError, WsiBrushError
from .inputs import Input, find_inputs
from .ledger import Ledger
from .probe import probe
from .store import EmbeddingStore
from .tissue import RULES

ELSEWHERE = "elsewhere"
"""Status of a slide that another process is at."""


@dataclass
class Standing:
    """How far a cohort is: slides, tiles and seconds, weighted by the bytes of the slides' files."""

    slides: int
    ended: int = 0
    failed: int = 0
    tiles: int = 0
    """Tiles embedded in this run."""
    slide: str = ""
    """The file that is embedded now, and the tiles of it that are done, and all of them."""
    here: tuple[int, int] = (0, 1)
    share: float = 0.0
    """Of the bytes of all slides, from 0 to 1."""
    rate: float = 0.0
    """Tiles a second."""
    left: float | None = None
    """Seconds that remain, as far as the slides before tell; None as long as none does."""


Watch = Callable[[Standing], None]


@dataclass
class Pace:
    """Counts what comes of the slides, and tells the standing."""

    slides: Sequence[Input]
    watch: Watch | None
    _sizes: dict[str, int] = field(init=False)
    _start: float = field(init=False, default_factory=time.monotonic)
    _ended: set[str] = field(init=False, default_factory=set)
    _free: int = field(init=False, default=0)
    standing: Standing = field(init=False)

    def __post_init__(self) -> None:
        self._sizes = {one.name: _size(one.path) for one in self.slides}
        self.standing = Standing(len(self.slides))

    def tile(self, one: Input, done: int, total: int) -> None:
        """So many tiles of a slide are done."""
        self.standing.slide, self.standing.here = one.path.name, (done, total)
        self._tell(done, self._sizes[one.name] * done / max(total, 1))

    def end(self, one: Input, row: dict[str, Any]) -> None:
        """A slide has ended; one that was done before says nothing of the pace."""
        name = one.name
        if name in self._ended:
            return
        self._ended.add(name)
        self.standing.ended += 1
        self.standing.failed += row["now"] == "failed"
        self.standing.slide, self.standing.here = one.path.name, (1, 1)
        if row["now"] == "unchanged":
            self._free += self._sizes[name]
        elif row["now"] != "failed":
            self.standing.tiles += int(row["tiles"])
        self._tell(0, 0.0)

    def _tell(self, tiles: int, within: float) -> None:
        whole = sum(self._sizes.values())
        done = sum(self._sizes[name] for name in self._ended) + within
        taken = max(time.monotonic() - self._start, 1e-9)
        self.standing.share = done / whole
        self.standing.rate = (self.standing.tiles + tiles) / taken
        self.standing.left = taken * (whole - done) / (done - self._free) if done > self._free else None
        if self.watch is not None:
            self.watch(self.standing)


def embed_slides(
    paths: Iterable[Path | str],
    out: Path | str,
    *,
    encoder: TileEncoder,
    assume_mpp: float | None = None,
    force_mpp: float | None = None,
    overwrite: bool = False,
    progress: Watch | None = None,
    outlines: Path | None = None,
    workers: int = 0,
    strict: bool = False,
    shard: tuple[int, int] = (1, 1),
    since: int | None = None,
    begun: Callable[[str], None] | None = None,
) -> list[SlideReport]:
    """Embed what `inputs.find_inputs` finds; one that fails costs itself only.

    Other processes may do the same at the same time: a slide that one has, the others pass over, and what one of them
    ended since this run began (or `since`, see `Ledger`) is reported and not done again. `workers`, `strict`: as in
    `embed_slide`. `shard` (i, n), counted from 1: only every n-th slide from the i-th on. `begun` gets the
    name of a slide before it is touched.

    Raises:
        UsageError: if the words mean no slides, or there is one file of outlines for several.
        RefusedError: if the cohort in `out` was made with other parameters; no slide is opened then.
        MachineError: if `out` cannot be written to, or the disk is full.
    """
    slides = cohort_of(paths, outlines, shard)
    ledger = open_ledger(out, encoder, outlines=outlines, overwrite=overwrite, since=since)
    pace = Pace(slides, progress)
    options: dict[str, Any] = {"assume_mpp": assume_mpp, "force_mpp": force_mpp, "overwrite": overwrite}
    options |= {"outlines": outlines, "workers": workers, "strict": strict}
    rows: dict[str, dict[str, Any]] = {}
    ledger.log("run", slides=len(slides), shard=f"{shard[0]}/{shard[1]}")
    try:
        waiting, before = slides, -1
        while len(waiting) != before:  # again, for those whose claimant has died meanwhile
            before = len(waiting)
            for one in waiting:
                row = embed_claimed(ledger, one, encoder, pace=pace, begun=begun, **options)
                if row is not None:
                    rows[one.name] = row
                    pace.end(one, row)
                ledger.publish_in_time()
            waiting = [one for one in waiting if one.name not in rows]
    finally:
        ledger.publish(ended=len(rows) == len(slides))
    ledger.log("end", slides=len(rows))
    return [report_of(one.path, one.name, out, rows.get(one.name)) for one in slides]


def cohort_of(paths: Iterable[Path | str], outlines: Path | None, shard: tuple[int, int]) -> list[Input]:
    """The slides of one shard, each with the name that it has among all.

    Raises:
        UsageError: as `embed_slides`.
    """
    slides = find_inputs(paths)
    check_outlines(outlines, len(slides))
    return slides[shard[0] - 1 :: shard[1]]


def as_shard(text: str) -> tuple[int, int]:
    """I/N as two numbers, from 1/N to N/N.

    Raises:
        UsageError: if it is something else.
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UsageError(f"--shard {text}: expected I/N, from 1/N to N/N, e.g. 2/8 for the second of eight parts")
    return int(first), int(second)


def open_ledger(
    out: Path | str, encoder: TileEncoder, *, outlines: Path | None, overwrite: bool, since: int | None = None
) -> Ledger:
    """The ledger of a cohort; its parameters are what one slide does not decide. Raises: as `Ledger`."""
    parameters = {
        "encoder": encoder.name,
        "encoder_weights": encoder.fingerprint,
        "tile": encoder.tile,
        "dim": encoder.dim,
        "pitches": list(PITCHES),
        "cover": COVER,
        "tissue_rules": RULES if outlines is None else "outlines",
    }
    about = {"encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint, **terms_of(encoder)}}
    return Ledger(Path(out), parameters, about=about, overwrite=overwrite, since=since)


def embed_claimed(
    ledger: Ledger,
    one: Input,
    encoder: TileEncoder,
    *,
    pace: Pace | None = None,
    begun: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Embed a slide if nobody else is at it, and write down what came of it; None if somebody is.

    Raises:
        MachineError, UsageError: what would cost every other slide too.
    """
    path, name = one.path, one.name
    options["assume_mpp"] = one.assumed(options["assume_mpp"])
    with ledger.claim(name) as ours:
        if not ours:
            return None
        there = ledger.ended(name)
        if there is not None:
            return there
        if begun is not None:
            begun(name)
        ledger.log("begin", name)
        tell = None if pace is None else (lambda done, total: pace.tile(one, done, total))
        report = _embed(path, name, ledger.out, encoder, progress=tell, **options)
        row = _row(name, report, ledger.row(name))
        ledger.put(row)
        if report.status == "failed":
            ledger.log("failed", name, error=report.message)
        else:
            ledger.log(report.status, name, **{key: row[key] for key in ("tiles", "bad_tiles", "seconds")})
        return row


def _embed(path: Path, name: str, out: Path, encoder: TileEncoder, **options: Any) -> SlideReport:
    sizes = {key: options[key] for key in ("assume_mpp", "force_mpp")}
    try:
        probe(path, **sizes)
        return embed_slide(path, out, encoder=encoder, name=name, **options)
    except (UsageError, MachineError):
        raise  # would cost every slide that follows
    except WsiBrushError as error:
        line, code = str(error), error.exit_code
    except OSError as error:
        line, code = f"{path}: {error.strerror or error}", SlideError.exit_code
    return SlideReport(path, out / f"{name}.zarr", "failed", message=line, exit_code=code)


def bury(ledger: Ledger, one: Input, line: str) -> None:
    """Write down that a slide failed, because who was at it is no more; unless another process is at it by now."""
    with ledger.claim(one.name) as ours:
        if ours and ledger.ended(one.name) is None:
            store, said = ledger.out / f"{one.name}.zarr", f"{one.path}: {line}"
            report = SlideReport(one.path, store, "failed", message=said, exit_code=SlideError.exit_code)
            ledger.put(_row(one.name, report, ledger.row(one.name)))
            ledger.log("failed", one.name, error=said)


def _row(name: str, report: SlideReport, before: dict[str, Any] | None) -> dict[str, Any]:
    """What is written down of a report: what its store holds, which a run that changed nothing of it did not make."""
    status, tiles, bad, seconds, error = report.status, report.tiles, report.bad_tiles, report.seconds, ""
    made = before is not None and before["status"] in ("done", "empty")
    if status == "unchanged":
        about = (read_manifest(report.store) or {}).get("about", {})
        tiles = sum(about.get("tiles", {}).values())
        status, seconds = "done" if tiles else "empty", before["seconds"] if before and made else 0.0
    elif status == "failed":
        error = report.message
    row = {
        "id": name,
        "path": str(report.path),
        "status": status,
        "tiles": tiles,
        "bad_tiles": bad,
        "mpp": report.mpp,
        "mpp_source": report.mpp_source,
        "seconds": round(seconds, 3),
        "error": error,
    }
    if before and made and status == "failed" and _whole(report.store):
        row = {key: before[key] for key in row}  # a refusal leaves the store, and what is known of it, as they are
    return row | {"now": report.status, "message": report.message, "exit_code": report.exit_code}


def _whole(store: Path) -> bool:
    try:
        EmbeddingStore.open(store)
    except RefusedError:
        return False
    return True


def report_of(path: Path, name: str, out: Path | str, row: dict[str, Any] | None) -> SlideReport:
    """A row as a report; without one, another process is at the slide."""
    store = Path(out) / f"{name}.zarr"
    if row is None:
        return SlideReport(path, store, ELSEWHERE, message="another process is at it")
    if row["now"] == "failed":  # the row may be that of a store which stays
        return SlideReport(path, store, "failed", message=row["message"], exit_code=row["exit_code"])
    new = row["now"] != "unchanged"
    return SlideReport(
        path, store, row["now"], row["tiles"] if new else 0, row["seconds"] if new else 0.0, row["mpp"],
        row["mpp_source"], row["message"], row["exit_code"], row["bad_tiles"],
    )  # fmt: skip


def _size(path: Path) -> int:
    """Bytes of a file; of a folder, or what is not there, one."""
    try:
        return max(path.stat().st_size, 1)
    except OSError:
        return 1
