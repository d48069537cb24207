"""Tissue is found by colour against fixed thresholds: blanks have none, ink is none, faint stroma is some."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush import tissue
from wsi_brush.grid import Grid
from wsi_brush.slide import open_slide
from wsi_brush.tissue import PITCH, Tissue, find_tissue, tissue_mask

DATA = Path(__file__).parents[2] / "shared" / "data"
PAPER = (243, 241, 242)
TISSUES = {
    "haematoxylin": (120, 95, 160),
    "eosin": (225, 150, 185),
    "pale stroma": (240, 220, 231),
    "blood": (175, 70, 90),
    "DAB": (160, 110, 75),
}
INKS = {
    "green": (60, 170, 140),
    "faint green": (170, 220, 205),
    "red": (215, 35, 50),
    "blue": (40, 70, 160),
    "black": (25, 25, 28),
    "yellow": (245, 225, 60),
}


def picture(
    colour: tuple[int, int, int], *, size: int = 96, patch: slice = slice(24, 72), noise: int = 2
) -> NDArray[np.uint8]:
    """Paper with a square of one colour, at the pitch of tissue, with a scanner's noise."""
    rgb = np.empty((size, size, 3), np.int64)
    rgb[:] = PAPER
    rgb[patch, patch] = colour
    return (rgb + np.random.default_rng(0).integers(-noise, noise + 1, rgb.shape)).clip(0, 255).astype(np.uint8)


