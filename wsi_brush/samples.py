"""What is looked at when slides are compared: tiles at chosen places of fields of view, after one codec for all.

A field is a slide, or the part of it that a painting follows. Tiles stand on the field's own lattice, half a tile
apart, where there is tissue; where there are too many, some are drawn by a seed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .embed import COVER, find_slides
from .errors import SlideError, UsageError
from .grid import Grid
from .progress import Tell, Told
from .slide import Slide, open_slide
from .tissue import PITCH, Tissue, find_tissue, tissue_mask

_BATCH = 64
FINER = 0.95  # a slide of a pitch of up to 5 % more will do


@dataclass(frozen=True)
class Field:
    """A part of a slide: `area` at the slide's own pitch, and which cells of 8 µm, counted from its corner, are
    tissue."""

    name: str
    slide: Slide
    area: Grid
    tissue: NDArray[np.bool_]


class Spot(NamedTuple):
    """A square of a field, counted at the pitch of `grid` from the slide's corner."""

    field: int
    grid: Grid


def field_of(slide: Slide, area: Grid | None = None) -> Field:
    """A whole slide, or an area of it (at its pitch, cut at its edges).

    Raises:
        SlideError: if there is no tissue in it.
    """
    if area is None:
        found = Field(_name(slide), slide, slide.grid, find_tissue(slide).mask)
    else:
        area = area.clip(slide.grid)
        top, left, height, width = (
            round(length * slide.mpp / PITCH) for length in (area.top, area.left, area.height, area.width)
        )
        found = Field(_name(slide), slide, area, tissue_mask(slide.read(Grid(PITCH, top, left, height, width)), PITCH))
    if not found.tissue.any():
        raise SlideError(f"{slide.path}: no tissue to be looked at; is it H&E, and is its pixel size right?")
    return found


def _name(slide: Slide) -> str:
    """Of its file, in letters that can be written."""
    return slide.path.name.encode("utf-8", "backslashreplace").decode("utf-8")


def spots_of(
    fields: Sequence[Field], mpp: float, side: int, *, stride: float = 0.5, most: int = 1024, seed: int = 0
) -> list[Spot]:
    """Squares of `side` pixels of pitch `mpp`, `stride` sides apart (1 or 0.5), of which `COVER` is tissue, at most
    `most` of them."""
    parts = round(1 / stride)
    step, corners = side // parts, []
    for index, one in enumerate(fields):
        top, left = (round(edge / mpp) for edge in one.area.extent[:2])
        # counted from the field's corner; a square is parts x parts cells
        rows, columns = (int(length * one.slide.mpp / mpp / step + 1e-6) for length in one.area.shape)
        cover = Tissue(one.tissue, Grid(PITCH, 0, 0, *one.tissue.shape)).cover(Grid(mpp * step, 0, 0, rows, columns))
        high, wide = max(rows - parts + 1, 0), max(columns - parts + 1, 0)
        mean = sum(cover[r : r + high, c : c + wide] for r in range(parts) for c in range(parts)) / parts**2
        places = np.argwhere(mean >= COVER) * step + [top, left]
        corners.append(np.column_stack([np.full(len(places), index), places]))
    every = np.concatenate(corners)
    if len(every) > most:
        every = every[np.sort(np.random.default_rng(seed).choice(len(every), most, replace=False))]
    return [Spot(int(index), Grid(mpp, int(row), int(column), side, side)) for index, row, column in every]


def halves(fields: Sequence[Field], spots: Sequence[Spot]) -> tuple[list[int], list[int]]:
    """Which spots lie in one half of their slides and which in the other, by their number; those across are in none.

    The halves are the black and the white squares of a chessboard on every slide, so that both show the same kinds of
    tissue, and share no pixel. A square is 4 spots wide; 3 or 2 where a field would have fewer than 4 x 4 of them.
    Where a field is smaller than 4 spots, whole fields are divided in turn; those that share pixels stay together.
    """
    parts: tuple[list[int], list[int]] = ([], [])
    if not spots:
        return parts
    side, width = spots[0].grid.height, _square(fields, spots)
    apart = _apart(fields) if _across(fields, spots) < 4 else [0]
    if max(apart):
        for number, spot in enumerate(spots):
            parts[apart[spot.field] % 2].append(number)
        return parts
    for number, (_, grid) in enumerate(spots):
        (row, down), (column, right) = divmod(grid.top, width), divmod(grid.left, width)
        if max(down, right) + side <= width:
            parts[(row + column) % 2].append(number)
    return parts


