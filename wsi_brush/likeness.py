"""How like two sides are: distances of their tiles in an encoder's space, their spectrum, stain and nuclei, seams.

A figure of a distribution stands beside its floor, the same figure between two real halves that share no pixel, at the
same number of tiles; both have a bootstrap interval over blocks of neighbouring tiles where there are blocks enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .distances import Groups, Overlap, Vectors, frechet, interval, kernel_distance, overlap
from .embed import TileEncoder
from .errors import SlideError
from .grid import Grid
from .progress import Tell, Told
from .samples import Codec, Sides, Spot, blocks, halves, read_spots, spots_of
from .texture import Nuclei, densities, find_nuclei, nuclear_threshold, octaves, seams, stain_distance

_WINDOW, _WINDOWS, _OCTAVES = 512, 48, 6  # pixels, and how many, for spectrum, stain and nuclei
_SHARP = 1.0  # µm: the coarsest pitch at which nuclei are looked for
_SEAM = 4096  # pixels a side that are searched for seams at most
_LIMITS = {"frechet": (0.0, math.inf), "kernel": (-math.inf, math.inf), "precision": (0.0, 1.0), "recall": (0.0, 1.0),
           "density": (0.0, math.inf), "coverage": (0.0, 1.0)}  # fmt: skip
_FEW = 8  # blocks of tiles; of fewer, no interval is drawn
_WIDE = 1024  # numbers of a vector; of more, the Fréchet distance alone takes seconds, and a bootstrap hours
_AT_ONCE = 2**22  # pixels of tiles that are read at once


def measured(
    names: Sequence[str], figure: Callable[[Vectors, Vectors], Any], first: Vectors, second: Vectors, other: Vectors, *,
    groups: tuple[Groups, Groups, Groups], seed: int, draws: int = 100,
    beside_second: Mapping[str, Vectors] | None = None,
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """Figures between a real half and the synthetic side, and between the real halves, each with its interval.

    `beside_second`: other vectors for the places of the second half, which are compared with the first one too.
    """
    found: dict[str, dict[str, float | None]] = {name: {} for name in names}
    more = [(name, vectors, groups[1]) for name, vectors in (beside_second or {}).items()]
    for start, one, mine in (("", other, groups[2]), ("floor", second, groups[1]), *more):
        values = np.atleast_1d(figure(first, one))
        edges: Any = [[None] * len(names)] * 2
        if draws and min(len(np.unique(ids)) for ids in (groups[0], mine)) >= _FEW:
            edges = interval(figure, first, one, seed=seed, draws=draws, groups=(groups[0], mine))
        for name, value, low, high in zip(names, values, *map(np.atleast_1d, edges), strict=True):
            before = f"{start}_" if start else ""
            found[name] |= {start or "value": _number(value)}
            found[name] |= {f"{before}{k}": _number(v, _LIMITS[name]) for k, v in (("low", low), ("high", high))}
    return found


def _number(value: Any, limits: tuple[float, float] = (-math.inf, math.inf)) -> float | None:
    """Six digits of a number, for JSON; None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{min(max(float(value), limits[0]), limits[1]):.6g}")


@dataclass
class Seen:
    """The tiles of one scale: where they are, what an encoder makes of them, and the real halves."""

    spots: tuple[list[Spot], list[Spot]]
    vectors: tuple[Vectors, Vectors]
    parts: tuple[list[int], list[int]]


