"""Grid: one half-pixel convention, and windows that fit together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_brush.grid import Grid

pitches = st.sampled_from([0.2528, 0.263018, 0.5, 0.499, 1.0, 2.0, 3.7, 8.0])
places = st.integers(-2_000_000, 2_000_000)
lengths = st.integers(0, 3000)
grids = st.builds(Grid, pitches, places, places, lengths, lengths)


@pytest.mark.parametrize("mpp", [0.0, -0.5, math.nan, math.inf])
def test_a_pitch_is_positive_and_finite(mpp: float) -> None:
    with pytest.raises(ValueError, match="positive pitch"):
        Grid(mpp, 0, 0, 1, 1)


def test_an_extent_is_not_negative() -> None:
    with pytest.raises(ValueError, match="cannot be -1 x 2"):
        Grid(1.0, 0, 0, -1, 2)


def test_a_centre_lies_half_a_pixel_inside() -> None:
    rows, columns = Grid(0.5, 2, -3, 2, 3).centres()
    np.testing.assert_array_equal(rows, [1.25, 1.75])
    np.testing.assert_array_equal(columns, [-1.25, -0.75, -0.25])


@given(grids)
def test_centres_lie_inside_the_extent_and_number_the_pixels(grid: Grid) -> None:
    rows, columns = grid.centres()
    top, left, bottom, right = grid.extent
    assert (len(rows), len(columns)) == grid.shape
    assert all(top < row < bottom for row in rows[[0, -1]] if len(rows)) if len(rows) else grid.height == 0
    assert all(left < column < right for column in columns[[0, -1]]) if len(columns) else grid.width == 0


@given(grids, pitches)
def test_at_another_pitch_it_covers_and_is_smallest(grid: Grid, mpp: float) -> None:
    other = grid.at(mpp)
    slack = 2e-6 * mpp + 1e-8
    for mine, its, sign in zip(grid.extent, other.extent, (1, 1, -1, -1), strict=True):
        assert sign * (mine - its) > -slack
        assert sign * (mine - its) < mpp + slack
    assert other.mpp == mpp


@given(grids)
def test_at_its_own_pitch_it_is_itself(grid: Grid) -> None:
    assert grid.at(grid.mpp) == grid


@given(grids, st.integers(1, 300))
def test_aligned_edges_are_multiples_and_no_further_than_needed(grid: Grid, multiple: int) -> None:
    outer = grid.aligned(multiple)
    assert not any(edge % multiple for edge in (outer.top, outer.left, outer.bottom, outer.right))
    assert grid.clip(outer) == grid
    assert 0 <= grid.top - outer.top < multiple
    assert 0 <= outer.right - grid.right < multiple


@given(grids, st.integers(1, 64))
def test_coarsened_covers_the_same_place(grid: Grid, factor: int) -> None:
    coarse = grid.coarsened(factor)
    assert coarse.mpp == grid.mpp * factor
    np.testing.assert_allclose(coarse.extent, grid.aligned(factor).extent, rtol=1e-12, atol=1e-9)


@given(grids, st.integers(0, 500))
def test_a_padded_grid_holds_the_grid(grid: Grid, pixels: int) -> None:
    outer = grid.pad(pixels)
    rows, columns = grid.within(outer)
    assert (rows, columns) == (slice(pixels, pixels + grid.height), slice(pixels, pixels + grid.width))
    assert outer.pad(0) == outer


@given(grids, places, places, lengths, lengths)
def test_clipping_is_symmetric_in_place_and_never_negative(
    a: Grid, top: int, left: int, height: int, width: int
) -> None:
    b = Grid(a.mpp, a.top + top % 4000 - 2000, a.left + left % 4000 - 2000, height, width)
    one, two = a.clip(b), b.clip(a)
    assert one == two
    assert one.height <= min(a.height, b.height)
    assert one.width <= min(a.width, b.width)
    assert one.clip(a) == one


def test_grids_of_different_pitch_do_not_meet() -> None:
    with pytest.raises(ValueError, match="different pitch"):
        Grid(1.0, 0, 0, 4, 4).clip(Grid(2.0, 0, 0, 4, 4))


def test_only_what_is_inside_has_a_place() -> None:
    with pytest.raises(ValueError, match="not inside"):
        Grid(1.0, 3, 0, 4, 4).within(Grid(1.0, 0, 0, 6, 6))


@settings(deadline=None)
@given(st.builds(Grid, pitches, places, places, st.integers(0, 90), st.integers(0, 90)), st.integers(4, 70))
def test_tiles_cover_every_pixel_once_in_raster_order(grid: Grid, size: int) -> None:
    seen = np.zeros(grid.shape, int)
    corners = []
    for tile in grid.tiles(size):
        assert 0 < tile.height <= size
        assert 0 < tile.width <= size
        seen[tile.within(grid)] += 1
        corners.append((tile.top, tile.left))
    assert (seen == 1).all()
    assert corners == sorted(corners)
