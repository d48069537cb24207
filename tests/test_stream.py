"""One step over a canvas is the same bits for every tile size and number of threads, and is what the operator says."""

from __future__ import annotations

from functools import partial
from typing import cast

import pytest
import torch
from conftest import make_brush, make_maps
from torch import Tensor

from wsi_brush import stream
from wsi_brush.brush import Brush
from wsi_brush.denoiser import NODE
from wsi_brush.diffusion import coefficients
from wsi_brush.field import NoiseField
from wsi_brush.grid import Grid
from wsi_brush.scratch import CHUNK
from wsi_brush.splat import nodes, splat
from wsi_brush.stream import CanvasDenoiser, tiles_of

DIM, SIDE, SIGMA = 6, 32, 1.3
CANVAS = Grid(0.5, 160, 96, 352, 256)
DEPTHS = [(1, 1, 2), (1, 2, 3), (2, 1, 1)]  # their operators reach 32, 56 and 40 pixels


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def brush() -> Brush:
    return cast(Brush, make_brush(dim=DIM, tile=SIDE))


maps_on = partial(make_maps, dim=DIM, tile=SIDE)


def step(brush: Brush, canvas: Grid = CANVAS, *, tile: int = 768, guidance: float = 2.0, seed: int = 0) -> Tensor:
    state = SIGMA * NoiseField(1).read(canvas)
    return CanvasDenoiser(brush, maps_on(canvas, seed=seed), canvas, mpp=0.5, guidance=guidance, tile=tile)(
        state, SIGMA
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_tile_size_gives_the_same_bits(brush: Brush, guidance: float) -> None:
    whole = step(brush, guidance=guidance)
    assert whole.std() > 0.05
    for tile in (32, 64, 96, 256):
        assert torch.equal(step(brush, tile=tile, guidance=guidance), whole), tile


@pytest.mark.parametrize("depth", DEPTHS)
def test_so_it_does_whatever_the_reach_of_the_operator(depth: tuple[int, int, int]) -> None:
    brush = make_brush(dim=DIM, tile=SIDE, depth=depth)
    canvas = Grid(0.5, 0, 0, 224, 192)
    assert brush.denoiser.config.halo == {DEPTHS[0]: 32, DEPTHS[1]: 56, DEPTHS[2]: 40}[depth]
    assert torch.equal(step(brush, canvas, tile=96), step(brush, canvas))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 320), (288, 64)])
def test_narrow_canvases_too(brush: Brush, height: int, width: int) -> None:
    canvas = Grid(0.5, 64, 0, height, width)
    assert torch.equal(step(brush, canvas, tile=32), step(brush, canvas))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_number_of_threads_changes_no_bit(brush: Brush, guidance: float) -> None:
    """Also on small canvases, whose matrix products have few rows: there MKL adds in another order."""
    for canvas, tile in ((Grid(0.5, 0, 0, 32, 32), 32), (Grid(0.5, 0, 0, 160, 192), 96), (CANVAS, 768)):
        torch.set_num_threads(1)
        alone = step(brush, canvas, tile=tile, guidance=guidance)
        torch.set_num_threads(2)
        assert torch.equal(step(brush, canvas, tile=tile, guidance=guidance), alone), canvas
        assert torch.get_num_threads() == 2  # as it was