def see(
    sides: Sides, mpp: float, encoder: TileEncoder, codec: Codec, *, most: int, seed: int, tell: Tell | None = None,
    words: str = "embedding",
) -> Seen:  # fmt: skip
    """Embed the tiles of both sides at one pitch; `words` are for `tell`.

    Raises:
        SlideError: if an embedding is not finite.
    """
    both = (sides.real, sides.synthetic)
    spots = tuple(spots_of(fields, mpp, encoder.tile, most=most, seed=seed) for fields in both)
    told, found = Told(tell, f"{words} at {mpp:g} µm", sum(map(len, spots))), []
    batch = min(64, max(1, _AT_ONCE // encoder.tile**2))
    for fields, mine in zip(both, spots, strict=True):
        vectors = np.zeros((len(mine), encoder.dim))
        done = 0
        for tiles in read_spots(fields, mine, codec, batch=batch):
            vectors[done : done + len(tiles)] = encoder(tiles)
            if not np.isfinite(vectors[done : done + len(tiles)]).all():
                name = fields[mine[done].field].slide.path
                raise SlideError(f"{name}: encoder {encoder.name} gives numbers that are not finite at {mpp:g} µm")
            done += len(tiles)
            told.add(len(tiles))
        found.append(vectors)
    return Seen((spots[0], spots[1]), (found[0], found[1]), halves(sides.real, spots[0]))


def distribution(sides: Sides, seen: Seen, *, seed: int, thumbnail: Vectors | None = None) -> dict[str, Any]:
    """Fréchet and kernel distance, precision, recall, density and coverage of one scale, at equal numbers of tiles.

    One real half is compared with the other (the floor), and with the synthetic tiles that lie where the other half
    does; where nothing is paired, with any. `thumbnail`: a vector for each real tile, of which those of the second half
    are compared too (`published`).
    """
    first, second = seen.parts
    theirs = _beside_second(sides, seen)
    count = min(len(first), len(second), len(theirs))
    found: dict[str, Any] = {"real": len(seen.vectors[0]), "synthetic": len(seen.vectors[1]), "n": count}
    dim = seen.vectors[0].shape[1]
    if count < 8:
        return found | {"missing": f"{count} tiles a half; at least 8 are needed"}
    rows = [  # by one seed: where both sides have the same places, the same are drawn
        np.sort(np.random.default_rng(seed).choice(np.asarray(part), count, replace=False))
        for part in (first, second, theirs)
    ]
    sets = seen.vectors[0][rows[0]], seen.vectors[0][rows[1]], seen.vectors[1][rows[2]]
    numbers = blocks(sides.real, seen.spots[0]), blocks(sides.synthetic, seen.spots[1])
    groups = numbers[0][rows[0]], numbers[0][rows[1]], numbers[1][rows[2]]
    beside = None if thumbnail is None else {"thumbnail": thumbnail[rows[1]]}
    said = partial(
        measured, first=sets[0], second=sets[1], other=sets[2], groups=groups, seed=seed, beside_second=beside
    )
    if count >= 1.25 * dim:
        found |= said(["frechet"], frechet, draws=100 if dim <= _WIDE else 0)
    else:
        found["frechet"] = {"missing": f"{count} tiles of {dim} numbers have no covariance; see the kernel distance"}
    return found | said(["kernel"], kernel_distance) | said(list(Overlap._fields), _overlap)


def _overlap(real: Vectors, other: Vectors) -> Vectors:
    return np.array(overlap(real, other))


def _beside_second(sides: Sides, seen: Seen) -> list[int]:
    """The synthetic spots, by number, whose places on the real slides lie in the second half."""
    if len(sides.pairs) < len(sides.synthetic):
        return list(range(len(seen.spots[1])))
    by_field = {pair.synthetic: pair for pair in sides.pairs}
    places = [Spot(by_field[spot.field].real, by_field[spot.field].there(spot.grid)) for spot in seen.spots[1]]
    return halves(sides.real, places)[1]


# -- what needs no network -----------------------------------------------------------------------------


def texture(sides: Sides, codec: Codec, *, mpp: float, seed: int, tell: Tell | None = None) -> dict[str, Any]:
    """Spectrum, stain and nuclei of windows at one pitch; nuclei only where it is fine enough to see them."""
    both = (sides.real, sides.synthetic)
    spots = tuple(spots_of(fields, mpp, _WINDOW, stride=1.0, most=_WINDOWS, seed=seed) for fields in both)
    if min(map(len, spots)) < 4:
        return {"missing": f"fewer than 4 windows of {_WINDOW} pixels with tissue at {mpp:g} µm"}
    windows = [np.concatenate(list(read_spots(f, s, codec))) for f, s in zip(both, spots, strict=True)]
    random, told = np.random.default_rng(seed), Told(tell, "looking at texture", sum(map(len, spots)))
    sharp = mpp <= _SHARP
    threshold = nuclear_threshold(list(windows[0]), mpp) if sharp else math.nan
    nuclei: list[list[Nuclei]] = []
    spectra, colours = [], []
    for side in windows:
        nuclei.append([])
        for window in side:
            if sharp:
                nuclei[-1].append(find_nuclei(window, mpp, threshold))
            told.add()
        spectra.append(np.stack([octaves(window, _OCTAVES) for window in side]))
        pixels = densities(side).reshape(len(side), -1, 3)
        colours.append(pixels[:, random.choice(pixels.shape[1], 2000, replace=False)])
    first, second = (list(range(start, len(spots[0]), 2)) for start in (0, 1))  # windows share no pixel
    count = min(len(first), len(second), len(spots[1]))
    some = [random.permutation(part)[:count] for part in (first, second, range(len(spots[1])))]
    stain = [colours[side][part].reshape(-1, 3) for side, part in zip((0, 0, 1), some, strict=True)]
    return {
        "mpp": mpp, "window": _WINDOW, "real": len(spots[0]), "synthetic": len(spots[1]),
        "octaves": _spectrum(spectra[0], spectra[1], first, second, mpp, seed),
        "stain": {
            "channels": ["red", "green", "blue"],
            "windows": count,
            "distance": stain_distance(stain[0], stain[2]).round(4).tolist(),
            "floor": stain_distance(stain[0], stain[1]).round(4).tolist(),
            "mean": [side.mean((0, 1), dtype=np.float64).round(4).tolist() for side in colours],
        },
        "nuclei": _nuclei(nuclei[0], nuclei[1], seed) if sharp else {"missing": f"not to be seen at {mpp:g} µm"},
    }  # fmt: skip


def _spectrum(
    real: Vectors, synthetic: Vectors, first: list[int], second: list[int], mpp: float, seed: int
) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def drawn(side: Vectors) -> Vectors:
        return np.stack([side[random.integers(len(side), size=len(side))].mean(0) for _ in range(200)])

    with np.errstate(divide="ignore", invalid="ignore"):  # a side may have nothing of an octave
        ratio = synthetic.mean(0) / real.mean(0)
        low, high = np.quantile(drawn(synthetic) / drawn(real), [0.025, 0.975], axis=0)
        floor = real[first].mean(0) / real[second].mean(0)
    return {
        "wavelength": [round(2 * mpp * 2**k, 3) for k in range(_OCTAVES)],  # µm, the shortest of the octave
        "ratio": [*map(_number, ratio)], "low": [*map(_number, low)], "high": [*map(_number, high)],
        "floor": [*map(_number, floor)],
    }  # fmt: skip


def _nuclei(real: list[Nuclei], synthetic: list[Nuclei], seed: int) -> dict[str, Any]:
    from scipy.stats import wasserstein_distance

    random = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, side in (("real", real), ("synthetic", synthetic)):
        counts, fields = (np.array([getattr(one, part) for one in side], float) for part in ("count", "field"))
        rows = random.integers(len(side), size=(200, len(side)))
        drawn = counts[rows].sum(1) / fields[rows].sum(1)
        area, shape = (np.concatenate([getattr(one, part) for one in side]) for part in ("area", "eccentricity"))
        found[name] = {
            "count": int(counts.sum()), "density": round(float(counts.sum() / fields.sum()), 1),
            "low": round(float(np.quantile(drawn, 0.025)), 1), "high": round(float(np.quantile(drawn, 0.975)), 1),
            "median_area": round(float(np.median(area)), 2) if len(area) else None,
            "median_eccentricity": round(float(np.median(shape)), 3) if len(shape) else None,
            "areas": np.histogram(area, bins=np.linspace(0, 200, 41))[0].tolist(),
        }  # fmt: skip
    for part in ("area", "eccentricity"):
        one, other = (np.concatenate([getattr(n, part) for n in side]) for side in (real, synthetic))
        if len(one) and len(other):
            found[f"{part}_distance"] = round(float(wasserstein_distance(one, other)), 4)
    return found


def borders(sides: Sides, codec: Codec) -> list[dict[str, Any]]:
    """Whether a lattice is seen in the synthetic slides, and in the real ones that they follow at the same places.

    Cells of 2 and 8 pixels are the lattices of the operator, 256 and 1024 are chunks and tiles; the latter are compared
    with other lines of the operator's lattice, every 32 pixels.
    """
    real, found = {pair.synthetic: pair for pair in sides.pairs}, []
    for number, one in enumerate(sides.synthetic):
        area = one.area.clip(Grid(one.slide.mpp, one.area.top, one.area.left, _SEAM, _SEAM))
        pixels = [codec(one.slide.read(area))]
        if number in real:
            pixels.append(codec(sides.real[real[number].real].slide.read(real[number].there(area))))
        for period, among in ((2, 1), (8, 1), (256, 32), (1024, 32)):
            if min(area.shape) >= 2 * period:
                ours, *theirs = (seams(side, period, among=among) for side in pixels)
                said = {"slide": one.name, "period": period, "ratio": _number(ours.ratio), "rank": _number(ours.rank)}
                found.append(said | {"floor": _number(theirs[0].ratio) if theirs else None})
    return found
