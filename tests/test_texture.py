"""What pictures are made of, against fields whose variance is known, made nuclei, and made seams."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush.texture import (
    DESCRIPTOR,
    GUARD,
    LEAST_NUCLEUS,
    Nuclei,
    Seam,
    densities,
    descriptor,
    find_nuclei,
    haematoxylin,
    nuclear_threshold,
    octaves,
    seam_of,
    stain_distance,
    steps,
)

Pixels = NDArray[np.uint8]
MPP = 0.5
NUCLEUS, GROUND = (0.10, 0.03, 0.0), (0.005, 0.05, 0.0)  # haematoxylin, eosin, DAB, in scikit-image's unit


def noise(height: int = 128, width: int = 128, *, seed: int = 0) -> Pixels:
    """Every grey level equally likely: a variance of (256² - 1) / 12."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def smooth(side: int = 128, *, seed: int = 0) -> Pixels:
    """Cloudy, coloured noise that is never black or white."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(seed).normal(size=(side, side, 3)), (2, 2, 0.7))
    return np.asarray(np.clip(150 + 40 * field / field.std(), 1, 254), np.uint8)


def tissue(
    centres: Sequence[tuple[float, float]],
    *,
    axes: tuple[float, float] = (4.0, 4.0),
    size: tuple[int, int] = (256, 256),
    mpp: float = MPP,
    angle: float = 0.0,
    nucleus: tuple[float, float, float] = NUCLEUS,
) -> Pixels:
    """Blue-violet ellipses on a pink ground, with a scanner's noise; half axes and centres (down, across) in µm."""
    from skimage.color import hed2rgb

    rows, columns = ((np.arange(side) + 0.5) * mpp for side in size)
    stains = np.broadcast_to(np.array(GROUND), (*size, 3)).copy()
    for row, column in centres:
        down, across = rows[:, None] - row, columns[None, :] - column
        along = (down * math.cos(angle) + across * math.sin(angle)) / axes[0]
        aside = (across * math.cos(angle) - down * math.sin(angle)) / axes[1]
        stains[along**2 + aside**2 <= 1] = nucleus
    rgb = 255 * hed2rgb(stains) + np.random.default_rng(0).normal(0, 2, stains.shape)
    return np.asarray(np.rint(rgb).clip(0, 255), np.uint8)


def lattice(pitch: float = 20.0, first: float = 24.0, count: int = 5) -> list[tuple[float, float]]:
    return [(first + pitch * i, first + pitch * j) for i in range(count) for j in range(count)]


def nuclei_of(pixels: Pixels, mpp: float = MPP) -> Nuclei:
    return find_nuclei(pixels, mpp, nuclear_threshold([pixels], mpp))


class TestOctaves:
    def test_white_noise_loses_three_quarters_each_time(self) -> None:
        found, variance = octaves(noise(1024, 1024), 4), (256**2 - 1) / 12
        assert found == pytest.approx(variance * 0.75 * 0.25 ** np.arange(4), rel=0.02)

    def test_a_checkerboard_is_all_in_the_octave_of_its_squares(self) -> None:
        checks = np.where(np.indices((64, 64)).sum(0) % 2, 200, 100).astype(np.uint8)[..., None].repeat(3, -1)
        assert octaves(checks, 3) == pytest.approx([2500, 0, 0])
        assert octaves(checks.repeat(4, 0).repeat(4, 1), 4) == pytest.approx([0, 0, 2500, 0])

    @given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_they_sum_to_what_the_coarsest_lacks(self, down: int, across: int, count: int, seed: int) -> None:
        side = 2**count
        pixels = noise(down * side, across * side, seed=seed)
        coarsest = pixels.reshape(down, side, across, side, 3).mean((1, 3))
        expected = (pixels.var((0, 1)) - coarsest.var((0, 1))).mean()
        found = octaves(pixels, count)
        assert found.shape == (count,)
        assert found.dtype == np.float64
        assert found.sum() == pytest.approx(expected, rel=1e-5, abs=1e-6)

    @pytest.mark.parametrize("shape", [(96, 64), (64, 96), (0, 64)])
    def test_sides_that_do_not_divide(self, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="halved 6 times"):
            octaves(np.zeros((*shape, 3), np.uint8))


