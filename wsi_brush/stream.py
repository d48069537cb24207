"""One denoising step over a canvas of any size, tile by tile.

    sweep A   every tile: sketch -> its own blocks of the splat
    barrier   the blocks are added to nodes; the layout sees the whole canvas at 1/1024 of its points
    sweep B   every tile, with a halo of the operator's reach: paint -> the image

Tiles share nothing but the nodes' sums, whose order of addition is that of the canvas, so the result is the same bits
for every tile size and number of threads. In this version the state of the canvas is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .brush import Brush
from .denoiser import NODE, ConditionMap, Setting, node_mass
from .diffusion import coefficients
from .grid import Grid
from .operators import nodes
from .store import EmbeddingMap

TILE = 768
"""Side of a tile, pixels; a multiple of NODE."""
_ALONE = 128 * 128  # pixels up to which a window is painted by one thread


class CanvasDenoiser:
    """`denoise(x, sigma)` over a canvas at one pitch: x (3, h, w) -> the image that the brush sees in it.

    canvas: the place to be painted, at the finest pitch; mpp: the pitch of x; h and w are multiples of NODE.
    With `guidance` g other than 1 the operator is asked with and without the condition, and the difference is
    stretched g times (classifier-free guidance, Ho and Salimans 2022). `tell` is called with the pixels of each tile.
    """

    def __init__(
        self, brush: Brush, maps: Mapping[float, EmbeddingMap], canvas: Grid, *, mpp: float, guidance: float = 1.5,
        tile: int = TILE, tell: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        if tile < NODE or tile % NODE:
            raise ValueError(f"tiles are multiples of {NODE} pixels, not {tile}")
        self._net, self._guidance, self._tile, self._tell = brush.denoiser, guidance, tile, tell
        self._mpp = mpp
        self._known = torch.ones(1) if guidance == 1 else torch.tensor([1.0, 0.0])
        self._maps = [_repeated(lattice, len(self._known)) for lattice in brush.condition(maps, canvas, mpp)]

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The image in the state x, whose noise is `sigma`.

        Raises:
            ValueError: if x does not consist of whole blocks.
        """
        if x.shape[1] % NODE or x.shape[2] % NODE:
            raise ValueError(f"a state of {x.shape[1]} x {x.shape[2]} pixels; sides are multiples of {NODE}")
        canvas = Grid(self._mpp, 0, 0, x.shape[1], x.shape[2])
        skip, out, into = (value.item() for value in coefficients(torch.tensor(sigma)))
        setting = self._setting(sigma)
        blocks = self._sketch(x, canvas, into, setting)
        with _threads_for(0):  # a few rows each: see there
            grid, tokens = self._net.layout(nodes(blocks), node_mass(*blocks.shape[:3]), setting)
            memory = self._net.memory(tokens, setting)
        image = torch.empty_like(x)
        for tile, window in self._tiles(canvas, self._net.config.halo):
            said = self._paint(x, window, into, setting, grid, memory)
            (rows, columns), (here, there) = tile.within(canvas), tile.within(window)
            image[:, rows, columns] = skip * x[:, rows, columns] + out * said[:, here, there]
            if self._tell is not None:
                self._tell(tile.height * tile.width)
        return image

    def _setting(self, sigma: float) -> Setting:
        asked = len(self._known)
        origin = torch.zeros(asked, 2, dtype=torch.float64)
        with _threads_for(0):
            return self._net.setting(
                torch.full((asked,), sigma), self._mpp, self._maps, origin=origin, known=self._known
            )

    def _sketch(self, x: Tensor, canvas: Grid, into: float, setting: Setting) -> Tensor:
        """Sweep A: every tile's blocks of the splat, (asked, h / NODE, w / NODE, 4, channels)."""
        halo = -(-self._net.config.halo // NODE) * NODE  # windows of whole blocks
        size = canvas.height // NODE, canvas.width // NODE
        blocks = torch.empty(len(self._known), *size, 4, 2 * self._net.config.width)
        for tile, window in self._tiles(canvas, halo):
            with _threads_for(window.height * window.width):
                found = self._net.sketch(self._cut(x, window) * into, setting)
            blocks[:, *_in_blocks(tile.within(canvas))] = found[:, *_in_blocks(tile.within(window))]
        return blocks

    def _paint(
        self, x: Tensor, window: Grid, into: float, setting: Setting, grid: Tensor, memory: list[Tensor]
    ) -> Tensor:
        """Sweep B, one window: (3, h, w)."""
        corner = tuple(torch.full((len(self._known),), float(edge)) for edge in (window.top, window.left))
        with _threads_for(window.height * window.width):
            said = self._net.paint(self._cut(x, window) * into, setting, grid, memory, corner=(corner[0], corner[1]))
        return said[0] if len(said) == 1 else torch.lerp(said[1], said[0], self._guidance)

    def _tiles(self, canvas: Grid, halo: int) -> Iterator[tuple[Grid, Grid]]:
        """Every tile, and the window around it that decides what is said in it."""
        for tile in canvas.tiles(self._tile):
            yield tile, tile.pad(halo).clip(canvas)

    def _cut(self, x: Tensor, window: Grid) -> Tensor:
        part = x[None, :, window.top : window.bottom, window.left : window.right]
        return part.expand(len(self._known), -1, -1, -1)


@contextmanager
def _threads_for(pixels: int) -> Iterator[None]:
    """One thread where there is little to do.

    A matrix product adds in another order where a thread gets fewer than four rows (measured with MKL), so what has
    few rows is left to one thread: then the bits do not depend on how many there are. It also waits less.
    """
    before = torch.get_num_threads()
    if before > 1 and pixels <= _ALONE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_blocks(place: tuple[slice, slice]) -> tuple[slice, slice]:
    rows, columns = (slice(part.start // NODE, part.stop // NODE) for part in place)
    return rows, columns


def _repeated(lattice: ConditionMap, count: int) -> ConditionMap:
    parts = (lattice.values, lattice.present, lattice.corner)
    values, present, corner = (part.expand(count, *part.shape[1:]) for part in parts)
    return ConditionMap(values, present, corner, lattice.cell)
