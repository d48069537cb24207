"""Operators: lattice and scatter say the same, sums are integrals, and nothing depends on tiling, order or threads."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from wsi_brush import operators
from wsi_brush.operators import (
    Block,
    Cells,
    Coarsen,
    CrossAttention,
    KernelIntegral,
    Refine,
    Scatter,
    SelfAttention,
    TokenSet,
    _sum_outer,
    attend,
    interpolate,
    interpolate_at,
    nodes,
    positional,
    splat,
    splat_at,
)

Operator = TypeVar("Operator", bound=nn.Module)


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def randomised(module: Operator) -> Operator:
    """No weight is zero: output layers start at zero, and would hide what stands before them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.requires_grad_(False)


def full(n: int, rows: int, columns: int, *, levels: int = 2) -> Scatter:
    """Every point of a lattice, in raster order."""
    scene, row, column = torch.meshgrid(*(torch.arange(size) for size in (n, rows, columns)), indexing="ij")
    return Scatter.of(scene.flatten(), row.flatten(), column.flatten(), levels=levels)


def masked(density: float, *, n: int = 3, size: int = 12, levels: int = 2, seed: int = 1) -> Scatter:
    """Some points of a lattice, in no order."""
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(n, size, size, generator=generator) < density).nonzero()
    points = points[torch.randperm(len(points), generator=generator)]
    return Scatter.of(points[:, 0], points[:, 1], points[:, 2], levels=levels)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


