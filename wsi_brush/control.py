"""Whether a painting shows what it was asked for: its tiles beside the real ones that they follow.

In any encoder; also in `Descriptor`, plain figures of colour and texture that no brush has ever seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distances import Groups, Vectors
from .embed import TileEncoder
from .likeness import Rows, bounded, number
from .progress import Tell, Told
from .samples import (
    Codec,
    Field,
    Spot,
    blocks,
    by_tile,
    elsewhere,
    embed_spots,
    finite,
    read_spots,
    spots_of,
)
from .sides import Sides
from .texture import DESCRIPTOR, descriptor

PLACE = 512.0
"""µm: side of the regions among which the own reference is looked for."""
_APART, _LEAST = 16, 8  # tiles: of fewer, they may overlap; of fewer still, nothing is said
_FAR, _DEAD = 3.0, 0.01  # spreads, as the brush hears them; part of the median spread


def control(
    sides: Sides, encoders: Sequence[TileEncoder], codec: Codec, scales: Sequence[float], *, most: int, seed: int,
    tell: Tell | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How near a painting comes to the tile that it follows, and whether its reference is found among all.

    Raises:
        SlideError: if a slide cannot be read, or an embedding is not finite.
    """
    found: dict[str, Any] = {encoder.name: {"cosine": {}} for encoder in encoders}
    for alike in by_tile(encoders):
        for mpp in scales:
            for encoder, said in zip(alike, _matched(sides, alike, codec, mpp, most, seed, tell), strict=True):
                found[encoder.name]["cosine"][f"{mpp:g}"] = said
        for encoder, said in zip(alike, retrieval(sides, alike, codec, scales[0], seed=seed, tell=tell), strict=True):
            found[encoder.name]["retrieval"] = said
    return found


def _matched(
    sides: Sides, encoders: Sequence[TileEncoder], codec: Codec, mpp: float, most: int, seed: int, tell: Tell | None
) -> list[dict[str, Any]]:
    """Of each encoder: cosine of tiles with their own real ones (mean), with real ones elsewhere, and of the real ones
    with those elsewhere (chance)."""
    # where the reference has tissue, whatever was painted there
    references, tile = [sides.real[pair.real] for pair in sides.pairs], encoders[0].tile
    found = spots_of(references, mpp, tile, stride=1.0, most=most, seed=seed)
    if len(found) < _APART:
        found = spots_of(references, mpp, tile, stride=0.5, most=most, seed=seed)
    theirs, spots = list[Spot](), list[Spot]()
    for followed, grid in found:
        follower = sides.pairs[followed]
        if (spot := sides.painted(follower, grid)) is not None:
            theirs.append(Spot(follower.real, grid))
            spots.append(spot)
    if len(spots) < _LEAST:
        few = f"{len(spots)} tiles of {tile * mpp:g} µm with tissue; {_LEAST} are needed"
        return [{"n": len(spots), "missing": few}] * len(encoders)
    told, groups = Told(tell, f"comparing at {mpp:g} µm", 2 * len(spots)), blocks(sides.real, theirs)
    vectors = [
        embed_spots(fields, mine, encoders, codec, told)
        for fields, mine in ((sides.synthetic, spots), (sides.real, theirs))
    ]
    others = np.array(elsewhere(sides.real, theirs, seed=seed))
    some, figures = others >= 0, []
    for pair in zip(*vectors, strict=True):
        ours, real = _standard(*pair)
        cosine, other, chance = (
            (one * another).sum(1) for one, another in ((ours, real), (ours, real[others]), (real, real[others]))
        )
        said: dict[str, Any] = {"n": len(spots), "seed": seed, "blocks": len(np.unique(groups))}
        said |= _mean("mean", cosine, groups, seed)
        for name, values in (("elsewhere", other), ("chance", chance)):
            said |= _mean(name, values[some], groups[some], seed)
        said["worst"] = [
            {"cosine": number(cosine[k]), "synthetic": spots[k].field, "real": theirs[k].field,
             "place": [spots[k].grid.top, spots[k].grid.left], "there": [theirs[k].grid.top, theirs[k].grid.left]}
            for k in np.argsort(cosine)[:8]
        ]  # fmt: skip
        figures.append(said)
    return figures


def _mean(name: str, cosine: Vectors, groups: Groups, seed: int) -> dict[str, float | None]:
    """A mean and its interval; of nothing None."""
    before, rows = "" if name == "mean" else f"{name}_", Rows(cosine, groups)
    if not len(cosine):
        return {name: None, f"{before}low": None, f"{before}high": None}
    (mean,), ((low,), (high,)) = bounded(lambda one, _: one.mean(), (rows, rows), seed=seed, draws=200)
    return {name: number(mean), f"{before}low": number(low, (-1, 1)), f"{before}high": number(high, (-1, 1))}


