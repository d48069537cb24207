"""The same slide in another stain: white stays white, densities are multiplied, every window says the same."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi_brush.slide import open_slide
from wsi_brush.stains import draw_stain, in_stain, restained

SAME = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
ALL = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3, indexing="ij"), -1)


def density(pixels: np.ndarray) -> np.ndarray:
    return -np.log((pixels.astype(np.float64) + 1) / 256)


@given(seed=st.integers(0, 2**32))
def test_white_stays_white_and_densities_are_multiplied(seed: int) -> None:
    mix = draw_stain(np.random.default_rng(seed))
    assert (restained(np.full((3, 3), 255, np.uint8), mix) == 255).all()
    found, expected = restained(ALL, mix), 256 * np.exp(-density(ALL) @ np.array(mix).T) - 1
    assert np.abs(found - np.clip(expected, 0, 255)).max() <= 0.51


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