def _square(fields: Sequence[Field], spots: Sequence[Spot]) -> int:
    """Side of the chessboard's squares, pixels."""
    return spots[0].grid.height * min(4, max(2, int(_across(fields, spots) / 4)))


def _across(fields: Sequence[Field], spots: Sequence[Spot]) -> float:
    """How many spots the smallest field is wide or high."""
    side, mpp = spots[0].grid.height, spots[0].grid.mpp
    return min(length * one.slide.mpp / mpp / side for one in fields for length in one.area.shape)


def _apart(fields: Sequence[Field]) -> list[int]:
    """A number for each field, from 0, the same for those that share pixels."""
    from scipy.sparse.csgraph import connected_components

    meet = [
        [one.slide.path == other.slide.path and min(one.area.clip(other.area).shape) > 0 for other in fields]
        for one in fields
    ]
    return [int(number) for number in connected_components(np.array(meet), directed=False)[1]]


def blocks(fields: Sequence[Field], spots: Sequence[Spot]) -> NDArray[np.intp]:
    """A number for each spot, the same for those that begin in one square of a slide: neighbours are no strangers."""
    if not spots:
        return np.zeros(0, np.intp)
    width = _square(fields, spots)
    keys = [(fields[index].slide.path, grid.top // width, grid.left // width) for index, grid in spots]
    order = {key: number for number, key in enumerate(sorted(set(keys)))}
    return np.array([order[key] for key in keys], np.intp)


class Codec:
    """What both sides go through before anything is measured: `jpeg:Q`, as scanners do it, or `none`."""

    def __init__(self, word: str) -> None:
        """Raises:
        UsageError: if it is neither.
        """
        name, _, quality = word.partition(":")
        number = int(quality) if quality.isascii() and quality.isdecimal() else 0
        if word != "none" and not (name == "jpeg" and 1 <= number <= 100):
            raise UsageError(f"--codec {word}: expected none, or jpeg:Q with Q from 1 to 100")
        self.word, self._quality = word, number

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self._quality:
            return pixels
        coded = io.BytesIO()
        Image.fromarray(pixels).save(coded, "JPEG", quality=self._quality, subsampling=0)
        with Image.open(coded) as image:
            return np.asarray(image, np.uint8).copy()


def read_spots(
    fields: Sequence[Field], spots: Sequence[Spot], codec: Codec, *, batch: int = _BATCH
) -> Iterator[NDArray[np.uint8]]:
    """Their pixels, some at a time: (n, side, side, 3)."""
    for start in range(0, len(spots), batch):
        part = spots[start : start + batch]
        yield np.stack([codec(fields[spot.field].slide.read(spot.grid)) for spot in part])


def shows(field: Field, mpp: float) -> bool:
    """Whether a slide has detail of a pitch."""
    return mpp >= FINER * field.slide.mpp


# -- pairs ---------------------------------------------------------------------------------------------


def painted_after(path: Path) -> dict[str, Any] | None:
    """What a painting of ours says of itself, or None."""
    import zarr

    if not path.is_dir():
        return None
    try:
        about = zarr.open_group(path, mode="r").attrs.get("wsi_brush")
    except (OSError, ValueError, KeyError):
        return None
    return dict(about) if isinstance(about, dict) and about.get("synthetic") else None


class Pair(NamedTuple):
    """A synthetic field and the real one that it follows, by their numbers; `down` and `right`: where the corner of
    the synthetic one lies on the real slide, µm."""

    real: int
    synthetic: int
    down: float
    right: float

    def there(self, grid: Grid) -> Grid:
        """The place on the real slide of a square of the synthetic one, to the nearest pixel."""
        return self._moved(grid, 1)

    def here(self, grid: Grid) -> Grid:
        """The other way: the place on the synthetic slide of a square of the real one."""
        return self._moved(grid, -1)

    def _moved(self, grid: Grid, way: int) -> Grid:
        top, left = (way * round(shift / grid.mpp) for shift in (self.down, self.right))
        return Grid(grid.mpp, grid.top + top, grid.left + left, grid.height, grid.width)


@dataclass
class Sides:
    """The two sides, and which synthetic field follows which real one."""

    real: list[Field]
    synthetic: list[Field]
    pairs: list[Pair]
    notes: list[str] = field(default_factory=list)
    brushes: list[dict[str, Any]] = field(default_factory=list)


def open_all(paths: Iterable[Path | str], *, assume_mpp: float | None = None) -> list[Slide]:
    """The slides of one side, each as often as it is named: two paintings may follow one reference.

    Raises:
        SlideError: if one cannot be read.
        UsageError: if a folder is empty.
    """
    return [open_slide(slide, assume_mpp=assume_mpp) for path in paths for slide in find_slides([path])]


def open_sides(
    real: Iterable[Path | str], synthetic: Iterable[Path | str], *, assume_mpp: float | None = None,
    tell: Tell | None = None,
) -> Sides:  # fmt: skip
    """Slides, pyramids, plain images and folders of them, as fields.

    Where there are as many of one side as of the other, the first follows the first, and so on: a painting of ours
    says which region it follows; any other must be as large as its real one.

    Raises:
        SlideError: if one cannot be read, or has no tissue.
        UsageError: if a folder is empty.
    """
    slides = [open_all(paths, assume_mpp=assume_mpp) for paths in (real, synthetic)]
    told, sides = Told(tell, "looking for tissue", sum(map(len, slides))), Sides([], [], [])

    def found(slide: Slide, area: Grid | None = None) -> Field:
        one = field_of(slide, area)
        told.add()
        return one

    about = [painted_after(slide.path) for slide in slides[1]]
    sides.brushes = [one for one in about if one is not None]
    paired = len(slides[0]) == len(slides[1])
    if not paired:
        sides.notes.append(
            f"{len(slides[0])} real and {len(slides[1])} synthetic: not paired, so nothing is said about control"
        )
    for number, (slide, made) in enumerate(zip(slides[1], about, strict=True)):
        sides.synthetic.append(found(slide))
        place = _place(slides[0][number], slide, made) if paired else None
        if place is not None:
            top, left = place.extent[:2]
            sides.pairs.append(Pair(number, number, top, left))
            sides.real.append(found(slides[0][number], place))
        elif paired:
            why = "of another size than" if made is None else "not painted after"
            sides.notes.append(f"{slide.path.name}: {why} {slides[0][number].path.name}, so no pair")
            sides.real.append(found(slides[0][number]))
    if not paired:
        sides.real = [found(slide) for slide in slides[0]]
    pitches = sorted({round(one.mpp, 4) for side in slides for one in side})
    if pitches[-1] > pitches[0] * 1.01:
        sides.notes.append(f"pixel sizes from {pitches[0]:g} to {pitches[-1]:g} µm: all are read at the same pitches")
    return sides


def _place(real: Slide, synthetic: Slide, made: dict[str, Any] | None) -> Grid | None:
    """Where a synthetic slide lies on its real one (level-0 pixels), if that is known."""
    place = real.grid
    if made is not None:
        reference = made.get("reference", {})
        if abs(real.mpp / reference.get("mpp", math.inf) - 1) > 1e-3:
            return None
        place = Grid(real.mpp, *reference["region"])
        if place.clip(real.grid) != place:
            return None
    sizes = [[length * one.mpp for length in one.shape] for one in (place, synthetic.grid)]
    most = 2 * max(real.mpp, synthetic.mpp)
    return place if all(abs(one - other) <= most for one, other in zip(*sizes, strict=True)) else None
