"""Figures and pictures as a folder to be read: `report.json`, and `report.html` with everything in it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .commit import staged
from .coordinates import turned
from .grid import Grid
from .samples import Field
from .sides import Pair, Sides

KIND = "report"
_SHOWN, _SIDE = 4, 640  # pairs, and pixels of a picture at most
_ZOOMS = ((1.0, _SIDE), (0.5, 256))  # µm per pixel or more, and pixels at most, of what is shown beside the whole


def write_report(target: Path, sides: Sides, figures: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write a folder with `report.json` and a self-contained `report.html`; whole or not at all.

    Raises:
        RefusedError: if something is there that may not be replaced.
        MachineError: if it cannot be written.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    template = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    shown = sides.pairs or [Pair(0, 0, 0.0, 0.0)]
    worst_in, worst = _worst(sides, figures)
    page = template.render(
        figures=figures, pictures=[_pictures(sides, pair) for pair in shown[:_SHOWN]], worst_in=worst_in, worst=worst,
        curves=Markup(_curves(figures["texture"])), areas=Markup(_areas(figures["texture"])),
        copies=_copies(sides, figures["copying"]), correlations=Markup(_correlations(figures["copying"])),
    )  # fmt: skip
    with staged(target, kind=KIND, about={"format": 1}, overwrite=overwrite) as stage:
        (stage / "report.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False), "utf-8")
        (stage / "report.html").write_text(page, "utf-8")


# -- pictures ------------------------------------------------------------------------------------------


def _pictures(sides: Sides, pair: Pair) -> dict[str, Any]:
    real, synthetic = sides.real[pair.real], sides.synthetic[pair.synthetic]
    title = f"{real.name} and {synthetic.name}" + ("" if sides.pairs else " (no pair: each at its own middle)")
    wholes = [one.area.at(one.slide.mpp * max(1.0, max(one.area.shape) / (_SIDE - 1))) for one in (real, synthetic)]
    rows: list[tuple[str, list[Grid]]] = [("the whole, ", wholes)]
    for mpp, side in _ZOOMS:
        mpp = max(mpp, real.slide.mpp, synthetic.slide.mpp)
        held = [*real.area.whole_cells(mpp).shape, *synthetic.area.whole_cells(mpp).shape]
        rows.append(("", [_middle(one, mpp, min(side, *held)) for one in (real, synthetic)]))
    seen = [(what, areas) for what, areas in rows if min(min(area.shape) for area in areas)]
    fields = (real, synthetic)
    zooms = [[_view(one, area, what) for one, area in zip(fields, areas, strict=True)] for what, areas in seen]
    return {"title": title, "zooms": zooms}


def _view(one: Field, area: Grid, what: str = "") -> tuple[str, str]:
    """A picture of an area, pixel for pixel, and its size and pitch in words."""
    height, width = (length * area.mpp for length in area.shape)
    return _coded(one.slide.read(area)), f"{what}{height:.0f} × {width:.0f} µm at {area.mpp:.3g} µm per pixel"


def _middle(one: Field, mpp: float, side: int) -> Grid:
    top, left, bottom, right = one.area.extent
    row, column = (round((low + high) / 2 / mpp - side / 2) for low, high in ((top, bottom), (left, right)))
    return Grid(mpp, row, column, side, side)


def _worst(sides: Sides, figures: dict[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """The first encoder and the finest scale in words, and the tiles with the smallest cosine there."""
    if not figures["control"]:
        return "", []
    first, found = figures["encoders"][0], []
    mpp, scale = next(iter(figures["control"][first["name"]]["cosine"].items()))
    side = first["tile"]
    for one in scale.get("worst", []):
        there, here = (Grid(float(mpp), one[name][0], one[name][1], side, side) for name in ("there", "place"))
        real, ours = sides.real[one["real"]].slide.read(there), sides.synthetic[one["synthetic"]].slide.read(here)
        place = f"{sides.synthetic[one['synthetic']].name}, row {one['place'][0]}, column {one['place'][1]}"
        found.append((_coded(real), _coded(ours), f"cosine {one['cosine']:.3f}; {place}"))
    return f"{first['name']}, {mpp} µm per pixel", found


def _copies(sides: Sides, copying: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """The synthetic tiles that are nearest to the training slides, beside what they are nearest to."""
    found = []
    for one in (copying or {}).get("worst", []):
        ours, theirs = sides.synthetic[one["synthetic"]], sides.training[one["training"]]
        views = []
        for slide, corner in ((ours.slide, one["place"]), (theirs, one["there"])):
            mpp = max(0.5, slide.mpp)
            places = [round(edge / mpp) for edge in corner]
            views.append(slide.read(Grid(mpp, *places, *[round(one["side"] / mpp)] * 2)))
        found.append(
            (_coded(views[0]), _coded(turned(views[1], one["turn"])),
             f"correlation {one['correlation']:.3f}; {ours.name}, and {theirs.path.name}")
        )  # fmt: skip
    return found


def _coded(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    found = io.BytesIO()
    Image.fromarray(pixels).save(found, "JPEG", quality=90)
    return base64.b64encode(found.getvalue()).decode("ascii")


# -- curves --------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _EDGE = 520, 200, 36


def _curves(texture: dict[str, Any]) -> str:
    """Power of each octave, synthetic over real, with its interval and the floor."""
    if "missing" in texture:
        return ""
    one = texture["octaves"]
    count = len(one["ratio"])
    curves = {
        name: [(k, v) for k, v in enumerate(one[name]) if v is not None] for name in ("ratio", "low", "high", "floor")
    }
    top = max(1.5, *(value for _, value in curves["high"]), 0.0)
    band, middle = curves["low"] + curves["high"][::-1], [(0, 1.0), (count - 1, 1.0)]
    lines = [f'<polygon points="{_points(band, count, top)}" fill="#a00000" fill-opacity="0.13"/>']
    for points, colour in ((middle, "#bbb"), (curves["ratio"], "#a00000"), (curves["floor"], "#3060a0")):
        lines.append(f'<polyline points="{_points(points, count, top)}" stroke="{colour}" fill="none"/>')
    labels = [f"{value:g} µm" for value in one["wavelength"]]
    return _figure(lines, labels, top, "power, synthetic / real (red, 95 %); real / real (blue); finest octave left")


def _areas(texture: dict[str, Any]) -> str:
    """How large nuclei are on both sides."""
    if "missing" in texture or "missing" in texture["nuclei"]:
        return ""
    lines, shares = [], []
    for side, colour in (("real", "#3060a0"), ("synthetic", "#a00000")):
        counts = np.asarray(texture["nuclei"][side]["areas"], float)
        shares.append((counts / max(counts.sum(), 1), colour))
    top = max(1e-3, *(float(share.max()) for share, _ in shares))
    for share, colour in shares:
        points = [(k, float(value)) for k, value in enumerate(share)]
        lines.append(f'<polyline points="{_points(points, len(share), top)}" stroke="{colour}" fill="none"/>')
    return _figure(lines, ["0", "50", "100", "150", "200 µm²"], top, "areas of nuclei: real (blue), synthetic (red)")


def _correlations(copying: dict[str, Any] | None) -> str:
    """How near to the training slides the tiles of both sides come."""
    if not copying or "counts" not in copying:
        return ""
    counts = [np.asarray(copying["counts"][side], float) for side in ("held_out", "synthetic")]
    shares = [one / one.sum() for one in counts]
    top, lines = max(float(share.max()) for share in shares), []
    for share, colour in zip(shares, ("#3060a0", "#a00000"), strict=True):
        points = [(k, float(value)) for k, value in enumerate(share)]
        lines.append(f'<polyline points="{_points(points, len(share), top)}" stroke="{colour}" fill="none"/>')
    across = _EDGE + copying["threshold"] * (_WIDTH - 2 * _EDGE)
    lines.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{_EDGE}" y2="{_HEIGHT - _EDGE}" stroke="#bbb"/>')
    words = "correlation with the nearest training tile: held out (blue), synthetic (red), threshold (grey)"
    return _figure(lines, ["0", "0.25", "0.5", "0.75", "1"], top, words)


def _points(points: Sequence[tuple[int, float]], count: int, top: float) -> str:
    across, up = (_WIDTH - 2 * _EDGE) / max(count - 1, 1), (_HEIGHT - 2 * _EDGE) / top
    return " ".join(f"{_EDGE + k * across:.1f},{_HEIGHT - _EDGE - min(value, top) * up:.1f}" for k, value in points)


def _figure(lines: Sequence[str], labels: Sequence[str], top: float, words: str) -> str:
    across = (_WIDTH - 2 * _EDGE) / max(len(labels) - 1, 1)
    texts = [
        f'<text x="{_EDGE + k * across:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{label}</text>'
        for k, label in enumerate(labels)
    ]
    texts.append(f'<text x="4" y="{_EDGE}">{top:.2g}</text><text x="4" y="{_HEIGHT - _EDGE}">0</text>')
    texts.append(f'<text x="{_EDGE}" y="16">{words}</text>')
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join([*lines, *texts])}</svg>'
