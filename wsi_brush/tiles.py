"""The tiles of a lattice, read in windows of many and handed out in batches; a tile that cannot be read is *bad*.

The order is that of the windows, whoever reads them, and a tile is the same alone and in a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import SlideError
from .grid import Grid
from .slide import Slide

BATCH = 128
"""Tiles given to an encoder at once."""
WINDOW = 1024
"""Pixels a side read at once, at the pitch."""
_FOOTPRINT = 8192  # and at level 0: a slide may have no other


@dataclass(frozen=True)
class Window:
    """Tiles that are read together: `grid` holds them all, `places` (n, 2) says which of its rows and columns of tiles
    are wanted, `corner` where its first stands in the lattice."""

    grid: Grid
    tile: int
    places: NDArray[np.intp]
    corner: tuple[int, int]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def cells(self) -> NDArray[np.intp]:
        """Rows and columns of the tiles in the lattice: (n, 2)."""
        return self.places + np.array(self.corner, np.intp)

    def at(self, number: int) -> Window:
        """One of its tiles alone."""
        row, column = (int(place) for place in self.places[number])
        grid = Grid(
            self.grid.mpp, self.grid.top + row * self.tile, self.grid.left + column * self.tile, self.tile, self.tile
        )
        return Window(grid, self.tile, np.zeros((1, 2), np.intp), (self.corner[0] + row, self.corner[1] + column))


@dataclass(frozen=True)
class Read:
    """What came of a window: its tiles (n, tile, tile, 3), and why those that are bad (black here) cannot be read."""

    window: Window
    tiles: NDArray[np.uint8]
    bad: dict[int, str]


@dataclass(frozen=True)
class Batch:
    """Tiles (n, tile, tile, 3), the pitch and the cells of each run of them, and why those that are bad (black here)
    cannot be read."""

    tiles: NDArray[np.uint8]
    runs: list[tuple[float, NDArray[np.intp]]]
    bad: dict[int, str]


def windows(slide: Slide, lattice: Grid, mpp: float, wanted: NDArray[np.bool_], tile: int) -> Iterator[Window]:
    """The wanted tiles of a lattice in windows of many, windows without a wanted tile not at all."""
    side = max(1, int(min(WINDOW, _FOOTPRINT * slide.mpp / mpp)) // tile)
    for block in lattice.tiles(side):
        rows, columns = block.within(lattice)
        inside = np.argwhere(wanted[rows, columns])
        if not len(inside):
            continue
        (top, left), (bottom, right) = (int(v) for v in inside.min(axis=0)), (int(v) + 1 for v in inside.max(axis=0))
        grid = Grid(
            mpp, (block.top + top) * tile, (block.left + left) * tile, (bottom - top) * tile, (right - left) * tile
        )
        yield Window(grid, tile, inside - np.array((top, left)), (rows.start + top, columns.start + left))


def without_first(found: Iterable[Window], count: int) -> Iterator[Window]:
    """The windows that follow the first `count` tiles; the first of them may be left with some of its tiles."""
    for window in found:
        if count < len(window):
            yield replace(window, places=window.places[count:]) if count else window
        count = max(0, count - len(window))


def batches(found: Iterable[Read], tile: int, *, size: int = BATCH) -> Iterator[Batch]:
    """Tiles in the order of their windows, `size` at a time; a bad one keeps its place, others their company."""
    room = np.empty((size, tile, tile, 3), np.uint8)
    runs: list[tuple[float, NDArray[np.intp]]] = []
    bad: dict[int, str] = {}
    filled = 0
    for read in found:
        start, count, cells = 0, len(read.window), read.window.cells
        while start < count:
            stop = min(count, start + size - filled)
            room[filled : filled + stop - start] = read.tiles[start:stop]
            runs.append((read.window.grid.mpp, cells[start:stop]))
            bad |= {filled + number - start: why for number, why in read.bad.items() if start <= number < stop}
            filled, start = filled + stop - start, stop
            if filled == size:
                yield Batch(room, runs, bad)
                room, runs, bad, filled = np.empty_like(room), [], {}, 0
    if filled:
        yield Batch(room[:filled], runs, bad)


def read_window(slide: Slide, window: Window, out: NDArray[np.uint8]) -> dict[int, str]:
    """Read the tiles of a window into `out` (n, tile, tile, 3), here; why those that cannot be read cannot."""
    tile = window.tile
    try:
        pixels = slide.read(window.grid)
    except SlideError as error:
        if len(window) == 1 or slide.reader == "image":  # which is read as a whole, or not at all
            out[:] = 0
            return dict.fromkeys(range(len(window)), str(error))
    else:
        for number, (row, column) in enumerate(window.places * tile):
            out[number] = pixels[row : row + tile, column : column + tile]
        return {}
    bad: dict[int, str] = {}
    for number in range(len(window)):
        alone = read_window(slide, window.at(number), out[number : number + 1])
        if alone:
            bad[number] = alone[0]
    return bad
