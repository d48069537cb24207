"""What a picture of H&E is made of, in figures that need no network: detail, stain, nuclei, seams.

Pictures are (height, width, 3) uint8. Two sets of pictures are compared through these figures; like the distances,
one says little without that of two sets of real pictures beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DESCRIPTOR = 24
"""How many numbers a `descriptor` has."""
LEAST_NUCLEUS, MOST_NUCLEUS = 12.0, 400.0
"""µm²: what is smaller is debris, what is larger a clump that was not split."""
GUARD = 12.0
"""µm: nuclei are counted this far from the border; a disc of the largest area there (radius 11.3) is seen whole."""

_SMOOTH, _APART = 0.75, 3.0  # µm: standard deviation of the smoothing; the least distance of two nuclei's centres
_PALE = 25.0  # µm²: pale insides of a nucleus that are filled; what larger gaps a chain of nuclei encloses is not
_GREY = 1 / 12  # variance of rounding to whole grey levels: what is less is no detail
_FAINT = 1e-6  # the same in optical density, on white: (1 / 256 / ln 10)² / 12, rounded up
_OCTAVES = 5  # of a descriptor


def octaves(pixels: NDArray[np.uint8], count: int = 6) -> NDArray[np.float64]:
    """Variance (grey levels²) that each halving of the resolution loses, finest first, mean of the channels: (count,).

    A halving is the mean over 2 × 2 pixels; with the variance of the last, coarsest picture they sum to the picture's.

    Raises:
        ValueError: if the sides are no multiples of 2**count.
    """
    return np.asarray(_lost(pixels, count).mean(1), np.float64)


def _lost(pixels: NDArray[np.uint8], count: int) -> NDArray[np.float64]:
    """The same for each channel: (count, 3)."""
    if pixels.size == 0 or any(side % 2**count for side in pixels.shape[:2]):
        raise ValueError(f"sides of {pixels.shape[:2]} pixels cannot be halved {count} times")
    image, found = pixels.astype(np.float32), np.empty((count, pixels.shape[2]))
    for level in range(count):
        height, width, channels = image.shape
        blocks = image.reshape(height // 2, 2, width // 2, 2, channels)
        image = (blocks[:, 0] + blocks[:, 1]).sum(2) / 4
        # Of two variances the difference; summed from what is lost itself, it has no cancellation and is never negative
        found[level] = np.square(blocks - image[:, None, :, None]).mean((0, 1, 2, 3), dtype=np.float64)
    return found


def densities(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density, -log10((rgb + 1) / 256): 0 for white, 2.4 for black, of the picture's shape."""
    return np.asarray(-np.log10((pixels.astype(np.float32) + 1) / 256), np.float32)


def stain_distance(real: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far optical densities (n, 3) are from others (m, 3): 1-Wasserstein distance of each channel, (3,).

    Raises:
        ValueError: if a set is empty.
    """
    from scipy.stats import wasserstein_distance

    if not len(real) or not len(other):
        raise ValueError("a stain distance needs densities of both sets")
    if len(real) == len(other):  # the k-th least goes to the k-th least; SciPy's way takes ten times longer
        return np.asarray(np.abs(np.sort(real, 0) - np.sort(other, 0)).mean(0, dtype=np.float64))
    return np.array([wasserstein_distance(one, two) for one, two in zip(real.T, other.T, strict=True)], np.float64)


def haematoxylin(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much haematoxylin lies on each pixel, in scikit-image's unit: (height, width), 0 where there is none.

    Colour deconvolution with the stain vectors of Ruifrok & Johnston (2001).
    """
    from skimage.color import rgb2hed

    # Black is taken for the darkest grey: scikit-image gives it more than twice as much, for want of a logarithm.
    rgb = np.maximum(pixels, 1).astype(np.float32) / 255
    return np.asarray(rgb2hed(rgb)[..., 0], np.float32)


def nuclear_threshold(windows: Sequence[NDArray[np.uint8]], mpp: float) -> float:
    """How much haematoxylin makes a nucleus: Otsu's threshold of all windows, smoothed as in `find_nuclei`, together.

    It is to be found on real windows, with nuclei among them, and used for those that are compared with them too.

    Raises:
        ValueError: if there are no windows.
    """
    from skimage.filters import threshold_otsu

    if not windows:
        raise ValueError("a threshold needs windows to be found on")
    pooled = np.concatenate([_smooth(pixels, mpp).ravel() for pixels in windows])
    return float(threshold_otsu(pooled))  # type: ignore[no-untyped-call]


def _smooth(pixels: NDArray[np.uint8], mpp: float) -> NDArray[np.float32]:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(haematoxylin(pixels), _SMOOTH / mpp, mode="nearest"), np.float32)


@dataclass(frozen=True)
class Nuclei:
    """The nuclei of a picture.

    count: how many have their centroid in the field; area (µm²), eccentricity (0 a disc, towards 1 a line): of those
    that are seen whole, (n,), n at most the count; field: mm² that was looked at, the picture without its border.
    """

    count: int
    area: NDArray[np.float64]
    eccentricity: NDArray[np.float64]
    field: float

    @property
    def density(self) -> float:
        """Nuclei per mm²."""
        return self.count / self.field


