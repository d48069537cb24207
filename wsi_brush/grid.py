"""A rectangle of pixels on the plane, in micrometres.

This is the only place that knows the half-pixel convention: pixel (i, j) of a grid is the square
[(top + i) * mpp, (top + i + 1) * mpp) x [(left + j) * mpp, (left + j + 1) * mpp), and its centre
lies half a pixel inside. Integers index, floats measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Grid:
    """Pixels of pitch `mpp` (µm per pixel) from row `top`, column `left`, counted at that pitch.

    Raises:
        ValueError: if the pitch is not positive and finite, or the extent is negative.
    """

    mpp: float
    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise ValueError(f"a grid needs a positive pitch in µm, not {self.mpp}")
        if self.height < 0 or self.width < 0:
            raise ValueError(f"a grid cannot be {self.height} x {self.width} pixels")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def bottom(self) -> int:
        """The row after the last."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The column after the last."""
        return self.left + self.width

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of the covered rectangle, µm."""
        return self.top * self.mpp, self.left * self.mpp, self.bottom * self.mpp, self.right * self.mpp

    def whole_cells(self, side: float) -> Grid:
        """The squares of `side` µm that lie whole inside, counted from its corner."""
        height, width = (math.floor(length * self.mpp / side + 1e-6) for length in self.shape)
        return Grid(side, 0, 0, height, width)

    def centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixel centres, µm: rows (height,) and columns (width,)."""
        rows = (np.arange(self.top, self.bottom, dtype=np.float64) + 0.5) * self.mpp
        columns = (np.arange(self.left, self.right, dtype=np.float64) + 0.5) * self.mpp
        return rows, columns

    def at(self, mpp: float) -> Grid:
        """The smallest grid of pitch `mpp` that covers this one (to a millionth of a pixel)."""
        top, left, bottom, right = (edge / mpp for edge in self.extent)
        top, left = math.floor(top + 1e-6), math.floor(left + 1e-6)
        return Grid(mpp, top, left, math.ceil(bottom - 1e-6) - top, math.ceil(right - 1e-6) - left)

    def aligned(self, multiple: int) -> Grid:
        """The smallest grid around this one whose edges are multiples of `multiple` pixels."""
        top, left = self.top // multiple * multiple, self.left // multiple * multiple
        bottom, right = -(-self.bottom // multiple) * multiple, -(-self.right // multiple) * multiple
        return Grid(self.mpp, top, left, bottom - top, right - left)

    def coarsened(self, factor: int) -> Grid:
        """The grid of `factor` times the pitch that covers this one."""
        outer = self.aligned(factor)
        return Grid(
            self.mpp * factor, outer.top // factor, outer.left // factor, outer.height // factor, outer.width // factor
        )

    def rounded(self, multiple: int) -> Grid:
        """This grid grown down and right until its sides are multiples of `multiple` pixels."""
        height, width = (-(-side // multiple) * multiple for side in self.shape)
        return Grid(self.mpp, self.top, self.left, height, width)

    def level(self, depth: int) -> Grid:
        """This grid's extent at 2^depth times the pitch; a corner between pixels goes up and left."""
        return Grid(
            self.mpp * 2**depth, self.top >> depth, self.left >> depth, self.height >> depth, self.width >> depth
        )

    def pad(self, pixels: int) -> Grid:
        """This grid with a margin of `pixels` on every side."""
        return Grid(self.mpp, self.top - pixels, self.left - pixels, self.height + 2 * pixels, self.width + 2 * pixels)

    def clip(self, other: Grid) -> Grid:
        """The part of this grid that lies in `other` (same pitch); empty if they do not meet."""
        self._check_pitch(other)
        top, left = max(self.top, other.top), max(self.left, other.left)
        height, width = min(self.bottom, other.bottom) - top, min(self.right, other.right) - left
        return Grid(self.mpp, top, left, max(0, height), max(0, width))

    def within(self, other: Grid) -> tuple[slice, slice]:
        """Where this grid's pixels stand in an array read on `other` (same pitch).

        Raises:
            ValueError: if this grid is not inside `other`.
        """
        self._check_pitch(other)
        if self.clip(other) != self:
            raise ValueError(f"{self} is not inside {other}")
        top, left = self.top - other.top, self.left - other.left
        return slice(top, top + self.height), slice(left, left + self.width)

    def tiles(self, size: int) -> Iterator[Grid]:
        """This grid in raster order as squares of `size` pixels, the last ones cut at the edge."""
        for top in range(self.top, self.bottom, size):
            for left in range(self.left, self.right, size):
                yield Grid(self.mpp, top, left, min(size, self.bottom - top), min(size, self.right - left))

    def _check_pitch(self, other: Grid) -> None:
        if not math.isclose(self.mpp, other.mpp, rel_tol=1e-9):
            raise ValueError(f"grids of different pitch: {self.mpp} and {other.mpp} µm")
