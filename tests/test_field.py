"""NoiseField: the same bits through any window, and the law that is claimed, up to the border."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_brush.field import NoiseField, mollifier, mollifier_radius, mollify
from wsi_brush.grid import Grid

far = st.integers(-(1 << 40), 1 << 40)
near = st.integers(0, 20)
lengths = st.integers(1, 24)


pytestmark = pytest.mark.usefixtures("one_thread")


@settings(deadline=None, max_examples=40)
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 9), far, far, near, near, lengths, lengths)
def test_any_window_draws_the_same_bits(
    seed: int, stream: int, top: int, left: int, down: int, right: int, height: int, width: int
) -> None:
    outer = Grid(0.5, top, left, 44, 44)
    inner = Grid(0.5, top + down, left + right, height, width)
    field = NoiseField(seed, channels=2)
    rows, columns = inner.within(outer)
    assert torch.equal(field.read(inner, stream=stream), field.read(outer, stream=stream)[:, rows, columns])


@settings(deadline=None, max_examples=25)
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 9), far, far, st.integers(0, 1 << 30))
def test_places_have_the_noise_of_every_window_over_them(
    seed: int, stream: int, top: int, left: int, draw: int
) -> None:
    """Scattered places, and squares of them; of many seeds at once, each its own."""
    window, field = Grid(0.5, top, left, 20, 30), NoiseField(seed)
    whole = field.read(window, stream=stream)
    generator = torch.Generator().manual_seed(draw)
    rows, columns = (torch.randint(side, (40,), generator=generator) for side in window.shape)
    assert torch.equal(field.read_at(top + rows, left + columns, stream=stream), whole[:, rows, columns].T)
    seeds = torch.tensor([5, seed, -3])
    several = NoiseField(seeds).read_at(
        (top + rows).view(1, 4, 10, 1).expand(3, -1, -1, -1), (left + columns[:7]).view(1, 1, 1, 7), stream=stream
    )
    assert several.shape == (3, 4, 10, 7, 3)
    for found, one in zip(several, seeds.tolist(), strict=True):
        whole = NoiseField(one).read(window, stream=stream)
        expected = whole[:, rows.view(4, 10, 1), columns[:7]].permute(1, 2, 3, 0)
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=25)
@given(far, far, near, near, lengths, lengths, st.sampled_from([0.3, 0.5, 1.0, 1.7]))
def test_any_window_draws_the_same_mollified_bits(
    top: int, left: int, down: int, right: int, height: int, width: int, sigma: float
) -> None:
    outer = Grid(0.5, top, left, 44, 44)
    inner = Grid(0.5, top + down, left + right, height, width)
    field = NoiseField(3, channels=1)
    rows, columns = inner.within(outer)
    whole = field.read_mollified(outer, width=sigma)
    assert torch.equal(field.read_mollified(inner, width=sigma), whole[:, rows, columns])


def test_the_bits_are_those_of_the_published_mixing_function() -> None:
    """SplitMix64 in Python's own integers, and Box-Muller: a second implementation, so no machine may differ."""
    wrap, golden, across = (1 << 64) - 1, 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03

    def mix(bits: int) -> int:
        bits = (bits + golden) & wrap
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & wrap
        return bits ^ (bits >> 31)

    seed, stream = 42, 7
    grid = Grid(0.5, -2, 1 << 33, 3, 4)
    found = NoiseField(seed).read(grid, stream=stream).numpy()
    for channel, i, j in itertools.product(range(3), range(3), range(4)):
        key = mix((mix((mix(seed) + stream) & wrap) + channel) & wrap)
        bits = mix((mix((key + (grid.top + i) * golden) & wrap) + (grid.left + j) * across) & wrap)
        radius = ((bits >> 32) + 0.5) * 2.0**-32
        expected = math.sqrt(-2 * math.log(radius)) * math.cos((bits & 0xFFFFFFFF) * 2 * math.pi * 2.0**-32)
        assert found[channel, i, j] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_noise_is_white_and_normal() -> None:
    noise = NoiseField(5).read(Grid(0.5, -300, 70_000, 512, 512)).double()
    count = noise.numel()
    assert abs(noise.mean().item()) < 4 / math.sqrt(count)
    assert abs(noise.var().item() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**4).mean().item() - 3) < 4 * math.sqrt(96 / count)
    assert abs((noise**3).mean().item()) < 4 * math.sqrt(15 / count)
    assert 4.0 < noise.abs().max().item() < 6.8
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1), (2, 0), (0, 2), (8, 0), (0, 8), (32, 32), (0, 256)):
        shifted = noise.roll((down, right), (1, 2))
        for power in (1, 2):  # squares too: a field can be uncorrelated and not independent
            one, two = noise**power, shifted**power
            lag = ((one - one.mean()) * (two - two.mean())).mean() / one.var()
            assert abs(lag.item()) < 4.5 / math.sqrt(count), (down, right, power)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (NoiseField(1), NoiseField(2)),
        (NoiseField(0), NoiseField(-1)),
        (NoiseField(0), NoiseField(1 << 40)),
    ],
)
def test_seeds_are_independent(one: NoiseField, two: NoiseField) -> None:
    grid = Grid(0.5, 0, 0, 256, 256)
    _uncorrelated(one.read(grid), two.read(grid))


