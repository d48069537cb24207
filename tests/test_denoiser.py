"""Denoiser: tiles with a halo say the bits of the whole canvas; points say what the lattice says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wsi_brush.condition import ConditionMap, Setting
from wsi_brush.denoiser import (
    CELL,
    NODE,
    Denoiser,
    DenoiserConfig,
)
from wsi_brush.field import mollify
from wsi_brush.grid import Grid
from wsi_brush.operators import Scatter
from wsi_brush.splat import nodes, positional, splat

SMALL = DenoiserConfig(dim=5, width=8, depth=(1, 1, 2), layout=2, heads=2, tokens=3)
DEEP = replace(SMALL, depth=(2, 1, 3), mollifier=1.0)
REAL = DenoiserConfig(dim=5)
"""The sizes that are trained: matrix products of other sizes may add in another order."""


pytestmark = pytest.mark.usefixtures("one_thread")


def denoiser_of(config: DenoiserConfig) -> Denoiser:
    """Trained enough that no weight is zero."""
    torch.manual_seed(0)
    made = Denoiser(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def condition_of(n: int, size: tuple[int, int], *, dim: int = 5, seed: int = 0) -> list[ConditionMap]:
    """Embeddings at three pitches around a canvas, some absent, none in step with the pixels."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for cell in (30.0, 120.0, 480.0):
        shape = (n, *(int(side / cell) + 3 for side in size))
        present = (torch.rand(shape, generator=generator) < 0.8).float()
        values = torch.randn(*shape, dim, generator=generator) * present[..., None]
        maps.append(ConditionMap(values, present, -cell * torch.rand(n, 2, generator=generator), cell))
    return maps


def setting_of(
    denoiser: Denoiser,
    n: int,
    size: tuple[int, int],
    *,
    mpp: float = 0.5,
    known: Tensor | None = None,
    place: float = 1000.0,
) -> Setting:
    origin = torch.full((n, 2), place, dtype=torch.float64)
    condition = condition_of(n, size)
    return denoiser.setting(torch.linspace(0.3, 1.2, n), mpp, condition, origin=origin, known=known)