def _standard(ours: Vectors, real: Vectors) -> tuple[Vectors, Vectors]:
    """Both in units of the real side's spread, none further than `_FAR`, of length 1; numbers that hardly vary there
    are left out. Else the few in which tissue does not differ, or few tiles by chance, would be all that is heard."""
    mean, spread = real.mean(0), real.std(0)
    heard = spread > _DEAD * np.median(spread)
    found = [((side - mean)[:, heard] / spread[heard]).clip(-_FAR, _FAR) for side in (ours, real)]
    ours, real = (side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in found)
    return ours, real


def retrieval(
    sides: Sides, encoders: Sequence[TileEncoder], codec: Codec, mpp: float, *, place: float = PLACE,
    stride: float = 1.0, seed: int = 0, tell: Tell | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Of each encoder: regions of `place` µm, each the mean of its tiles: is the nearest real one the own reference?
    (`top1`, `top5`, of `n` that ask; a region that several paintings follow is there once)

    At most 64 regions of a painting, drawn by `seed` where it has more. `real`: how often the mean of half of a real
    region's tiles finds that of the other half. `stride`: 0.5 for regions that overlap by half, so that the own one is
    to be told from neighbours that share half of it.

    Raises:
        SlideError: if a slide cannot be read, or an embedding is not finite.
    """
    tile = encoders[0].tile
    per = max(1, round(place / mpp / tile))
    ours, own, places = list[Spot](), list[int](), dict[Spot, int]()
    for pair in sides.pairs:
        for spot in spots_of([sides.real[pair.real]], mpp, per * tile, stride=stride, most=64, seed=seed):
            if (painted := sides.painted(pair, spot.grid)) is not None:
                ours.append(painted)
                own.append(places.setdefault(Spot(pair.real, spot.grid), len(places)))
    theirs = list(places)
    if len(theirs) < 4:
        return [{"regions": len(theirs), "missing": "fewer than 4 regions"}] * len(encoders)
    told = Told(tell, "looking for the own reference", len(ours) + len(theirs))
    some = np.unique(np.arange(4) * per // 4)

    def embedded(fields: Sequence[Field], spots: Sequence[Spot]) -> list[Vectors]:
        """Of each encoder (n, tiles of a region, dim); of many tiles, 4 x 4 that are spread evenly."""
        found: list[list[Vectors]] = [[] for _ in encoders]
        for (region,) in read_spots(fields, spots, codec, batch=1):
            tiles = region.reshape(per, tile, per, tile, 3).swapaxes(1, 2)[some][:, some]
            tiles = np.ascontiguousarray(tiles.reshape(-1, tile, tile, 3))
            for encoder, vectors in zip(encoders, found, strict=True):
                vectors.append(finite(encoder(tiles), fields[spots[len(vectors)].field], encoder, mpp))
            told.add()
        return [np.stack(vectors) for vectors in found]

    return [
        {
            "n": len(ours),
            "regions": len(theirs),
            "side": per * tile * mpp,
            "chance": round(1 / len(theirs), 4),
            "seed": seed,
        }
        | _ranked(*pair, own)
        for pair in zip(embedded(sides.synthetic, ours), embedded(sides.real, theirs), strict=True)
    ]


def _ranked(ours: Vectors, real: Vectors, own: Sequence[int]) -> dict[str, Any]:
    first, side = _ranks(ours.mean(1), real.mean(1), own), math.isqrt(real.shape[1])
    found = _share("top1", first < 1, len(real)) | _share("top5", first < 5, len(real))
    if side > 1:
        black = np.indices((side, side)).sum(0).ravel() % 2 == 0  # of a chessboard of tiles
        halves = real[:, black].mean(1), real[:, ~black].mean(1)
        found |= _share("real", _ranks(*halves, range(len(real))) < 1, len(real))
    return found


def _ranks(ours: Vectors, real: Vectors, own: Sequence[int]) -> NDArray[np.int_]:
    """How many others are as near as the own one, or nearer."""
    one, other = _standard(ours, real)
    scores = one @ other.T
    return np.asarray((scores >= scores[np.arange(len(ours)), own][:, None]).sum(1) - 1)


def _share(name: str, hits: NDArray[np.bool_], regions: int) -> dict[str, float | None]:
    """How many there are of all, and its interval after Clopper & Pearson (1934), as of one painting of each region:
    others of a region are no other witnesses. A bootstrap of what is always, or never, so has none."""
    from scipy.stats import binomtest

    low, high = binomtest(round(hits.mean() * regions), regions).proportion_ci(0.95)
    return {name: number(hits.mean()), f"{name}_low": number(low), f"{name}_high": number(high)}


class Descriptor:
    """`texture.descriptor` as an encoder: colours and octaves, which no brush is conditioned on."""

    name, dim, tile, fingerprint = "descriptor", DESCRIPTOR, 128, "descriptor-1"

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, tile, tile, 3) -> (n, 24)."""
        return np.stack([descriptor(tile) for tile in tiles]).astype(np.float32)
