"""A tile is found where it lies, however it is turned, among much that is of its kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tissue, write_lossless
from numpy.typing import NDArray

from wsi_brush.coordinates import turned
from wsi_brush.grid import Grid
from wsi_brush.nearest import NOWHERE, PITCH, SIDE, _density, _inner, detail, nearest, search_seconds, whole
from wsi_brush.samples import Codec
from wsi_brush.slide import Slide, open_slide

pytestmark = pytest.mark.usefixtures("one_thread")

Pixels = NDArray[np.uint8]
JPEG = Codec("jpeg:90")


@pytest.mark.parametrize("turn", range(8))
def test_the_place_and_the_turn_are_the_right_ones(tmp_path: Path, turn: int) -> None:
    """Also between the pixels of 2 µm, where the tile and its place share none."""
    fine = tissue(256, 288, 7).repeat(2, 0).repeat(2, 1)  # 1 µm
    training = open_slide(write_lossless(tmp_path / "training.tif", fine, mpp=1.0))
    top, left = 101 + turn, 203 - turn
    around = training.read(Grid(1.0, top, left, 64, 64).pad(32))
    slide = open_slide(write_lossless(tmp_path / "tile.tif", np.ascontiguousarray(turned(around, turn)), mpp=1.0))
    everywhere = Grid(PITCH, 0, 0, 256, 288)
    (hit,) = nearest([(slide, Grid(PITCH, 16, 16, SIDE, SIDE))], [(training, everywhere)], JPEG)
    assert (hit.slide, hit.turn, hit.grid.mpp, hit.grid.shape) == (0, turn, 1.0, (64, 64))
    assert abs(hit.grid.top - top) <= 1
    assert abs(hit.grid.left - left) <= 1
    assert hit.correlation > 0.8
    seen = turned(training.read(hit.grid), hit.turn).astype(float)
    assert np.corrcoef(seen.ravel(), slide.read(Grid(1.0, 32, 32, 64, 64)).astype(float).ravel())[0, 1] > 0.9


def test_the_nearest_of_all_slides_is_found(kin: Path, tmp_path: Path) -> None:
    slides = [open_slide(kin / name) for name in ("training.tif", "held.tif", "other.tif")]
    tiles = [(slides[k], Grid(PITCH, 111 + 32 * k, 77, SIDE, SIDE)) for k in range(3)]
    parts = [(slide, Grid(PITCH, 0, 0, 256, 256)) for slide in slides]
    hits = nearest(tiles, parts, Codec("none"))
    assert [hit.slide for hit in hits] == [0, 1, 2]
    assert [(hit.grid.top, hit.grid.left, hit.turn) for hit in hits] == [(222 + 64 * k, 154, 0) for k in range(3)]
    assert min(hit.correlation for hit in hits) > 0.999
    away = nearest(tiles[:1], [(slides[0], Grid(PITCH, 0, 128, 256, 192))], Codec("none"))[0]  # not where it was cut
    assert away.correlation < 0.6
    assert away.grid.left >= 256
    odd = nearest(tiles[:1], [(slides[0], Grid(PITCH, 1, 3, 254, 280))], Codec("none"))[0]  # over a block's edge
    assert (odd.grid, odd.turn) == (hits[0].grid, 0)


def test_what_is_nearly_blank_is_near_to_nothing(kin: Path, tmp_path: Path) -> None:
    """One nucleus on glass lies on any nucleus at the edge of glass."""
    pixels = np.full((256, 256, 3), 245, np.uint8)
    pixels[:, 128:] = tissue(256, 128, 5)
    pixels[100:104, 60:64] = (96, 58, 134)
    slide = open_slide(write_lossless(tmp_path / "edge.tif", pixels))
    parts = [(slide, Grid(PITCH, 0, 0, 256, 256))]
    blank, speck, full = nearest([(slide, Grid(PITCH, 84, c, SIDE, SIDE)) for c in (4, 46, 180)], parts, Codec("none"))
    assert blank.correlation < 0.1
    assert speck.correlation < 0.6
    assert full.correlation > 0.999
    nowhere = nearest([(slide, Grid(PITCH, 84, 180, SIDE, SIDE))], [(slide, Grid(PITCH, 0, 0, 31, 256))], Codec("none"))
    assert nowhere[0].correlation == NOWHERE


def test_detail_does_not_depend_on_stain_or_light(kin: Path) -> None:
    density = _density(open_slide(kin / "held.tif"), Grid(PITCH, 64, 64, 64, 64), Codec("none"))
    plain, faint = (_inner(detail(one, PITCH), 12) for one in (density, 0.5 * density + 0.2))
    assert np.corrcoef(plain.ravel(), faint.ravel())[0, 1] > 0.99
    assert 0.6 < plain.std() < 1.2
    assert np.abs(detail(np.full((40, 40), 0.7, np.float32), PITCH)).max() < 1e-3


def test_training_slides_are_read_a_little_at_a_time(kin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with them, nor with how many they are."""
    read, largest = Slide.read, [0]

    def watched(self: Slide, grid: Grid) -> Pixels:
        if grid.mpp == PITCH:
            largest.append(grid.height * grid.width)
        return read(self, grid)

    monkeypatch.setattr(Slide, "read", watched)
    slide = open_slide(kin / "held.tif")
    nearest([(slide, Grid(PITCH, 64, 64, SIDE, SIDE))], [(slide, Grid(PITCH, 0, 0, 640, 640))], JPEG)
    assert 256**2 <= max(largest) <= (256 + 32 + 2 * 12) ** 2


def test_the_time_it_takes_is_known_before(kin: Path) -> None:
    slide = open_slide(kin / "other.tif")
    assert [whole(slide).shape, whole(slide, 0.2).shape] == [(640, 640), (640, 128)]
    assert 0 < search_seconds(64, [whole(slide)]) < 60
    assert search_seconds(64, [whole(slide, 0.2)]) > search_seconds(64, [])
