"""Whether a painting copies what its brush was trained on: the nearest place in the training slides of each tile.

A tile of 64 µm is laid on every place of every training slide, in all eight flips and rotations. What is correlated is
where its detail stands (nuclei, fibres, edges), not of which kind it is: to an encoder all tissue of a kind is near.
Optical density is cut to a band of wavelengths and brought to one contrast everywhere, so that no single edge decides.
Real tiles that the brush has not seen are laid beside; what is nearer to the training slides than they are is a copy.

Two passes: every place at 4 µm, then the best of them at 2 µm and half pixels, which gives the figure. Held are the
tiles of the evaluated slides alone; training slides, however many and large, are read block by block.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .coordinates import turned
from .distances import Groups, interval
from .embed import slide_fingerprint
from .grid import Grid
from .progress import Tell, Told
from .samples import FINER, Codec, Spot, blocks, shows, spots_of
from .sides import Sides, open_all
from .slide import Slide
from .texture import densities
from .tissue import Tissue, find_tissue

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]
Place = tuple[Slide, Grid]  # pixels of `PITCH` of a slide

PITCH = 2.0
"""µm: the pitch at which a tile and its nearest place are correlated; places are looked for at twice of it."""
SIDE = 32
"""Pixels of a tile at `PITCH`: 64 µm."""
MOST = 400
"""Tiles of a side at most."""
_FINE, _COARSE = 1.0, 4.0  # µm: standard deviations at the ends of the band; of the latter also that of its contrast
_FAINT = 0.02  # optical density: detail of that much cannot be told from noise
_LEAST = 0.6  # of the usual contrast; a tile with less of it, for it is half blank, is not stretched to it
_MARGIN = 12  # pixels around a tile that decide its detail, or a little more
_REGION, _BLOCK = 256, 64  # pixels of a training slide read at once; pixels of which the best place is a candidate
_BEST = 4  # candidates of a tile
_SHIFT = 3  # pixels around a candidate that are tried
_RARE, _SURE = 0.01, 0.95  # the share of held-out tiles that may be called copies, and how surely it is not exceeded
_FEW = 32  # held-out tiles; from fewer, nothing is said
_BLOCKS = 8  # of tiles; of fewer, no interval is drawn
_SAME = 0.7  # unrelated tissue came to 0.64 at most
_SHOWN = 12
_NOWHERE = -1.0


class Hit(NamedTuple):
    """The nearest place of a tile: `turned(slides[slide].read(grid), turn)` is what looks most like it."""

    correlation: float
    slide: int
    grid: Grid
    turn: int


def copying(
    sides: Sides, training: Iterable[Slide | Path | str], codec: Codec, *, until: float = 1.0,
    assume_mpp: float | None = None, most: int, seed: int, tell: Tell | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The share of synthetic tiles that are nearer to the training slides than real held-out tiles are.

    `until`: part of a training slide's width, from the left, that was trained on. Real tiles that lie there are not
    held out. `sides.training` has the searched slides afterwards, and `sides.notes` what the reader must know.

    Raises:
        SlideError: if a training slide cannot be read.
        UsageError: if a folder is empty.
    """
    slides = open_all(training, assume_mpp=assume_mpp)
    sides.training = [slide for slide in slides if slide.mpp * FINER <= PITCH]
    for slide in slides:
        if slide.mpp * FINER > PITCH:
            sides.notes.append(f"{slide.path.name}: pixels of {slide.mpp:g} µm, too coarse to be searched for copies")
    found: dict[str, Any] = {
        "training": [slide.path.name for slide in sides.training], "until": until, "mpp": PITCH, "side": SIDE * PITCH,
    }  # fmt: skip
    both = (sides.real, sides.synthetic)
    if not sides.training or not all(shows(one, PITCH) for side in both for one in side):
        return found | {"missing": f"copies are looked for at {PITCH:g} µm, which a side or the training does not show"}
    parts = [(slide, _whole(slide, until)) for slide in sides.training]
    strange = _unseen(sides, parts, min(most, MOST), seed)
    ours_at = spots_of(sides.synthetic, PITCH, SIDE, stride=1.0, most=min(most, MOST), seed=seed)
    tiles = [(sides.real[spot.field].slide, spot.grid) for spot in strange]
    tiles += [(sides.synthetic[spot.field].slide, spot.grid) for spot in ours_at]
    hits = nearest(tiles, parts, codec, tell=tell)
    if all(hit.correlation == _NOWHERE for hit in hits):
        return found | {"missing": "no place of a tile with tissue in the training slides"}
    theirs, ours = hits[: len(strange)], hits[len(strange) :]
    kept = _held_out(sides, strange, theirs)
    return found | _compared(
        [theirs[k].correlation for k in kept], [hit.correlation for hit in ours],
        (blocks(sides.real, [strange[k] for k in kept]), blocks(sides.synthetic, ours_at)), sides.notes, seed,
    ) | {"worst": _worst(ours_at, ours)}  # fmt: skip