def blots(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Stains, pens and paper in spots of all sizes, and some specks."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(seed)
    rgb = np.full((height, width, 3), PAPER, np.uint8)
    for colour in (*TISSUES.values(), *INKS.values(), PAPER):
        field = gaussian_filter(random.normal(size=(height, width)), random.choice([0.6, 2, 5]))
        rgb[field > np.quantile(field, random.uniform(0.7, 0.95))] = colour
    return rgb


@settings(max_examples=15, deadline=None)
@given(st.integers(340, 900), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_a_mask_is_the_same_in_strips_and_whole(height: int, width: int, seed: int) -> None:
    rgb = blots(height, width, seed)
    whole = tissue_mask(rgb, PITCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tissue, "_CELLS", 1)
        assert len(list(tissue._strips((height, width), 313))) > 1
        assert np.array_equal(tissue_mask(rgb, PITCH), whole)


def test_the_memory_for_a_mask_does_not_grow_with_the_picture_as_colours_do() -> None:
    rgb = blots(512, 512, 0)
    peaks = []
    for repeats in (1, 16):
        tall = np.tile(rgb, (repeats, 1, 1))
        tracemalloc.start()
        tissue_mask(tall, PITCH)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 12 * 15 * 512 * 512  # bytes a cell: masks, and the numbers of their parts


@pytest.mark.parametrize("stain", TISSUES)
def test_stained_cells_are_tissue(stain: str) -> None:
    mask = tissue_mask(picture(TISSUES[stain]), PITCH)
    assert mask[26:70, 26:70].all()
    assert not mask[:20].any()
    assert mask.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("ink", INKS)
def test_ink_is_no_tissue(ink: str) -> None:
    assert tissue_mask(picture(INKS[ink]), PITCH).mean() == 0


@pytest.mark.parametrize("ink", ["green", "red", "blue", "black"])
def test_ink_over_tissue_is_cut_out_and_not_filled(ink: str) -> None:
    rgb = picture(TISSUES["eosin"])
    rgb[40:48, 40:48] = INKS[ink]
    mask = tissue_mask(rgb, PITCH)
    assert not mask[40:48, 39:49].any()
    assert not mask[39:49, 40:48].any()
    assert mask[28:36, 28:68].all()


@pytest.mark.parametrize("level", [0, 128, 200, 235, 255])
@pytest.mark.parametrize("noise", [0, 2, 4])
def test_blanks_have_no_tissue_whatever_their_noise(level: int, noise: int) -> None:
    rgb = picture((level, level, level), patch=slice(0, 96), noise=noise)
    assert tissue_mask(rgb, PITCH).mean() == 0


@pytest.mark.parametrize("tint", [(245, 240, 232), (246, 243, 240), (238, 242, 245), (250, 244, 247)])
def test_tinted_glass_is_no_tissue(tint: tuple[int, int, int]) -> None:
    assert tissue_mask(picture(tint, patch=slice(0, 96)), PITCH).mean() == 0


def test_fat_is_tissue_by_its_membranes() -> None:
    rgb = picture(PAPER)
    for line in range(24, 73, 8):
        rgb[line, 24:73] = rgb[24:73, line] = (240, 226, 235)  # thinner than a cell of the mask, so very faint
    mask = tissue_mask(rgb, PITCH)
    assert mask[26:70, 26:70].all()
    assert not mask[:20].any()


def test_a_lumen_is_filled_and_a_wide_gap_is_not() -> None:
    rgb = picture(TISSUES["eosin"], size=200, patch=slice(10, 190))
    rgb[30:40, 30:40] = PAPER  # 80 µm
    rgb[80:140, 80:140] = PAPER  # 480 µm
    mask = tissue_mask(rgb, PITCH)
    assert mask[30:40, 30:40].all()
    assert not mask[90:130, 90:130].any()


def test_dust_is_dropped_but_a_tiny_picture_is_not_dust() -> None:
    assert tissue_mask(picture(TISSUES["haematoxylin"], patch=slice(40, 44)), PITCH).mean() == 0
    for shape in [(1, 1), (1, 5), (3, 2), (4, 4)]:
        assert tissue_mask(np.full((*shape, 3), TISSUES["eosin"], np.uint8), PITCH).all()
        assert not tissue_mask(np.full((*shape, 3), PAPER, np.uint8), PITCH).any()
    assert tissue_mask(np.empty((0, 4, 3), np.uint8), PITCH).shape == (0, 4)


def test_corners_of_a_picture_full_of_tissue_are_tissue() -> None:
    assert tissue_mask(picture(TISSUES["eosin"], patch=slice(0, 96)), PITCH).all()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 99),
    mpp=st.floats(1.0, 90.0),
    top=st.integers(-9, 9),
    left=st.integers(-9, 9),
)
def test_cover_is_the_exact_area(seed: int, mpp: float, top: int, left: int) -> None:
    """Against a sum over the corners of every pair of cells, and in total against the area of the mask."""
    mask = np.random.default_rng(seed).random((5, 7)) < 0.5
    tissue = Tissue(mask, Grid(8.0, 1, -2, 5, 7))
    lattice = Grid(mpp, top, left, 4, 3)
    cover = tissue.cover(lattice)
    for row in range(4):
        for column in range(3):
            y, x, area = (top + row) * mpp, (left + column) * mpp, 0.0
            for i, j in np.argwhere(mask):
                v, u = (1 + i) * 8.0, (j - 2) * 8.0
                area += max(0.0, min(y + mpp, v + 8) - max(y, v)) * max(0.0, min(x + mpp, u + 8) - max(x, u))
            assert cover[row, column] == pytest.approx(area / mpp**2, abs=1e-6)
    around = Grid(mpp, -int(200 // mpp) - 1, -int(200 // mpp) - 1, int(400 // mpp) + 3, int(400 // mpp) + 3)
    assert tissue.cover(around).sum(dtype=np.float64) * mpp**2 == pytest.approx(mask.sum() * 64.0, rel=1e-5, abs=1e-6)


def test_fraction_and_shape() -> None:
    assert Tissue(np.eye(4, dtype=bool), Grid(8, 0, 0, 4, 4)).fraction == 0.25
    assert Tissue(np.zeros((0, 0), bool), Grid(8, 0, 0, 0, 0)).fraction == 0
    with pytest.raises(ValueError, match="tissue mask"):
        Tissue(np.zeros((2, 2), bool), Grid(8, 0, 0, 4, 4))


def test_the_tissue_of_a_slide(tissue_slide: Path) -> None:
    """Found where the slide's own pixels are coloured, and the same twice."""
    slide = open_slide(tissue_slide)
    tissue = find_tissue(slide)
    assert tissue.grid == slide.grid.at(8.0)
    assert 0.02 < tissue.fraction < 0.9
    coloured = slide.read(tissue.grid).min(axis=-1) < 215
    assert (tissue.mask & coloured).sum() > 0.9 * coloured.sum()
    assert np.array_equal(find_tissue(slide).mask, tissue.mask)


@pytest.mark.real
@pytest.mark.skipif(not DATA.is_dir(), reason="no real slides beside the checkout")
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("no-tissue", 0.0, 0.0),
        ("no-tissue-green-pen", 0.0, 0.0),
        ("medium-nuclei-score-green-pen-level1", 0.30, 0.50),
        ("tcga-green-pen", 0.70, 0.85),
        ("tcga-red-pen", 0.55, 0.75),
        ("very-low-nuclei-score-red-pen-level1", 0.30, 0.60),
        ("high-nuclei-score-red-pen-level1", 0.95, 1.0),
    ],
)
def test_pen_marks_and_blanks(name: str, low: float, high: float) -> None:
    """The bounds are from looking at the overlays: what is neither ink nor glass is tissue."""
    slide = open_slide(DATA / "artefacts" / f"{name}.png", assume_mpp=0.5)
    assert low <= find_tissue(slide).fraction <= high
