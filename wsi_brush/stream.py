"""One denoising step over a canvas of any size, tile by tile.

    sweep A   every tile: sketch -> its own blocks of the splat
    barrier   the blocks are added to nodes; the layout sees the whole canvas at 1/1024 of its points
    sweep B   every tile, with a halo of the operator's reach: paint -> the image

Tiles share nothing but the nodes' sums, whose order of addition is that of the canvas, so the result is the same bits
for every tile size. In this version the state of the canvas is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .brush import Brush
from .denoiser import NODE, ConditionMap, Setting
from .diffusion import coefficients
from .grid import Grid
from .operators import nodes, splat
from .store import EmbeddingMap

TILE = 768
"""Side of a tile, pixels; a multiple of NODE."""


class CanvasDenoiser:
    """`denoise(x, sigma)` over a canvas at one pitch: x (3, h, w) -> the image that the brush sees in it.

    canvas: the place to be painted, at the finest pitch; mpp: the pitch of x; h and w are multiples of NODE.
    With `guidance` g other than 1 the operator is asked with and without the condition, and the difference is stretched g times
    (classifier-free guidance, Ho and Salimans 2022).
    """

    def __init__(
        self, brush: Brush, maps: Mapping[float, EmbeddingMap], canvas: Grid, *, mpp: float, guidance: float = 2.0,
        tile: int = TILE, tell: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        if tile % NODE:
            raise ValueError(f"tiles are multiples of {NODE} pixels, not {tile}")
        self._net, self._guidance, self._tile, self._tell = brush.denoiser, guidance, tile, tell
        self._mpp = mpp
        asked = 1 if guidance == 1 else 2
        self._known = torch.tensor([1.0, 0.0][:asked])
        self._maps = [_repeated(lattice, asked) for lattice in brush.condition(maps, canvas, mpp)]

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        level = torch.tensor([sigma])
        skip, out, into = (value.item() for value in coefficients(level))
        asked = len(self._known)
        origin = torch.zeros(asked, 2, dtype=torch.float64)
        setting = self._net.setting(level.expand(asked), self._mpp, self._maps, origin=origin, known=self._known)
        canvas = Grid(self._mpp, 0, 0, x.shape[1], x.shape[2])
        halo = self._net.config.halo

        blocks = None
        for tile, window, read in _tiles(canvas, self._tile, halo):
            found = self._net.sketch(_cut(x, window, asked) * into, setting)
            rows, columns = (slice(part.start // NODE, part.stop // NODE) for part in read)
            found = found[:, rows, columns]
            if blocks is None:
                blocks = found.new_empty(asked, canvas.height // NODE, canvas.width // NODE, *found.shape[3:])
            top, left = tile.top // NODE, tile.left // NODE
            blocks[:, top : top + found.shape[1], left : left + found.shape[2]] = found
        assert blocks is not None
        grid, tokens = self._net.layout(nodes(blocks), _mass(canvas, asked), setting)
        memory = self._net.memory(tokens, setting)

        image = torch.empty_like(x)
        for tile, window, read in _tiles(canvas, self._tile, halo):
            said = self._said(_cut(x, window, asked) * into, window, setting, grid, memory)[:, read[0], read[1]]
            here = tile.within(canvas)
            image[:, here[0], here[1]] = skip * x[:, here[0], here[1]] + out * said
            if self._tell is not None:
                self._tell(tile.height * tile.width)
        return image

    def _said(self, x: Tensor, window: Grid, setting: Setting, grid: Tensor, memory: list[Tensor]) -> Tensor:
        corner = torch.full((len(x),), float(window.top)), torch.full((len(x),), float(window.left))
        said = self._net.paint(x, setting, grid, memory, corner=corner)
        return said[0] if len(x) == 1 else torch.lerp(said[1], said[0], self._guidance)


def _tiles(canvas: Grid, size: int, halo: int) -> list[tuple[Grid, Grid, tuple[slice, slice]]]:
    """(tile, the window with its halo inside the canvas, where the tile stands in the window)."""
    found = []
    for tile in canvas.tiles(size):
        window = tile.pad(halo).clip(canvas)
        found.append((tile, window, tile.within(window)))
    return found


def _cut(x: Tensor, window: Grid, count: int) -> Tensor:
    part = x[None, :, window.top : window.bottom, window.left : window.right]
    return part.expand(count, -1, -1, -1)


def _mass(canvas: Grid, count: int) -> Tensor:
    ones = torch.ones(count, canvas.height // 8, canvas.width // 8, 1)
    return nodes(splat(ones, NODE // 8))


def _repeated(lattice: ConditionMap, count: int) -> ConditionMap:
    parts = (lattice.values, lattice.present, lattice.corner)
    values, present, corner = (part.expand(count, *part.shape[1:]) for part in parts)
    return ConditionMap(values, present, corner, lattice.cell)
