"""What a slide's header says, what in it is suspicious, and what embedding the slide would take; no pixels are read.

What is found is a `Finding`: OK, look (it works, and something is to be known or looked at) or bad (a verb would fail).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from .embed import PITCHES
from .errors import UsageError, WsiBrushError
from .grid import Grid
from .info import PYRAMID
from .machine import lent_cores
from .probe import apart
from .slide.pixelsize import PixelSize
from .zoo import entries

Status = Literal["OK", "look", "bad"]

TILES_PER_CORE = 120.0
"""Tiles that a core (AMD EPYC, Zen 3) reads and embeds in a second of its own with the bundled encoder."""
_FINEST, _COARSEST = 0.1, 2.0  # µm: scanners make 0.11 (100x) to 2 (5x)
_ENLARGED = 1.2  # times the finest pitch, above which its tiles are mostly interpolated
_GLASS = 80.0  # mm; a slide is 26 x 76
_PRINT = {72, 96, 100, 120, 150, 200, 240, 300, 350, 400, 600, 1200, 2400}  # dots per inch
_AGREE = 1.05  # of two pixel sizes
_GIANT, _GAP, _TOP = 10**8, 8.5, 8192  # pixels of a single level; a step between levels; side of the coarsest one
_SLOW = 5.0  # seconds to open, from which it is said


@dataclass(frozen=True)
class Finding:
    """`about` is what was looked at, `said` one line: what was found and, unless all is well, what to do."""

    status: Status
    about: str
    said: str


@dataclass(frozen=True)
class Examined:
    """A slide. `facts` are those of `info.describe`, None if it cannot be opened.

    `tiles`, `seconds` and `bytes`: what embedding takes if all of it is tissue; None without a pixel size.
    """

    path: Path
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] | None = None
    tiles: int | None = None
    seconds: float | None = None
    bytes: int | None = None


def check_slide(path: Path, *, assume_mpp: float | None = None, force_mpp: float | None = None) -> Examined:
    """What the header of a slide says, what in it is suspicious, and what embedding it would take.

    Raises:
        UsageError: if the pixel size given is itself implausible.
    """
    start = time.perf_counter()
    try:
        facts = _open(path, assume_mpp, force_mpp)
    except (WsiBrushError, OSError) as error:
        given = [PixelSize("given", mpp, mpp) for mpp in (assume_mpp, force_mpp) if mpp is not None]
        if isinstance(error, UsageError) and not all(size.plausible for size in given):
            raise
        return Examined(path, (Finding("bad", str(path), reason_of(error).removeprefix(f"{path}: ")),))
    took = time.perf_counter() - start
    if facts["kind"] not in ("slide", PYRAMID):
        said = f"{facts['kind']}, no slide; see it with: wsi-brush info"
        return Examined(path, (Finding("bad", str(path), said),), facts)
    tiles = seconds = size = None
    if facts["mpp"] is not None:
        tiles, size = _embedding(facts)
        seconds = round(tiles / TILES_PER_CORE / _threads(), 1)
    findings = [_header(facts, tiles, seconds, size)]
    findings += [Finding("look", str(path), said) for said in (*_pixel_size(facts), *_levels(facts))]
    if took > _SLOW:
        findings.append(Finding("look", str(path), f"its header took {took:.0f} s to read; copy it to a faster disk"))
    return Examined(path, tuple(findings), facts, tiles, seconds, size)


def check_cohort(slides: list[Examined], free: int) -> Finding:
    """All slides together: how many are bad, time, and disk, of which `free` bytes are there."""
    bad = sum(any(one.status == "bad" for one in slide.findings) for slide in slides)
    known = [slide for slide in slides if slide.tiles is not None]
    room = sum(slide.bytes or 0 for slide in known)
    said = f"{bad} bad of {len(slides)}; embedding takes at most {_minutes(sum(s.seconds or 0 for s in known))} and "
    said += f"{shown_bytes(room)} of disk"
    if room > free:
        return Finding("look", "slides", f"{said}, of which {shown_bytes(free)} are free; give another --out")
    return Finding("look" if bad else "OK", "slides", said)


def _open(path: Path, assume_mpp: float | None, force_mpp: float | None) -> dict[str, Any]:
    """The one place where a slide is opened: in a process of its own, which it may abort, stop or fill."""
    return apart("wsi_brush.info:describe", path, assume_mpp=assume_mpp, force_mpp=force_mpp)


def reason_of(error: BaseException) -> str:
    """What an error says, on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def shown_bytes(count: float) -> str:
    """A size in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.1f} MB"


def _threads() -> float:
    """Cores that the encoder will use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(lent_cores(), int(asked)) if asked.isdecimal() and int(asked) else lent_cores()


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _header(facts: Mapping[str, Any], tiles: int | None, seconds: float | None, size: int | None) -> Finding:
    name, count = str(facts["path"]), len(facts["levels"])
    if tiles is None or seconds is None or size is None:
        return Finding("bad", name, str(facts["mpp_source"]))
    millimetres, coarsest = facts["millimetres"], facts["levels"][-1]["mpp"]
    said = f"{'SYNTHETIC, ' if facts['synthetic'] else ''}{facts['height']} x {facts['width']} pixels of "
    said += f"{facts['mpp']:.4g} µm ({facts['mpp_source']}), {millimetres['height']:.3g} x {millimetres['width']:.3g} "
    said += f"mm, {count} level{'s' if count > 1 else ''} to {coarsest:.3g} µm, {facts['reader']}; embedding: at most "
    return Finding("OK", name, f"{said}{tiles} tiles, {_minutes(seconds)}, {shown_bytes(size)}")


