"""Operators: lattice and scatter say the same, sums are integrals, and nothing depends on tiling, order or threads."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import torch
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
    through,
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


# -- bands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [1, 300, 10**9])
@pytest.mark.parametrize("size", [(2, 2), (2, 31), (17, 6), (1, 5)])
def test_a_block_in_bands_says_what_it_says_operator_by_operator(
    size: tuple[int, int], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that paints and the way that trains, edges included, where cells have fewer neighbours."""
    monkeypatch.setattr(operators, "_BAND", band)
    blocks, u, signal = [randomised(Block(6, signal=4)) for _ in range(2)], torch.randn(1, *size, 6), torch.randn(1, 4)
    expected = through(blocks, u, signal)  # with gradients
    before = u.clone()
    with torch.inference_mode():
        found = through(blocks, u, signal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1


@pytest.mark.parametrize("band", [1, 50, 10**9])
def test_operators_in_bands_say_what_they_say_at_once(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_BAND", band)
    u, fine, place = torch.randn(2, 6, 4, 8), torch.randn(2, 12, 8, 3), torch.randn(2, 6, 4, 8)
    coarsen, refine = randomised(Coarsen(8, 5)), randomised(Refine(8, 3))
    cross = randomised(CrossAttention(8, heads=2, sets=1))
    memory = cross.remember([torch.randn(2, 7, 8)])
    for work in (lambda: coarsen(u), lambda: refine(u), lambda: refine(u, onto=fine), lambda: cross(u, place, memory)):
        expected = work()
        with torch.inference_mode():
            close(work(), expected)
