"""Distances between sets of vectors, against closed forms and against every pair, one by one."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_brush import distances
from wsi_brush.distances import Vectors, frechet, interval, kernel_distance, overlap


def normal(n: int, dim: int, *, seed: int = 0, mean: float = 0.0, spread: float = 1.0) -> Vectors:
    return np.random.default_rng(seed).normal(mean, spread, (n, dim))


def exactly(mean: Vectors, spread: Vectors, n: int = 200, seed: int = 0) -> Vectors:
    """Vectors whose sample mean and covariance are these."""
    draw = normal(n, len(mean), seed=seed)
    draw -= draw.mean(0)
    white = draw @ np.linalg.inv(np.linalg.cholesky(np.cov(draw, rowvar=False))).T
    found: Vectors = mean + white @ np.linalg.cholesky(spread).T
    return found


class TestFrechet:
    def test_gaussians_whose_distance_is_known(self) -> None:
        first, second = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
        one, two = exactly(np.zeros(3), first), exactly(np.array([1.0, 2.0, 2.0]), second, seed=1)
        assert frechet(one, two) == pytest.approx(9 + 1 + 0 + 4, rel=1e-9)  # of diagonal ones, (s - s')² an axis

    def test_gaussians_that_share_no_axes(self) -> None:
        """In two dimensions tr (C C')^½ = (tr CC' + 2 (det CC')^½)^½."""
        first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
        product = first @ second
        root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
        found = frechet(exactly(np.zeros(2), first), exactly(np.ones(2), second, seed=1))
        assert found == pytest.approx(2 + np.trace(first + second) - 2 * root, rel=1e-9)

    def test_scipy_says_the_same(self) -> None:
        from scipy.linalg import sqrtm

        one, two = normal(90, 20), normal(70, 20, seed=1, mean=0.2) @ normal(20, 20, seed=2)
        first, second = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
        expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
        assert frechet(one, two) == pytest.approx(float(expected), rel=1e-6)

    def test_itself_is_at_no_distance(self) -> None:
        one = normal(50, 8)
        assert abs(frechet(one, one)) < 1e-9

    def test_too_few_vectors(self) -> None:
        with pytest.raises(ValueError, match="8 vectors of 8 numbers"):
            frechet(normal(8, 8), normal(90, 8))


class TestKernelDistance:
    @given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
    @settings(max_examples=40)
    def test_pair_by_pair(self, n: int, m: int, dim: int, seed: int) -> None:
        one, two = normal(n, dim, seed=seed), normal(m, dim, seed=seed + 1, mean=0.5)

        def kernel(x: Vectors, y: Vectors) -> float:
            return float((x @ y / dim + 1) ** 3)

        own = [
            np.mean([kernel(v[i], v[j]) for i in range(len(v)) for j in range(len(v)) if i != j]) for v in (one, two)
        ]
        expected = own[0] + own[1] - 2 * np.mean([kernel(x, y) for x in one for y in two])
        assert kernel_distance(one, two) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)

    @given(
        st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=4),
        st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=4),
    )
    @settings(max_examples=40)
    def test_in_whole_numbers(self, one: list[tuple[int, ...]], two: list[tuple[int, ...]]) -> None:
        """As the U-statistic's mean over two of the one and two of the other, in fractions."""

        def kernel(x: tuple[int, ...], y: tuple[int, ...]) -> Fraction:
            return Fraction(sum(a * b for a, b in zip(x, y, strict=True)) + len(x), len(x)) ** 3

        terms = [
            kernel(x, x2)
            + kernel(y, y2)
            - kernel(x, y2) / 2
            - kernel(x2, y) / 2
            - kernel(x, y) / 2
            - kernel(x2, y2) / 2
            for x, x2 in permutations(one, 2)
            for y, y2 in permutations(two, 2)
        ]
        expected = float(sum(terms, Fraction()) / len(terms))
        assert kernel_distance(np.array(one, float), np.array(two, float)) == pytest.approx(
            expected, rel=1e-9, abs=1e-6
        )

    def test_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = normal(50, 6), normal(31, 6, seed=1)
        whole = kernel_distance(one, two), overlap(one, two)
        monkeypatch.setattr(distances, "_ROWS", 7)
        assert kernel_distance(one, two) == pytest.approx(whole[0], rel=1e-9)
        assert overlap(one, two) == pytest.approx(whole[1])

    def test_no_bias(self) -> None:
        """The mean over many pairs of sets of one law is zero, though every set is small."""
        found = [kernel_distance(normal(12, 4, seed=2 * s), normal(9, 4, seed=2 * s + 1)) for s in range(400)]
        assert abs(np.mean(found)) < 4 * np.std(found) / 20

    def test_too_few(self) -> None:
        with pytest.raises(ValueError, match="two vectors"):
            kernel_distance(normal(1, 3), normal(9, 3))


