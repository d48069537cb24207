"""The same slide in another stain: white stays white, densities are multiplied, every window says the same."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush import stains
from wsi_brush.slide import open_slide
from wsi_brush.stains import VECTORS, draw_stain, in_stain, restained

SAME = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
ALL = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3, indexing="ij"), -1)


def density(pixels: NDArray[Any]) -> NDArray[np.float64]:
    return -np.log((pixels.astype(np.float64) + 1) / 256)


@given(seed=st.integers(0, 2**32))
def test_white_stays_white_and_densities_are_multiplied(seed: int) -> None:
    mix = draw_stain(np.random.default_rng(seed))
    assert (restained(np.full((3, 3), 255, np.uint8), mix) == 255).all()
    found, expected = restained(ALL, mix), 256 * np.exp(-density(ALL) @ np.array(mix).T) - 1
    assert np.abs(found - np.clip(expected, 0, 255)).max() <= 0.51


class Still(np.random.Generator):
    """Draws one number for every factor, and turns nothing."""

    def __init__(self, place: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.place = place

    def uniform(self, low: float, high: float, size: int) -> NDArray[np.float64]:  # type: ignore[override]
        assert low <= self.place <= high
        return np.full(size, self.place)

    def normal(self, loc: float, scale: float, size: tuple[int, int]) -> NDArray[np.float64]:  # type: ignore[override]
        return np.zeros(size)


@pytest.mark.parametrize("place", [-1.0, 0.0, 1.0])
def test_what_is_not_turned_is_scaled(place: float) -> None:
    np.testing.assert_allclose(np.linalg.norm(VECTORS, axis=1), 1)
    found = np.array(draw_stain(Still(place))) @ VECTORS.T
    np.testing.assert_allclose(found, VECTORS.T * np.array([1.6, 1.6, 1.3]) ** place, atol=1e-12)


def test_each_stain_is_turned_by_some_degrees_and_has_the_length_that_was_drawn() -> None:
    found = np.stack([np.array(draw_stain(np.random.default_rng(seed))) @ VECTORS.T for seed in range(500)])
    length = np.linalg.norm(found, axis=1)
    least, most = 1 / np.array([1.6, 1.6, 1.3]), np.array([1.6, 1.6, 1.3])
    assert (length > 0.999 * least).all()
    assert (length < 1.001 * most).all()
    np.testing.assert_allclose(np.log(length).std(0), np.log(most) / np.sqrt(3), rtol=0.1)
    turn = np.degrees(np.arccos(np.clip((found / length[:, None] * VECTORS.T).sum(1), -1, 1)))
    assert (np.sqrt((turn**2).mean(0)) > 4.3).all()
    assert (np.sqrt((turn**2).mean(0)) < 6.5).all()


def test_long_strips_are_done_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = draw_stain(np.random.default_rng(0))
    whole = restained(ALL, mix)
    np.testing.assert_array_equal(restained(ALL.swapaxes(0, 1), mix), whole.swapaxes(0, 1))
    monkeypatch.setattr(stains, "_BAND", 100)
    np.testing.assert_array_equal(restained(ALL, mix), whole)


def test_the_same_stain_changes_nothing() -> None:
    np.testing.assert_array_equal(restained(ALL, SAME), ALL)


def test_stains_differ_from_each_other_about_as_laboratories_do() -> None:
    generator = np.random.default_rng(0)
    tissue = np.array([[180, 110, 170], [230, 160, 200]], np.uint8)  # a nucleus' colour, and stroma's
    found = np.stack([restained(tissue, draw_stain(generator)) for _ in range(200)]).astype(np.float64)
    assert (np.abs(found.mean(0) - tissue) < 12).all(), "no colour is preferred"
    spread = found.std(0)
    assert (spread > 5).all(), spread
    assert (spread < 40).all(), spread
    assert (density(found[:, 0]).sum(-1) > density(found[:, 1]).sum(-1)).mean() > 0.97, "nuclei are the darker ones"


def test_a_slide_in_another_stain_is_one_in_every_window(tissue_slide: Path) -> None:
    slide = open_slide(tissue_slide)
    mix = draw_stain(np.random.default_rng(1))
    other = in_stain(slide, mix)
    grid = replace(slide.grid, top=64, left=32, height=100, width=90)
    whole = other.read(grid)
    np.testing.assert_array_equal(whole, restained(slide.read(grid), mix))
    np.testing.assert_array_equal(other.read(replace(grid, top=80, height=20)), whole[16:36])
    assert (whole != slide.read(grid)).mean() > 0.5
    assert (other.grid, other.mpp, other.path) == (slide.grid, slide.mpp, slide.path)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(other)).read(grid), whole)  # noqa: S301 (ours, a moment ago)


def test_one_generator_gives_one_stain_after_the_other() -> None:
    one, two = (np.random.default_rng(seed) for seed in (4, 4))
    first = [draw_stain(one) for _ in range(3)]
    assert first == [draw_stain(two) for _ in range(3)]
    assert len(set(first)) == 3
