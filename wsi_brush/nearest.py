"""Where in other slides a tile looks most like itself: every place, in all eight flips and rotations.

What is correlated is where the tile's detail stands (nuclei, fibres, edges), not of which kind it is. Optical density
is cut to a band of wavelengths and brought to one contrast everywhere, so that no single edge decides: of tiles that
have nothing to do with each other the correlation is about 0.3, of the same tissue read at another half pixel 0.8.

Two passes: every place at 4 µm, then the best of them at 2 µm and half pixels, which gives the figure. Held are the
tiles alone; the slides, however many and large, are read block by block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .coordinates import turned
from .grid import Grid
from .progress import Tell, Told
from .samples import Codec
from .slide import Slide
from .texture import densities
from .tissue import Tissue, find_tissue

Floats = NDArray[np.float32]
Place = tuple[Slide, Grid]
"""A slide, and pixels of `PITCH` of it."""

PITCH = 2.0
"""µm: the pitch at which a tile and its nearest place are correlated; places are looked for at twice of it."""
SIDE = 32
"""Pixels of a tile at `PITCH`: 64 µm."""
NOWHERE = -1.0
"""The correlation where there is no place with tissue."""
_FINE, _COARSE = 1.0, 4.0  # µm: standard deviations at the ends of the band; of the latter also that of its contrast
_FAINT = 0.02  # optical density: detail of that much cannot be told from noise
_LEAST = 0.6  # of the usual contrast; a tile with less of it, for it is half blank, is not stretched to it
_MARGIN = 12  # pixels around a tile that decide its detail, or a little more
_REGION, _BLOCK = 256, 64  # pixels of a slide read at once; pixels of which the best place is a candidate
_BEST = 4  # candidates of a tile
_SHIFT = 3  # pixels around a candidate that are tried


class Hit(NamedTuple):
    """The nearest place of a tile: `turned(slides[slide].read(grid), turn)` is what looks most like it."""

    correlation: float
    slide: int
    grid: Grid
    turn: int


def nearest(tiles: Sequence[Place], among: Sequence[Place], codec: Codec, *, tell: Tell | None = None) -> list[Hit]:
    """For each tile of `SIDE` x `SIDE` pixels the nearest place within the areas among which it is looked for.

    Areas have an even number of pixels a side (as `whole`). Of several equal places it is the first. Where there is
    none with tissue the correlation is -1.
    """
    told = Told(tell, "looking for copies", sum(len(_regions(area)) for _, area in among))
    best = _Candidates(len(tiles))
    close = np.zeros((len(tiles), SIDE + 4, SIDE + 4), np.float32)
    coarse = np.zeros((len(tiles), 8, (SIDE // 2) ** 2), np.float32)
    for number, (slide, grid) in enumerate(tiles):
        density = _density(slide, grid, codec)
        close[number] = _inner(detail(density, PITCH), _MARGIN - 2)
        coarse[number] = [_back(_inner(detail(_halved(density), 2 * PITCH), _MARGIN // 2), k).ravel() for k in range(8)]
    templates = _unit(coarse)
    for number, place in enumerate(among):
        _search(number, place, templates, best, codec, told)
    told = Told(tell, "looking at the nearest places", len(tiles))
    found = []
    for number in range(len(tiles)):
        hits = [Hit(NOWHERE, 0, Grid(PITCH / 2, 0, 0, 2 * SIDE, 2 * SIDE), 0)]
        for score, place in zip(best.scores[number], best.places[number].tolist(), strict=True):
            if score > NOWHERE:
                hits.append(_closely(close[number], among[place[0]][0], place, codec))
        found.append(max(hits, key=lambda hit: hit.correlation))
        told.add()
    return found


class _Candidates:
    """The best places of each tile so far: scores (n, _BEST); slide, row, column, turn of each (n, _BEST, 4)."""

    def __init__(self, count: int) -> None:
        self.scores = np.full((count, _BEST), NOWHERE, np.float32)
        self.places = np.zeros((count, _BEST, 4), np.int64)

    def offer(self, tile: int, score: float, place: tuple[int, int, int, int]) -> None:
        """In place of the worst of a tile."""
        last = int(self.scores[tile].argmin())
        self.scores[tile, last], self.places[tile, last] = score, place


def whole(slide: Slide, until: float = 1.0) -> Grid:
    """The pixels of `PITCH` that lie in a slide, or the left part of it: an even number a side."""
    top, left, bottom, right = slide.grid.extent
    top, left = (math.ceil(edge / PITCH - 1e-6) for edge in (top, left))
    lengths = (bottom - top * PITCH, until * (right - left * PITCH))
    return Grid(PITCH, top, left, *(max(0, math.floor(length / PITCH + 1e-6) // 2 * 2) for length in lengths))


def _regions(area: Grid) -> list[Grid]:
    """What is read at once: tiles begin in squares of `_REGION` pixels, and reach beyond."""
    squares = area.tiles(_REGION)
    parts = (Grid(PITCH, s.top, s.left, s.height + SIDE - 2, s.width + SIDE - 2).clip(area) for s in squares)
    return [part for part in parts if min(part.shape) >= SIDE]


def _search(number: int, place: Place, templates: Floats, best: _Candidates, codec: Codec, told: Told) -> None:
    """Lay the templates (n, 8, pixels) on all places with tissue in an area of a slide."""
    import torch

    slide, area = place
    tissue, side, step = find_tissue(slide), SIDE // 2, _BLOCK // 2
    laid = torch.from_numpy(templates.reshape(-1, side * side))
    for region in _regions(area):
        told.add()
        if not _has_tissue(tissue, region):
            continue
        picture = _inner(detail(_halved(_density(slide, region, codec)), 2 * PITCH), _MARGIN // 2)
        every = np.lib.stride_tricks.sliding_window_view(picture, (side, side))
        for top, left in ((r, c) for r in range(0, len(every), step) for c in range(0, every.shape[1], step)):
            places = every[top : top + step, left : left + step]
            height, width = (2 * (count - 1) + SIDE for count in places.shape[:2])
            block = Grid(PITCH, region.top + 2 * top, region.left + 2 * left, height, width)
            if not _has_tissue(tissue, block):
                continue
            scores = laid @ torch.from_numpy(_unit(places.reshape(-1, side * side))).T
            tops, turns = scores.amax(1).view(-1, 8).max(1)
            for tile in np.flatnonzero(tops.numpy() > best.scores.min(1)).tolist():
                turn = int(turns[tile])
                down, right = divmod(int(scores[8 * tile + turn].argmax()), places.shape[1])
                best.offer(tile, float(tops[tile]), (number, block.top + 2 * down, block.left + 2 * right, turn))


def _has_tissue(tissue: Tissue, area: Grid) -> bool:
    cells = area.at(tissue.grid.mpp).clip(tissue.grid)
    return bool(tissue.mask[cells.within(tissue.grid)].any())


def _closely(tile: Floats, slide: Slide, place: Sequence[int], codec: Codec) -> Hit:
    """The best of all half pixels around a candidate; `tile` has two pixels around it."""
    number, row, column, turn = place
    around = Grid(PITCH, row, column, SIDE, SIDE).pad(_SHIFT)
    picture = _inner(detail(_density(slide, around, codec), PITCH), _MARGIN)
    patches = np.lib.stride_tricks.sliding_window_view(picture, (SIDE, SIDE)).reshape(-1, SIDE * SIDE)
    mine, halves = _back(tile, turn), [(down, right) for down in (0, 1) for right in (0, 1)]
    moved = [_inner(_moved(mine, *half), 2).ravel() for half in halves]
    scores = _unit(patches) @ _unit(np.stack(moved)).T
    at, which = divmod(int(scores.argmax()), len(halves))
    down, right = divmod(at, 2 * _SHIFT + 1)
    top, left = 2 * (around.top + down) + halves[which][0], 2 * (around.left + right) + halves[which][1]
    return Hit(float(scores.max()), number, Grid(PITCH / 2, top, left, 2 * SIDE, 2 * SIDE), turn)


# -- what is correlated --------------------------------------------------------------------------------


def _density(slide: Slide, grid: Grid, codec: Codec) -> Floats:
    """Optical density of a grid of `PITCH` and `_MARGIN` pixels around it; beyond the slide its edge goes on."""
    around = grid.pad(_MARGIN)
    inside = around.clip(whole(slide))
    beyond = (
        (inside.top - around.top, around.bottom - inside.bottom),
        (inside.left - around.left, around.right - inside.right),
    )
    return np.asarray(np.pad(densities(codec(slide.read(inside))).mean(-1), beyond, mode="edge"), np.float32)


def detail(density: Floats, mpp: float) -> Floats:
    """Where detail of some µm stands, in a picture of optical density: a band of it, of one contrast everywhere."""

    def smooth(values: Floats, spread: float) -> Floats:
        down, across = (_smoothing(length, spread / mpp) for length in values.shape)
        return np.asarray(down @ values @ across.T, np.float32)

    band = smooth(density, _FINE) - smooth(density, _COARSE)
    return np.asarray(band / np.sqrt(smooth(band**2, _COARSE) + _FAINT**2), np.float32)


@lru_cache(maxsize=64)
def _smoothing(length: int, spread: float) -> Floats:
    """A Gaussian of so many pixels, cut at twice of it, as a matrix; beyond the edge the edge goes on."""
    reach = int(2 * spread + 0.5)
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (steps / spread) ** 2)
    matrix = np.zeros((length, length))
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        rows = np.arange(length)
        np.add.at(matrix, (rows, (rows + step).clip(0, length - 1)), weight)
    return matrix.astype(np.float32)


def _moved(image: Floats, *halves: int) -> Floats:
    """Half a pixel down or right, or not, between four neighbours (cubic); the outermost two pixels are wrong."""
    for axis in (axis for axis, half in enumerate(halves) if half):
        before, here, after = (np.roll(image, step, axis) for step in (2, 1, -1))
        image = np.asarray((9 * (here + image) - before - after) / 16, np.float32)
    return image


def _unit(rows: Floats) -> Floats:
    """Rows less their mean, of length 1; where there is next to nothing, shorter."""
    plain = rows - rows.mean(-1, keepdims=True)
    length = np.linalg.norm(plain, axis=-1, keepdims=True)
    return np.asarray(plain / np.maximum(length, _LEAST * math.sqrt(rows.shape[-1])), np.float32)


def _halved(image: Floats) -> Floats:
    height, width = image.shape
    return np.asarray(image.reshape(height // 2, 2, width // 2, 2).mean((1, 3)), np.float32)


def _inner(image: Floats, margin: int) -> Floats:
    return image[margin:-margin, margin:-margin]


def _back(image: Floats, turn: int) -> Floats:
    """What `turned` makes this image of."""
    return turned(image, 4 | (turn & 1) << 1 | (turn & 2) >> 1 if turn & 4 else turn)


def search_seconds(tiles: int, among: Sequence[Grid]) -> float:
    """How long a search for so many tiles takes here at most, from one region and one block of blank ones."""
    import torch

    random = np.random.default_rng(0)
    region = random.random((_REGION // 2 + SIDE + _MARGIN,) * 2, np.float32)
    laid = torch.from_numpy(random.random((8 * tiles, (SIDE // 2) ** 2), np.float32))
    places = torch.from_numpy(random.random(((_BLOCK // 2) ** 2, (SIDE // 2) ** 2), np.float32))
    seconds = []
    for work in (lambda: detail(region, 2 * PITCH), lambda: (laid @ places.T).amax(1)):
        work()
        start = time.monotonic()
        work()
        seconds.append(time.monotonic() - start)
    count = sum(len(_regions(area)) for area in among)
    return count * (seconds[0] + (_REGION // _BLOCK) ** 2 * seconds[1]) + 0.02 * tiles
