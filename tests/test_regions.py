"""Tissue as readers see it is tissue as it is; what is bad is NaN and named, and nothing else changes."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TileStatistics
from numpy.typing import NDArray

from wsi_brush.blocks import Blocks
from wsi_brush.errors import MachineError, SlideError
from wsi_brush.machine import on_cores
from wsi_brush.reading import Readers
from wsi_brush.regions import Damage, at_once, embed_lattices, readable_tissue
from wsi_brush.slide import open_slide
from wsi_brush.tiles import BATCH, Read, Window
from wsi_brush.tissue import find_tissue


class Losing(Readers):
    """Readers that cannot read every seventh tile."""

    def _here(self, window: Window) -> Read:
        found = super()._here(window)
        for number, (row, column) in enumerate(window.cells):
            if (row + column) % 7 == 0:
                found.tiles[number] = 0
                found.bad[number] = "lost"
        return found


def test_readers_find_the_tissue_that_is_found_without(tissue_slide: Path) -> None:
    slide = open_slide(tissue_slide)
    with Readers(slide) as readers:
        found = readable_tissue(slide, readers)
    expected = find_tissue(slide)
    assert found.grid == expected.grid
    assert np.array_equal(found.mask, expected.mask)
    with Losing(slide) as readers:
        maybe = readable_tissue(slide, readers).mask
    rows, columns = np.indices(maybe.shape) // 8
    assert maybe[(rows + columns) % 7 == 0].all()


def test_bad_tiles_are_nan_and_named(tissue_slide: Path) -> None:
    slide, encoder = open_slide(tissue_slide), TileStatistics()
    tissue = find_tissue(slide)
    with Readers(slide) as whole, Losing(slide) as losing:
        good, none = embed_lattices(slide, slide.grid, tissue, whole, encoder, (0.5, 2.0), strict=False, progress=None)
        maps, damage = embed_lattices(
            slide, slide.grid, tissue, losing, encoder, (0.5, 2.0), strict=False, progress=None
        )
        with pytest.raises(SlideError, match="lost"):
            embed_lattices(slide, slide.grid, tissue, losing, encoder, (0.5, 2.0), strict=True, progress=None)
    assert len(none) == 0
    for mpp, one in maps.items():
        rows, columns = np.indices(one.present.shape)
        lost = good[mpp].present & ((rows + columns) % 7 == 0)
        assert lost.any()
        assert sorted(damage.cells[mpp]) == [(int(row), int(column)) for row, column in np.argwhere(lost)]
        expected = np.where(lost[..., None], np.float16(np.nan), good[mpp].values)
        assert np.array_equal(one.values, expected, equal_nan=True)


def test_strictness_holds_for_what_a_killed_run_has_kept(tissue_slide: Path, tmp_path: Path) -> None:
    slide, encoder = open_slide(tissue_slide), TileStatistics()
    tissue, options = find_tissue(slide), {"pitches": (2.0,), "progress": None}
    with Losing(slide) as losing, Readers(slide) as whole:
        blocks = Blocks(tmp_path, encoder.dim, seconds=0)
        embed_lattices(slide, slide.grid, tissue, losing, encoder, strict=False, blocks=blocks, **options)
        blocks = Blocks(tmp_path, encoder.dim)
        with pytest.raises(SlideError, match="before this run was killed"):
            embed_lattices(slide, slide.grid, tissue, whole, encoder, strict=True, blocks=blocks, **options)


class AtOnce(TileStatistics):
    """The first call answers after the second has."""

    at_once = 2

    def __init__(self) -> None:
        self.calls, self.second, self.cores = itertools.count(), threading.Event(), set[int]()

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        call = next(self.calls)
        assert call or self.second.wait(30)
        self.cores.add(torch.get_num_threads())
        found = super().__call__(tiles)
        if call == 1:
            self.second.set()
        return found


def test_calls_at_once_change_nothing(tissue_slide: Path) -> None:
    slide, found = open_slide(tissue_slide), []
    for encoder in (TileStatistics(), twice := AtOnce()):
        with on_cores(4), Losing(slide) as readers:
            one, damage = embed_lattices(
                slide, slide.grid, find_tissue(slide), readers, encoder, (0.125,), strict=False, progress=None
            )
        found.append((one[0.125].values, damage.cells[0.125]))
    assert np.isfinite(found[0][0]).any(axis=-1).sum() > 2 * BATCH
    assert np.array_equal(found[0][0], found[1][0], equal_nan=True)
    assert found[0][1] == found[1][1]
    assert twice.cores == {2}


def test_an_error_waits_for_no_other_call() -> None:
    class Slow(TileStatistics):
        at_once = 2

    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            begun.wait(30)
            raise MachineError("out of memory")
        begun.set()
        may_end.wait(10)
        ended.set()

    with pytest.raises(MachineError):
        list(at_once(Slow(), work, range(2)))
    assert not ended.is_set()
    may_end.set()


def test_the_first_of_calls_at_once_that_fails_ends_it(tissue_slide: Path) -> None:
    class Failing(TileStatistics):
        at_once = 2

        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            raise MachineError("out of memory")

    slide = open_slide(tissue_slide)
    with Readers(slide) as readers, pytest.raises(MachineError, match="out of memory"):
        embed_lattices(slide, slide.grid, find_tissue(slide), readers, Failing(), (0.5,), strict=False, progress=None)


def test_a_long_list_is_cut_and_counted() -> None:
    about = Damage({0.5: [(row, 0) for row in range(2500)]}).about()
    assert about["0.5"]["tiles"] == 2500
    assert about["0.5"]["cells"] == [[row, 0] for row in range(1000)]