def find_nuclei(pixels: NDArray[np.uint8], mpp: float, threshold: float) -> Nuclei:
    """Nuclei of a picture of `mpp` µm a pixel, at most about 1: where there is more haematoxylin than the threshold.

    A nucleus is counted where its centroid is, if that is at least `GUARD` µm inside the picture: nearer to the border,
    what is cut has its centroid elsewhere, and large ones would be left out more often. Those that touch the border
    even so are counted and not measured.

    Raises:
        ValueError: if the picture has no inside.
    """
    from skimage.measure import regionprops_table

    height, width = pixels.shape[:2]
    guard = math.ceil(GUARD / mpp)
    if min(height, width) <= 2 * guard:
        raise ValueError(f"a picture of {height} × {width} pixels has nothing {GUARD:g} µm inside its border")
    names = ("area", "bbox", "centroid", "eccentricity")
    table = regionprops_table(_bodies(pixels, mpp, threshold), properties=names)  # type: ignore[no-untyped-call]
    area = np.asarray(table["area"], np.float64) * mpp**2
    inside = (area >= LEAST_NUCLEUS) & (area <= MOST_NUCLEUS)
    whole = (table["bbox-0"] > 0) & (table["bbox-1"] > 0) & (table["bbox-2"] < height) & (table["bbox-3"] < width)
    for axis, side in enumerate((height, width)):
        place = table[f"centroid-{axis}"] + 0.5  # of a pixel, its centre
        inside &= (place >= guard) & (place < side - guard)
    whole &= inside
    field = (height - 2 * guard) * (width - 2 * guard) * mpp**2 / 1e6
    return Nuclei(int(inside.sum()), area[whole], np.asarray(table["eccentricity"], np.float64)[whole], field)


def _bodies(pixels: NDArray[np.uint8], mpp: float, threshold: float) -> NDArray[np.int32]:
    """Nuclei, numbered from 1: (height, width); those that touch are cut apart where they are narrow."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter
    from skimage.feature import peak_local_max
    from skimage.measure import label
    from skimage.morphology import remove_small_holes, remove_small_objects
    from skimage.segmentation import watershed

    mask = _smooth(pixels, mpp) > threshold
    mask = remove_small_objects(mask, max_size=int(LEAST_NUCLEUS / mpp**2))
    mask = remove_small_holes(mask, max_size=int(_PALE / mpp**2))
    # Smoothed, as the ridge of a long nucleus is a row of peaks on a lattice of pixels.
    depth = gaussian_filter(distance_transform_edt(mask), _SMOOTH / mpp)
    peaks = peak_local_max(  # type: ignore[no-untyped-call]
        depth,
        min_distance=max(1, round(_APART / mpp)),
        exclude_border=False,
        labels=label(mask),  # type: ignore[no-untyped-call]
    )
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return np.asarray(watershed(-depth, seeds, mask=mask), np.int32)  # type: ignore[no-untyped-call]


class Seam(NamedTuple):
    """Whether neighbours differ more across the lines of a lattice than elsewhere.

    ratio: mean absolute difference across the lines over that across all others, about 1 without seams;
    rank: share of the other offsets at which neighbours differ as much or less, about 0.5 without, 1 with.
    Neither is a number (NaN) of a blank picture, or of one without such a line, or without others.
    """

    ratio: float
    rank: float


def steps(
    pixels: NDArray[np.uint8], period: int, *, among: int = 1, corner: tuple[int, int] = (0, 0)
) -> NDArray[np.float64]:
    """What a seam is made of: the sum of the absolute differences across the lines at each offset from a lattice, rows
    and columns together, and how many they are: (2, offsets).

    Offset 0 is between pixels k * period - 1 and k * period, counted from the lattice's corner; `corner`: where on it
    the picture begins, whose first row and column are but the neighbours of the next. With `among`, only offsets that
    are multiples of it, so that a finer lattice is not taken for the seams of this one. Where no line of the lattice
    crosses the picture one way, no other counts that way: a line is compared with those beside it.
    """
    found = np.zeros((2, period // among))
    for image, first in zip((pixels, pixels.swapaxes(0, 1)), corner, strict=True):
        lines = np.arange(1, len(image))
        lines = lines[(first + lines) % among == 0]
        if ((first + lines) % period).all():
            continue
        one, other = image[lines, 1:], image[lines - 1, 1:]
        apart = np.maximum(one, other) - np.minimum(one, other)
        offsets = (first + lines) % period // among
        np.add.at(found[0], offsets, apart.sum((1, 2)))
        np.add.at(found[1], offsets, apart[:1].size)
    return found


def seam_of(steps: NDArray[np.float64]) -> Seam:
    """The seam of `steps`, which may be summed over pictures: (2, offsets)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        border, *others = steps[0] / steps[1]
        ratio = border / (steps[0, 1:].sum() / steps[1, 1:].sum())
    less = np.array(others)[steps[1, 1:] > 0] <= border
    return Seam(float(ratio), math.nan if np.isnan(ratio) else float(less.mean()))


def descriptor(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """A picture in 24 numbers, for distances in a space that no brush has seen; a flip does not change them.

    Mean (3) and standard deviation (3) of the channels' optical densities; their correlations (3), red-green, red-blue,
    green-blue; logarithms of the variances that the five first halvings lose (5 × 3, finest first, channels together).
    All are finite for a blank picture too: to variances that of rounding to 8 bits is added.

    Raises:
        ValueError: if the sides are no multiples of 32.
    """
    detail = np.log(_lost(pixels, _OCTAVES) + _GREY)
    density = densities(pixels).reshape(-1, 3).astype(np.float64)
    shared = np.cov(density, rowvar=False, bias=True)
    spread = np.sqrt(shared.diagonal() + _FAINT)
    linked = (shared / np.outer(spread, spread))[np.triu_indices(3, 1)]
    return np.concatenate([density.mean(0), np.sqrt(shared.diagonal()), linked, detail.ravel()])