class TestStain:
    def test_densities(self) -> None:
        found = densities(np.array([[[255, 127, 0]]], np.uint8))
        assert found.dtype == np.float32
        assert found[0, 0] == pytest.approx([0, math.log10(2), math.log10(256)], abs=1e-6)

    @given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.integers(1, 60), st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_a_shift_is_how_far_they_are(self, shift: list[float], n: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        real = random.normal(0.4, 0.2, (n, 3))
        found = stain_distance(real, random.permutation(real) + shift)
        assert found.dtype == np.float64
        assert found == pytest.approx(np.abs(shift), abs=1e-9)

    def test_spread_counts_too(self) -> None:
        """Of 0 and 2 against 1 and 1, all is moved by 1 though the means are one; sets may differ in size."""
        real, other = np.array([[0.0, 5.0, 1.0], [2.0, 5.0, 1.0]]), np.array([[1.0, 5.0, 3.0]] * 3)
        assert stain_distance(real, other) == pytest.approx([1, 0, 2])

    def test_scipy_says_the_same(self) -> None:
        """Of sets of one size too, for which there is a shorter way."""
        from scipy.stats import wasserstein_distance

        real, other = densities(smooth())[::2].reshape(-1, 3), densities(noise())[1::2].reshape(-1, 3)
        expected = [wasserstein_distance(real[:, k], other[:, k]) for k in range(3)]
        assert stain_distance(real, other) == pytest.approx(expected, rel=1e-5)

    def test_none(self) -> None:
        with pytest.raises(ValueError, match="both sets"):
            stain_distance(np.zeros((0, 3)), np.zeros((4, 3)))


class TestHaematoxylin:
    def test_it_is_what_was_put_there(self) -> None:
        pixels = tissue([(64.0, 64.0)], axes=(20.0, 20.0))
        found = haematoxylin(pixels)
        assert found.shape == pixels.shape[:2]
        assert found.dtype == np.float32
        assert found[118:138, 118:138].mean() == pytest.approx(NUCLEUS[0], abs=0.003)
        assert found[:30].mean() == pytest.approx(GROUND[0], abs=0.003)

    def test_black_and_white(self) -> None:
        black, dark, white = haematoxylin(np.array([[[0] * 3, [1] * 3, [255] * 3]], np.uint8))[0]
        assert black == dark > 0.1
        assert white == pytest.approx(0, abs=1e-6)


class TestNuclei:
    @pytest.mark.parametrize("mpp", [0.25, 0.5, 0.8])
    @pytest.mark.parametrize("radius", [3.0, 4.0, 6.0])
    def test_discs(self, radius: float, mpp: float) -> None:
        size, random = (round(128 / mpp), round(140 / mpp)), np.random.default_rng(0)
        centres = [(row + random.uniform(-1, 1), column + random.uniform(-1, 1)) for row, column in lattice()]
        found = nuclei_of(tissue(centres, axes=(radius, radius), size=size, mpp=mpp), mpp)
        assert found.count == 25
        assert found.area.shape == found.eccentricity.shape == (25,)
        assert found.area.mean() == pytest.approx(math.pi * radius**2, rel=0.1)
        assert found.area == pytest.approx(math.pi * radius**2, rel=0.15)  # of 44 pixels, a few
        assert found.eccentricity.max() < 0.5  # half axes that differ by 13 %, less than a pixel
        guard = mpp * math.ceil(GUARD / mpp)
        field = (size[0] * mpp - 2 * guard) * (size[1] * mpp - 2 * guard) / 1e6
        assert found.field == pytest.approx(field)
        assert found.density == pytest.approx(25 / field)

    @pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 4, math.pi / 2])
    @pytest.mark.parametrize("axes", [(6.0, 4.0), (8.0, 4.0), (9.0, 3.0)])
    def test_ellipses(self, axes: tuple[float, float], angle: float) -> None:
        found = nuclei_of(tissue(lattice(), axes=axes, angle=angle))
        assert found.count == 25
        assert found.eccentricity == pytest.approx(math.sqrt(1 - (axes[1] / axes[0]) ** 2), abs=0.05)
        assert found.area == pytest.approx(math.pi * axes[0] * axes[1], rel=0.1)

    def test_those_that_touch_are_split(self) -> None:
        pairs = [(row, column + side) for row, column in lattice() for side in (-3.4, 3.4)]
        found = nuclei_of(tissue(pairs, axes=(4.0, 4.0)))
        assert found.count == 50
        # Two discs less half the lens that they share
        lens = 2 * 16 * math.acos(3.4 / 4) - 2 * 3.4 * math.sqrt(16 - 3.4**2)
        assert found.area == pytest.approx(math.pi * 16 - lens / 2, rel=0.12)

    def test_specks_and_clumps_are_none_and_pale_insides_are_filled(self) -> None:
        assert nuclei_of(tissue(lattice(), axes=(1.6, 1.6))).count == 0
        assert math.pi * 1.6**2 < LEAST_NUCLEUS
        assert nuclei_of(tissue([(64.0, 64.0)], axes=(13.0, 13.0))).count == 0
        rings = tissue(lattice(), axes=(5.0, 5.0))
        pale = tissue(lattice(), axes=(2.4, 2.4), nucleus=(0.0, 0.0, 0.0)) > 250
        rings[pale.all(-1)] = tissue([])[0, 0]
        found = nuclei_of(rings)
        assert found.count == 25
        assert found.area == pytest.approx(math.pi * 25, rel=0.1)

    def test_a_chain_around_a_lumen_is_not_filled(self) -> None:
        around = [(64 + 20 * math.sin(a), 64 + 20 * math.cos(a)) for a in np.arange(18) * math.tau / 18]
        found = nuclei_of(tissue(around))
        assert found.count == 18
        assert found.area.max() < 60

    def test_counted_where_the_centroid_is(self) -> None:
        """Cut into pieces that overlap by twice the guard, a picture has every nucleus in one piece."""
        random = np.random.default_rng(3)
        centres = [(row + random.uniform(-5, 5), column + random.uniform(-5, 5)) for row, column in lattice(count=6)]
        whole, guard = tissue(centres, size=(300, 300)), round(GUARD / MPP)
        threshold = nuclear_threshold([whole], MPP)
        everything = find_nuclei(whole, MPP, threshold)
        step = (300 - 2 * guard) // 2
        parts = [
            find_nuclei(whole[r : r + step + 2 * guard, c : c + step + 2 * guard], MPP, threshold)
            for r in (0, step)
            for c in (0, step)
        ]
        assert everything.count == sum(row >= GUARD and column >= GUARD for row, column in centres) > 30
        assert sum(part.count for part in parts) == everything.count
        assert sum(part.field for part in parts) == pytest.approx(everything.field)
        assert sorted(np.concatenate([p.area for p in parts])) == pytest.approx(sorted(everything.area), rel=0.03)

    @pytest.mark.parametrize("side", range(4))
    def test_what_touches_the_border_is_counted_and_not_measured(self, side: int) -> None:
        pixels = tissue([(13.0, 64.0), (64.0, 64.0)], axes=(15.0, 4.0))
        found = nuclei_of(np.rot90(pixels, side))
        assert found.count == 2
        assert len(found.area) == len(found.eccentricity) == 1

    @pytest.mark.parametrize("side", range(4))
    def test_the_edge_of_the_field(self, side: int) -> None:
        for place, count in ((GUARD - 0.2, 0), (GUARD + 0.2, 1)):
            assert nuclei_of(np.rot90(tissue([(place, 64.0)]), side)).count == count

    def test_what_is_cut_by_the_border_is_split_from_its_neighbour(self) -> None:
        assert nuclei_of(tissue([(1.5, 64.0), (13.0, 64.0)], axes=(6.5, 6.5))).count == 1

    @pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (230, 180, 205)])
    def test_blank(self, colour: tuple[int, int, int]) -> None:
        blank = np.full((128, 128, 3), colour, np.uint8)
        found = nuclei_of(blank)
        assert found.count == len(found.area) == len(found.eccentricity) == 0
        assert found.density == 0
        assert find_nuclei(blank, MPP, -1.0).count == 0  # all of it one clump

    def test_one_threshold_of_all_windows(self) -> None:
        """It lies between ground and nucleus, where a window of ground alone would be cut through its noise."""
        ground, nuclei = tissue([]), tissue(lattice())
        threshold = nuclear_threshold([ground, nuclei], MPP)
        assert GROUND[0] + 0.02 < threshold < NUCLEUS[0] - 0.02
        assert find_nuclei(ground, MPP, threshold).count == 0
        assert find_nuclei(nuclei, MPP, threshold).count == 25

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="windows"):
            nuclear_threshold([], MPP)
        with pytest.raises(ValueError, match="inside its border"):
            find_nuclei(np.zeros((48, 99, 3), np.uint8), MPP, 0.1)
        assert find_nuclei(np.zeros((49, 99, 3), np.uint8), MPP, 9.0).field == pytest.approx(51 * 0.25e-6)


