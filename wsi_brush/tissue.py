"""Where there is something to look at.

Every 8 µm cell is judged by its own colour and that of its neighbours, against fixed thresholds: no statistic of
the slide enters, so a blank slide has no tissue, and a region is judged as it is within its slide. Colours are
optical densities, per channel; their *shares* (they sum to one) are the hue and do not depend on how thick the
stain lies. Haematoxylin, eosin, blood and DAB absorb green most or blue after green; felt pens do not:
green and blue ink absorb red most, red ink absorbs green and blue alike and no red, black ink absorbs all alike.
Only marks at least 24 µm wide count as ink: a few blood cells or a speck of pigment are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .grid import Grid

if TYPE_CHECKING:
    from .slide import Slide

PITCH = 8.0
"""µm: the pitch at which tissue is looked for."""
RULES = 1
"""Version of the rules below: another number, another mask, so stores made under the other are not mixed."""

_STAINED = 0.035  # spread of optical density over the channels, from which a cell is stained: faint stroma has ~0.05
_DARK = 0.25  # summed optical density from which a cell that is no stain can be ink; fainter is a shadow or dust
_THREAD, _THREAD_WIDTH = 0.005, 88.0  # how much, within how many µm, a membrane of fat stands out
_INK_WIDTH, _INK_HALO = 24.0, 8.0  # µm: the narrowest pen mark, and how far its blurred edge reaches
_FAINT = 0.03  # the most that counts of it
_GRAIN = 256.0  # µm²: what is smaller, by itself, is noise or a grain
_GAP, _HOLE, _SPECK = 24.0, 20_000.0, 2_500.0  # µm, µm², µm²: gaps closed, holes (fat, lumina) filled, dust dropped
_CELLS = 1 << 19  # looked at at once: up to 100 bytes each while colours are judged
_WINDOW = 128  # cells a side read at once: at most 4096 px of a slide of 0.25 µm, also where it has one level only


@dataclass(frozen=True)
class Tissue:
    """Which cells of a slide hold tissue: `mask` (height, width), True where they do, on `grid`."""

    mask: NDArray[np.bool_]
    grid: Grid

    def __post_init__(self) -> None:
        if self.mask.shape != self.grid.shape:
            raise ValueError(f"a tissue mask of {self.mask.shape} cells on a grid of {self.grid.shape}")

    @staticmethod
    def everywhere(grid: Grid) -> Tissue:
        """Every cell: of pictures that are no H&E, where all of it is to be looked at."""
        return Tissue(np.ones(grid.shape, np.bool_), grid)

    @property
    def fraction(self) -> float:
        """Share of the cells that hold tissue; 0 where there are no cells."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    def cover(self, lattice: Grid) -> NDArray[np.float32]:
        """Share of each lattice cell's area that is tissue, exactly: (rows, columns) in [0, 1].

        Nothing outside the mask is tissue. The lattice may have any pitch and place.
        """
        ends = np.arange(self.grid.left, self.grid.right + 1) * self.grid.mpp
        wanted = np.arange(lattice.left, lattice.right + 1) * lattice.mpp
        cover = np.zeros(lattice.shape, np.float32)
        for row in range(lattice.height):
            one = replace(lattice, top=lattice.top + row, height=1)
            below = one.at(self.grid.mpp).pad(1).clip(self.grid)
            share = _overlap(one.top, one.mpp, below.top, below.height, below.mpp)
            depth = share @ self.mask[below.top - self.grid.top :][: below.height]  # µm of tissue below each column
            area = np.interp(wanted, ends, np.cumsum([0.0, *(depth * self.grid.mpp)]))
            cover[row] = np.clip(np.diff(area) / lattice.mpp**2, 0, 1)
        return cover


def find_tissue(slide: Slide, *, mpp: float = PITCH) -> Tissue:
    """The tissue of a whole slide, at `mpp` µm a cell; no tissue at all is a valid answer."""
    grid = slide.grid.at(mpp)
    rgb = np.full((*grid.shape, 3), 255, np.uint8)
    for window in grid.tiles(_WINDOW):
        rgb[window.within(grid)] = slide.read(window)
    return Tissue(tissue_mask(rgb, mpp), grid)


