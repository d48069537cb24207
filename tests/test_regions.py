"""Tissue as readers see it is tissue as it is; what is bad is NaN and named, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TileStatistics

from wsi_brush.errors import SlideError
from wsi_brush.reading import Readers
from wsi_brush.regions import Damage, embed_lattices, readable_tissue
from wsi_brush.slide import open_slide
from wsi_brush.tiles import Read, Window
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


def test_a_long_list_is_cut_and_counted() -> None:
    about = Damage({0.5: [(row, 0) for row in range(2500)]}).about()
    assert about["0.5"]["tiles"] == 2500
    assert about["0.5"]["cells"] == [[row, 0] for row in range(1000)]
