"""Whether the lattices on which a painting is made are seen in it: at its borders, and in tiles that stand on them.

Cells of 2 and 8 pixels are the lattices of the operator; chunks, tiles and shards have borders every 256, 1024 and 2048
pixels. The real slide at the same lines is the floor: there no border is, but
those of the blocks of 8 pixels of a slide that was stored as JPEG.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distances import Vectors
from .embed import COVER, TileEncoder
from .grid import Grid
from .likeness import Rows, compared, measured
from .progress import Tell, Told
from .samples import Codec, Field, Spot, blocks, by_tile, drawn, embed_spots, shows, spots_of
from .sides import Pair, Sides
from .texture import seam_of, steps
from .tissue import PITCH, Tissue

LATTICES = ((2, 1), (8, 1), (256, 32), (1024, 32), (2048, 32))
"""Periods in pixels, and the lattice to which the lines belong that they are compared with."""
_PART, _PARTS = 256, 256  # pixels a side of the squares whose neighbours are compared, and how many at most
_LEAST = 8  # crops on a lattice, and beside it


def gradients(sides: Sides, *, seed: int) -> list[dict[str, Any]]:
    """Mean difference of neighbours across the lines of each lattice over that across other lines, and its rank, of
    each synthetic slide beside the real one that it follows; `over_real`: the ratio over the real one's, or over 1
    where that is less, as it is where blocks of JPEG lie beside the lines.

    Pixels are as they are: a codec has blocks of its own, 8 pixels wide, on just these lines. `squares`: how many hold
    tissue; of those, as many as `n` says were drawn and lie on the lines.
    """

    @cache
    def real(number: int, mpp: float) -> dict[int, Rows]:
        field = sides.real[number]
        return _searched(field, mpp, seed)[0] if shows(field, mpp) else {}

    found = []
    for pair in _followed(sides):
        one = sides.synthetic[pair.synthetic]
        ours, count = _searched(one, one.slide.mpp, seed)
        theirs = real(pair.real, one.slide.mpp)
        for period, _ in LATTICES:
            if min(one.area.shape) >= 2 * period:
                here = ours.get(period)
                said = {"missing": "no tissue on its lines"} if here is None else _seams(here, theirs.get(period), seed)
                found.append({"slide": one.name, "period": period, "squares": count, **said})
    return found


def _seams(ours: Rows, theirs: Rows | None, seed: int) -> dict[str, Any]:
    """The figures of one lattice, of `steps` of both sides; of the real one there may be none."""
    floor, both = (None, None) if theirs is None else ((theirs, theirs), (ours, theirs))

    def over(one: Vectors, two: Vectors) -> Any:
        return seam_of(one.sum(0)).ratio / np.maximum(seam_of(two.sum(0)).ratio, 1)

    samples = {"value": (ours, ours), "floor": floor}
    said = measured(["ratio", "rank"], lambda one, _: seam_of(one.sum(0)), samples, seed=seed)
    return said | measured(["over_real"], over, {"value": both}, seed=seed)


def _searched(field: Field, mpp: float, seed: int) -> tuple[dict[int, Rows], int]:
    """`steps` of each lattice that begins at a field's corner, by its period, one row for each square on its lines, of
    those with tissue that were drawn from all over the field; and how many have tissue. Nothing of a lattice for which
    the field is too small, or on whose lines no square lies."""
    top, left = (round(edge / mpp) for edge in field.area.extent[:2])
    area = Grid(mpp, top, left, *field.area.whole_cells(mpp).shape)
    cells = Grid(mpp * _PART, 0, 0, *(-(-length // _PART) for length in area.shape))
    cover = Tissue(field.tissue, Grid(PITCH, 0, 0, *field.tissue.shape)).cover(cells)
    places = np.argwhere(cover >= COVER)
    some = np.sort(np.random.default_rng(seed).permutation(len(places))[:_PARTS])
    lattices = [lattice for lattice in LATTICES if min(area.shape) >= 2 * lattice[0]]
    found: dict[int, list[Vectors]] = {period: [] for period, _ in lattices}
    for row, column in (places[some] * _PART).tolist():
        # with the row above and the column to the left, so that the border of the square is among its lines
        square = Grid(mpp, top + row - 1, left + column - 1, _PART + 1, _PART + 1).clip(area)
        pixels, corner = field.slide.read(square), (square.top - top, square.left - left)
        for period, among in lattices:
            one = steps(pixels, period, among=among, corner=corner)
            found[period].extend([one] if one.any() else [])
    return {period: Rows(np.stack(rows), np.arange(len(rows))) for period, rows in found.items() if rows}, len(places)


def crops(
    sides: Sides, encoders: Sequence[TileEncoder], codec: Codec, *, most: int, seed: int, tell: Tell | None = None
) -> dict[str, Any]:
    """How far tiles that are centred on the borders of a lattice are from other tiles of the same paintings, in each
    encoder's space; the floor is the same between the real tiles at the same places.

    No two tiles share a pixel: their centres are as far apart as the smallest power of two that holds a tile.
    """
    found: dict[str, Any] = {}
    follows = {pair.synthetic: pair for pair in _followed(sides)}
    for alike in by_tile(encoders):
        ours, centres = _centred(sides, alike[0].tile, most=most, seed=seed)
        places = [Spot(follows[index].real, follows[index].there(grid)) for index, grid in ours]
        held = [grid.clip(sides.real[index].area.at(grid.mpp)) == grid for index, grid in places]
        theirs = [place for place, whole in zip(places, held, strict=True) if whole]
        told = Told(tell, "looking at borders", len(ours) + len(theirs))
        vectors = [
            embed_spots(fields, spots, alike, codec, told)
            for fields, spots in ((sides.synthetic, ours), (sides.real, theirs))
        ]
        groups = blocks(sides.synthetic, ours), blocks(sides.real, theirs)
        for encoder, *both in zip(alike, *vectors, strict=True):
            rows = [Rows(*one) for one in zip(both, groups, strict=True)]
            found[encoder.name] = {}
            for period, _ in LATTICES:
                if period >= 2 * _spacing(encoder.tile):
                    on = [(one % period == 0).any(1) for one in (centres, centres[held])]
                    found[encoder.name][f"{period}"] = _on_and_beside(rows, on, seed)
    return found


def _on_and_beside(rows: Sequence[Rows], on: Sequence[NDArray[np.bool_]], seed: int) -> dict[str, Any]:
    """Tiles that stand on a lattice compared with those that do not, and the same of the real ones."""
    counts = [(int(part.sum()), int((~part).sum())) for part in on]
    found: dict[str, Any] = {"on": counts[0][0], "beside": counts[0][1]}
    if min(counts[0]) < _LEAST:
        return found | {"missing": f"fewer than {_LEAST} tiles on its lines, or beside them"}
    pair, floor = (
        (Rows(one.values[~part], one.groups[~part]), Rows(one.values[part], one.groups[part]))
        for one, part in zip(rows, on, strict=True)
    )
    return found | compared({"value": pair, "floor": floor if min(counts[1]) >= _LEAST else None}, seed=seed)


def _spacing(tile: int) -> int:
    """Pixels between the centres of tiles: a divisor of every lattice that is at least as large."""
    return 1 << (tile - 1).bit_length()


def _centred(sides: Sides, tile: int, *, most: int, seed: int) -> tuple[list[Spot], Vectors]:
    """Tiles at the paintings' own pitches, and their centres, pixels from the paintings' corners: (n, 2)."""
    spacing, spots, centres = _spacing(tile), [], []
    for index, one in enumerate(sides.synthetic):
        for _, grid in spots_of([one], one.slide.mpp, spacing, stride=0.5, most=2**31, seed=seed):
            centre = (grid.top - one.area.top + spacing // 2, grid.left - one.area.left + spacing // 2)
            if not any(place % spacing for place in centre):
                margin = (spacing - tile) // 2
                square = Grid(grid.mpp, grid.top + margin, grid.left + margin, tile, tile)
                spots.append(Spot(index, square))
                centres.append(centre)
    rows = drawn(len(spots), most, seed)
    return [spots[row] for row in rows], np.array(centres, np.float64).reshape(-1, 2)[rows]


def _followed(sides: Sides) -> list[Pair]:
    """For each synthetic slide the real one that it follows; else one that is laid under it corner on corner."""
    found = {pair.synthetic: pair for pair in sides.pairs}
    for number, one in enumerate(sides.synthetic):
        real = number % len(sides.real)
        corners = [side.area.extent[:2] for side in (sides.real[real], one)]
        down, right = (there - here for there, here in zip(*corners, strict=True))
        found.setdefault(number, Pair(real, number, down, right))
    return [found[number] for number in range(len(sides.synthetic))]