# -- held out, and the threshold -----------------------------------------------------------------------


def _unseen(sides: Sides, parts: Sequence[Place], most: int, seed: int) -> list[Spot]:
    """Some real tiles, each once, that share no pixel with the training slides; which real slides do is said."""
    areas = [[area for slide, area in parts if _is(one.slide, slide)] for one in sides.real]
    every = spots_of(sides.real, PITCH, SIDE, stride=1.0, most=sys.maxsize)
    found: dict[tuple[Path, Grid], Spot] = {}
    seen = set()
    for spot in every:
        if any(min(spot.grid.clip(area).shape) for area in areas[spot.field]):
            seen.add(spot.field)
        else:
            found.setdefault((sides.real[spot.field].slide.path, spot.grid), spot)
    if seen:
        names = ", ".join(dict.fromkeys(sides.real[field].name for field in sorted(seen)))
        sides.notes.append(f"{names}: what was trained on is not held out when copies are told")
    some = np.random.default_rng(seed).permutation(len(found))[:most]
    return [list(found.values())[k] for k in np.sort(some)]


def _is(slide: Slide, other: Slide) -> bool:
    """Whether both are one slide, whatever the file is called."""
    return slide.path.resolve() == other.path.resolve() or (
        slide.grid.shape == other.grid.shape and slide_fingerprint(slide.path) == slide_fingerprint(other.path)
    )


def _held_out(sides: Sides, spots: Sequence[Spot], hits: Sequence[Hit]) -> list[int]:
    """The tiles, by number, of real slides that were not saved anew from the training slides, cut or in another format.

    Of those most tiles are found again.
    """
    scores, owner = np.array([hit.correlation for hit in hits]), np.array([spot.field for spot in spots], np.intp)
    again = {k for k in set(owner.tolist()) if np.median(scores[owner == k]) > _SAME}
    if again:
        names = dict.fromkeys(sides.real[k].name for k in sorted(again))
        sides.notes.append(f"{', '.join(names)}: found in the training slides, so not held out when copies are told")
    return [k for k, number in enumerate(owner.tolist()) if number not in again]


def limit(scores: Scores) -> float:
    """The correlation that at most 1 % of held-out tiles exceed, 95 % sure: an order statistic (Wilks, 1941).

    Of fewer than 299 tiles none is as sure; then it is the largest of them.
    """
    from scipy.special import bdtr  # the binomial distribution

    rank = max(1, int((bdtr(np.arange(len(scores)), len(scores), _RARE) <= 1 - _SURE).sum()))
    return float(np.sort(scores)[-rank])