# -- the index of a scatter --------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_cells_know_their_children_and_neighbours(density: float) -> None:
    scatter = masked(density, levels=3)
    below = list(zip(scatter.scene.tolist(), scatter.rows.tolist(), scatter.columns.tolist(), strict=True))
    for cells in scatter.levels:
        here = list(zip(cells.scene.tolist(), cells.rows.tolist(), cells.columns.tolist(), strict=True))
        assert here == sorted({(s, r // 2, c // 2) for s, r, c in below})
        for (s, r, c), cell, slot in zip(below, cells.children.tolist(), cells.slots.tolist(), strict=True):
            assert here[cell] == (s, r // 2, c // 2)
            assert slot == r % 2 * 2 + c % 2
        place = {key: index for index, key in enumerate(here)}
        for (s, r, c), found in zip(here, cells.neighbours.tolist(), strict=True):
            assert found == [place.get((s, r + i, c + j), -1) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        below = here


# -- lattice and scatter -----------------------------------------------------------------------------------


def test_a_kernel_integral_is_the_same_on_a_full_scatter() -> None:
    operator = randomised(KernelIntegral(5))
    u = torch.randn(2, 6, 9, 5)
    cells = full(2, 12, 18).levels[0]
    close(operator(u.flatten(0, 2), cells).reshape(u.shape), operator(u))


def test_coarsen_is_the_same_on_a_full_scatter() -> None:
    operator = randomised(Coarsen(3, 7))
    u = torch.randn(2, 12, 18, 3)
    cells = full(2, 12, 18).levels[0]
    close(operator(u.flatten(0, 2), cells).reshape(2, 6, 9, 7), operator(u))


def test_refine_is_the_same_on_a_full_scatter() -> None:
    operator = randomised(Refine(5, 3))
    u = torch.randn(2, 6, 9, 5)
    cells = full(2, 12, 18).levels[0]
    close(operator(u.flatten(0, 2), cells).reshape(2, 12, 18, 3), operator(u))


def test_a_block_is_the_same_on_a_full_scatter() -> None:
    operator = randomised(Block(8, signal=4))
    u, signal = torch.randn(2, 6, 9, 8), torch.randn(2, 4)
    cells = full(2, 12, 18).levels[0]
    close(operator(u.flatten(0, 2), signal, cells).reshape(u.shape), operator(u, signal))


def test_cross_attention_is_the_same_on_a_full_scatter() -> None:
    operator = randomised(CrossAttention(8, heads=2, sets=2))
    u, place = torch.randn(2, 2, 6, 9, 8)
    memory = operator.remember([torch.randn(2, 5, 8), torch.randn(2, 1, 8)])
    cells = full(2, 12, 18).levels[0]
    close(operator(u.flatten(0, 2), place.flatten(0, 2), memory, cells).reshape(u.shape), operator(u, place, memory))


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


def test_a_pyramid_of_operators_is_the_same_on_a_full_scatter() -> None:
    """Order of points and cells survives going down and up again."""
    down = [randomised(Coarsen(3, 4)), randomised(Coarsen(4, 6))]
    block = randomised(Block(6, signal=2))
    up = [randomised(Refine(6, 4)), randomised(Refine(4, 3))]
    u, signal = torch.randn(2, 8, 12, 3), torch.randn(2, 2)
    scatter = full(2, 8, 12)
    order = torch.randperm(2 * 8 * 12)
    mixed = Scatter.of(scatter.scene[order], scatter.rows[order], scatter.columns[order], levels=2)
    lattice, points = u, u.flatten(0, 2)[order]
    for coarsen, cells in zip(down, mixed.levels, strict=True):
        lattice, points = coarsen(lattice), coarsen(points, cells)
    lattice, points = block(lattice, signal), block(points, signal, mixed.levels[1])
    for refine, cells in zip(up, reversed(mixed.levels), strict=True):
        lattice, points = refine(lattice), refine(points, cells)
    close(points, lattice.flatten(0, 2)[order])


# -- scattered points against slow loops -------------------------------------------------------------------


def named(cells: Cells) -> list[tuple[int, int, int]]:
    return list(zip(cells.scene.tolist(), cells.rows.tolist(), cells.columns.tolist(), strict=True))


@pytest.mark.parametrize("density", [0.02, 0.15, 0.6])
def test_a_kernel_integral_is_a_mean_over_the_present_neighbours(density: float) -> None:
    operator = randomised(KernelIntegral(4))
    cells = masked(density).levels[0]
    here = named(cells)
    u = torch.randn(len(here), 4)
    found = operator(u, cells)
    for index, (s, r, c) in enumerate(here):
        terms = []
        for other, (s2, r2, c2) in enumerate(here):
            if s2 == s and abs(r2 - r) <= 1 and abs(c2 - c) <= 1:
                terms.append(operator.kernel[:, 0, r2 - r + 1, c2 - c + 1] * u[other])
        close(found[index], 9 * torch.stack(terms).mean(0) + operator.bias)


@pytest.mark.parametrize("density", [0.02, 0.15, 0.6])
def test_coarsen_is_a_mean_over_the_present_children(density: float) -> None:
    operator = randomised(Coarsen(3, 5))
    scatter = masked(density)
    cells = scatter.levels[0]
    u = torch.randn(len(scatter.rows), 3)
    found = operator(u, cells)
    matrices = operator.mix.weight.unflatten(1, (4, 3))
    points = list(zip(scatter.scene.tolist(), scatter.rows.tolist(), scatter.columns.tolist(), strict=True))
    for index, (s, r, c) in enumerate(named(cells)):
        terms = [
            matrices[:, i % 2 * 2 + j % 2] @ u[point]
            for point, (s2, i, j) in enumerate(points)
            if (s2, i // 2, j // 2) == (s, r, c)
        ]
        close(found[index], 4 * torch.stack(terms).mean(0) + operator.mix.bias)


@pytest.mark.parametrize("density", [0.02, 0.6])
def test_refine_gives_each_child_its_own_matrix(density: float) -> None:
    operator = randomised(Refine(5, 3))
    scatter = masked(density)
    here = named(scatter.levels[0])
    u = torch.randn(len(here), 5)
    found = operator(u, scatter.levels[0])
    matrices, biases = operator.mix.weight.unflatten(0, (4, 3)), operator.mix.bias.unflatten(0, (4, 3))
    for point, (s, r, c) in enumerate(
        zip(scatter.scene.tolist(), scatter.rows.tolist(), scatter.columns.tolist(), strict=True)
    ):
        slot = r % 2 * 2 + c % 2
        close(found[point], matrices[slot] @ u[here.index((s, r // 2, c // 2))] + biases[slot])


def test_a_block_on_a_scatter_is_modulated_by_its_own_scene() -> None:
    block = randomised(Block(6, signal=4))
    cells, signal = masked(0.3).levels[0], torch.randn(3, 4)
    u = torch.randn(len(cells.keys), 6)
    found = block(u, signal, cells)
    scale, shift = (signal @ block.modulate.weight.T + block.modulate.bias).chunk(2, -1)
    h = functional.layer_norm(block.kernel(u, cells), (6,))
    h = h * (1 + scale[cells.scene]) + shift[cells.scene]
    close(found, u + block.narrow(functional.gelu(block.widen(h))))
    assert not torch.allclose(found, block(u, signal.flip(0), cells))


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_attention_on_a_scatter_reads_its_own_scene(density: float) -> None:
    operator = randomised(CrossAttention(8, heads=2, sets=1))
    tokens = torch.randn(4, 5, 8)  # the last scene has no points
    cells = masked(density).levels[0]
    u, place = torch.randn(2, len(cells.keys), 8)
    found = operator(u, place, operator.remember([tokens]), cells)
    for scene in range(3):
        mine = cells.scene == scene
        alone = operator(u[mine][None], place[mine][None], operator.remember([tokens[scene : scene + 1]]))
        close(found[mine], alone[0])


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


# -- attention ---------------------------------------------------------------------------------------------


def test_one_token_gives_its_value_whatever_the_query() -> None:
    """Single-token theorem: such a set is a bias at every point, so layout needs tokens that have places."""
    remember = randomised(TokenSet(12, heads=3))
    token = torch.randn(2, 1, 12)
    value = remember.value(token).unflatten(-1, (3, -1))
    for scale in (0.1, 1.0, 30.0):
        query = (scale * torch.randn(2, 7, 5, 3, 4)).softmax(-1)
        torch.testing.assert_close(
            attend(query, remember(token)), value[:, None].expand(2, 7, 5, 3, 4), rtol=1e-5, atol=2e-6
        )


def test_two_tokens_do_not() -> None:
    remember = randomised(TokenSet(12, heads=3))
    query = torch.randn(1, 7, 3, 4).mul(3).softmax(-1)
    found = attend(query, remember(torch.randn(1, 2, 12)))
    assert found.std(1).max() > 1e-2


def test_cross_attention_is_equation_10_of_the_paper() -> None:
    """q + (1/L) Σ_l α_l Σ_j (q · k_j) v_j with α_l = 1 / Σ_j q · k_j, token by token."""
    operator = randomised(CrossAttention(8, heads=2, sets=3))
    u, place = torch.randn(2, 1, 2, 2, 8)
    sets = [torch.randn(1, count, 8) for count in (1, 4, 70)]
    found = operator(u, place, operator.remember(sets))
    query = operator.query(functional.layer_norm(u, (8,)) + place).reshape(4, 2, 4).softmax(-1)
    total = query.clone()
    for kept, tokens in zip(operator.sets, sets, strict=True):
        assert isinstance(kept, TokenSet)
        key = kept.key(tokens[0]).reshape(-1, 2, 4).softmax(-1)
        value = kept.value(tokens[0]).reshape(-1, 2, 4)
        score = torch.einsum("phd,jhd->phj", query, key)
        total += torch.einsum("phj,jhd->phd", score / score.sum(-1, keepdim=True), value) / 3
    close(found, u + operator.out(total.flatten(1)).reshape(u.shape))


def attended(operator: SelfAttention, u: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    found: Tensor = operator(u, place, operator.part(u, place, weights).float())
    return found


def test_self_attention_is_a_quadrature() -> None:
    """Every point twice, at half the weight: the same function, so the same answer."""
    operator = randomised(SelfAttention(8, heads=2))
    u, place = torch.randn(2, 2, 3, 4, 8)
    weights = torch.rand(2, 3, 4) + 0.1
    once = attended(operator, u, place, weights)
    twice = attended(operator, torch.cat([u, u], 2), torch.cat([place, place], 2), torch.cat([weights, weights], 2) / 2)
    close(twice[:, :, :4], once)
    close(twice[:, :, 4:], once)
    assert not torch.allclose(attended(operator, u, place, torch.ones(2, 3, 4)), once, atol=1e-3)


def test_self_attention_is_a_sum_of_parts() -> None:
    operator = randomised(SelfAttention(8, heads=2))
    u, place = torch.randn(2, 2, 9, 4, 8)
    weights = torch.rand(2, 9, 4) + 0.1
    parts = [operator.part(u[:, r], place[:, r], weights[:, r]) for r in (slice(0, 5), slice(5, 9))]
    torch.testing.assert_close(parts[0] + parts[1], operator.part(u, place, weights), rtol=1e-12, atol=1e-12)


def test_a_point_of_no_weight_is_not_attended() -> None:
    operator = randomised(SelfAttention(8, heads=2))
    u, place = torch.randn(2, 1, 3, 4, 8)
    weights = torch.ones(1, 3, 4)
    weights[:, 2] = 0
    other = u.clone()
    other[:, 2] = 100 * torch.randn(4, 8)
    close(attended(operator, u, place, weights)[:, :2], attended(operator, other, place, weights)[:, :2])


@pytest.mark.parametrize("count", [2, 63, 64, 65, 300])
def test_the_order_of_tokens_is_irrelevant(count: int) -> None:
    remember = randomised(TokenSet(8, heads=2))
    tokens, weights = torch.randn(2, count, 8), torch.rand(2, count)
    order = torch.randperm(count)
    torch.testing.assert_close(
        remember.part(tokens, weights), remember.part(tokens[:, order], weights[:, order]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_sums_over_tokens_do_not_depend_on_threads(count: int) -> None:
    key, value = torch.rand(2, count, 3, 16), torch.randn(2, count, 3, 17)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_sum_outer(key, value))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = np.einsum("njhd,njhe->nhde", key.double().numpy(), value.double().numpy())
    np.testing.assert_allclose(found[0].numpy(), exact, rtol=1e-6, atol=1e-6)


# -- reading and splatting ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_coordinates_written_into_nodes_are_read_back(rows: int, columns: int, seed: int) -> None:
    """Read-back identity: the public parent code reads the transposed lower right quadrant."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.stack(torch.meshgrid(torch.arange(rows) * 32.0, torch.arange(columns) * 32.0, indexing="ij"), -1)
    at_rows = torch.rand(9, generator=generator) * (rows - 1)
    at_columns = torch.rand(7, generator=generator) * (columns - 1)
    expected = torch.stack(torch.meshgrid(at_rows * 32, at_columns * 32, indexing="ij"), -1)
    torch.testing.assert_close(interpolate(table, at_rows, at_columns), expected, rtol=1e-5, atol=1e-4)
    paired = interpolate_at(table, at_rows[:7], at_columns)
    torch.testing.assert_close(paired, torch.stack([at_rows[:7], at_columns], -1) * 32, rtol=1e-5, atol=1e-4)


def test_reading_goes_on_with_the_edge() -> None:
    table = torch.randn(3, 4, 2)
    beyond = interpolate(table, torch.tensor([-5.0, 0.0, 2.0, 9.0]), torch.tensor([-1.0, 3.0, 3.5]))
    close(beyond, table[[0, 0, 2, 2]][:, [0, 3, 3]])


def test_paired_reading_is_reading() -> None:
    table = torch.randn(4, 5, 3)
    rows, columns = torch.rand(6) * 5 - 1, torch.rand(6) * 6 - 1
    whole = interpolate(table, rows, columns)
    close(interpolate_at(table, rows, columns), whole[torch.arange(6), torch.arange(6)])


def test_reading_does_not_depend_on_the_window() -> None:
    table = torch.randn(5, 7, 33)
    rows, columns = torch.arange(0.125, 4, 0.25), torch.arange(0.125, 6, 0.25)
    whole = interpolate(table, rows, columns)
    assert torch.equal(interpolate(table, rows[3:9], columns[5:6]), whole[3:9, 5:6])


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
    read = interpolate(table, (torch.arange(12) + 0.5) / 4, (torch.arange(20) + 0.5) / 4)
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


@pytest.mark.parametrize("band", [1, 300, 10**9])
@pytest.mark.parametrize("size", [(2, 2), (2, 31), (17, 6), (1, 5)])
def test_a_block_in_bands_says_what_it_says_operator_by_operator(
    size: tuple[int, int], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that paints and the way that trains, edges included, where cells have fewer neighbours."""
    monkeypatch.setattr(operators, "_BAND", band)
    block, u, signal = randomised(Block(6, signal=4)), torch.randn(1, *size, 6), torch.randn(1, 4)
    before = u.clone()
    with torch.enable_grad():
        expected = block(u, signal)
    with torch.inference_mode():
        found = block(u, signal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(u, before)
    assert (expected - u).abs().max() > 0.1
