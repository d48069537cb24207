"""The map of similarity: which tiles of a painting are like those that they follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TileStatistics, make_brush, make_maps

from wsi_brush.errors import UsageError
from wsi_brush.grid import Grid
from wsi_brush.progress import StoppedError
from wsi_brush.pyramid import Pyramid
from wsi_brush.similarity import compare_maps, compare_slides, compare_stores
from wsi_brush.slide import open_slide
from wsi_brush.store import write_store
from wsi_brush.tissue import Tissue


@pytest.fixture(scope="module")
def painted(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of 512 x 640 pixels of the slide from (300, 200), of which the tile at row 2, column 3 is turned over."""
    target, grid = tmp_path_factory.mktemp("painted") / "new.ome.zarr", Grid(0.5, 300, 200, 512, 640)
    pixels = open_slide(tissue_slide).read(grid)
    pixels[256:384, 384:512] = 255 - pixels[256:384, 384:512]
    pyramid = Pyramid(target, grid, about={})
    pyramid.write(grid, pixels)
    pyramid.finish()
    return target


BRUSH, ENCODER = make_brush(dim=24, tile=128), TileStatistics()


def test_the_tile_that_was_changed_is_the_worst(tissue_slide: Path, painted: Path) -> None:
    told: list[tuple[int, int]] = []
    found = compare_slides(
        open_slide(tissue_slide), open_slide(painted), 0.5, brush=BRUSH, encoder=ENCODER,
        down=150.0, right=100.0, progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert (found.mpp, found.lattice) == (0.5, Grid(64.0, 0, 0, 4, 5))
    assert found.worst[0] == (2, 3)
    assert found.values[2, 3] < 0.97
    assert np.delete(found.values.ravel(), 2 * 5 + 3).min() > 0.9999  # 150 µm are whole pixels, so nothing is resampled
    assert found.centre((2, 3)) == (160.0, 224.0)
    assert told[-1] == (40, 40)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    beside = compare_slides(open_slide(tissue_slide), open_slide(painted), 0.5, brush=BRUSH, encoder=ENCODER)
    assert np.nanmedian(beside.values) < 0.9999  # at another place it is other tissue


def test_where_the_reference_has_no_tissue_nothing_is_compared(tissue_slide: Path) -> None:
    slide = open_slide(tissue_slide)
    found = compare_slides(slide, slide, 0.5, brush=BRUSH, encoder=ENCODER)
    missing = np.isnan(found.values)
    assert missing[0, 0]
    assert not missing[3:5, 3:5].any()
    np.testing.assert_allclose(found.values[~missing], 1, atol=1e-6)
    assert len(found.worst) == (~missing).sum()


def test_what_cannot_be_compared(tissue_slide: Path, painted: Path) -> None:
    real, new = open_slide(tissue_slide), open_slide(painted)
    with pytest.raises(UsageError, match=r"1 µm: the brush knows embeddings at 0\.5, 2, 8 µm"):
        compare_slides(real, new, 1.0, brush=BRUSH, encoder=ENCODER)
    with pytest.raises(UsageError, match="smaller than a tile of 1024 µm"):
        compare_slides(real, new, 8.0, brush=BRUSH, encoder=ENCODER)
    coarse = open_slide(painted, force_mpp=1.0)
    with pytest.raises(UsageError, match=r"pixels of 1 µm show nothing at 0\.5 µm"):
        compare_slides(real, coarse, 0.5, brush=BRUSH, encoder=ENCODER)


def test_a_comparison_is_stopped_by_whom_it_tells(tissue_slide: Path, painted: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        compare_slides(open_slide(tissue_slide), open_slide(painted), 0.5, brush=BRUSH, encoder=ENCODER, progress=stop)


def test_stores_are_compared_where_their_tiles_are_the_same(tmp_path: Path) -> None:
    """The second store lies two tiles below and one left of the first's corner, and its last column beyond it."""
    whole = make_maps(Grid(0.5, 0, 0, 1024, 1024), dim=24, tile=128)[0.5]
    part = replace(whole, lattice=Grid(64.0, 0, 0, 6, 8), values=np.roll(whole.values, 1, axis=1)[2:])
    paths = []
    for name, one in (("real", whole), ("new", part)):
        tissue = Tissue.everywhere(one.lattice.at(8.0))
        paths.append(write_store(tmp_path / f"{name}.zarr", {0.5: one}, tissue=tissue, about={}).path)
    found = compare_stores(paths[0], paths[1], 0.5, brush=BRUSH, down=128.0, right=-64.0)
    assert found is not None
    assert np.isnan(found.values[:, 0]).all()  # left of the first
    expected = np.isfinite(whole.values[2:, :7, 0])
    assert (np.isfinite(found.values[:, 1:]) == expected).all()
    np.testing.assert_allclose(found.values[:, 1:][expected], 1, atol=1e-6)
    assert compare_stores(paths[0], paths[1], 0.5, brush=BRUSH, down=96.0) is None
    assert compare_stores(paths[0], paths[1], 2.0, brush=BRUSH) is None


def test_the_cosine_is_that_of_standardised_embeddings() -> None:
    brush = make_brush(dim=2, tile=128)
    brush.about["embeddings"]["0.5"] = {"mean": [1.0, 0.0], "std": [1.0, 2.0]}
    one, other = (
        replace(make_maps(Grid(0.5, 0, 0, 128, 128), dim=2, tile=128)[0.5], values=np.array([[row]], np.float16))
        for row in ([2.0, 0.0], [1.0, 2.0])
    )
    assert compare_maps(one, one, brush=brush).values.item() == pytest.approx(1)
    assert compare_maps(one, other, brush=brush).values.item() == pytest.approx(0, abs=1e-6)