def seams(pixels: Pixels, period: int, *, among: int = 1) -> Seam:
    return seam_of(steps(pixels, period, among=among))


class TestSeams:
    @pytest.mark.parametrize("period", [8, 32, 128])
    def test_noise_has_none(self, period: int) -> None:
        ranks = []
        for seed in range(8):
            ratio, rank = seams(noise(256, 512, seed=seed), period)
            assert ratio == pytest.approx(1, abs=0.05)
            ranks.append(rank)
        assert 0.2 < np.mean(ranks) < 0.8

    def test_a_smooth_trend_has_none(self) -> None:
        trend = np.linspace(20, 230, 256)[:, None, None] + np.zeros((1, 256, 3))
        dithered = (trend + np.random.default_rng(0).uniform(0, 1, trend.shape)).astype(np.uint8)
        assert seams(dithered, 32).ratio == pytest.approx(1, abs=0.1)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("size", [(256, 256), (300, 256), (256, 300)])
    def test_a_step_in_every_second_block(self, size: tuple[int, int], axis: int) -> None:
        pixels = 100 + noise(*size) // 16
        pixels[np.arange(size[0]) // 32 % 2 == 1] += 50
        found = seams(pixels.swapaxes(0, axis), 32)
        assert found.ratio > 2
        assert found.rank == 1
        assert seams(np.roll(pixels, 7, 0).swapaxes(0, axis), 32).ratio < 1  # the step is not where borders are

    def test_counted_by_hand(self) -> None:
        rows = np.array([0, 1, 4, 5, 5, 10], np.uint8)[:, None, None].repeat(2, 1).repeat(3, 2)
        # Period 3: steps 1, 3, |1|, 0, 5 at offsets 1, 2, 0, 1, 2, of one pixel; across, no border, or one of five
        assert steps(rows, 3).tolist() == [[3, 3, 24], [3, 6, 6]]
        assert steps(rows, 3, corner=(-1, 2)).tolist() == [[3, 24, 3], [6 + 15, 6, 3]]
        assert seams(rows, 3) == pytest.approx((1 / (9 / 4), 1 / 2))

    def test_nothing_differs_or_only_blocks_do(self) -> None:
        assert np.isnan(seams(np.full((64, 64, 3), 7, np.uint8), 16)).all()
        blocks = noise(4, 4).repeat(16, 0).repeat(16, 1)
        assert seams(blocks, 16) == (math.inf, 1)

    @pytest.mark.parametrize("period", [64, 65, 1])
    def test_no_border_or_nothing_else(self, period: int) -> None:
        assert np.isnan(seams(noise(64, 64), period)).all()


class TestDescriptor:
    def test_by_definition(self) -> None:
        pixels = smooth()
        found, density = descriptor(pixels), densities(pixels).reshape(-1, 3).astype(np.float64)
        assert found.shape == (DESCRIPTOR,)
        assert found.dtype == np.float64
        assert found[:6] == pytest.approx([*density.mean(0), *density.std(0)])
        correlations = np.asarray(np.corrcoef(density, rowvar=False))
        assert found[6:9] == pytest.approx(correlations[[0, 0, 1], [1, 2, 2]], abs=1e-3)
        detail = np.exp(found[9:].reshape(5, 3))
        assert detail.mean(1) == pytest.approx(octaves(pixels, 5) + 1 / 12, rel=1e-6)

    @pytest.mark.parametrize("level", [0, 131, 255])
    def test_blank_is_finite(self, level: int) -> None:
        found = descriptor(np.full((64, 32, 3), level, np.uint8))
        assert np.isfinite(found).all()
        assert found[3:9] == pytest.approx(0, abs=1e-6)

    @given(st.integers(0, 99))
    @settings(max_examples=10, deadline=None)
    def test_flips_do_not_matter(self, seed: int) -> None:
        pixels = smooth(64, seed=seed)
        for other in (pixels[::-1], pixels[:, ::-1], pixels.swapaxes(0, 1)):
            assert descriptor(other) == pytest.approx(descriptor(pixels), rel=1e-6, abs=1e-9)

    def test_stain_and_blur_do(self) -> None:
        from scipy.ndimage import gaussian_filter

        pixels = smooth()
        plain, blurred = descriptor(pixels), descriptor(gaussian_filter(pixels, (1.5, 1.5, 0)))
        assert (blurred[9:12] < plain[9:12] - 0.5).all()
        assert blurred[:3] == pytest.approx(plain[:3], abs=0.02)
        stained = pixels.copy()
        stained[..., 1] //= 2
        assert descriptor(stained)[1] == pytest.approx(plain[1] + math.log10(2), abs=0.01)
        assert descriptor(stained)[[0, 2]] == pytest.approx(plain[[0, 2]])

    def test_sides_that_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="halved 5 times"):
            descriptor(noise(48, 64))