def test_streams_and_channels_are_independent() -> None:
    grid, field = Grid(0.5, 0, 0, 256, 256), NoiseField(9)
    streams = [field.read(grid, stream=stream) for stream in (0, 1, 2, 1000)]
    for one, two in itertools.combinations(streams, 2):
        _uncorrelated(one, two)
        _uncorrelated(one[0], two[1])  # nor the next stream's neighbour channel
    for one, two in itertools.combinations(streams[0], 2):
        _uncorrelated(one, two)
    assert torch.equal(NoiseField(9, channels=1).read(grid)[0], streams[0][0])


def _uncorrelated(one: torch.Tensor, two: torch.Tensor) -> None:
    bound = 4.5 / math.sqrt(one.numel())
    assert abs((one * two).mean().item()) < bound
    assert abs(((one**2 - 1) * (two**2 - 1)).mean().item() / 2) < bound
    assert abs((one * two.flip(-1)).mean().item()) < bound


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_mollified_noise_has_the_variance_of_theory_at_the_border_and_inside(sigma: float) -> None:
    """A reflecting transform would double it at the edge."""
    theory = float((mollifier(sigma).double() ** 2).sum() ** 2)
    length = 20_000
    slack = 4 * math.sqrt(2 / length * (4 * sigma + 1))  # neighbours along the strip are correlated
    for shape, along in (((9, length), 1), ((length, 9), 0)):
        power = NoiseField(6, channels=1).read_mollified(Grid(0.5, 0, 0, *shape), width=sigma)[0].double() ** 2
        across = power.mean(along)
        for name, place in (("first", 0), ("inside", 4), ("last", 8)):
            assert across[place].item() == pytest.approx(theory, rel=slack), (name, along)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.5, 1.0, 2.5])
def test_a_constant_stays_itself_up_to_the_edge(sigma: float) -> None:
    flat = torch.full((2, 3, 9, 14), 0.7)
    torch.testing.assert_close(mollify(flat, sigma), flat, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2)])
def test_images_smaller_than_the_kernel_are_means_of_what_is_there(shape: tuple[int, int]) -> None:
    image = torch.randn(1, 1, *shape)
    smooth = mollify(image, 2.0)
    assert smooth.shape == image.shape
    assert smooth.min() >= image.min() - 1e-6
    assert smooth.max() <= image.max() + 1e-6


def test_mollifying_is_the_double_sum_over_present_neighbours() -> None:
    image = torch.randn(1, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    sigma = 0.8
    radius = mollifier_radius(sigma)
    smooth = mollify(image, sigma)[0, 0]
    for row, column in itertools.product(range(7), range(9)):
        total = mass = 0.0
        for i, j in itertools.product(range(7), range(9)):
            if max(abs(i - row), abs(j - column)) <= radius:
                weight = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                total, mass = total + weight * image[0, 0, i, j].item(), mass + weight
        assert smooth[row, column].item() == pytest.approx(total / mass, abs=2e-6)


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0, 3.0])
def test_the_kernel_is_a_truncated_gaussian(sigma: float) -> None:
    taps = mollifier(sigma).double().numpy()
    assert len(taps) == 2 * mollifier_radius(sigma) + 1
    assert taps.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(taps, taps[::-1])
    middle = len(taps) // 2
    assert taps[middle + 1] / taps[middle] == pytest.approx(math.exp(-0.5 / sigma**2), rel=1e-6)
    assert mollifier_radius(sigma) >= 4 * sigma


def test_threads_do_not_change_a_bit() -> None:
    grid, field = Grid(0.5, 5, -9, 200, 211), NoiseField(77)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((field.read(grid), field.read_mollified(grid, width=1.0)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
