"""Whether a painting shows what it was asked for: its tiles beside the real ones that they follow.

In any encoder; also in `Descriptor`, plain figures of colour and texture that no brush has ever seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distances import Vectors, interval
from .embed import TileEncoder
from .progress import Tell, Told
from .samples import Codec, Field, Sides, Spot, blocks, read_spots, spots_of
from .texture import descriptor

_PLACE = 512  # µm: regions among which the own reference is looked for


def control(
    sides: Sides, encoders: Sequence[TileEncoder], codec: Codec, scales: Sequence[float], *, most: int, seed: int,
    tell: Tell | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How near a painting comes to the tile that it follows, and whether its reference is found among all."""
    found: dict[str, Any] = {}
    for encoder in encoders:
        by_scale = {f"{mpp:g}": _matched(sides, encoder, codec, mpp, most, seed, tell) for mpp in scales}
        found[encoder.name] = {"cosine": by_scale, "retrieval": _retrieval(sides, encoder, codec, scales[0])}
    return found


def _matched(
    sides: Sides, encoder: TileEncoder, codec: Codec, mpp: float, most: int, seed: int, tell: Tell | None
) -> dict[str, Any]:
    # where the reference has tissue, whatever was painted there
    by_field = {pair.real: pair for pair in sides.pairs}
    theirs = spots_of(sides.real, mpp, encoder.tile, stride=1.0, most=most, seed=seed)
    theirs = [spot for spot in theirs if spot.field in by_field]
    spots = [Spot(by_field[spot.field].synthetic, by_field[spot.field].here(spot.grid)) for spot in theirs]
    if len(spots) < 2:
        return {"n": len(spots), "missing": "fewer than 2 tiles with tissue"}
    told = Told(tell, f"comparing at {mpp:g} µm", len(spots))
    vectors: list[list[NDArray[np.float32]]] = [[], []]
    for ours, real in zip(
        read_spots(sides.synthetic, spots, codec), read_spots(sides.real, theirs, codec), strict=True
    ):
        vectors[0].append(encoder(ours))
        vectors[1].append(encoder(real))
        told.add(len(ours))
    both = _standard(*(np.concatenate(side).astype(np.float64) for side in vectors))
    cosine = (both[0] * both[1]).sum(1)
    other = (both[0] * np.roll(both[1], len(spots) // 2, axis=0)).sum(1)
    numbers = blocks(sides.real, theirs)
    low, high = interval(lambda one, _: one.mean(), cosine, cosine, draws=200, seed=seed, groups=(numbers, numbers))
    worst = np.argsort(cosine)[:8]
    return {
        "n": len(spots), "mean": round(float(cosine.mean()), 4),
        "low": round(float(low), 4), "high": round(float(high), 4), "blocks": len(np.unique(numbers)),
        "elsewhere": round(float(other.mean()), 4),
        "worst": [
            {"cosine": round(float(cosine[k]), 4), "synthetic": spots[k].field, "real": theirs[k].field,
             "place": [spots[k].grid.top, spots[k].grid.left], "there": [theirs[k].grid.top, theirs[k].grid.left]}
            for k in worst
        ],
    }  # fmt: skip


def _standard(ours: Vectors, real: Vectors) -> tuple[Vectors, Vectors]:
    """Both in units of the real side's spread, of length 1."""
    mean, spread = real.mean(0), np.maximum(real.std(0), 1e-6)
    found = [(side - mean) / spread for side in (ours, real)]
    ours, real = (side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in found)
    return ours, real


def _retrieval(sides: Sides, encoder: TileEncoder, codec: Codec, mpp: float) -> dict[str, Any]:
    """Regions of 512 µm, each the mean of its tiles: is the nearest real one the own reference?"""
    per = max(1, round(_PLACE / mpp / encoder.tile))
    side = per * encoder.tile
    ours, theirs = [], []
    for pair in sides.pairs:
        for spot in spots_of([sides.real[pair.real]], mpp, side, stride=1.0, most=64):
            ours.append(Spot(pair.synthetic, pair.here(spot.grid)))
            theirs.append(Spot(pair.real, spot.grid))
    if len(ours) < 4:
        return {"regions": len(ours), "missing": "fewer than 4 regions"}

    def means(fields: Sequence[Field], spots: Sequence[Spot]) -> Vectors:
        found = []
        for (region,) in read_spots(fields, spots, codec, batch=1):
            tiles = region.reshape(per, encoder.tile, per, encoder.tile, 3).swapaxes(1, 2)
            tiles = tiles.reshape(-1, encoder.tile, encoder.tile, 3)[:: max(1, per * per // 16)]
            found.append(encoder(np.ascontiguousarray(tiles)).astype(np.float64).mean(0))
        return np.stack(found)

    one, other = _standard(means(sides.synthetic, ours), means(sides.real, theirs))
    scores = one @ other.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    return {
        "regions": len(ours), "side": side * mpp, "top1": round(float((ranks < 1).mean()), 4),
        "top5": round(float((ranks < 5).mean()), 4), "chance": round(1 / len(ours), 4),
    }  # fmt: skip


class Descriptor:
    """`texture.descriptor` as an encoder: colours and octaves, which no brush is conditioned on."""

    name, dim, tile, fingerprint = "descriptor", 24, 128, "descriptor-1"

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, tile, tile, 3) -> (n, 24)."""
        return np.stack([descriptor(tile) for tile in tiles]).astype(np.float32)