def _embedding(facts: Mapping[str, Any]) -> tuple[int, int]:
    """The tiles of the bundled encoder that cover all of a slide at the three pitches, and bytes of their vectors."""
    bundled = next(entry for entry in entries() if entry.id == "bundled")
    mpp, tall, broad = facts["mpp"], 1.0, 1.0
    if "pixel" in facts:
        tall, broad = (facts["pixel"][side] / mpp for side in ("height", "width"))
    grid = Grid(mpp, 0, 0, round(facts["height"] * tall), round(facts["width"] * broad))
    lattices = [grid.at(bundled.tile * pitch) for pitch in PITCHES]
    tiles = sum(lattice.height * lattice.width for lattice in lattices)
    return tiles, tiles * bundled.dim * 2


def _pixel_size(facts: Mapping[str, Any]) -> Iterator[str]:
    """What speaks against the pixel size that is used."""
    mpp, source = facts["mpp"], facts["mpp_source"]
    if mpp is None:
        return
    dots = round(25400 / mpp)
    if dots in _PRINT and abs(25400 / mpp / dots - 1) < 0.002:
        yield f"{mpp:.4g} µm is {dots} dots per inch, a resolution for print; pass the true size with --force-mpp"
    elif not _FINEST <= mpp <= _COARSEST:
        yield (
            f"{mpp:.4g} µm is implausible, scanners make {_FINEST:g} to {_COARSEST:g}; pass the true size with "
            "--force-mpp"
        )
    elif mpp > _ENLARGED * PITCHES[0]:
        yield f"{mpp:.4g} µm is coarser than the tiles at {PITCHES[0]:g} µm: they are enlarged, with less detail"
    longest = max(facts["millimetres"].values())
    if longest > _GLASS:
        yield f"{longest:.0f} mm long, a glass slide is 76; if that is wrong, pass the true size with --force-mpp"
    if "pixel" in facts:
        tall, broad = facts["pixel"]["height"], facts["pixel"]["width"]
        yield f"its pixels are not square, {tall:.4g} x {broad:.4g} µm; they are read as squares of {mpp:.4g}"
    for other in facts["pixel_sizes"]:
        pitch = (other["height"] * other["width"]) ** 0.5 if other["height"] > 0 < other["width"] else 0.0
        if other["source"] != source and not 1 / _AGREE <= pitch / mpp <= _AGREE:
            which = "--assume-mpp" if source == "assumed" else "--force-mpp"
            yield f"{other['source']} says {pitch:.4g} µm, {source} {mpp:.4g}; if that is wrong, pass another {which}"


def _levels(facts: Mapping[str, Any]) -> Iterator[str]:
    """What makes coarse pitches slow to read."""
    levels = facts["levels"]
    areas = [level["height"] * level["width"] for level in levels]
    advice = "coarse pitches are slow; make a pyramid of it, e.g. vips tiffsave --tile --pyramid"
    if len(levels) == 1:
        if areas[0] > _GIANT:
            yield f"one level of {areas[0] / 1e6:.0f} megapixels, {advice}"
        return
    steps = [(above / below) ** 0.5 for above, below in pairwise(areas)]
    if max(steps) > _GAP:
        yield f"levels are missing, one is {max(steps):.3g} times coarser than the one before it: {advice}"
    elif max(levels[-1]["height"], levels[-1]["width"]) > _TOP:
        yield f"coarse levels are missing, the last has {levels[-1]['height']} x {levels[-1]['width']} pixels: {advice}"
