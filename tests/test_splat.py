"""Points and nodes: nothing is lost on the way there, and coordinates come back as they were written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsi_brush.splat import interpolate, interpolate_at, nodes, positional, splat, splat_at


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_the_splat_is_the_same_on_a_full_scatter() -> None:
    u = torch.randn(2, 8, 12, 3)
    scene, rows, columns = torch.meshgrid(torch.arange(2), torch.arange(8), torch.arange(12), indexing="ij")
    at = splat_at(
        u.flatten(0, 2),
        (rows.flatten() + 0.5) / 4,
        (columns.flatten() + 0.5) / 4,
        scene=scene.flatten(),
        shape=(2, 3, 4),
    )
    close(at, nodes(splat(u, 4)))


def test_scattered_points_land_on_their_nodes() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, columns = torch.rand(2, 40, generator=generator) * torch.tensor([[3.0], [5.0]])
    scene = torch.randint(2, (40,), generator=generator)
    u = torch.randn(40, 2, generator=generator)
    expected = torch.zeros(2, 4, 6, 2)
    for s, r, c, value in zip(scene.tolist(), rows.tolist(), columns.tolist(), u, strict=True):
        for i in range(4):
            for j in range(6):
                expected[s, i, j] += max(0.0, 1 - abs(r - i)) * max(0.0, 1 - abs(c - j)) * value
    close(splat_at(u, rows, columns, scene=scene, shape=(2, 4, 6)), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_coordinates_written_into_nodes_are_read_back(rows: int, columns: int, seed: int) -> None:
    """Read-back identity: the public parent code reads the transposed lower right quadrant."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.stack(torch.meshgrid(torch.arange(rows) * 32.0, torch.arange(columns) * 32.0, indexing="ij"), -1)
    at_rows = torch.rand(9, generator=generator) * (rows - 1)
    at_columns = torch.rand(7, generator=generator) * (columns - 1)
    expected = torch.stack(torch.meshgrid(at_rows * 32, at_columns * 32, indexing="ij"), -1)
    found = interpolate(table[None], at_rows[None], at_columns[None])
    torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=1e-4)
    paired = interpolate_at(table[None], at_rows[:7], at_columns, torch.zeros(7, dtype=torch.int64))
    torch.testing.assert_close(paired, torch.stack([at_rows[:7], at_columns], -1) * 32, rtol=1e-5, atol=1e-4)


def test_reading_goes_on_with_the_edge() -> None:
    table = torch.randn(1, 3, 4, 2)
    beyond = interpolate(table, torch.tensor([[-5.0, 0.0, 2.0, 9.0]]), torch.tensor([[-1.0, 3.0, 3.5]]))
    close(beyond, table[:, [0, 0, 2, 2]][:, :, [0, 3, 3]])


def test_paired_reading_is_reading() -> None:
    table, scene = torch.randn(2, 4, 5, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    rows, columns = torch.rand(6) * 5 - 1, torch.rand(6) * 6 - 1
    whole = interpolate(table, rows[None], columns[None])
    close(interpolate_at(table, rows, columns, scene), whole[scene, torch.arange(6), torch.arange(6)])


def test_scenes_are_read_at_their_own_places() -> None:
    table, rows, columns = torch.randn(3, 4, 5, 2), torch.rand(3, 6) * 5 - 1, torch.rand(3, 7) * 6 - 1
    alone = [interpolate(table[s : s + 1], rows[s : s + 1], columns[s : s + 1]) for s in range(3)]
    assert torch.equal(interpolate(table, rows, columns), torch.cat(alone))


def test_reading_does_not_depend_on_the_window() -> None:
    table = torch.randn(1, 5, 7, 33)
    rows, columns = torch.arange(0.125, 4, 0.25)[None], torch.arange(0.125, 6, 0.25)[None]
    whole = interpolate(table, rows, columns)
    assert torch.equal(interpolate(table, rows[:, 3:9], columns[:, 5:6]), whole[:, 3:9, 5:6])


def test_the_splat_is_a_partition_of_unity_and_keeps_mass() -> None:
    u = torch.randn(2, 12, 20, 3, dtype=torch.float64)
    blocks = splat(u, 4)
    assert blocks.shape == (2, 3, 5, 4, 3)
    torch.testing.assert_close(nodes(blocks).sum((1, 2)), u.sum((1, 2)))
    mass = nodes(splat(torch.ones(1, 12, 20, 1), 4))[0, ..., 0]
    close(mass[1:-1, 1:-1], torch.full((2, 4), 16.0))
    close(mass[0, 1:-1], torch.full((4,), 8.0))
    close(mass[0, 0], torch.tensor(4.0))


def test_the_splat_is_the_adjoint_of_reading() -> None:
    u, table = torch.randn(12, 20, 2), torch.randn(4, 6, 2)
    read = interpolate(table[None], (torch.arange(12)[None] + 0.5) / 4, (torch.arange(20)[None] + 0.5) / 4)[0]
    close((nodes(splat(u[None], 4))[0] * table).sum(), (u * read).sum())


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 4), (12, 20), (4, 20), (8, 12)])
def test_the_splat_does_not_depend_on_tiling(height: int, width: int) -> None:
    u = torch.randn(1, 24, 40, 5)
    whole = splat(u, 4)
    blocks = torch.full_like(whole, math.nan)
    for top in range(0, 24, height):
        for left in range(0, 40, width):
            found = splat(u[:, top : top + height, left : left + width], 4)
            blocks[:, top // 4 : (top + height) // 4, left // 4 : (left + width) // 4] = found
    assert torch.equal(blocks, whole)
    assert torch.equal(nodes(blocks), nodes(whole))


def test_positional_features_are_waves_of_the_place_in_micrometres() -> None:
    rows, columns = torch.tensor([0.0, 8.0, 1e6]), torch.tensor([0.0, 0.0, 3.0])
    found = positional(rows, columns)
    assert found.shape == (3, 36)
    close(found[0], torch.cat([torch.zeros(18), torch.ones(18)]))
    close(found[1, :9], torch.sin(2 * math.pi * 8 / (32 * 2.0 ** torch.arange(9))))
    close(found[2, 0], torch.tensor(math.sin(2 * math.pi * 1e6 / 32), dtype=torch.float32))
    close(positional(columns, rows), found[:, [*range(9, 18), *range(9), *range(27, 36), *range(18, 27)]])


def test_rows_read_far_from_the_origin_keep_their_places() -> None:
    """In float32 a place 0.4 m away would be off by the width of a nucleus."""
    far = torch.tensor([4e5 + 0.25, 4e5 + 0.5], dtype=torch.float64)
    found = positional(far, torch.zeros(2, dtype=torch.float64))
    step = 2 * math.pi * 0.25 / 32
    angle = torch.atan2(found[:, 0], found[:, 18])
    assert (angle[1] - angle[0]).item() == pytest.approx(step, abs=1e-5)