def tissue_mask(rgb: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Which pixels of a picture (height, width, 3) of `mpp` µm a pixel, around 8, are tissue: (height, width)."""
    if rgb.size == 0:
        return np.zeros(rgb.shape[:2], np.bool_)
    height, width, _ = rgb.shape
    stained, ink = (np.empty((height, width), np.bool_) for _ in range(2))
    for seen, kept, inner in _strips((height, width), _reach((_THREAD_WIDTH + 4 * PITCH) / mpp)):
        stained[kept], ink[kept] = (mask[inner] for mask in _judge(rgb[seen], mpp))
    ink = _grown(_wide(ink, _INK_WIDTH / mpp), _INK_HALO / mpp)
    # A picture of a few cells is not dust: there the limits are an eighth of the picture.
    grain, speck = (int(min(area / mpp**2, stained.size / 8)) for area in (_GRAIN, _SPECK))
    stained &= ~ink
    mask = _larger(stained, grain, connectivity=2)
    del stained
    mask = ~_grown(~_grown(mask, _GAP / mpp), _GAP / mpp)
    mask = _larger(mask & ~ink, speck)
    # What reaches the border of the picture is no hole: its end is not seen.
    enclosed = ~mask
    enclosed &= ~_holding(enclosed, _border(mask.shape))
    mask |= enclosed & ~_larger(enclosed, int(_HOLE / mpp**2))
    return mask & ~ink


def _judge(rgb: NDArray[np.uint8], mpp: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which cells are stained like tissue, and which are coloured like ink."""
    density = -np.log10((rgb.astype(np.float32) + 1) / 256)  # optical density, 0 for white
    total = density.sum(axis=-1)
    red, green, blue = np.moveaxis(density / np.maximum(total, 1e-6)[..., None], -1, 0)
    spread = density.max(axis=-1) - density.min(axis=-1)
    # Measured on H&E of nine laboratories: shares of tissue stay within red 0.11-0.38, green 0.40-0.58, blue 0.19-0.35.
    greenish = (red > 0.33) & (green < blue + 0.10)
    bluish = red > green + 0.07
    reddish = (blue > red + 0.27) & (green > blue - 0.03)
    yellowish = (blue > 0.58) | ((blue > green + 0.03) & (green < 0.28))
    neutral = spread < 0.10 * total
    foreign = greenish | bluish | reddish | yellowish | neutral
    ink = (total > _DARK) & foreign
    return ((spread > _STAINED) & ~foreign) | (_threads(density, mpp) & ~ink), ink


def _threads(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """Thin lines that are a little more magenta than what is around them: the membranes of fat."""
    from skimage.filters import gaussian
    from skimage.morphology import footprint_rectangle, white_tophat

    magenta = density[..., 1] - (density[..., 0] + density[..., 2]) / 2
    # Cut, so that a dark edge does not shine into the glass beside it; smoothed, so that noise makes no lines.
    smooth = gaussian(np.minimum(magenta, _FAINT), PITCH / mpp, mode="nearest")  # type: ignore[no-untyped-call]
    side = 2 * int(_THREAD_WIDTH / mpp / 2) + 1
    around = footprint_rectangle((side, side), decomposition="separable")  # type: ignore[no-untyped-call]
    return np.asarray(white_tophat(np.maximum(smooth, 0), around) > _THREAD, np.bool_)


def _wide(mask: NDArray[np.bool_], width: float) -> NDArray[np.bool_]:
    """The parts of a mask at least `width` pixels wide, whole; the border of the picture cuts nothing off."""
    return _holding(mask, ~_grown(~mask, width / 2)) if mask.any() else mask


def _holding(mask: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected parts of a mask that hold one of the seeds or more, whole; corners connect."""
    from scipy.ndimage import label

    parts = label(mask, np.ones((3, 3)))[0]
    held = np.zeros(int(parts.max()) + 1, np.bool_)
    held[parts[seeds & mask]] = True
    holding = np.empty_like(mask)
    for row, of_row in zip(holding, parts, strict=True):  # an index of the whole would be twice as large as the parts
        row[:] = held[of_row]
    return holding


def _border(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The outermost cells of a picture."""
    border = np.ones(shape, np.bool_)
    border[1:-1, 1:-1] = False
    return border


def _grown(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """A mask and all within `radius` pixels of it. (Of an empty one, scikit-image's own would grow a corner.)"""
    from skimage.morphology import isotropic_dilation

    grown = mask.copy()
    for seen, kept, inner in _strips(mask.shape, _reach(radius)):
        if mask[seen].any():
            grown[kept] = isotropic_dilation(mask[seen], radius)[inner]  # type: ignore[no-untyped-call]
    return grown


def _larger(mask: NDArray[np.bool_], size: int, *, connectivity: int = 1) -> NDArray[np.bool_]:
    """The connected parts of a mask of more than `size` pixels. What is larger is so within as many rows, wherever a
    strip cuts it."""
    from skimage.morphology import remove_small_objects

    larger = np.empty_like(mask)
    for seen, kept, inner in _strips(mask.shape, size + 1):
        larger[kept] = remove_small_objects(mask[seen], max_size=size, connectivity=connectivity)[inner]
    return larger


def _strips(shape: tuple[int, int], margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of a picture for work that looks `margin` rows around: the rows to look at, about `_CELLS` of them, those to
    keep, and where they stand in the former. So a large picture takes no more memory than what is kept of it."""
    height, width = shape
    step = max(margin, _CELLS // width - 2 * margin)
    for top in range(0, height, step):
        bottom, first = min(top + step, height), max(0, top - margin)
        yield slice(first, bottom + margin), slice(top, bottom), slice(top - first, bottom - first)


def _reach(cells: float) -> int:
    """Whole cells for so much of one, and one more."""
    return math.ceil(cells) + 1


def _overlap(row: int, pitch: float, first: int, count: int, other_pitch: float) -> NDArray[np.float64]:
    """How many µm a row of one pitch shares with each of `count` rows of another, from the `first` on."""
    low = np.arange(first, first + count) * other_pitch
    shared: NDArray[np.float64] = np.minimum((row + 1) * pitch, low + other_pitch) - np.maximum(row * pitch, low)
    return shared.clip(min=0)