def _compared(
    theirs: Sequence[float], ours: Sequence[float], groups: tuple[Groups, Groups], notes: list[str], seed: int
) -> dict[str, Any]:
    """The figures of the correlations of held-out and of synthetic tiles."""
    scores = tuple(np.asarray(side, np.float64) for side in (theirs, ours))
    found: dict[str, Any] = {"held_out": len(theirs), "synthetic": len(ours)}
    if not ours or len(theirs) < _FEW:
        return found | {
            "missing": f"{len(theirs)} held-out and {len(ours)} synthetic tiles; at least {_FEW} and 1 needed"
        }
    enough = math.ceil(math.log(1 - _SURE) / math.log(1 - _RARE))
    if len(theirs) < enough:
        notes.append(
            f"{len(theirs)} held-out tiles: fewer than the {enough} from which it is sure that at most "
            f"{100 * _RARE:g} % of such tiles are called copies"
        )
    # every other block is judged by the rest, so that no tile is judged by itself
    fold, judged = np.unique(groups[0], return_inverse=True)[1] % 2, np.zeros(len(theirs), np.bool_)
    for part in (0, 1):
        if (fold == part).any() and (fold != part).any():
            judged[fold == part] = scores[0][fold == part] > limit(scores[0][fold != part])
    edge = limit(scores[0])
    flagged = _with_interval(scores[1] > edge, groups[1], seed, share=True)
    floor = _with_interval(judged, groups[0], seed, share=True)
    middle, below = (_with_interval(side, ids, seed) for side, ids in zip(scores[::-1], groups[::-1], strict=True))
    return found | {
        "threshold": round(edge, 4), "share": flagged | _as_floor(floor), "correlation": middle | _as_floor(below),
        "counts": {
            name: np.histogram(side.clip(0, 1), bins=40, range=(0, 1))[0].tolist()
            for name, side in zip(("held_out", "synthetic"), scores, strict=True)
        },
    }  # fmt: skip


def _with_interval(values: NDArray[Any], groups: Groups, seed: int, *, share: bool = False) -> dict[str, float | None]:
    """Median, or share of what is true, with a bootstrap interval over blocks of tiles.

    Where none or all is true no draw differs; there the end stands that is exact for independent tiles (Clopper and
    Pearson, 1934).
    """
    plain = values.astype(np.float64)
    value = float(plain.mean() if share else np.median(plain))
    if share and value in (0.0, 1.0):
        far = 1 - 0.025 ** (1 / len(values))
        low, high = (0.0, far) if value == 0 else (1 - far, 1.0)
    elif len(np.unique(groups)) < _BLOCKS:
        return {"value": round(value, 4), "low": None, "high": None}
    else:
        ends = interval(
            lambda _, one: one.mean() if share else np.median(one), plain, plain, draws=400, seed=seed,
            groups=(groups, groups),
        )  # fmt: skip
        low, high = (min(max(float(end), 0.0), 1.0) for end in ends)
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def _as_floor(one: dict[str, float | None]) -> dict[str, float | None]:
    return {"floor": one["value"], "floor_low": one["low"], "floor_high": one["high"]}


