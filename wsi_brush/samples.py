"""What is looked at when slides are compared: tiles at chosen places of fields of view, after one codec for all.

A field is a slide, or the part of it that a painting follows. Tiles stand on the field's own lattice, half a tile
apart, where there is tissue; where there are too many, some are drawn by a seed.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .distances import Vectors
from .embed import COVER, TileEncoder
from .errors import SlideError, UsageError
from .grid import Grid
from .progress import Told
from .slide import Slide
from .tissue import PITCH, Tissue, find_tissue, tissue_mask

_BATCH, _AT_ONCE = 64, 2**22  # tiles, and pixels of them, that are held at once
FINER = 0.95  # a slide of a pitch of up to 5 % more will do
_SAME, _NEAR = 1.001, 1.2  # times as large: pixels that are smeared by resampling, and not made of whole ones
_SLIDES = 4  # of a half; of fewer, it would be of one kind of tissue


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


def field_of(slide: Slide, area: Grid | None = None, *, blank: bool = False) -> Field:
    """A whole slide, or an area of it (at its pitch, cut at its edges), which may be `blank`.

    Raises:
        SlideError: if it may not, and there is no tissue in it.
    """
    if area is None:
        found = Field(_name(slide), slide, slide.grid, find_tissue(slide).mask)
    else:
        area = area.clip(slide.grid)
        top, left, height, width = (
            round(length * slide.mpp / PITCH) for length in (area.top, area.left, area.height, area.width)
        )
        found = Field(_name(slide), slide, area, tissue_mask(slide.read(Grid(PITCH, top, left, height, width)), PITCH))
    if not blank and not found.tissue.any():
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
        top, left = _corner(one, mpp)
        # counted from the field's corner; a square is parts x parts cells. Of the last one a part of a pixel of level 0
        # may be missing, to which regions are rounded, if the slide goes on there
        rows, columns = (
            int(min(length + 1, room) * one.slide.mpp / mpp / step + 1e-6)
            for length, room in zip(one.area.shape, _room(one), strict=True)
        )
        cover = Tissue(one.tissue, Grid(PITCH, 0, 0, *one.tissue.shape)).cover(Grid(mpp * step, 0, 0, rows, columns))
        high, wide = max(rows - parts + 1, 0), max(columns - parts + 1, 0)
        mean = sum(cover[r : r + high, c : c + wide] for r in range(parts) for c in range(parts)) / parts**2
        places = np.argwhere(mean >= COVER) * step + [top, left]
        corners.append(np.column_stack([np.full(len(places), index), places]))
    every = np.concatenate(corners)
    every = every[drawn(len(every), most, seed)]
    return [Spot(int(index), Grid(mpp, int(row), int(column), side, side)) for index, row, column in every]


def _room(one: Field) -> tuple[int, int]:
    """Pixels of level 0 from a field's corner to the end of its slide."""
    return one.slide.grid.bottom - one.area.top, one.slide.grid.right - one.area.left


def drawn(count: int, most: int, seed: int) -> NDArray[np.intp]:
    """The numbers from 0 to `count`, or `most` of them, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def halves(fields: Sequence[Field], spots: Sequence[Spot]) -> tuple[list[int], list[int]]:
    """Which spots lie in one half of their slides and which in the other, by their number; those across are in none.

    The halves are the black and the white squares of a chessboard on every field, so that both show the same kinds of
    tissue, and share no pixel, also where fields of one slide overlap. A square is 4 spots wide; 3 or 2 where a field
    would have fewer than 4 x 4 of them, 1 where it is narrower than 4 spots. The corner is black in one field, white in
    the next that shares no pixel with it, so that fields of one spot go to both halves.
    """
    parts: tuple[list[int], list[int]] = ([], [])
    if not spots:
        return parts
    side, width, colours = spots[0].grid.height, _square(fields, spots), _apart(fields)
    for number, (index, grid) in enumerate(spots):
        top, left = _corner(fields[index], grid.mpp)
        (row, down), (column, right) = divmod(grid.top - top, width), divmod(grid.left - left, width)
        if max(down, right) + side <= width:
            parts[(row + column + colours[index]) % 2].append(number)
    places = _places(fields, spots)
    first = places[parts[0]]
    return parts[0], [number for number in parts[1] if not _meet(places[number], first, side).any()]


def slide_halves(fields: Sequence[Field], spots: Sequence[Spot]) -> tuple[list[int], list[int]] | None:
    """The same of whole slides, the fullest first, each to the emptier half; None where a half would be of fewer than
    four slides, or of less than a third of the spots."""
    owners = [fields[index].slide.path for index, _ in spots]
    parts: tuple[list[int], list[int]] = ([], [])
    for slide, _ in Counter(owners).most_common():
        min(parts, key=len).extend(number for number, owner in enumerate(owners) if owner == slide)
    if min(len({owners[number] for number in part}) for part in parts) < _SLIDES:
        return None
    return (sorted(parts[0]), sorted(parts[1])) if min(map(len, parts)) >= len(spots) / 3 else None


def elsewhere(fields: Sequence[Field], spots: Sequence[Spot], *, seed: int) -> list[int]:
    """For each spot the number of another that shares no pixel with it, drawn from the same slide where that has one;
    -1 where there is none."""
    random, places, found = np.random.default_rng(seed), _places(fields, spots), []
    for place, (_, grid) in zip(places, spots, strict=True):
        apart = ~_meet(place, places, grid.height)
        near = np.flatnonzero(apart & (places[:, 0] == place[0]))
        among = near if len(near) else np.flatnonzero(apart)
        found.append(int(random.choice(among)) if len(among) else -1)
    return found


def _corner(field: Field, mpp: float) -> tuple[int, int]:
    """Where a field's own lattice begins, pixels of a pitch."""
    top, left = (round(edge / mpp) for edge in field.area.extent[:2])
    return top, left