def test_a_sweep_that_is_stopped_gives_its_cores_back_at_once(brush: Brush, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_own_nodes", stop)
    monkeypatch.setattr(CanvasDenoiser, "_sketch", lambda *_: torch.zeros(1, 1, 1))
    torch.set_num_threads(2)
    try:
        step(brush, tile=96)
        pytest.fail("it was not stopped")
    except KeyboardInterrupt:  # which holds every name of the frames that it came through
        assert torch.get_num_threads() == 2


def test_guidance_one_is_the_conditional_answer(brush: Brush) -> None:
    """By the operator itself, in one piece."""
    x, level = SIGMA * NoiseField(1).read(CANVAS), torch.tensor([SIGMA])
    skip, out, into = coefficients(level)
    net, condition = brush.denoiser, brush.condition(maps_on(CANVAS), CANVAS, 0.5)
    setting = net.setting(level, 0.5, condition, origin=torch.zeros(1, 2, dtype=torch.float64))
    blocks = net.sketch(into * x[None], setting)
    mass = nodes(splat(torch.ones(1, CANVAS.height // 8, CANVAS.width // 8, 1), NODE // 8))
    grid, tokens = net.layout(nodes(blocks), mass, setting)
    corner = torch.zeros(1), torch.zeros(1)
    said = net.paint(into * x[None], setting, grid, net.memory(tokens, setting), corner=corner)
    assert torch.allclose(step(brush, guidance=1.0), (skip * x + out * said)[0], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4, 11])
def test_the_grid_level_in_strips_is_that_in_one_piece(
    brush: Brush, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve rows of nodes; only the order of the sums over them differs."""
    whole = step(brush)
    monkeypatch.setattr(stream, "STRIP", rows)
    torch.testing.assert_close(step(brush), whole, rtol=0, atol=1e-5)


def test_guidance_stretches_the_difference(brush: Brush) -> None:
    """Linear in g: on from the answer without the condition, through the one with it."""
    zero, one, two, three = (step(brush, guidance=guidance) for guidance in (0.0, 1.0, 2.0, 3.0))
    assert torch.allclose(two - one, one - zero, atol=1e-4)
    assert torch.allclose(three - two, one - zero, atol=1e-4)


def test_embeddings_matter_only_with_the_condition(brush: Brush) -> None:
    assert torch.equal(step(brush, guidance=0.0, seed=0), step(brush, guidance=0.0, seed=1))
    assert not torch.allclose(step(brush, guidance=1.0, seed=0), step(brush, guidance=1.0, seed=1), atol=1e-3)


def test_tiles_on_their_own_would_not_do(brush: Brush) -> None:
    """The control: painted as canvases of their own, tiles differ, so the tests above can fail."""
    whole, maps, state = step(brush), maps_on(CANVAS), SIGMA * NoiseField(1).read(CANVAS)
    apart = torch.empty_like(whole)
    for tile in CANVAS.tiles(96):
        rows, columns = tile.within(CANVAS)
        apart[:, rows, columns] = CanvasDenoiser(brush, maps, tile, mpp=0.5)(state[:, rows, columns], SIGMA)
    assert not torch.allclose(apart, whole, atol=1e-3)


@pytest.mark.parametrize("tile", [0, 16, 100])
def test_tiles_are_whole_blocks(brush: Brush, tile: int) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        step(brush, tile=tile)


def test_a_state_of_cut_blocks_is_an_error(brush: Brush) -> None:
    denoise = CanvasDenoiser(brush, maps_on(CANVAS), CANVAS, mpp=0.5)
    with pytest.raises(ValueError, match="multiples of 32"):
        denoise(torch.zeros(3, 100, 64), 1.0)


@pytest.mark.parametrize("threads", [1, 2, 8, 16])
@pytest.mark.parametrize("side", [1024, 768, 512, 256])
def test_tiles_are_halved_where_threads_would_have_none_and_stay_whole_chunks(
    side: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster write their tiles themselves: a chunk that two of them share would lose pixels."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for shape in ((3, 2048, 1024), (3, 544, 1088), (3, 64, 32)):
        tiles = tiles_of(shape, side)
        assert all(tile.top % CHUNK == tile.left % CHUNK == 0 for tile in tiles)
        assert sum(tile.height * tile.width for tile in tiles) == shape[1] * shape[2]
        assert len(tiles) == len(set(tiles))
    assert len(tiles_of((3, 1024, 1024), 1024)) == {1: 1, 2: 4, 8: 16, 16: 16}[threads]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_retouch_of_the_same_state_says_what_the_evaluation_said(depth: tuple[int, int, int]) -> None:
    """All but the levels of 1 to 4 pixels is kept; where nothing has changed they give the same image."""
    brush = make_brush(dim=DIM, tile=SIDE, depth=depth)
    x, whole = (SIGMA * NoiseField(1).read(CANVAS)).numpy(), Grid(1.0, 0, 0, *CANVAS.shape)
    denoise = CanvasDenoiser(brush, maps_on(CANVAS), CANVAS, mpp=0.5, guidance=1.0)
    denoise.prepare(x, SIGMA)
    halo = brush.denoiser.config.retouch_halo
    for tile in (Grid(1.0, 128, 64, 96, 128), Grid(1.0, 0, 0, 64, 64), Grid(1.0, 320, 0, 32, 256)):
        window = tile.pad(halo).clip(whole)
        seen = denoise.image(x, window, keep=True)
        around = torch.from_numpy(x[:, window.top : window.bottom, window.left : window.right].copy())
        again = denoise.retouch(around, window, seen, tile, whole, SIGMA)
        rows, columns = tile.within(window)
        torch.testing.assert_close(again, seen.image[:, rows, columns], rtol=1e-4, atol=1e-4)
        other = denoise.retouch(around + 0.3, window, seen, tile, whole, SIGMA)
        assert (other - again).abs().mean() > 0.02
        nearer = denoise.retouch(around, window, seen, tile, whole, SIGMA / 3)
        assert (nearer - again).abs().mean() > 0.02