def _worst(spots: Sequence[Spot], hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The synthetic tiles that are nearest to the training slides, nearest first; places of corners in µm."""
    order = sorted(range(len(hits)), key=lambda k: -hits[k].correlation)[:_SHOWN]
    found = []
    for spot, hit in ((spots[k], hits[k]) for k in order):
        corners = [[edge * grid.mpp for edge in (grid.top, grid.left)] for grid in (spot.grid, hit.grid)]
        found.append(
            {"correlation": round(hit.correlation, 4), "synthetic": spot.field, "place": corners[0],
             "training": hit.slide, "there": corners[1], "side": SIDE * PITCH, "turn": hit.turn}
        )  # fmt: skip
    return found


# -- the search ----------------------------------------------------------------------------------------


def nearest(tiles: Sequence[Place], training: Sequence[Place], codec: Codec, *, tell: Tell | None = None) -> list[Hit]:
    """For each tile of `SIDE` x `SIDE` pixels the nearest place within the training slides' areas.

    Of several equal ones it is the first. Where there is none with tissue the correlation is -1.
    """
    told = Told(tell, "looking for copies", sum(len(_regions(area)) for _, area in training))
    best = _Candidates(len(tiles))
    close = np.zeros((len(tiles), SIDE + 4, SIDE + 4), np.float32)
    coarse = np.zeros((len(tiles), 8, (SIDE // 2) ** 2), np.float32)
    for number, (slide, grid) in enumerate(tiles):
        density = _density(slide, grid, codec)
        close[number] = _inner(detail(density, PITCH), _MARGIN - 2)
        coarse[number] = [_back(_inner(detail(_halved(density), 2 * PITCH), _MARGIN // 2), k).ravel() for k in range(8)]
    templates = _unit(coarse)
    for number, place in enumerate(training):
        _search(number, place, templates, best, codec, told)
    told = Told(tell, "looking at the nearest places", len(tiles))
    found = []
    for number in range(len(tiles)):
        hits = [Hit(_NOWHERE, 0, Grid(PITCH / 2, 0, 0, 2 * SIDE, 2 * SIDE), 0)]
        for score, place in zip(best.scores[number], best.places[number].tolist(), strict=True):
            if score > _NOWHERE:
                hits.append(_closely(close[number], training[place[0]][0], place, codec))
        found.append(max(hits, key=lambda hit: hit.correlation))
        told.add()
    return found


class _Candidates:
    """The best places of each tile so far: scores (n, _BEST); slide, row, column, turn of each (n, _BEST, 4)."""

    def __init__(self, count: int) -> None:
        self.scores = np.full((count, _BEST), _NOWHERE, np.float32)
        self.places = np.zeros((count, _BEST, 4), np.int64)

    def offer(self, tile: int, score: float, place: tuple[int, int, int, int]) -> None:
        """In place of the worst of a tile."""
        last = int(self.scores[tile].argmin())
        self.scores[tile, last], self.places[tile, last] = score, place


def _whole(slide: Slide, until: float = 1.0) -> Grid:
    """The pixels of `PITCH` that lie in a slide, or the left part of it: an even number a side."""
    top, left, bottom, right = slide.grid.extent
    top, left = (math.ceil(edge / PITCH - 1e-6) for edge in (top, left))
    lengths = (bottom - top * PITCH, until * (right - left * PITCH))
    return Grid(PITCH, top, left, *(max(0, math.floor(length / PITCH + 1e-6) // 2 * 2) for length in lengths))


def _regions(area: Grid) -> list[Grid]:
    """What is read at once: tiles begin in squares of `_REGION` pixels, and reach beyond."""
    squares = area.aligned(_REGION).tiles(_REGION)
    parts = (Grid(PITCH, s.top, s.left, s.height + SIDE - 2, s.width + SIDE - 2).clip(area) for s in squares)
    return [part for part in parts if min(part.shape) >= SIDE]


def _search(number: int, place: Place, templates: Floats, best: _Candidates, codec: Codec, told: Told) -> None:
    """Lay the templates (n, 8, pixels) on all places with tissue in an area of a slide."""
    import torch

    slide, whole = place
    tissue, side, step = find_tissue(slide), SIDE // 2, _BLOCK // 2
    laid = torch.from_numpy(templates.reshape(-1, side * side))
    for region in _regions(whole):
        told.add()
        if not _has_tissue(tissue, region):
            continue
        picture = _inner(detail(_halved(_density(slide, region, codec)), 2 * PITCH), _MARGIN // 2)
        every = np.lib.stride_tricks.sliding_window_view(picture, (side, side))
        for top, left in ((r, c) for r in range(0, len(every), step) for c in range(0, every.shape[1], step)):
            places = every[top : top + step, left : left + step]
            height, width = (2 * (count - 1) + SIDE for count in places.shape[:2])
            area = Grid(PITCH, region.top + 2 * top, region.left + 2 * left, height, width)
            if not _has_tissue(tissue, area):
                continue
            scores = laid @ torch.from_numpy(_unit(places.reshape(-1, side * side))).T
            tops, turns = scores.amax(1).view(-1, 8).max(1)
            for tile in np.flatnonzero(tops.numpy() > best.scores.min(1)).tolist():
                turn = int(turns[tile])
                down, right = divmod(int(scores[8 * tile + turn].argmax()), places.shape[1])
                best.offer(tile, float(tops[tile]), (number, area.top + 2 * down, area.left + 2 * right, turn))


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
    inside = around.clip(_whole(slide))
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


def search_seconds(tiles: int, training: Sequence[Slide], until: float = 1.0) -> float:
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
    count = sum(len(_regions(_whole(slide, until))) for slide in training)
    return count * (seconds[0] + (_REGION // _BLOCK) ** 2 * seconds[1]) + 0.02 * tiles
