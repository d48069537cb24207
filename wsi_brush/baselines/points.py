"""The point level and the grid level that ∞-Diff and ∞-Brush share: on a whole canvas, or at scattered points of it.

Features are (n, rows, columns, c) in both domains: scattered points are (n, points, 1, c), and what is pointwise or a
sum over points does not know the difference. Local operators do (`PointKernel`), and what goes to the grid and back
(`Domain`). A whole canvas is evaluated in bands of rows, so that what is held are a few maps of features.

After Bond-Taylor and Willcocks, "∞-Diff" (2024), with two departures: points go to the nodes by a partition of unity,
which hears every point, where theirs takes the three nearest; and nodes stand a fixed number of pixels apart, so that a
canvas larger than the scenes of the training has more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..denoiser import signal_of
from ..grid import Grid
from ..operators import SelfAttention, by_bands, rows_of
from ..splat import interpolate, interpolate_at, nodes, positional, splat, splat_at

_ROOM = 1 << 20  # places on a side that a point's key can tell apart
_GPU_TILE = 1024  # pixels
_TILE = 96  # pixels: twice its features are below what the command line has handed back to the system at once
SIGNAL = 128
AXIS = 36  # positional features of a place on one axis


@dataclass(frozen=True)
class Neighbours:
    """Which scattered points lie in each other's windows of `side` x `side` pixels.

    receivers, givers, places: (pairs,) of two points, and the place of the second in the first's window, in raster
    order; none is its middle. count: (points, 1) points in the window, itself included.
    """

    side: int
    receivers: Tensor
    givers: Tensor
    places: Tensor
    count: Tensor

    @staticmethod
    def of(places: Tensor, side: int) -> Neighbours:
        """Of distinct places (n, points, 2), in raster order within each scene."""
        scene = torch.arange(len(places), device=places.device)[:, None]
        keys = ((scene * _ROOM + places[..., 0]) * _ROOM + places[..., 1]).flatten()
        reach, before = side // 2, torch.arange(side * side // 2, device=places.device)
        away = (before // side - reach) * _ROOM + before % side - reach
        wanted = keys + away[:, None]  # of half a window; the other half are the same pairs the other way
        index = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        place, receivers = torch.nonzero(keys[index] == wanted, as_tuple=True)
        givers = index[place, receivers]
        pairs = torch.cat([receivers, givers]), torch.cat([givers, receivers])
        count = torch.ones(len(keys), device=keys.device).index_add(0, pairs[0], torch.ones_like(pairs[0]).float())
        return Neighbours(side, *pairs, torch.cat([place, side * side - 1 - place]), count[:, None])


@dataclass(frozen=True)
class Domain:
    """Where features (n, rows, columns, c) lie: all pixels of a scene, or scattered ones as (n, points, 1, c).

    rows, columns: (n, rows, 1) and (n, 1, columns) of a lattice, (n, points, 1) each of scattered points, in pixels of
    the scene; shape: the scene's, multiples of the nodes' distance; mpp: µm per pixel; origin: (n, 2) µm of its corner.
    """

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]
    mpp: float
    origin: Tensor
    near: Neighbours | None = None

    @staticmethod
    def lattice(shape: tuple[int, int], mpp: float, origin: Tensor) -> Domain:
        """All pixels."""
        rows, columns = (torch.arange(side, device=origin.device).expand(len(origin), -1) for side in shape)
        return Domain(rows[:, :, None], columns[:, None], shape, mpp, origin)

    @staticmethod
    def scattered(places: Tensor, shape: tuple[int, int], mpp: float, origin: Tensor, *, side: int) -> Domain:
        """Distinct places (n, points, 2), in raster order within each scene; `side` of the kernels to come."""
        near = Neighbours.of(places, side)
        return Domain(places[..., :1], places[..., 1:], shape, mpp, origin, near)

    def over(
        self, work: Callable[..., Tensor], *features: Tensor, halo: int = 0, onto: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """`work(domain, *features)`, which says of a pixel what those within `halo` decide.

        Of a lattice without gradients tile by tile, so that what is between fits a core's cache; with no halo `onto`
        may be a map of features that becomes the result.
        """
        if self._whole:
            return work(self, *features)
        whole = Grid(1.0, 0, 0, *self.shape)
        for tile in whole.tiles(_TILE if self.rows.device.type == "cpu" else _GPU_TILE):
            around = tile.pad(halo).clip(whole)
            rows, columns = around.within(whole)
            part = replace(self, rows=self.rows[:, rows], columns=self.columns[:, :, columns])
            found = work(part, *(u[:, rows, columns] for u in features))
            if onto is None:
                onto = found.new_empty(len(found), *self.shape, found.shape[-1])
            onto[:, *tile.within(whole)] = found[:, *tile.within(around)]
        return torch.as_tensor(onto)

    def total(self, part: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        """The sum of `part` over all points, added up in float64 in rows."""
        side = _TILE if u.device.type == "cpu" else _GPU_TILE
        rows = u.shape[1] if self._whole else max(1, side**2 // u.shape[2])
        return torch.stack([part(band) for band in u.split(rows, 1)]).sum(0)

    @property
    def _whole(self) -> bool:
        return self.near is not None or torch.is_grad_enabled()

    def axes(self) -> tuple[Tensor, Tensor]:
        """Rows and columns as positional features, (n, rows, 1, AXIS) and (n, 1, columns, AXIS) or (n, points, 1, .)"""
        zero = torch.zeros((), dtype=torch.float64, device=self.rows.device)
        down, across = (self.origin[:, axis, None, None] for axis in (0, 1))
        rows, columns = down + (self.rows + 0.5) * self.mpp, across + (self.columns + 0.5) * self.mpp
        return positional(rows, zero.expand_as(rows)), positional(zero.expand_as(columns), columns)

    def to_nodes(self, u: Tensor, node: int) -> Tensor:
        """The mean around every node, one each `node` pixels: (n, rows / node + 1, columns / node + 1, c)."""
        rows, columns = (side // node for side in self.shape)
        if self.near is None:
            total = nodes(by_bands(lambda part: splat(part, node), rows, u))
            mass = _edges(rows, node, u.device)[:, None] * _edges(columns, node, u.device)
            return total / mass[..., None]
        scene = torch.arange(len(u), device=u.device).repeat_interleave(u.shape[1])
        places = [(axis.flatten() + 0.5) / node for axis in (self.rows, self.columns)]
        u = torch.cat([u, torch.ones_like(u[..., :1])], -1).flatten(0, 2)
        total = splat_at(u, *places, scene=scene, shape=(len(self.rows), rows + 1, columns + 1))
        return total[..., :-1] / total[..., -1:].clamp_min(1e-6)

    def read(self, table: Tensor, node: int) -> Tensor:
        """Nodes (n, r, c, channels) read bilinearly at the pixels or points of this domain."""
        rows, columns = ((axis.flatten(1) + 0.5) / node for axis in (self.rows, self.columns))
        if self.near is None:
            return interpolate(table, rows, columns)
        scene = torch.arange(len(table), device=table.device).repeat_interleave(rows.shape[1])
        found = interpolate_at(table, rows.flatten(), columns.flatten(), scene)
        return found.reshape(len(table), -1, 1, found.shape[-1])


def _edges(blocks: int, node: int, device: torch.device) -> Tensor:
    """The mass of a row of nodes in pixels: half at both ends."""
    mass = torch.full((blocks + 1,), float(node), device=device)
    for end in (0, -1):
        mass[end] /= 2
    return mass


class PointKernel(nn.Module):
    """(K u)(x) = mean over the present y in a window around x of k(y - x) u(y), times the window's size; depthwise.

    ∞-Diff's sparse operator. Normalised by the pixels that are present, so trained on a part of them it is evaluated on
    all of them; `operators.KernelIntegral` is the same on cells.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, 1, side, side) / side**2)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, u: Tensor, near: Neighbours | None = None) -> Tensor:
        """(n, rows, columns, c); the same shape comes back."""
        side = self.kernel.shape[-1]
        if near is None:
            total = functional.conv2d(
                u.permute(0, 3, 1, 2), self.kernel, padding=side // 2, groups=u.shape[-1]
            ).permute(0, 2, 3, 1)  # fmt: skip
            counts = [_present(length, side // 2, u.device) for length in u.shape[1:3]]
            return total * (side**2 / (counts[0][:, None] * counts[1]))[..., None] + self.bias
        flat, taps = u.flatten(0, 2), self.kernel.flatten(1).T
        total = flat * taps[side**2 // 2]
        total = total.index_add(0, near.receivers, rows_of(flat, near.givers) * rows_of(taps, near.places))
        return (total * (side**2 / near.count) + self.bias).view_as(u)


def _present(length: int, reach: int, device: torch.device) -> Tensor:
    """How many places of a window of 2 reach + 1 lie inside a line, for each of its places."""
    place = torch.arange(length, device=device)
    return (place.clamp_max(reach) + (length - 1 - place).clamp_max(reach) + 1).float()


class Modulated(nn.Module):
    """Channel norm, scaled and shifted by noise level and pitch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(SIGNAL, 2 * channels)

    def forward(self, u: Tensor, signal: Tensor) -> Tensor:
        """(n, rows, columns, c) and (n, SIGNAL)."""
        scale, shift = self.modulate(signal)[:, None, None].chunk(2, -1)
        return torch.addcmul(shift, functional.layer_norm(u, u.shape[-1:]), 1 + scale)


class Local(nn.Module):
    """u + K(norm u): ∞-Diff's sparse operator with its residual."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.norm, self.kernel = Modulated(channels), PointKernel(channels, side)

    def forward(self, u: Tensor, signal: Tensor, near: Neighbours | None) -> Tensor:
        """(n, rows, columns, c); the same shape comes back."""
        change: Tensor = self.kernel(self.norm(u, signal), near)
        return u + change


class Feed(nn.Module):
    """u + two matrices with a GELU between them, of the norm of u."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Modulated(channels)
        self.widen, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, u: Tensor, signal: Tensor) -> Tensor:
        """(n, rows, columns, c); the same shape comes back."""
        change: Tensor = self.narrow(functional.gelu(self.widen(self.norm(u, signal))))
        return u + change


class Signal(nn.Module):
    """Noise level and pitch as SIGNAL features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(80, SIGNAL), nn.SiLU(), nn.Linear(SIGNAL, SIGNAL), nn.SiLU())

    def forward(self, sigma: Tensor, mpp: float) -> Tensor:
        """Noise levels (n,) -> (n, SIGNAL)."""
        found: Tensor = self.layers(signal_of(sigma, mpp))
        return found


class GridBlock(nn.Module):
    """A residual block of two 3 x 3 convolutions, modulated between them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, after, 3, padding=1) for c in (before, after))
        self.norm = Modulated(after)
        self.across = nn.Linear(before, after) if before != after else nn.Identity()
        for weight in self.second.parameters():
            nn.init.zeros_(weight)

    def forward(self, u: Tensor, signal: Tensor) -> Tensor:
        """(n, rows, columns, before) -> (n, rows, columns, after)."""
        h = _conv(self.first, functional.gelu(functional.layer_norm(u, u.shape[-1:])))
        h = _conv(self.second, functional.gelu(self.norm(h, signal)))
        kept: Tensor = self.across(u)
        return kept + h


class GridLevel(nn.Module):
    """A small U-Net on the nodes: widths 1, 2, 2 times `width`, linear self-attention at the coarsest."""

    def __init__(self, channels: int, width: int, *, heads: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 2 * width]
        self.width = widths[-1]
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.down = nn.ModuleList(GridBlock(c, c) for c in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(c, d, 3, stride=2, padding=1) for c, d in pairwise(widths))
        self.middle = nn.ModuleList(GridBlock(self.width, self.width) for _ in range(2))
        self.attention = SelfAttention(self.width, heads=heads)
        self.up = nn.ModuleList(GridBlock(d + c, c) for c, d in zip(widths[-2::-1], widths[:0:-1], strict=True))

    def forward(self, u: Tensor, signal: Tensor, told: Tensor | None = None) -> Tensor:
        """Nodes (n, r, c, channels); `told`, (n, 2 width), is added at the coarsest level."""
        u, kept = self.enter(u), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            u = block(u, signal)
            kept.append(u)
            u = _conv(shrink, u)
        u = self.middle[0](u, signal)
        if told is not None:
            u = u + told[:, None, None]
        sums = self.attention.part(u, torch.zeros_like(u), torch.ones_like(u[..., 0])).float()
        u = self.middle[1](self.attention(u, torch.zeros_like(u), sums), signal)
        for block in self.up:
            across = kept.pop()
            u = functional.interpolate(u.permute(0, 3, 1, 2), size=across.shape[1:3]).permute(0, 2, 3, 1)
            u = block(torch.cat([u, across], -1), signal)
        left: Tensor = self.leave(u)
        return left


def _conv(layer: nn.Module, u: Tensor) -> Tensor:
    found: Tensor = layer(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return found


class PointBlock(nn.Module):
    """A block of the point level: a local operator and what is pointwise after it. ∞-Diff's."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.local, self.feed = Local(channels, side), Feed(channels)

    def far(self, u: Tensor, domain: Domain, signal: Tensor, tokens: list[Tensor]) -> Tensor:
        """All after the local operator; `tokens` of the scene, (n, 1, channels) each. u may become the result."""
        return domain.over(lambda _, part: self.feed(part, signal), u, onto=u)


class PointLevel(nn.Module):
    """Three blocks down, the grid level, three blocks up with what was there on the way down: (., 3) -> (., 3)."""

    def __init__(self, block: Callable[[], PointBlock], channels: int, grid: GridLevel, node: int, side: int) -> None:
        super().__init__()
        self.node, self.reach = node, side // 2
        self.enter, self.leave = nn.Linear(3, channels), nn.Linear(channels, 3)
        self.down, self.up = (nn.ModuleList(block() for _ in range(3)) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(3))
        self.grid = grid
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self, values: Tensor, domain: Domain, signal: Tensor, tokens: list[Tensor], told: Tensor | None
    ) -> Tensor:
        """`tokens` for the blocks, `told` (n, grid features) for the middle of the grid level.

        Of a whole canvas without gradients it holds four maps of features at most.
        """
        u, kept = values, []
        for block, first in zip(self.down, (self.enter, nn.Identity(), nn.Identity()), strict=True):
            u = self._block(block, first, domain, signal, tokens, u)
            kept.append(u)
        grid = self.grid(domain.to_nodes(u, self.node), signal, told)
        for index, (block, mix) in enumerate(zip(self.up, self.mix, strict=True)):
            below = grid if index == 0 else None
            parts = [kept.pop()] if index == 0 else [u, kept.pop()]
            u = self._block(block, mix, domain, signal, tokens, *parts, grid=below)
        return domain.over(lambda _, part: self.leave(part), u)

    def _block(
        self, block: nn.Module, mix: nn.Module, domain: Domain, signal: Tensor, tokens: list[Tensor], *parts: Tensor,
        grid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A block of what `mix` makes of the parts, and of the grid where it is given."""
        this = cast(PointBlock, block)

        def local(part: Domain, *features: Tensor) -> Tensor:
            read = [] if grid is None else [part.read(grid, self.node)]
            found: Tensor = this.local(mix(torch.cat([*read, *features], -1)), signal, part.near)
            return found

        u = domain.over(local, *parts, halo=self.reach)
        del parts
        return this.far(u, domain, signal, tokens)
