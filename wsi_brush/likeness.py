"""How like two sides are: distances of their tiles in an encoder's space, their spectrum, stain and nuclei.

A figure stands beside its floor, the same figure between two real halves that share no pixel, at the same number of
tiles where that number moves it; both have a bootstrap interval over blocks of neighbouring tiles, or over windows of
that size, where there are enough of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .distances import Groups, Overlap, Vectors, frechet, interval, kernel_distance, overlap
from .embed import TileEncoder
from .grid import Grid
from .progress import Tell, Told
from .samples import Codec, Spot, by_tile, embed_spots, read_spots
from .sides import Sides
from .slide import Slide
from .texture import densities, find_nuclei, nuclear_threshold, octaves, stain_distance

_WINDOWS, _FEWEST = (512, 256, 128), 4  # for spectrum, stain and nuclei: pixels, how many windows at least
_PART = 32  # as many windows of 512 pixels as this part of the tiles at most
_OCTAVES = 6
THUMBNAIL = 256
"""Pixels of the longer side of a thumbnail."""
_SHARP = 1.0  # µm: the coarsest pitch at which nuclei are looked for
_PIXELS = 1000  # of a window, for stain
_LIMITS = {"kernel": (-math.inf, math.inf)} | dict.fromkeys(("precision", "recall", "coverage", "rank"), (0.0, 1.0))
_FEW = 8  # blocks; of fewer, no interval is drawn
_WIDE = 1024  # numbers of a vector; of more, the Fréchet distance alone takes seconds, and a bootstrap hours
_REACH = 2  # pixels of a thumbnail that bicubic interpolation reaches beyond an edge
_TOGETHER = 2**20  # pixels of thumbnails that are held at once
_WHOLE = 2**20  # tiles: as wide as any slide
_LEAST, _NEIGHBOURS = 8, 20  # tiles a half, without which nothing is said, and nothing of neighbourhoods


class Rows(NamedTuple):
    """A sample: what figures are made of, one row a tile or window, and which rows are drawn together."""

    values: NDArray[Any]
    groups: Groups


Samples = Mapping[str, tuple[Rows, Rows] | None]
"""What a figure is of: `value`, the two sides; `floor`, two real halves, and whatever else stands beside it."""


def measured(
    names: Sequence[Any], figure: Callable[[Any, Any], Any], samples: Samples, *, seed: int, draws: int = 100,
    together: bool = False,
) -> dict[Any, dict[str, Any]]:  # fmt: skip
    """Figures of each pair of samples with their intervals: by name value, low, high, floor, floor_low, floor_high, ...
    (None where there is none), n, floor_n, ... (rows of the two) and seed. `together`: groups of one number in both of
    `value` are drawn as one, as in `distances.interval`."""
    found: dict[Any, dict[str, Any]] = {name: {} for name in names}
    about: dict[str, Any] = {"seed": seed}
    for start, pair in samples.items():
        nothing = [None] * len(names)
        how: dict[str, Any] = {"seed": seed, "draws": draws, "together": together and start == "value"}
        values, edges = (nothing, [nothing] * 2) if pair is None else bounded(figure, pair, **how)
        before = "" if start == "value" else f"{start}_"
        for name, value, low, high in zip(names, values, *edges, strict=True):
            limits = _LIMITS.get(name, (0.0, math.inf))
            if low == high:  # as of a share of nothing or of all: drawn again it is the same, and that is no certainty
                low = high = None
            found[name] |= {start: number(value)}
            found[name] |= {f"{before}{k}": number(v, limits) for k, v in (("low", low), ("high", high))}
        about[f"{before}n"] = [len(one.values) for one in pair or ()]
    return {name: one | about for name, one in found.items()}


def bounded(
    figure: Callable[[Any, Any], Any], sample: tuple[Rows, Rows], *, seed: int, draws: int = 100, together: bool = False
) -> Any:
    """Figures of two samples, (k,), and their interval, (2, k); None for both edges where there are too few groups."""
    one, other = sample
    with np.errstate(divide="ignore", invalid="ignore"):  # a side may have nothing of an octave
        values = np.atleast_1d(figure(one.values, other.values))
        if not draws or min(len(np.unique(rows.groups)) for rows in sample) < _FEW:
            return values, [[None] * len(values)] * 2
        groups = one.groups, other.groups
        edges = interval(
            figure, one.values, other.values, seed=seed, draws=draws, groups=groups, together=together
        )  # fmt: skip
    return values, [*map(np.atleast_1d, edges)]


def number(value: Any, limits: tuple[float, float] = (-math.inf, math.inf)) -> float | None:
    """Six digits of a number, for JSON; None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{min(max(float(value), limits[0]), limits[1]):.6g}")