class TestOverlap:
    def test_one_law_overlaps_with_itself(self) -> None:
        found = overlap(normal(600, 4), normal(600, 4, seed=1))
        assert found.precision > 0.9
        assert found.recall > 0.9
        assert found.density == pytest.approx(1, abs=0.1)
        assert found.coverage > 0.9

    def test_a_set_that_lost_its_variety_is_precise_and_covers_little(self) -> None:
        found = overlap(normal(400, 4), normal(400, 4, seed=1, spread=0.1))
        assert found.precision > 0.99
        assert found.recall < 0.2
        assert found.coverage < 0.2

    def test_far_apart(self) -> None:
        assert overlap(normal(50, 3), normal(40, 3, seed=1, mean=99.0)) == (0, 0, 0, 0)

    def test_on_a_line_counted_by_hand(self) -> None:
        real, other = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [9.0], [9.2]])
        # k = 1: real balls reach 1, 1, 2; 0.5 lies in the balls of 0 and 1, not within 2 of 3; 9 and 9.2 in none.
        found = overlap(real, other, k=1)
        assert found == pytest.approx((1 / 3, 3 / 3, 2 / 3, 2 / 3))  # 0.5 reaches to 9: 8.5, over all real ones

    def test_too_few(self) -> None:
        with pytest.raises(ValueError, match="more than 5"):
            overlap(normal(5, 3), normal(9, 3))


class TestInterval:
    def test_it_holds_the_truth_about_as_often_as_it_says(self) -> None:
        truth, held = 0.25, 0  # squared distance of two means half a unit apart

        def figure(one: Vectors, two: Vectors) -> float:
            return float((one.mean() - two.mean()) ** 2)

        for seed in range(100):
            one, two = normal(80, 1, seed=2 * seed), normal(80, 1, seed=2 * seed + 1, mean=0.5)
            low, high = interval(figure, one, two, draws=100, seed=seed)
            held += low <= truth <= high
        assert 85 <= held <= 100

    def test_it_is_around_the_figure_and_the_same_again(self) -> None:
        one, two = normal(60, 5), normal(60, 5, seed=1, mean=0.3)
        low, high = interval(frechet, one, two, draws=50)
        assert low < frechet(one, two) < high
        assert (low, high) == interval(frechet, one, two, draws=50)


def test_rows_of_one_group_are_no_independent_witnesses() -> None:
    """Every vector ten times: by rows the interval is too narrow, by groups it is that of the vectors themselves."""
    random = np.random.default_rng(4)
    one, two = random.normal(size=(40, 2)), random.normal(0.5, 1, size=(40, 2))

    def distance(a: Vectors, b: Vectors) -> float:
        return float(((a.mean(0) - b.mean(0)) ** 2).sum())

    many = one.repeat(10, 0), two.repeat(10, 0)
    numbers = np.arange(40).repeat(10)
    widths = [
        high - low
        for low, high in (
            interval(distance, one, two, draws=400),
            interval(distance, *many, draws=400, groups=(numbers, numbers)),
            interval(distance, *many, draws=400),
        )
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)
    assert widths[2] < 0.5 * widths[0]


def test_what_differs_from_place_to_place_is_no_doubt_about_two_that_share_places() -> None:
    """48 places of 3 to 30, and 0.9 to 1.1 of that beside them, twice: the interval of the ratio holds 1 about as often
    as it says, and is many times narrower than one of two strangers."""

    def ratio(a: Vectors, b: Vectors) -> float:
        return float(b.mean() / a.mean())

    held, widths = 0, []
    for seed in range(100):
        random = np.random.default_rng(seed)
        place, numbers = random.uniform(3, 30, 48), np.arange(48)
        beside = np.concatenate([place * random.uniform(0.9, 1.1, 48) for _ in range(2)])
        groups = numbers, np.concatenate([numbers, numbers])
        low, high = interval(ratio, place, beside, draws=200, seed=seed, groups=groups, together=True)
        held += low <= 1 <= high
        apart = interval(ratio, place, beside, draws=20, seed=seed, groups=groups)
        widths.append((high - low) / (apart[1] - apart[0]))
    assert 85 <= held <= 100
    assert np.median(widths) < 0.2
