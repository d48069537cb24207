"""Exact, place-independent resampling: the value of a pixel depends on where it is, not on who asked.

An output pixel is the mean of the source over a box centred on it, as wide as the larger of the two
pixels. For coarser output that is the area average, for finer output linear interpolation, and for
equal pitch the source itself. The weights come from the absolute index of the output pixel in
float64; the taps are added one by one, in the same order, in float32. Beyond the source lies white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..grid import Grid

Source = Callable[[int, int, int, int], NDArray[np.uint8]]
"""(top, left, height, width) inside the source -> (height, width, 3)."""

STRIP = 1 << 22  # source pixels held at once: 12 MB of uint8, and a decoder still sees whole rows of tiles
BAND = 32  # output rows averaged at once: they are turned around in the cache, which halves the time
CACHED = 1 << 16  # numbers added at once: they stay near the processor from tap to tap


@dataclass(frozen=True)
class Taps:
    """Along one axis: output pixel `first_output + i` is the sum of weights[i, t] * source[start[i] + t].

    Only the output pixels that meet the source are here. Weights that would fall beyond it are
    missing from the sum, which is therefore taken over ink (255 - colour): white is no ink.
    """

    first_output: int
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, part: slice) -> Taps:
        return Taps(self.first_output + (part.start or 0), self.start[part], self.stop[part], self.weights[part])

    @property
    def span(self) -> tuple[int, int]:
        """The source pixels that take part: first, and one after the last."""
        return int(self.start[0]), int(self.stop[-1])


def find_taps(first: int, count: int, size: int, ratio: float) -> Taps:
    """Taps of the output pixels first ... first + count - 1 over a source of `size` pixels.

    `ratio` is the output's pitch in source pixels; both axes begin at the same edge.
    """
    breadth = max(1.0, ratio)
    begin = np.arange(first, first + count, dtype=np.float64) * ratio + (ratio - breadth) / 2
    end = begin + breadth
    start = np.clip(np.floor(begin), 0, size).astype(np.int64)
    stop = np.clip(np.ceil(end), 0, size).astype(np.int64)
    inside = np.flatnonzero(stop > start)
    if not len(inside):
        return Taps(first, start[:0], stop[:0], np.zeros((0, 0), np.float32))
    part = slice(int(inside[0]), int(inside[-1]) + 1)
    begin, end, start, stop = begin[part], end[part], start[part], stop[part]
    places = start[:, None] + np.arange(int((stop - start).max()))
    overlap = np.minimum(end[:, None], places + 1) - np.maximum(begin[:, None], places)
    weights = np.where(places < stop[:, None], np.maximum(overlap, 0) / breadth, 0)
    return Taps(first + part.start, start, stop, weights.astype(np.float32))


def resample(source: Source, shape: tuple[int, int], ratios: tuple[float, float], window: Grid) -> NDArray[np.uint8]:
    """Read `window` (height, width, 3) from a source of `shape` whose corner is the plane's.

    `ratios` are the window's pitch in source pixels, vertical and horizontal. Memory beyond the result
    is bounded by `STRIP` source pixels, or by those below a single output pixel if they are more.
    """
    rows = find_taps(window.top, window.height, shape[0], ratios[0])
    columns = find_taps(window.left, window.width, shape[1], ratios[1])
    out = np.empty((*window.shape, 3), np.uint8)
    if (len(rows), len(columns)) != window.shape:
        out[:] = 255
    for across, down in _strips(rows, columns, ratios):
        top, bottom = across.span
        left, right = down.span
        pixels = source(top, left, bottom - top, right - left)
        y, x = across.first_output - window.top, down.first_output - window.left
        part = out[y : y + len(across), x : x + len(down)]
        if ratios == (1.0, 1.0):
            part[:] = pixels
            continue
        for i in range(0, len(across), BAND):
            band = across[i : i + BAND]
            first, last = band.span
            part[i : i + BAND] = _average(pixels[first - top : last - top], band, down)
    return out


def _strips(rows: Taps, columns: Taps, ratios: tuple[float, float]) -> Iterator[tuple[Taps, Taps]]:
    """Cut the output so that no piece needs more than about `STRIP` source pixels; whole rows first."""
    if not (len(rows) and len(columns)):
        return
    tall, broad = max(1.0, ratios[0]), max(1.0, ratios[1])
    width = len(columns) if tall * len(columns) * broad <= STRIP else max(1, math.floor(STRIP / (tall * broad)))
    height = max(1, math.floor(STRIP / (tall * width * broad)))
    for i in range(0, len(rows), height):
        for j in range(0, len(columns), width):
            yield rows[i : i + height], columns[j : j + width]


def _average(pixels: NDArray[np.uint8], rows: Taps, columns: Taps) -> NDArray[np.uint8]:
    """(source rows, source columns, 3) -> (rows, columns, 3), first down, then across."""
    height, width, _ = pixels.shape
    ink = np.subtract(255, pixels, dtype=np.uint8).reshape(height, width * 3)
    down = _add_taps(ink, rows).view("V12")  # a colour moves as one thing: twice as fast
    across = _add_taps(np.ascontiguousarray(down.T).view(np.float32), columns)
    colour = np.empty(across.shape, np.uint8)
    np.subtract(255, np.rint(across, out=across), out=colour, casting="unsafe")  # whole numbers
    turned = colour.reshape(len(columns), len(rows), 3).view("V3").transpose(1, 0, 2)
    return np.ascontiguousarray(turned).view(np.uint8)


def _add_taps(lines: NDArray[np.uint8] | NDArray[np.float32], taps: Taps) -> NDArray[np.float32]:
    """Weighted sums of lines (n, m) -> (len(taps), m). No reduction of numpy: its order follows the shape."""
    start, breadth = taps.start - taps.span[0], lines.shape[1]
    step = min(len(taps), max(1, CACHED // breadth))
    total = np.empty((len(taps), breadth), np.float32)
    taken, product = np.empty((step, breadth), lines.dtype), np.empty((step, breadth), np.float32)
    for i in range(0, len(taps), step):
        part = total[i : i + step]
        for t in range(taps.weights.shape[1]):
            # A clipped place has weight 0: adding nothing changes no bit.
            line = np.take(lines, start[i : i + step] + t, axis=0, mode="clip", out=taken[: len(part)])
            weight = taps.weights[i : i + step, t, None]
            if t:
                part += np.multiply(line, weight, dtype=np.float32, out=product[: len(part)])
            else:
                np.multiply(line, weight, dtype=np.float32, out=part)
    return total