@dataclass
class Seen:
    """The tiles of one scale: where they are, what an encoder makes of them, the real halves, and whether these are of
    other slides."""

    spots: tuple[list[Spot], list[Spot]]
    vectors: tuple[Vectors, Vectors]
    parts: tuple[list[int], list[int]]
    by_slide: bool


def see(
    sides: Sides, mpp: float, encoders: Sequence[TileEncoder], codec: Codec, *, most: int, seed: int,
    tell: Tell | None = None, words: str = "embedding",
) -> list[Seen]:  # fmt: skip
    """Embed the tiles of both sides at one pitch, in each encoder; `words` are for `tell`.

    Raises:
        SlideError: if an embedding is not finite.
    """
    found: dict[str, Seen] = {}
    for alike in by_tile(encoders):
        both = sides.real, sides.synthetic
        real, synthetic = sides.spots(mpp, alike[0].tile, most=most, seed=seed)
        told, (parts, by_slide) = Told(tell, f"{words} at {mpp:g} µm", len(real) + len(synthetic)), sides.halves(real)
        vectors = [embed_spots(f, s, alike, codec, told) for f, s in zip(both, (real, synthetic), strict=True)]
        for encoder, one, other in zip(alike, *vectors, strict=True):
            found[encoder.name] = Seen((real, synthetic), (one, other), parts, by_slide)
    return [found[encoder.name] for encoder in encoders]


def distribution(sides: Sides, seen: Seen, *, seed: int, thumbnail: Vectors | None = None) -> dict[str, Any]:
    """Fréchet and kernel distance, precision, recall, density and coverage of one scale, at equal numbers of tiles.

    One real half is compared with the other (the floor), and with the synthetic tiles that lie where the other half
    does; where not all are paired, with any. `thumbnail`: a vector for each real tile, of which those of the second
    half are compared too (`through_thumbnails`).
    """
    first, second = seen.parts
    theirs = _beside_second(sides, seen.spots, second)
    count = min(len(first), len(second), len(theirs))
    found: dict[str, Any] = {"real": len(seen.vectors[0]), "synthetic": len(seen.vectors[1]), "n": count}
    found["halves"] = "other slides" if seen.by_slide else "squares of the same slides"
    if count < _LEAST:
        side = f" of {seen.spots[0][0].grid.height * seen.spots[0][0].grid.mpp:g} µm" if seen.spots[0] else ""
        return found | {
            "missing": f"{count} tiles{side} in a half; {_LEAST} are needed: give larger regions, or more pairs"
        }
    wide = _WHOLE if seen.by_slide else None
    numbers = sides.groups(*seen.spots, wide=wide)

    def drawn(vectors: Vectors, groups: Groups, part: list[int]) -> Rows:
        # by one seed: where both sides have the same places, the same are drawn
        some = np.sort(np.random.default_rng(seed).choice(np.asarray(part), count, replace=False))
        return Rows(vectors[some], groups[some])

    (real, synthetic), (here, there) = seen.vectors, numbers
    one, names = drawn(real, here, first), list(Overlap._fields)
    samples = {"value": (one, drawn(synthetic, there, theirs)), "floor": (one, drawn(real, here, second))}
    if thumbnail is not None:
        samples["thumbnail"] = (one, drawn(thumbnail, here, second))
    found |= compared(samples, seed=seed)
    if count < _NEIGHBOURS:
        few = {"missing": f"{count} tiles have no neighbourhoods; {_NEIGHBOURS} are needed"}
        return found | dict.fromkeys(names, few)
    return found | measured(names, overlap, samples, seed=seed)


