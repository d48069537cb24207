"""One denoising step over a canvas of any size, tile by tile, exactly.

Sweep A sketches every tile onto the nodes of the grid level; the grid level goes over its nodes in strips of rows, once
for the sums of its self-attention and once for features and global tokens; sweep B paints every tile. What is kept
between them is one vector for every 32 x 32 pixels. Windows are grown by the operator's reach and cut at the canvas, so
that a pixel is computed from the same numbers in the same order whatever the tile: results are the same bits for every
tile size, order and number of threads. A tile, and the grid level, is one core's: a matrix product adds in another
order where a core gets fewer than four rows (seen with MKL).

What is kept is the host's. The brush computes where its weights are: on a GPU a tile's window goes there, and what
comes of it back; in between nobody waits for it, so that one thread reads windows while another writes results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from .brush import Brush
from .condition import ConditionMap
from .denoiser import NODE, Around, TokenParts, node_mass
from .errors import RefusedError
from .grid import Grid
from .machine import Precision, on_cores, products, side_by_side
from .scratch import CHUNK, Plane, new_plane, open_plane
from .splat import nodes
from .store import EmbeddingMap

TILE = 1024
"""Side of a tile, pixels; a multiple of NODE."""
STRIP = 32  # rows of nodes that the grid level takes at once


Sweep = Callable[[Iterable[Grid]], Iterable[tuple[Grid, NDArray[np.float32]]]]
"""Has tiles sketched, by whatever hands: tiles and their nodes, in any order."""


class Seen(NamedTuple):
    """An evaluation in a tile: the state there, its image, the image without guidance, (3, h, w) each; and what
    `CanvasDenoiser.retouch` needs of it."""

    tile: Grid
    state: Tensor
    image: Tensor
    plain: Tensor
    kept: Tensor | None


class CanvasDenoiser:
    """`denoise(x, sigma)` over a canvas at one pitch: x (3, h, w) -> the image that the brush sees in it.

    canvas: the place to be painted, at the finest pitch; mpp: the pitch of x; h and w are multiples of NODE.
    With `guidance` g other than 1 the operator is asked with and without the condition, and the difference is
    stretched g times (classifier-free guidance, Ho and Salimans 2022). `folder`: where the grid level is kept, else in
    memory. It computes where the brush is; `precision` is that of the tiles, the grid level's products are float32.
    `origin`: µm (down, across) that the canvas's corner lies from the one that places are counted from, where it is a
    window of a larger canvas.
    """

    def __init__(
        self, brush: Brush, maps: Mapping[float, EmbeddingMap], canvas: Grid, *, mpp: float, guidance: float = 1.0,
        tile: int = TILE, folder: Path | None = None, precision: Precision = "float32",
        origin: tuple[float, float] = (0.0, 0.0),
    ) -> None:  # fmt: skip
        if tile < NODE or tile % NODE:
            raise ValueError(f"tiles are multiples of {NODE} pixels, not {tile}")
        self._net, self._guidance, self._tile, self._folder = brush.denoiser, guidance, tile, folder
        self._device, self._precision = brush.device, precision
        self._coefficients = partial(brush.ladder.coefficients, mpp=mpp)
        condition = brush.condition(maps, canvas, mpp)
        known = (True,) if guidance == 1 else (True, False)
        self._asked = [
            _Asked(brush, condition, mpp, origin, known=k, folder=folder and folder / f"grid-{k}") for k in known
        ]
        self._nodes: Plane | None = None
        self._sigma, self._into = math.nan, math.nan

    def prepare(self, x: Plane, sigma: float, sweep: Sweep | None = None) -> None:
        """Sweep A and the grid level, for the state x, whose noise is `sigma`; then `image` may be asked.

        `sweep` has the tiles sketched elsewhere; by default threads do it here.

        Raises:
            ValueError: if x does not consist of whole blocks.
        """
        if x.shape[1] % NODE or x.shape[2] % NODE:
            raise ValueError(f"a state of {x.shape[1]} x {x.shape[2]} pixels; sides are multiples of {NODE}")
        self.at(sigma)
        tiles = self.tiles(x)
        canvas = _canvas(x)
        if self._nodes is None:
            size = canvas.height // NODE + 1, canvas.width // NODE + 1
            self._nodes = new_plane(
                (*size, 2 * self._net.config.width), self._folder, "nodes", axes=(0, 1), chunk=STRIP
            )
        sweep = sweep or partial(self._sweep, x)
        for tile, found in sweep(tiles):  # without a name it ends with the loop, also where that is stopped
            self._nodes[_own_nodes(tile, canvas)] = found
        for asked in self._asked:
            asked.lay_out(self._nodes)

    def _sweep(self, x: Plane, tiles: Iterable[Grid]) -> Iterator[tuple[Grid, NDArray[np.float32]]]:
        for tile, found in side_by_side(partial(self._sketch, x), tiles, threads=self.threads):
            yield tile, on_host(found)

    def at(self, sigma: float) -> None:
        """What follows is asked at this noise level."""
        self._sigma, self._into = sigma, self._coefficients(sigma)[2]
        for asked in self._asked:
            asked.at(sigma)

    def sketch(self, x: Plane, tile: Grid) -> NDArray[np.float32]:
        """Sweep A at one tile: its nodes (rows, columns, c), complete, from the blocks around each."""
        return on_host(self._sketch(x, tile))

    @torch.inference_mode()
    def _sketch(self, x: Plane, tile: Grid) -> Tensor:
        canvas = _canvas(x)
        around = Grid(tile.mpp, tile.top - NODE, tile.left - NODE, tile.height + NODE, tile.width + NODE)
        inner = around.clip(canvas)
        window = inner.pad(self._net.config.sketch_halo).clip(canvas)
        state = read_plane(x, window, self._device)
        with products(self._precision, self._device):
            blocks = self._net.sketch(state[None] * self._into, self._asked[0].setting)
        found = nodes(blocks[:, *_in_blocks(inner.within(window))])[0]
        rows, columns = _own_nodes(tile, canvas)
        first, second = inner.top // NODE, inner.left // NODE
        return found[rows.start - first : rows.stop - first, columns.start - second : columns.stop - second]

    def save_memory(self, path: Path) -> None:
        """What `image` needs besides the features in `folder`, for another process's `load_memory`."""
        kept = {f"{k}.{i}": t.cpu() for k, asked in enumerate(self._asked) for i, t in enumerate(asked.memory)}
        save_file(kept, path)

    def load_memory(self, path: Path) -> None:
        """The grid level of another process, whose `folder` is the same."""
        kept = load_file(path, device=str(self._device))
        for k, asked in enumerate(self._asked):
            asked.memory = [kept[f"{k}.{index}"] for index in range(len(kept) // len(self._asked))]
            asked.open_features()

    @torch.inference_mode()
    def image(self, x: Plane, tile: Grid, *, keep: bool = False) -> Seen:
        """Sweep B at one tile, counted from the canvas's corner; `keep` what `retouch` needs."""
        window = tile.pad(self._net.config.halo).clip(_canvas(x))
        rows, columns = tile.within(window)
        around = read_plane(x, window, self._device)
        state, around = around[:, rows, columns].clone(), around * self._into
        grids = [asked.features(window) for asked in self._asked]  # before the device has work
        sides, setting = _around(tile, window), self._asked[0].setting
        with products(self._precision, self._device):
            fine, mid, deep = self._net.descend(around[None], setting)
            own = torch.clone if len(self._asked) > 1 else torch.Tensor.detach  # what is made of features uses them up
            risen = [a.rise(mid, own(deep), grid, window, tile) for a, grid in zip(self._asked, grids, strict=True)]
            kept = self._net.keep(mid, risen[0], sides) if keep else None
            del around, mid, deep
            said = [self._net.finish(own(fine), one, setting, around=sides)[0].float() for one in risen]
        skip, out, _ = self._coefficients(self._sigma)
        image = plain = skip * state + out * said[0]
        if len(said) > 1:
            image = skip * state + out * torch.lerp(said[1], said[0], self._guidance)
        return Seen(tile, state, image, plain, kept)

    @torch.inference_mode()
    def retouch(self, x: Tensor, window: Grid, seen: Seen, tile: Grid, canvas: Grid, sigma: float) -> Tensor:
        """The image in `tile`, without guidance, of a state in `window` around it whose noise is a little less than
        that of `seen`, which covers the window: what is deeper than 4 pixels is kept from there."""
        assert seen.kept is not None
        reach = self._net.config.reaches[0]
        rows, columns = tile.pad(reach).clip(canvas).within(seen.tile.pad(reach).clip(canvas))
        kept = seen.kept[:, rows.start // 4 : rows.stop // 4, columns.start // 4 : columns.stop // 4]
        setting = self._net.at(self._asked[0].setting, torch.full((1,), sigma, device=self._device))
        skip, out, into = self._coefficients(sigma)
        with products(self._precision, self._device):
            said = self._net.retouch(x[None] * into, setting, kept, around=_around(tile, window))[0].float()
        rows, columns = tile.within(window)
        return skip * x[:, rows, columns] + out * said

    def tiles(self, x: Plane) -> list[Grid]:
        """The tiles of a canvas of x's size."""
        return tiles_of(x.shape, self._tile, threads=self.threads)

    @property
    def threads(self) -> int | None:
        """How many give it tiles: those of torch (None), or of a GPU one."""
        return threads_for(self._device)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The whole image in a state that is in memory."""
        plane, image = x.numpy(), torch.empty_like(x)
        self.prepare(plane, sigma)
        for tile, seen in side_by_side(partial(self.image, plane), self.tiles(plane), threads=self.threads):
            rows, columns = tile.within(_canvas(plane))
            image[:, rows, columns] = seen.image.cpu()
        return image


class _Asked:
    """The operator asked with the condition, or without it: its settings, and its grid level at this step."""

    def __init__(
        self, brush: Brush, condition: list[ConditionMap], mpp: float, corner: tuple[float, float], *, known: bool,
        folder: Path | None,
    ) -> None:  # fmt: skip
        self._net, self._folder, self._device = brush.denoiser, folder, brush.device
        self._grid: Plane | None = None
        with torch.inference_mode(), on_cores(1):
            origin = torch.tensor([corner], dtype=torch.float64, device=self._device)
            one = torch.ones(1, device=self._device)
            setting = self._net.setting(one, mpp, condition, origin=origin, known=one * known)
            self._layout_memory = self._net.layout_cross.remember(setting.memory)
            self._paint_memory = self._net.condition_memory(setting)
        # embeddings and tokens, which grow with the canvas, have had their say
        bare = [replace(lattice, values=lattice.values[..., :0].clone()) for lattice in setting.maps]
        self.setting = replace(setting, maps=bare, memory=[])
        self.memory: list[Tensor] = []

    @torch.inference_mode()
    def at(self, sigma: float) -> None:
        with on_cores(1):
            self.setting = self._net.at(self.setting, torch.full((1,), sigma, device=self._device))

    def open_features(self) -> None:
        assert self._folder is not None
        self._grid = open_plane(self._folder / "features")

    @torch.inference_mode()
    def lay_out(self, nodes: Plane) -> None:
        """The grid level, from the nodes of all tiles."""
        if self._grid is None:
            shape = (*nodes.shape[:2], 4 * self._net.config.width)
            self._grid = new_plane(shape, self._folder, "features", axes=(0, 1), chunk=STRIP)
        with on_cores(1):
            self._lay_out(nodes, self._grid)

    def _lay_out(self, nodes: Plane, grid: Plane) -> None:
        net, rows, columns = self._net, nodes.shape[0], nodes.shape[1]
        near, far = net.layout_halo
        mass = node_mass(1, rows - 1, columns - 1).to(self._device)
        weights = mass[..., 0] / mass.max().clamp_min(1e-6)
        sums = torch.zeros((), dtype=torch.float64, device=self._device)
        for strip, window in _strips(rows, near):
            u, place = self._near(nodes, mass, window)
            inside = slice(strip.start - window.start, strip.stop - window.start)
            sums = sums + net.layout_self.part(u[:, inside], place[:, inside], weights[:, strip])
        parts = []
        for strip, window in _strips(rows, near + far):
            u, place = self._near(nodes, mass, window)
            u = net.layout_far(u, place, sums.float(), self._layout_memory, self.setting)
            u = u[:, strip.start - window.start : strip.stop - window.start]
            parts.append(net.token_parts(u))
            grid[strip] = on_host(u[0])
        self.memory = [*self._paint_memory, net.token_memory(TokenParts.joined(parts))]

    def _near(self, nodes: Plane, mass: Tensor, window: slice) -> tuple[Tensor, Tensor]:
        total = _read(nodes, window, self._device)[None]
        return self._net.layout_near(total, mass[:, window], self.setting, row=window.start)

    def features(self, window: Grid) -> Tensor:
        """What the grid level says around a window: (1, rows, columns, c)."""
        assert self._grid is not None
        top, left = window.top // NODE, window.left // NODE
        bottom, right = -(-window.bottom // NODE) + 1, -(-window.right // NODE) + 1
        return _read(self._grid, (slice(top, bottom), slice(left, right)), self._device)[None]

    def rise(self, mid: Tensor, deep: Tensor, grid: Tensor, window: Grid, tile: Grid) -> Tensor:
        """The way up in a tile, to 4 pixels, from the features of a window that its halo surrounds."""
        top, left = (torch.full((1,), float(edge), device=deep.device) for edge in (window.top, window.left))
        node = window.top // NODE, window.left // NODE
        return self._net.rise(
            mid, deep, self.setting, grid, self.memory, corner=(top, left), node=node, around=_around(tile, window)
        )


def read_plane(plane: Plane, window: Grid, device: torch.device | str = "cpu") -> Tensor:
    """A window, counted from the corner, of a plane (c, rows, columns), on a device.

    Raises:
        RefusedError: if its chunks on disk are damaged.
    """
    return _read(plane, (slice(None), slice(window.top, window.bottom), slice(window.left, window.right)), device)


def _read(plane: Plane, window: slice | tuple[slice, ...], device: torch.device | str) -> Tensor:
    try:
        values = plane[window]
    except ValueError as error:
        where = getattr(plane, "store_path", "the state")
        raise RefusedError(f"{where}: damaged ({error}); remove the work folder to begin anew") from None
    return _to(device, torch.from_numpy(np.ascontiguousarray(values)))


def _to(device: torch.device | str, values: Tensor) -> Tensor:
    """Values on a device; from page-locked memory, else it would first do all that it was given before."""
    return values if torch.device(device).type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def on_host(values: Tensor) -> NDArray[np.float32]:
    """Values as an array, once they are there."""
    return np.asarray(values.cpu().numpy(), np.float32)


def _around(tile: Grid, window: Grid) -> Around:
    return tile.top - window.top, tile.left - window.left, window.bottom - tile.bottom, window.right - tile.right


def _canvas(x: Plane) -> Grid:
    return Grid(1.0, 0, 0, x.shape[1], x.shape[2])


def _strips(rows: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Strips of rows, and the windows that decide what is said in them."""
    for top in range(0, rows, STRIP):
        bottom = min(top + STRIP, rows)
        yield slice(top, bottom), slice(max(0, top - halo), min(rows, bottom + halo))


def threads_for(device: torch.device) -> int | None:
    """How many threads give tiles to a device: one to a GPU, which a tile fills; None: as many as torch has."""
    return None if device.type == "cpu" else 1


def tiles_of(shape: tuple[int, ...], side: int, *, threads: int | None = None) -> list[Grid]:
    """The tiles of a canvas (..., rows, columns), counted from its corner; halved where a thread would have none.

    To be asked before `side_by_side`, under which there is one thread. Whole chunks of a plane stay whole chunks.
    """
    canvas = Grid(1.0, 0, 0, *shape[-2:])
    while len(tiles := list(canvas.tiles(side))) < (threads or torch.get_num_threads()) and side % (2 * CHUNK) == 0:
        side //= 2
    return tiles


def _own_nodes(tile: Grid, canvas: Grid) -> tuple[slice, slice]:
    """The nodes at the upper left corners of a tile's blocks; and those along the canvas's end, where it reaches it."""
    return (
        slice(tile.top // NODE, tile.bottom // NODE + (tile.bottom == canvas.bottom)),
        slice(tile.left // NODE, tile.right // NODE + (tile.right == canvas.right)),
    )


def _in_blocks(place: tuple[slice, slice]) -> tuple[slice, slice]:
    rows, columns = (slice(part.start // NODE, part.stop // NODE) for part in place)
    return rows, columns