def _places(fields: Sequence[Field], spots: Sequence[Spot]) -> NDArray[np.int_]:
    """Number of the slide, top and left of each spot: (n, 3)."""
    slides = {path: number for number, path in enumerate(dict.fromkeys(one.slide.path for one in fields))}
    return np.array([(slides[fields[index].slide.path], grid.top, grid.left) for index, grid in spots], np.int_)


def _meet(place: NDArray[np.int_], others: NDArray[np.int_], side: int) -> NDArray[np.bool_]:
    """Whether a square shares a pixel with each of the others."""
    return np.asarray((others[:, 0] == place[0]) & (np.abs(others[:, 1:] - place[1:]) < side).all(1))


def _apart(fields: Sequence[Field]) -> list[int]:
    """A number for each field, from 0, the same for those that share pixels, also through others."""
    found: list[int] = []
    of_slide: dict[Path, list[int]] = {}
    for index, one in enumerate(fields):
        others = of_slide.setdefault(one.slide.path, [])
        alike = {found[k] for k in others if min(fields[k].area.clip(one.area).shape)}
        for k in others:
            found[k] = index if found[k] in alike else found[k]
        others.append(index)
        found.append(index)
    order = {number: k for k, number in enumerate(dict.fromkeys(found))}
    return [order[number] for number in found]


def _square(fields: Sequence[Field], spots: Sequence[Spot]) -> int:
    """Side of the chessboard's squares, pixels."""
    side, mpp = spots[0].grid.height, spots[0].grid.mpp
    across = min(length * one.slide.mpp / mpp / side for one in fields for length in one.area.shape)
    return side * min(4, max(2 if across >= 4 else 1, int(across / 4)))


def blocks(fields: Sequence[Field], spots: Sequence[Spot], *, wide: int | None = None) -> NDArray[np.intp]:
    """A number for each spot, the same for those that begin in one square of a slide: neighbours are no strangers.

    `wide`: of how many spots a square is; as in `halves` where it is not given.
    """
    if not spots:
        return np.zeros(0, np.intp)
    width = _square(fields, spots) if wide is None else wide * spots[0].grid.height
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


def by_tile(encoders: Iterable[TileEncoder]) -> list[list[TileEncoder]]:
    """Encoders that see tiles of one size together, so that a tile is read once for all of them."""
    found: dict[int, list[TileEncoder]] = {}
    for encoder in encoders:
        found.setdefault(encoder.tile, []).append(encoder)
    return list(found.values())


def finite(vectors: NDArray[np.float32], field: Field, encoder: TileEncoder, mpp: float) -> Vectors:
    """What an encoder makes of tiles of a field.

    Raises:
        SlideError: if a number of it is none.
    """
    if not np.isfinite(vectors).all():
        raise SlideError(f"{field.slide.path}: encoder {encoder.name} gives numbers that are not finite at {mpp:g} µm")
    return vectors.astype(np.float64)


def embed_spots(
    fields: Sequence[Field], spots: Sequence[Spot], encoders: Sequence[TileEncoder], codec: Codec, told: Told
) -> list[Vectors]:
    """What each encoder makes of the spots, (n, dim) each; every spot is read once.

    Raises:
        SlideError: if a slide cannot be read, or an embedding is not finite.
    """
    found, done = [np.zeros((len(spots), encoder.dim)) for encoder in encoders], 0
    batch = min(_BATCH, max(1, _AT_ONCE // encoders[0].tile ** 2))
    for tiles in read_spots(fields, spots, codec, batch=batch):
        for encoder, vectors in zip(encoders, found, strict=True):
            field, grid = spots[done]
            vectors[done : done + len(tiles)] = finite(encoder(tiles), fields[field], encoder, grid.mpp)
        done += len(tiles)
        told.add(len(tiles))
    return found


def common_pitch(real: Sequence[Slide], synthetic: Sequence[Slide], least: float) -> float:
    """The finest pitch, from `least` µm on, at which both sides are read alike.

    Read at its own pitch a slide loses nothing, resampled to a little more a part of its finest detail. Paintings show
    what a slide shows that is read at theirs, so that one is right for them. Else it is the coarsest of all, or where
    others are of nearly that size half an octave more, so that all are resampled.
    """
    pitches = [slide.mpp for slide in (*real, *synthetic)]
    own, coarsest = max(slide.mpp for slide in synthetic), max(pitches)
    if all(slide.synthetic for slide in synthetic) and own >= FINER * coarsest:
        return max(least, own)
    finest = max(least, coarsest)
    near = coarsest > _SAME * min(pitches) and any(_SAME < finest / mpp < _NEAR for mpp in pitches)
    return math.sqrt(2) * finest if near else finest


def shows(field: Field, mpp: float) -> bool:
    """Whether a slide has detail of a pitch."""
    return mpp >= FINER * field.slide.mpp