def noise(n: int, size: tuple[int, int], *, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def whole(denoiser: Denoiser, x: Tensor, setting: Setting) -> tuple[Tensor, Tensor, list[Tensor]]:
    """F over a canvas at once, and what the layout said."""
    size = x.shape[2:]
    mass = nodes(splat(torch.ones(len(x), size[0] // CELL, size[1] // CELL, 1), NODE // CELL))
    grid, tokens = denoiser.layout(nodes(denoiser.sketch(x, setting)), mass, setting)
    memory = denoiser.memory(tokens, setting)
    corner = torch.zeros(len(x)), torch.zeros(len(x))
    return denoiser.paint(x, setting, grid, memory, corner=corner), grid, memory


def tile_of(
    denoiser: Denoiser, x: Tensor, setting: Setting, grid: Tensor, memory: list[Tensor], tile: Grid, halo: int
) -> Tensor:
    canvas = Grid(0.5, 0, 0, x.shape[2], x.shape[3])
    window = tile.pad(halo).clip(canvas)
    corner = torch.full((len(x),), float(window.top)), torch.full((len(x),), float(window.left))
    part = x[:, :, window.top : window.bottom, window.left : window.right]
    around = tile.top - window.top, tile.left - window.left, window.bottom - tile.bottom, window.right - tile.right
    fine, mid, deep = denoiser.descend(part, setting)
    risen = denoiser.rise(mid, deep, setting, grid, memory, corner=corner, around=around)
    return denoiser.finish(fine, risen, setting, around=around)


def tiles(canvas: tuple[int, int], height: int, width: int, top: int, left: int) -> Iterator[Grid]:
    """A canvas cut into rectangles whose lattice is shifted by `top`, `left`."""
    whole = Grid(0.5, 0, 0, *canvas)
    for row in range(top - height if top else 0, canvas[0], height):
        for column in range(left - width if left else 0, canvas[1], width):
            yield Grid(0.5, row, column, height, width).clip(whole)


# -- tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "size", "cuts"),
    [
        (SMALL, (160, 224), [(64, 64, 0, 0), (32, 96, 0, 0), (160, 32, 0, 0), (56, 40, 24, 32), (104, 72, 8, 56)]),
        (DEEP, (160, 192), [(64, 64, 0, 0), (40, 104, 32, 16)]),
        (REAL, (192, 256), [(96, 128, 0, 0), (64, 192, 40, 0)]),
    ],
    ids=["small", "deep", "real"],
)
@torch.inference_mode()
def test_tiles_with_a_halo_say_the_bits_of_the_whole(
    config: DenoiserConfig, size: tuple[int, int], cuts: list[tuple[int, int, int, int]]
) -> None:
    denoiser = denoiser_of(config)
    setting, x = setting_of(denoiser, 2, size), noise(2, size)
    expected, grid, memory = whole(denoiser, x, setting)
    assert expected.std() > 0.01
    for cut in cuts:
        for tile in tiles(size, *cut):
            said = tile_of(denoiser, x, setting, grid, memory, tile, config.halo)
            rows, columns = tile.within(Grid(0.5, 0, 0, *size))
            assert torch.equal(said, expected[:, :, rows, columns]), (cut, tile)


@pytest.mark.parametrize("config", [SMALL, DEEP, REAL], ids=["small", "deep", "real"])
@torch.inference_mode()
def test_a_smaller_halo_is_not_enough(config: DenoiserConfig) -> None:
    size = tuple((2 * config.halo + side + NODE - 1) // NODE * NODE for side in (32, 64))
    assert len(size) == 2
    denoiser = denoiser_of(config)
    setting, x = setting_of(denoiser, 1, size), noise(1, size)
    expected, grid, memory = whole(denoiser, x, setting)
    tile = Grid(0.5, config.halo, config.halo, 32, 64)
    rows, columns = tile.within(Grid(0.5, 0, 0, *size))
    inside = expected[:, :, rows, columns]
    assert torch.equal(tile_of(denoiser, x, setting, grid, memory, tile, config.halo), inside)
    assert not torch.equal(tile_of(denoiser, x, setting, grid, memory, tile, config.halo - CELL), inside)


@torch.inference_mode()
def test_what_lies_beyond_the_halo_is_not_read() -> None:
    """Were it, not-a-number would come in."""
    size, tile = (96, 128), Grid(0.5, SMALL.halo, SMALL.halo, 32, 64)
    denoiser = denoiser_of(SMALL)
    setting, x = setting_of(denoiser, 1, size), noise(1, size)
    _, grid, memory = whole(denoiser, x, setting)
    beyond = torch.nn.functional.pad(x, (64, 64, 64, 64), value=float("nan"))
    corner = torch.full((1,), -64.0), torch.full((1,), -64.0)
    found = denoiser.paint(beyond, setting, grid, memory, corner=corner)
    found = found[:, :, 64 + tile.top : 64 + tile.bottom, 64 + tile.left : 64 + tile.right]
    assert torch.isfinite(found).all()
    assert torch.equal(found, tile_of(denoiser, x, setting, grid, memory, tile, SMALL.halo))


@pytest.mark.parametrize("config", [SMALL, REAL], ids=["small", "real"])
@torch.inference_mode()
def test_the_sketch_of_tiles_is_the_bits_of_the_whole(config: DenoiserConfig) -> None:
    size = (160, 256)
    denoiser = denoiser_of(config)
    setting, x = setting_of(denoiser, 1, size), noise(1, size)
    expected = denoiser.sketch(x, setting)
    canvas = Grid(0.5, 0, 0, *size)
    for height, width in ((64, 64), (32, 128)):
        for tile in tiles(size, height, width, 0, 0):
            window = tile.pad(NODE).clip(canvas)
            found = denoiser.sketch(x[:, :, window.top : window.bottom, window.left : window.right], setting)
            rows, columns = (slice(s.start // NODE, s.stop // NODE) for s in tile.within(window))
            r, c = (slice(s.start // NODE, s.stop // NODE) for s in tile.within(canvas))
            assert torch.equal(found[:, rows, columns], expected[:, r, c])


# -- points ------------------------------------------------------------------------------------------------


def full_scatter(n: int, size: tuple[int, int], *, seed: int = 0) -> tuple[Scatter, Tensor]:
    """Every point, shuffled, and the order in which they stand."""
    scene, rows, columns = torch.meshgrid(*(torch.arange(side) for side in (n, *size)), indexing="ij")
    order = torch.randperm(scene.numel(), generator=torch.Generator().manual_seed(seed))
    mixed = (at.flatten()[order] for at in (scene, rows, columns))
    return Scatter.of(*mixed, levels=3), order


@torch.inference_mode()
def test_painting_all_points_is_painting_the_lattice() -> None:
    size = (64, 96)
    denoiser = denoiser_of(SMALL)
    setting, x = setting_of(denoiser, 2, size), noise(2, size)
    expected, grid, memory = whole(denoiser, x, setting)
    scatter, order = full_scatter(2, size)
    u = mollify(x, SMALL.mollifier).permute(0, 2, 3, 1).reshape(-1, 3)[order]
    found = denoiser.paint_points(u, scatter, setting, grid, memory)
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).reshape(-1, 3)[order], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_sketching_all_points_is_sketching_the_lattice() -> None:
    size = (64, 96)
    denoiser = denoiser_of(SMALL)
    setting, x = setting_of(denoiser, 2, size), noise(2, size)
    scatter, order = full_scatter(2, size)
    u = mollify(x, SMALL.mollifier).permute(0, 2, 3, 1).reshape(-1, 3)[order]
    found = denoiser.sketch_points(u, scatter, 1.5, setting, size)
    mass = nodes(splat(torch.ones(2, 8, 12, 1), NODE // CELL))
    expected = 1.5 * torch.cat([nodes(denoiser.sketch(x, setting)), mass], -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_points_of_a_batch_do_not_see_each_other() -> None:
    size = (64, 64)
    denoiser = denoiser_of(SMALL)
    x = noise(2, size)
    setting = setting_of(denoiser, 2, size)
    _, grid, memory = whole(denoiser, x, setting)
    generator = torch.Generator().manual_seed(5)
    points = (torch.rand(2, *size, generator=generator) < 0.05).nonzero()
    scatter = Scatter.of(points[:, 0], points[:, 1], points[:, 2], levels=3)
    u = torch.randn(len(points), 3, generator=generator)
    both = denoiser.paint_points(u, scatter, setting, grid, memory)
    first = points[:, 0] == 0
    other = torch.where(first[:, None], u, 7 * u)
    again = denoiser.paint_points(other, scatter, setting, grid, memory)
    assert torch.equal(both[first], again[first])
    assert not torch.allclose(both[~first], again[~first])


# -- the condition -----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_withheld_condition_is_not_seen() -> None:
    size = (64, 64)
    denoiser, x = denoiser_of(SMALL), noise(2, size)
    known = torch.tensor([0.0, 1.0])
    one, _, _ = whole(denoiser, x, setting_of(denoiser, 2, size, known=known))
    maps = condition_of(2, size)
    changed = [replace(m, values=m.values + 3, present=1 - m.present) for m in maps]
    origin = torch.full((2, 2), 1000.0, dtype=torch.float64)
    setting = denoiser.setting(torch.linspace(0.3, 1.2, 2), 0.5, changed, origin=origin, known=known)
    other, _, _ = whole(denoiser, x, setting)
    assert torch.equal(other[0], one[0])
    assert (other[1] - one[1]).abs().max() > 1e-3


@pytest.mark.parametrize("index", [0, 1, 2])
@torch.inference_mode()
def test_every_pitch_of_embeddings_is_seen_where_it_is(index: int) -> None:
    """One finest cell more, and the image changes there more than far away."""
    size = (96, 96)
    denoiser, x = denoiser_of(SMALL), noise(1, size)
    maps = [replace(m, present=torch.ones_like(m.present)) for m in condition_of(1, size)]
    changed = list(maps)
    values = maps[index].values.clone()
    values[:, 1, 1] += 5
    changed[index] = replace(maps[index], values=values)
    origin, sigma = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.5])
    one, two = (
        whole(denoiser, x, denoiser.setting(sigma, 0.5, condition, origin=origin))[0] for condition in (maps, changed)
    )
    difference = (one - two).abs().mean((0, 1))
    assert difference.max() > 1e-3
    if index == 0:
        rows, columns = (int(at[0, 1]) for at in maps[0].centres())
        near = difference[max(0, rows - 8) : rows + 8, max(0, columns - 8) : columns + 8].mean()
        assert near > 3 * difference[72:, 72:].mean()


@torch.inference_mode()
def test_an_absent_cell_says_nothing_of_its_values() -> None:
    size = (64, 64)
    denoiser, x = denoiser_of(SMALL), noise(1, size)
    maps = condition_of(1, size)
    changed = [replace(m, values=m.values + 9 * (1 - m.present[..., None])) for m in maps]
    origin, sigma = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.5])
    one, two = (
        whole(denoiser, x, denoiser.setting(sigma, 0.5, condition, origin=origin))[0] for condition in (maps, changed)
    )
    torch.testing.assert_close(one, two)


@torch.inference_mode()
def test_pitch_noise_level_and_place_are_told() -> None:
    size = (64, 64)
    denoiser, x = denoiser_of(SMALL), noise(1, size)
    one, _, _ = whole(denoiser, x, setting_of(denoiser, 1, size))
    for other in (
        setting_of(denoiser, 1, size, mpp=1.0),
        setting_of(denoiser, 1, size, mpp=8.0),
        setting_of(denoiser, 1, size, place=1100.0),
        replace(setting_of(denoiser, 1, size), signal=setting_of(denoiser, 2, size).signal[1:]),
    ):
        assert (whole(denoiser, x, other)[0] - one).abs().max() > 1e-4


def test_a_place_is_the_same_at_every_pitch() -> None:
    denoiser = denoiser_of(SMALL)
    fine, coarse = (setting_of(denoiser, 2, (64, 64), mpp=mpp) for mpp in (0.5, 2.0))
    rows, columns = torch.tensor([0.0, 40.0, 8.0]), torch.tensor([4.0, 0.0, 1000.0])
    first = torch.zeros(3, dtype=torch.int64)
    found = fine.places_of_points(rows, columns, first)
    torch.testing.assert_close(found, coarse.places_of_points(rows / 4, columns / 4, first))
    torch.testing.assert_close(found, positional(1000 + rows / 2, 1000 + columns / 2))
    torch.testing.assert_close(found, fine.places(rows[None], columns[None])[0].diagonal().T)
    origin = torch.tensor([[0.0, 0.0], [20.0, 2.0]], dtype=torch.float64)
    moved = replace(fine, origin=origin)
    expected = moved.places_of_points(rows + 40, columns + 4, first)
    torch.testing.assert_close(moved.places_of_points(rows, columns, first + 1), expected)
    torch.testing.assert_close(moved.places_of_points(rows[None], columns[None])[1], expected[0:3])


def test_cells_of_a_map_lie_where_they_are_read() -> None:
    for lattice in condition_of(2, (300, 200)):
        for along in lattice.in_cells(*lattice.centres()):
            torch.testing.assert_close(along, torch.arange(along.shape[1]).float().expand(2, -1), rtol=0, atol=1e-4)


# -- training ----------------------------------------------------------------------------------------------


def test_every_parameter_is_trained() -> None:
    size = (96, 96)
    denoiser, x = denoiser_of(SMALL), noise(3, size)
    setting = setting_of(denoiser, 3, size, known=torch.tensor([1.0, 0.0, 1.0]))
    said, _, _ = whole(denoiser, x, setting)
    (said - noise(3, size, seed=2)).pow(2).mean().backward()
    largest = {
        name: p.grad.abs().max().item() if p.grad is not None else 0.0 for name, p in denoiser.named_parameters()
    }
    # A softmax over places does not see what is added to all of them: this bias is idle by construction.
    idle = largest.pop("token_score.bias")
    typical = sorted(largest.values())[len(largest) // 2]
    assert idle < 1e-5 * typical
    assert [name for name, value in largest.items() if value < 1e-5 * typical] == []


def test_an_untrained_brush_says_nothing_and_starts_at_the_output() -> None:
    """F = 0 at first, and the gradient enters through the last layer."""
    torch.manual_seed(0)
    denoiser, x = Denoiser(SMALL), noise(1, (64, 64))
    said, _, _ = whole(denoiser, x, setting_of(denoiser, 1, (64, 64)))
    assert not said.any()
    (said - x).pow(2).mean().backward()
    assert denoiser.leave2.mix.weight.grad is not None
    assert denoiser.leave2.mix.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("depth", "mollifier", "halo"),
    [((1, 2, 4), 0.5, 64), ((1, 1, 2), 0.5, 32), ((2, 1, 3), 1.0, 56), ((0, 0, 1), 0.0, 16)],
)
def test_the_halo_walks_back_from_the_output(depth: tuple[int, int, int], mollifier: float, halo: int) -> None:
    assert replace(SMALL, depth=depth, mollifier=mollifier).halo == halo