def through_thumbnails(
    sides: Sides, seen: Seen, encoder: TileEncoder, codec: Codec, factor: int | None = None, tell: Tell | None = None
) -> Vectors | None:
    """What an encoder makes of the real tiles of the second half, each enlarged from a thumbnail: `factor` times
    smaller, or of its field `THUMBNAIL` pixels. Zeros elsewhere; None where no thumbnail is smaller than its field, or
    the tiles are too few for a figure.

    A figure in which a thumbnail does as well as the slide itself does not see detail.
    """
    second, vectors, any_shrunk = seen.parts[1], np.zeros_like(seen.vectors[0]), False
    if len(second) < _LEAST:
        return None
    told, batch = Told(tell, f"{encoder.name}, thumbnails", len(second)), max(1, _TOGETHER // encoder.tile**2)
    for start in range(0, len(second), batch):
        part = second[start : start + batch]
        tiles = []
        for number in part:
            field, grid = sides.real[seen.spots[0][number].field], seen.spots[0][number].grid
            times = factor or max(1, round(max(field.area.shape) * field.slide.mpp / grid.mpp / THUMBNAIL))
            any_shrunk |= times > 1
            tiles.append(codec(thumbnail(field.slide, grid, times)))
        vectors[part] = encoder(np.stack(tiles))
        told.add(len(part))
    return vectors if any_shrunk else None


def thumbnail(slide: Slide, grid: Grid, factor: int) -> NDArray[np.uint8]:
    """A square of a slide, shrunk by the mean over `factor` x `factor` pixels and enlarged again (bicubic)."""
    around = grid.pad(_REACH * factor).clip(slide.grid.at(grid.mpp))  # beyond the slide is white, which would seep in
    image = Image.fromarray(slide.read(around))
    cells = (0, 0, image.width / factor, image.height / factor)  # of the last one only a part may be there
    large = np.asarray(image.reduce(factor).resize(image.size, Image.Resampling.BICUBIC, box=cells))
    return large[grid.within(around)]


def compared(samples: Samples, *, seed: int) -> dict[str, Any]:
    """Fréchet and kernel distance of vectors; in place of the former, why not, where they have no covariance."""
    sets = [one.values for pair in samples.values() for one in pair or ()]
    count, dim = min(map(len, sets)), sets[0].shape[1]
    need, draws = math.ceil(1.25 * dim), 100 if dim <= _WIDE else 0
    few = {"missing": f"{count} tiles; of {dim} numbers {need} are needed for a covariance; see the kernel distance"}
    found = {"frechet": few} if count < need else measured(["frechet"], frechet, samples, seed=seed, draws=draws)
    return found | measured(["kernel"], kernel_distance, samples, seed=seed)


def _beside_second(sides: Sides, spots: tuple[list[Spot], list[Spot]], second: list[int]) -> list[int]:
    """The synthetic spots, by number, whose places are those of the second real half; where not all are paired, any."""
    real, synthetic = spots
    if not sides.paired:
        return list(range(len(synthetic)))
    there = {real[number] for number in second}
    return [number for number, place in enumerate(sides.followed(synthetic)) if place in there]


# -- what needs no network -----------------------------------------------------------------------------


class _Windows(NamedTuple):
    """Of the windows of a side, (n, ...): what each octave holds, optical densities of some pixels, nuclei; groups."""

    octaves: Vectors
    stain: NDArray[np.float32]
    nuclei: NDArray[Any]
    groups: Groups

    def rows(self, name: str, part: Any = slice(None)) -> Rows:
        return Rows(getattr(self, name)[part], self.groups[part])


def texture(
    sides: Sides, codec: Codec, *, mpp: float, most: int = 1536, seed: int, tell: Tell | None = None
) -> dict[str, Any]:
    """Spectrum, stain and nuclei of windows at one pitch; nuclei only where it is fine enough to see them.

    A distance is the larger the fewer windows it is of, so those are between halves and at equal numbers, as those of
    tiles are; ratios are of all windows.
    """
    window, (real, synthetic) = _largest_windows(sides, mpp, most, seed)
    if min(len(real), len(synthetic)) < _FEWEST:
        return {"missing": f"fewer than {_FEWEST} windows of {window} pixels with tissue at {mpp:g} µm"}
    told, threshold = Told(tell, "looking at texture", len(real) + len(synthetic)), math.nan
    # a window is as large as a block of tiles at the same pitch, and shares no pixel with another
    groups = sides.groups(real, synthetic, wide=1)
    windows: list[_Windows] = []
    for fields, spots, group in zip((sides.real, sides.synthetic), (real, synthetic), groups, strict=True):
        pixels = np.concatenate(list(read_spots(fields, spots, codec)))
        if mpp <= _SHARP and not windows:
            threshold = nuclear_threshold(list(pixels), mpp)
        windows.append(_looked_at(group, pixels, mpp, threshold, seed, told))
    first, second = sides.halves(real)[0]
    parts = [first, second, _beside_second(sides, (real, synthetic), second)]
    count, random = min(map(len, parts)), np.random.default_rng(seed)
    drawn = [np.sort(random.choice(np.asarray(part, np.intp), count, replace=False)) for part in parts]
    said = partial(_beside, windows, parts=drawn, paired=sides.paired, seed=seed)
    return {
        "mpp": mpp, "window": window, "real": len(real), "synthetic": len(synthetic), "n": count,
        "octaves": {"wavelength": [round(2 * mpp * 2**k, 3) for k in range(_OCTAVES)]}  # µm, the shortest of each
        | _listed("ratio", said("octaves", range(_OCTAVES), lambda a, b: b.mean(0) / a.mean(0), whole=True)),
        "stain": {"channels": ["red", "green", "blue"], "windows": count}
        | _listed("distance", said("stain", range(3), _stain))
        | {"mean": [one.stain.mean((0, 1), dtype=np.float64).round(4).tolist() for one in windows]},
        "nuclei": _nuclei(windows, said, seed) if mpp <= _SHARP else {"missing": f"not to be seen at {mpp:g} µm"},
    }  # fmt: skip


def _largest_windows(sides: Sides, mpp: float, most: int, seed: int) -> tuple[int, tuple[list[Spot], list[Spot]]]:
    """Side of the largest windows of which both sides have some, or of the smallest, and where they are."""
    for window in _WINDOWS:
        count = max(most // _PART, _FEWEST) * (_WINDOWS[0] // window) ** 2
        both = sides.spots(mpp, window, stride=1.0, most=count, seed=seed)
        if min(map(len, both)) >= _FEWEST:
            break
    return window, both


def _looked_at(
    groups: Groups, pixels: NDArray[np.uint8], mpp: float, threshold: float, seed: int, told: Told
) -> _Windows:
    random, spectra, colours = np.random.default_rng(seed), [], []
    nuclei = np.empty(len(pixels), object)
    for number, window in enumerate(pixels):
        spectra.append(octaves(window, _OCTAVES))
        colours.append(random.permutation(densities(window).reshape(-1, 3))[:_PIXELS])
        if math.isfinite(threshold):
            nuclei[number] = find_nuclei(window, mpp, threshold)
        told.add()
    return _Windows(np.stack(spectra), np.stack(colours), nuclei, groups)


def _beside(
    windows: Sequence[_Windows], name: str, names: Sequence[Any], figure: Callable[[Any, Any], Any], *,
    parts: Sequence[Groups], paired: bool, seed: int, whole: bool = False,
) -> dict[Any, dict[str, Any]]:  # fmt: skip
    """Figures between the sides (`whole`, or where there are no halves), or between the first real half and what lies
    beside the second."""
    real, synthetic = windows
    first, second, theirs = (side.rows(name, part) for side, part in zip((real, real, synthetic), parts, strict=True))
    halved = len(parts[0]) > 0
    apart = halved and not whole
    samples = {
        "value": (first, theirs) if apart else (real.rows(name), synthetic.rows(name)),
        "floor": (first, second) if halved else None,
    }
    return measured(names, figure, samples, seed=seed, together=paired and not apart)


def _listed(name: str, found: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """Figures of one kind as lists."""
    keys = ("value", "low", "high", "floor", "floor_low", "floor_high")
    listed = {name if key == "value" else key: [one[key] for one in found.values()] for key in keys}
    one = next(iter(found.values()))
    return listed | {key: one[key] for key in ("n", "floor_n", "seed")}


def _stain(real: NDArray[Any], other: NDArray[Any]) -> Vectors:
    return stain_distance(real.reshape(-1, 3), other.reshape(-1, 3))


def _nuclei(windows: Sequence[_Windows], said: Callable[..., dict[Any, dict[str, Any]]], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, side in zip(("real", "synthetic"), windows, strict=True):
        rows = side.rows("nuclei")
        (density,), (low, high) = bounded(lambda one, _: _density(one), (rows, rows), seed=seed, draws=200)
        area, shape = (_pooled(side.nuclei, part) for part in ("area", "eccentricity"))
        found[name] = {
            "count": int(sum(one.count for one in side.nuclei)), "density": number(density),
            "low": number(low[0], (0, math.inf)), "high": number(high[0], (0, math.inf)),
            "median_area": round(float(np.median(area)), 2) if len(area) else None,
            "median_eccentricity": round(float(np.median(shape)), 3) if len(shape) else None,
            "areas": np.histogram(area, bins=np.linspace(0, 200, 41))[0].tolist(),
        }  # fmt: skip
    found |= said("nuclei", ["density_ratio"], lambda a, b: np.float64(_density(b)) / _density(a), whole=True)
    return found | said("nuclei", ["area_distance", "eccentricity_distance"], _shapes)


def _density(nuclei: NDArray[Any]) -> float:
    return float(sum(one.count for one in nuclei) / sum(one.field for one in nuclei))


def _pooled(nuclei: NDArray[Any], part: str) -> Vectors:
    return np.concatenate([getattr(one, part) for one in nuclei])


def _shapes(real: NDArray[Any], other: NDArray[Any]) -> Vectors:
    """Wasserstein distances of areas (µm²) and eccentricities; NaN where a side has no nuclei."""
    from scipy.stats import wasserstein_distance

    sets = [[_pooled(side, part) for side in (real, other)] for part in ("area", "eccentricity")]
    return np.array([wasserstein_distance(*pair) if min(map(len, pair)) else math.nan for pair in sets])