@pytest.mark.parametrize(("period", "among"), [(2, 1), (8, 1), (8, 2)])
def test_squares_sum_to_the_whole(period: int, among: int) -> None:
    """Each line is counted once, in the square that begins with it, which is seen with the row and column before."""
    pixels = noise(600, 530)
    found = sum(
        steps(pixels[top : top + 101, left : left + 101], period, among=among, corner=(top, left))
        for top in range(0, 599, 100)
        for left in range(0, 529, 100)
    )
    expected = np.zeros((2, period))
    for image in (pixels.astype(int), pixels.astype(int).swapaxes(0, 1)):
        for line in range(1, len(image)):
            expected[:, line % period] += np.abs(image[line, 1:] - image[line - 1, 1:]).sum(), image[line, 1:].size
    assert np.array_equal(found, expected[:, ::among])
    assert np.array_equal(found, steps(pixels, period, among=among))


def test_lines_without_one_of_the_lattice_beside_them_do_not_count() -> None:
    pixels = noise(100, 100)
    assert not steps(pixels, 128, corner=(10, 20)).any()
    assert (
        steps(pixels, 128, corner=(28, 29))[1].sum() == 99 * 99 * 3
    )  # the line at 128 is its last row's, or no column's


def test_a_finer_lattice_is_not_taken_for_seams() -> None:
    """Cells of 2 pixels that are flat inside: every even line is a border, of tiles or not."""
    cells = np.random.default_rng(5).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    pixels = cells.repeat(2, 0).repeat(2, 1)
    assert seams(pixels, 2).rank == 1
    assert seams(pixels, 128).ratio > 1.8
    assert seams(pixels, 128, among=2).ratio == pytest.approx(1, abs=0.05)
