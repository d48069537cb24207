"""How like two sides are: distances of their tiles in an encoder's space, their spectrum, stain and nuclei, seams.

Every figure of a distribution stands beside its floor, the same figure between two real halves that share no pixel, at
the same number of tiles, and has a bootstrap interval over blocks of neighbouring tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distances import Vectors, frechet, interval, kernel_distance, overlap
from .embed import TileEncoder
from .errors import SlideError
from .grid import Grid
from .samples import Codec, Sides, Spot, Tell, Told, blocks, halves, read_spots, spots_of
from .texture import Nuclei, densities, find_nuclei, nuclear_threshold, octaves, seams, stain_distance

_WINDOW, _WINDOWS, _OCTAVES = 512, 48, 6  # pixels, and how many, for spectrum, stain and nuclei
_BLOCK = 4  # sides of a tile: what lies in one block is drawn together
_SEAM = 4096  # pixels a side that are searched for seams at most


def measured(
    figure: Callable[[Vectors, Vectors], float], first: Vectors, second: Vectors, other: Vectors, *,
    groups: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]], seed: int, draws: int = 100,
) -> dict[str, float]:  # fmt: skip
    """A figure between a real half and the synthetic side, and between the real halves, each with its interval."""
    found: dict[str, float] = {}
    for name, one, mine in (("", other, groups[2]), ("floor", second, groups[1])):
        low, high = interval(figure, first, one, seed=seed, draws=draws, groups=(groups[0], mine))
        start = f"{name}_" if name else ""
        found |= {name or "value": figure(first, one), f"{start}low": low, f"{start}high": high}
    return {name: round(value, 6) for name, value in found.items()}


@dataclass
class Seen:
    """The tiles of one scale: where they are, what an encoder makes of them, and the real halves."""

    spots: tuple[list[Spot], list[Spot]]
    vectors: tuple[Vectors, Vectors]
    parts: tuple[list[int], list[int]]


def see(
    sides: Sides, mpp: float, encoder: TileEncoder, codec: Codec, *, most: int, seed: int, tell: Tell | None = None
) -> Seen:
    """Embed the tiles of both sides at one pitch.

    Raises:
        SlideError: if an embedding is not finite.
    """
    both = (sides.real, sides.synthetic)
    spots = tuple(spots_of(fields, mpp, encoder.tile, most=most, seed=seed) for fields in both)
    told, found = Told(tell, f"embedding at {mpp:g} µm", sum(map(len, spots))), []
    for fields, mine in zip(both, spots, strict=True):
        vectors = np.zeros((len(mine), encoder.dim))
        done = 0
        for tiles in read_spots(fields, mine, codec):
            vectors[done : done + len(tiles)] = encoder(tiles)
            if not np.isfinite(vectors[done : done + len(tiles)]).all():
                name = fields[mine[done].field].slide.path
                raise SlideError(f"{name}: encoder {encoder.name} gives numbers that are not finite at {mpp:g} µm")
            done += len(tiles)
            told.add(len(tiles))
        found.append(vectors)
    return Seen((spots[0], spots[1]), (found[0], found[1]), halves(sides.real, spots[0]))


def distribution(seen: Seen, *, seed: int) -> dict[str, Any]:
    """Fréchet and kernel distance, precision, recall, density and coverage of one scale, at equal numbers of tiles."""
    first, second = seen.parts
    count = min(len(first), len(second), len(seen.vectors[1]))
    found: dict[str, Any] = {"real": len(seen.vectors[0]), "synthetic": len(seen.vectors[1]), "n": count}
    dim = seen.vectors[0].shape[1]
    if count < 8:
        return found | {"missing": f"{count} tiles a half; at least 8 are needed"}
    random = np.random.default_rng(seed)
    rows = [
        np.sort(random.choice(np.asarray(part), count, replace=False))
        for part in (first, second, range(len(seen.vectors[1])))
    ]
    sets = seen.vectors[0][rows[0]], seen.vectors[0][rows[1]], seen.vectors[1][rows[2]]
    numbers = blocks(seen.spots[0], _BLOCK), blocks(seen.spots[1], _BLOCK)
    groups = numbers[0][rows[0]], numbers[0][rows[1]], numbers[1][rows[2]]
    said = partial(measured, first=sets[0], second=sets[1], other=sets[2], groups=groups, seed=seed)
    if count >= 1.25 * dim:
        found["frechet"] = said(frechet, draws=30)
    else:
        found["frechet"] = {"missing": f"{count} tiles of {dim} numbers have no covariance; see the kernel distance"}
    found["kernel"] = said(kernel_distance)
    for name in ("precision", "recall", "density", "coverage"):
        found[name] = said(partial(_overlap, name), draws=30)
    return found


def _overlap(name: str, real: Vectors, other: Vectors) -> float:
    return float(getattr(overlap(real, other), name))


# -- what needs no network -----------------------------------------------------------------------------


def texture(sides: Sides, codec: Codec, *, mpp: float, seed: int, tell: Tell | None = None) -> dict[str, Any]:
    """Spectrum, stain and nuclei of windows at the finest pitch that all slides have."""
    both = (sides.real, sides.synthetic)
    spots = tuple(spots_of(fields, mpp, _WINDOW, stride=1.0, most=_WINDOWS, seed=seed) for fields in both)
    if min(map(len, spots)) < 4:
        return {"missing": f"fewer than 4 windows of {_WINDOW} pixels with tissue at {mpp:g} µm"}
    windows = [np.concatenate(list(read_spots(f, s, codec))) for f, s in zip(both, spots, strict=True)]
    random, told = np.random.default_rng(seed), Told(tell, "looking at texture", sum(map(len, spots)))
    threshold = nuclear_threshold(list(windows[0]), mpp)
    nuclei: list[list[Nuclei]] = []
    spectra, colours = [], []
    for side in windows:
        nuclei.append([])
        for window in side:
            nuclei[-1].append(find_nuclei(window, mpp, threshold))
            told.add()
        spectra.append(np.stack([octaves(window, _OCTAVES) for window in side]))
        pixels = densities(side).reshape(len(side), -1, 3)
        colours.append(pixels[:, random.choice(pixels.shape[1], 2000, replace=False)].reshape(-1, 3))
    first, second = halves(sides.real, spots[0])
    return {
        "mpp": mpp, "window": _WINDOW, "real": len(spots[0]), "synthetic": len(spots[1]),
        "octaves": _spectrum(spectra[0], spectra[1], first, second, mpp, seed),
        "stain": {
            "channels": ["red", "green", "blue"],
            "distance": stain_distance(*colours).round(4).tolist(),
            "floor": stain_distance(*(_rows_of(colours[0], half, 2000) for half in (first, second))).round(4).tolist()
            if first and second else None,
            "mean": [side.mean(0, dtype=np.float64).round(4).tolist() for side in colours],
        },
        "nuclei": _nuclei(nuclei[0], nuclei[1], seed),
    }  # fmt: skip


def _rows_of(values: NDArray[Any], windows: Sequence[int], each: int) -> NDArray[Any]:
    return values.reshape(-1, each, 3)[list(windows)].reshape(-1, 3)


def _spectrum(
    real: Vectors, synthetic: Vectors, first: list[int], second: list[int], mpp: float, seed: int
) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def drawn(side: Vectors) -> Vectors:
        return np.stack([side[random.integers(len(side), size=len(side))].mean(0) for _ in range(200)])

    ratio = synthetic.mean(0) / real.mean(0)
    low, high = np.quantile(drawn(synthetic) / drawn(real), [0.025, 0.975], axis=0)
    floor = real[first].mean(0) / real[second].mean(0) if first and second else np.full(_OCTAVES, math.nan)
    return {
        "wavelength": [round(2 * mpp * 2**k, 3) for k in range(_OCTAVES)],  # µm, the shortest of the octave
        "ratio": ratio.round(4).tolist(), "low": low.round(4).tolist(), "high": high.round(4).tolist(),
        "floor": [None if math.isnan(value) else round(float(value), 4) for value in floor],
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


def borders(sides: Sides) -> list[dict[str, Any]]:
    """Whether a lattice is seen in the synthetic slides, and in the real ones that they follow at the same places.

    Cells of 2 and 8 pixels are the lattices of the operator, 256 and 1024 are chunks and tiles; the latter are compared
    with other lines of the operator's lattice, every 32 pixels.
    """
    real, found = {pair.synthetic: pair for pair in sides.pairs}, []
    for number, one in enumerate(sides.synthetic):
        area = one.area.clip(Grid(one.slide.mpp, one.area.top, one.area.left, _SEAM, _SEAM))
        pixels = [one.slide.read(area)]
        if number in real:
            pixels.append(sides.real[real[number].real].slide.read(real[number].there(area)))
        for period, among in ((2, 1), (8, 1), (256, 32), (1024, 32)):
            if min(area.shape) >= 2 * period:
                ours, *theirs = (seams(side, period, among=among) for side in pixels)
                said = {"slide": one.name, "period": period, "ratio": round(ours.ratio, 4), "rank": round(ours.rank, 4)}
                found.append(said | {"floor": round(theirs[0].ratio, 4) if theirs else None})
    return found
