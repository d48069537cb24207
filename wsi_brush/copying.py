"""Whether a painting copies what its brush was trained on: the nearest place in the training slides of each tile.

Real tiles that the brush has not seen are laid on the training slides too; what is nearer to them than those are is
called a copy. Nearness is that of `nearest`: in an encoder's space all tissue of a kind is near, and none is a copy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distances import Groups, interval
from .embed import slide_fingerprint
from .grid import Grid
from .nearest import NOWHERE, PITCH, SIDE, Hit, Place, nearest, whole
from .progress import Tell
from .samples import FINER, Codec, Spot, blocks, shows, spots_of
from .sides import Sides, open_all
from .slide import Slide

Scores = NDArray[np.float64]
MOST = 400
"""Tiles of a side at most."""
_RARE, _SURE = 0.01, 0.95  # the share of held-out tiles that may be called copies, and how surely it is not exceeded
_FEW = 32  # held-out tiles; from fewer, nothing is said
_BLOCKS = 8  # of tiles; of fewer, no interval is drawn
_SAME = 0.7  # unrelated tissue came to 0.44 at most
_SHOWN = 12


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
    parts = [(slide, whole(slide, until)) for slide in sides.training]
    strange = _unseen(sides, parts, min(most, MOST), seed)
    ours_at = spots_of(sides.synthetic, PITCH, SIDE, stride=1.0, most=min(most, MOST), seed=seed)
    tiles = [(sides.real[spot.field].slide, spot.grid) for spot in strange]
    tiles += [(sides.synthetic[spot.field].slide, spot.grid) for spot in ours_at]
    hits = nearest(tiles, parts, codec, tell=tell)
    if all(hit.correlation == NOWHERE for hit in hits):
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
    """The correlation that next to no held-out tile exceeds: the higher of two.

    One is the order statistic that, 95 % sure, at most 1 % exceed, whatever their distribution is (Wilks, 1941); of
    fewer than 299 tiles it is the largest, and less sure. The other is what 0.1 % exceed where the tail beyond the
    highest tenth is exponential (Davison and Smith, 1990), so that the first tile beyond the largest is no copy yet.
    """
    from scipy.special import bdtr  # the binomial distribution

    rank = max(1, int((bdtr(np.arange(len(scores)), len(scores), _RARE) <= 1 - _SURE).sum()))
    high = np.quantile(scores, 0.9)
    tail = high + (scores[scores >= high] - high).mean() * math.log(0.1 / (_RARE / 10))
    return float(max(np.sort(scores)[-rank], tail))


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
