"""Tiles come in one order, in full batches, and a bad one keeps its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pyramid

from wsi_brush.grid import Grid
from wsi_brush.slide import Slide, open_slide
from wsi_brush.tiles import Read, Window, batches, read_window, windows, without_first

TILE = 32


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (512, 640, 3), np.uint8)
    path = tmp_path_factory.mktemp("tiles") / "a.tif"
    return open_slide(write_pyramid(path, [pixels], compression="zlib", compressionargs={}))


def some(slide: Slide) -> tuple[Grid, np.ndarray, list[Window]]:
    lattice = slide.grid.at(0.5 * TILE)
    wanted = np.random.default_rng(1).random(lattice.shape) < 0.6
    wanted[4] = False
    return lattice, wanted, list(windows(slide, lattice, 0.5, wanted, TILE))


def test_every_wanted_tile_is_read_once_and_is_itself(slide: Slide) -> None:
    _, wanted, found = some(slide)
    seen = np.zeros(wanted.shape, np.int64)
    for window in found:
        out = np.empty((len(window), TILE, TILE, 3), np.uint8)
        assert read_window(slide, window, out) == {}
        for number, (row, column) in enumerate(window.cells):
            alone = slide.read(Grid(0.5, int(row) * TILE, int(column) * TILE, TILE, TILE))
            assert np.array_equal(out[number], alone)
            assert np.array_equal(window.at(number).cells, [[row, column]])
            seen[row, column] += 1
    assert np.array_equal(seen, wanted.astype(np.int64))


@pytest.mark.parametrize("count", [0, 1, 7, 150, 10**6])
def test_the_first_tiles_are_left_out(slide: Slide, count: int) -> None:
    _, _, found = some(slide)
    every = np.concatenate([window.cells for window in found])
    rest = [window.cells for window in without_first(found, count)]
    assert np.array_equal(np.concatenate([every[:0], *rest]), every[count:])


def reads(counts: list[int]) -> Iterator[Read]:
    """Windows of so many tiles, each tile of the colour of its number; every tenth is bad."""
    start = 0
    for number, count in enumerate(counts):
        places = np.stack([np.zeros(count, np.intp), np.arange(count)], -1)
        window = Window(Grid(0.5 if number % 2 else 2.0, 0, 0, 2, 2 * count), 2, places, (number, 0))
        colours = (np.arange(start, start + count) % 256).astype(np.uint8)
        tiles = np.broadcast_to(colours[:, None, None, None], (count, 2, 2, 3))
        yield Read(window, tiles, {k: str(start + k) for k in range(count) if (start + k) % 10 == 0})
        start += count


def test_batches_are_full_and_in_order() -> None:
    counts = [3, 40, 1, 100, 7]
    colours, runs, bad, sizes = [], [], [], []
    for batch in batches(reads(counts), 2, size=16):
        bad += [(len(colours) + number, why) for number, why in batch.bad.items()]
        colours += batch.tiles[:, 0, 0, 0].tolist()
        runs += [(mpp, tuple(cell)) for mpp, cells in batch.runs for cell in cells.tolist()]
        sizes.append(len(batch.tiles))
    assert sizes == [16] * 9 + [7]
    assert colours == [number % 256 for number in range(151)]
    assert runs == [
        (0.5 if number % 2 else 2.0, (number, k)) for number, count in enumerate(counts) for k in range(count)
    ]
    assert bad == [(number, str(number)) for number in range(0, 151, 10)]


def test_a_damaged_window_is_read_tile_by_tile(slide: Slide, tmp_path: Path) -> None:
    import tifffile

    path = tmp_path / "b.tif"
    path.write_bytes(slide.path.read_bytes())
    with tifffile.TiffFile(path) as file:
        place, size = file.pages.first.dataoffsets[6], file.pages.first.databytecounts[6]  # row 1, column 1
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(bytes(size))
    bad = open_slide(path)
    (window,) = windows(bad, bad.grid.at(16.0), 0.5, np.ones((16, 20), np.bool_), TILE)
    out = np.empty((len(window), TILE, TILE, 3), np.uint8)
    found = read_window(bad, window, out)
    # a TIFF tile of 128 pixels holds 4 x 4 of ours
    assert sorted(window.cells[list(found)].tolist()) == [
        [row, column] for row in range(4, 8) for column in range(4, 8)
    ]
    assert all("b.tif" in why for why in found.values())
    whole = slide.read(window.grid)
    for number, (row, column) in enumerate(window.places * TILE):
        expected = np.zeros_like(out[number]) if number in found else whole[row : row + TILE, column : column + TILE]
        assert np.array_equal(out[number], expected)
