"""The conditional operator of the brush: a sparse level on points, a grid level for layout.

    sketch    points -> a narrow summary at 8 pixels -> splat         local, then a sum    (sweep A)
    layout    nodes every 32 pixels: local operators, self-attention, cross-attention      (the barrier)
    paint     points -> 2, 4, 8 pixels -> cross-attention -> 4, 2, 1 pixels                (sweep B)

Only `layout` sees the whole canvas, and it sees 1/1024 of its points; `sketch` and `paint` have a
finite reach, so a canvas of any size is painted tile by tile with one barrier a step. The operator is
told its pitch in µm and places in µm, never fractions of an image: any extent, not only any resolution.

∞-Brush (ECCV 2024) interleaves pixel-level self-attention with local operators, which costs a barrier
each; here global tokens made by the layout take its place (`reference` order: see README, "The method").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .condition import PLACES, ConditionMap, Setting
from .field import mollifier_radius, mollify
from .operators import (
    Block,
    Coarsen,
    CrossAttention,
    Refine,
    Scatter,
    SelfAttention,
    by_bands,
    through,
)
from .splat import interpolate, interpolate_at, splat, splat_at

CELL = 8  # pixels between the points of the coarsest local lattice
NODE = 32  # pixels between the nodes of the grid level


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the operator; `dim` is the encoder's, the rest is the one dial `width` and depths."""

    dim: int
    sets: int = 3  # pitches of embeddings
    width: int = 48  # channels at 2 pixels; 2x at 4 pixels, 4x at 8 pixels and on the grid
    depth: tuple[int, int, int] = (1, 2, 4)  # local operators at 2 and 4 pixels (down and up each), at 8 pixels
    layout: int = 4  # local operators on the grid
    heads: int = 6
    tokens: int = 16  # global tokens that the layout emits
    mollifier: float = 0.5  # standard deviation of A, pixels

    def to_json(self) -> dict[str, object]:
        """Plain values, for the brush's JSON."""
        return asdict(self)

    @property
    def reaches(self) -> tuple[int, int, int]:
        """Pixels around the output that decide it, as features at 2, 4 and 8 pixels on the way up.

        Walks the local operators back from the output: each reads one cell further at its own pitch.
        """
        down, middle, up = self.depth
        fine = _ceil(2 * (down + 1), 4)
        mid = _ceil(fine + 4 * middle, CELL)
        return fine, mid, mid + CELL * up

    @property
    def halo(self) -> int:
        """Pixels around a tile that decide what `paint` says inside it; a multiple of CELL."""
        down, middle, _ = self.depth
        return _ceil(self.reaches[-1] + 4 * middle + 2 * down + mollifier_radius(self.mollifier), CELL)

    @property
    def sketch_halo(self) -> int:
        """Pixels around a tile that decide what `sketch` says inside it; a multiple of NODE."""
        return _ceil(CELL + mollifier_radius(self.mollifier), NODE)

    @property
    def retouch_halo(self) -> int:
        """Pixels around a tile that decide what `retouch` says inside it; a multiple of CELL."""
        down, middle, _ = self.depth
        return _ceil(self.reaches[0] + 4 * middle + 2 * down + mollifier_radius(self.mollifier), CELL)


Around = tuple[int, int, int, int]
"""Pixels at the top, left, bottom and right of a window."""


def _left(around: Around, reach: int) -> Around:
    """What is left of a window's margin once it was cut to `reach`."""
    top, left, bottom, right = (min(side, reach) for side in around)
    return top, left, bottom, right


def _cut(u: Tensor, around: Around, reach: int, cell: int) -> Tensor:
    """A window (n, rows, columns, c) of cells of `cell` pixels whose margin is cut to `reach` pixels."""
    top, left, bottom, right = ((side - rest) // cell for side, rest in zip(around, _left(around, reach), strict=True))
    return u[:, top : u.shape[1] - bottom, left : u.shape[2] - right] if top or left or bottom or right else u


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class TokenParts(NamedTuple):
    """A softmax mean over some of the nodes, before it is divided.

    top: (n, tokens) highest score; mass: (n, tokens) sum of exp(score - top); total: (n, tokens, c) of it times u.
    """

    top: Tensor
    mass: Tensor
    total: Tensor

    @staticmethod
    def joined(parts: Sequence[TokenParts]) -> Tensor:
        """The mean over all nodes, (n, tokens, c), added in the order given."""
        top = torch.stack([part.top for part in parts]).amax(0)
        scales = [(part.top - top).exp().double() for part in parts]
        mass = sum(part.mass * scale for part, scale in zip(parts, scales, strict=True))
        total = sum(part.total * scale[..., None] for part, scale in zip(parts, scales, strict=True))
        return (torch.as_tensor(total) / torch.as_tensor(mass)[..., None]).float()


class Denoiser(nn.Module):
    """F(c_in A x, σ, pitch, condition): what `diffusion.coefficients` turn into an estimate of the image."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        one, two, four, signal = config.width, 2 * config.width, 4 * config.width, 128
        down, middle, up = config.depth[0], config.depth[1], config.depth[2]
        self.signal = nn.Sequential(nn.Linear(64 + 16, signal), nn.SiLU(), nn.Linear(signal, signal), nn.SiLU())

        def blocks(channels: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(channels, signal=signal) for _ in range(count))

        self.embed = nn.ModuleList(nn.Linear(config.dim, four) for _ in range(config.sets))
        self.absent = nn.Parameter(torch.randn(config.sets, four) * 0.02)  # a cell without tissue
        self.unknown = nn.Parameter(torch.randn(config.sets, four) * 0.02)  # no condition: classifier-free guidance
        self.place = nn.Linear(PLACES, four)

        self.sketch_in = nn.ModuleList([Coarsen(3, one // 2), Coarsen(one // 2, one), Coarsen(one, two)])
        self.sketch_block = blocks(two, 1)
        self.layout_in = nn.Linear(two, four)
        self.layout_blocks = blocks(four, config.layout)
        self.layout_self = SelfAttention(four, heads=config.heads)
        self.layout_cross = CrossAttention(four, heads=config.heads, sets=config.sets)
        self.token_score = nn.Linear(four, config.tokens)

        self.enter2, self.enter4, self.enter8 = Coarsen(3, one), Coarsen(one, two), Coarsen(two, four)
        self.down2, self.down4 = blocks(one, down), blocks(two, middle)
        self.gather = nn.Linear(four, four)
        self.middle8 = blocks(four, up)
        self.cross8 = CrossAttention(four, heads=config.heads, sets=config.sets + 1)
        self.leave8, self.leave4, self.leave2 = Refine(four, two), Refine(two, one), Refine(one, 3)
        self.up4, self.up2 = blocks(two, middle), blocks(one, down + 1)
        nn.init.zeros_(self.leave2.mix.weight)
        nn.init.zeros_(self.leave2.mix.bias)

    # -- what is said once per evaluation ------------------------------------------------------------------

    def setting(
        self, sigma: Tensor, mpp: float, condition: list[ConditionMap], *, origin: Tensor, known: Tensor | None = None
    ) -> Setting:
        """Noise levels (n,), pitch, embeddings; `known` (n,) is 0 where the condition is withheld."""
        tables = []
        for index, (project, lattice) in enumerate(zip(self.embed, condition, strict=True)):
            present = lattice.present[..., None]
            told = project(lattice.values).to(present)
            table = torch.lerp(self.absent[index].expand_as(told), told, present)
            if known is not None:
                table = torch.lerp(self.unknown[index].expand_as(table), table, known[:, None, None, None])
            tables.append(table)
        setting = Setting(self.signal(signal_of(sigma, mpp)), mpp, origin, tables, condition, [])
        for table, lattice in zip(tables, condition, strict=True):
            setting.memory.append((table + self.place(setting.places(*lattice.centres()))).flatten(1, 2))
        return setting

    def at(self, setting: Setting, sigma: Tensor) -> Setting:
        """The same setting at other noise levels (n,)."""
        return replace(setting, signal=self.signal(signal_of(sigma, setting.mpp)))

    # -- sweep A -------------------------------------------------------------------------------------------

    def sketch(self, x: Tensor, setting: Setting) -> Tensor:
        """The splat of a window: (n, 3, h, w) with h, w multiples of NODE -> (n, h / 32, w / 32, 4, c)."""
        u = self._mollified(x, lambda u: functional.gelu(self.sketch_in[0](u)))
        return splat(self._sketch(u, setting).float(), NODE // CELL)

    def _mollified(self, x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        """`then`, which leads to twice the pitch, of A x on the lattice (n, h, w, 3)."""

        def work(u: Tensor) -> Tensor:
            return then(mollify(u.permute(0, 3, 1, 2), self.config.mollifier).permute(0, 2, 3, 1).contiguous())

        halo = -(-mollifier_radius(self.config.mollifier) // 2)
        return by_bands(work, x.shape[2] // 2, x.permute(0, 2, 3, 1), halo=halo)

    def _sketch(self, u: Tensor, setting: Setting, scatter: Scatter | None = None) -> Tensor:
        """From features at 2 pixels to 8."""
        levels = scatter.levels if scatter is not None else (None, None, None)
        for coarsen, cells in zip(self.sketch_in[1:], levels[1:], strict=True):
            u = functional.gelu(coarsen(u, cells))
        return through(self.sketch_block, u, setting.signal, levels[-1])

    def sketch_points(
        self, u: Tensor, scatter: Scatter, weight: float, setting: Setting, size: tuple[int, int]
    ) -> Tensor:
        """The splat of scattered points with quadrature weight `weight`, and its mass: (n, rows, columns, c + 1)."""
        u = self._sketch(functional.gelu(self.sketch_in[0](u, scatter.levels[0])), setting, scatter)
        cells = scatter.levels[-1]
        rows, columns = ((place + 0.5) * CELL / NODE for place in (cells.rows, cells.columns))
        u = torch.cat([u, torch.ones_like(u[:, :1])], -1) * weight
        shape = (len(setting.signal), size[0] // NODE + 1, size[1] // NODE + 1)
        return splat_at(u, rows, columns, scene=cells.scene, shape=shape)

    # -- the barrier ---------------------------------------------------------------------------------------

    def layout(self, total: Tensor, mass: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
        """Node sums (n, r, c, channels) and their mass (n, r, c, 1) -> grid features and the paint's token memory.

        Returns (n, r, c, 4 width) and global tokens (n, tokens, 4 width). In one piece, as in training; a canvas does
        the same in strips of rows, by the four methods that this one calls.
        """
        u, place = self.layout_near(total, mass, setting)
        weights = mass[..., 0] / mass.amax(dim=(1, 2, 3))[:, None, None].clamp_min(1e-6)
        sums = self.layout_self.part(u, place, weights).float()
        u = self.layout_far(u, place, sums, self.layout_cross.remember(setting.memory), setting)
        return u, TokenParts.joined([self.token_parts(u)])

    @property
    def layout_halo(self) -> tuple[int, int]:
        """Rows of nodes around a strip that decide what `layout_near` and `layout_far` say inside it."""
        near = max(len(self.layout_blocks) // 2, 1)
        return near, len(self.layout_blocks) - near

    def layout_near(self, total: Tensor, mass: Tensor, setting: Setting, *, row: int = 0) -> tuple[Tensor, Tensor]:
        """What nodes know of their neighbours: rows from `row` on of the sums and mass -> features and places."""
        at_rows = (row + torch.arange(total.shape[1], device=total.device)[None]) * float(NODE)
        at_columns = torch.arange(total.shape[2], device=total.device)[None] * float(NODE)
        u = self.layout_in(total / mass.clamp_min(1e-6)) + setting.read(at_rows, at_columns)
        u = through(self.layout_blocks[: self.layout_halo[0]], u, setting.signal)
        return u, self.place(setting.places(at_rows, at_columns))

    def layout_far(self, u: Tensor, place: Tensor, sums: Tensor, memory: list[Tensor], setting: Setting) -> Tensor:
        """And of all others: `sums` over all nodes, `memory` of the condition."""
        u = self.layout_self(u, place, sums)
        u = self.layout_cross(u, place, memory)
        return through(self.layout_blocks[self.layout_halo[0] :], u, setting.signal)

    def token_parts(self, u: Tensor) -> TokenParts:
        """What some of the nodes add to the global tokens: means under a softmax over all nodes."""
        score = self.token_score(functional.layer_norm(u, u.shape[-1:])).flatten(1, 2)
        top = score.detach().amax(1)
        share = (score - top[:, None]).exp()
        return TokenParts(top, share.sum(1), torch.einsum("npt,npc->ntc", share, u.flatten(1, 2)))

    # -- sweep B -------------------------------------------------------------------------------------------

    def memory(self, tokens: Tensor, setting: Setting) -> list[Tensor]:
        """The four sets of the paint's cross-attention, summed: embeddings of every pitch, and the layout's tokens."""
        return [*self.condition_memory(setting), self.token_memory(tokens)]

    def condition_memory(self, setting: Setting) -> list[Tensor]:
        """The sets that do not change with the noise level."""
        return [remember(t) for remember, t in zip(list(self.cross8.sets)[:-1], setting.memory, strict=True)]

    def token_memory(self, tokens: Tensor) -> Tensor:
        """The set that does."""
        found: Tensor = self.cross8.sets[-1](tokens)
        return found

    def paint(
        self, x: Tensor, setting: Setting, grid: Tensor, memory: list[Tensor], *, corner: tuple[Tensor, Tensor]
    ) -> Tensor:
        """F at a window (n, 3, h, w), h and w multiples of CELL, whose corner lies at pixel `corner` = rows (n,),
        columns (n,) of its scene, multiples of CELL."""
        fine, mid, deep = self.descend(x, setting)
        return self.finish(fine, self.rise(mid, deep, setting, grid, memory, corner=corner), setting)

    def descend(self, x: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
        """The way down, which knows nothing of condition and layout: features at 2, 4 and 8 pixels."""
        fine, mid = self._down(self._mollified(x, self.enter2), setting)
        return fine, mid, self.enter8(mid)

    def rise(
        self, mid: Tensor, deep: Tensor, setting: Setting, grid: Tensor, memory: list[Tensor], *,
        corner: tuple[Tensor, Tensor], node: tuple[int, int] = (0, 0), around: Around = (0, 0, 0, 0),
    ) -> Tensor:  # fmt: skip
        """The way up: features at 4 pixels, which reach `reaches[0]` pixels beyond what is wanted.

        `node`: the first row and column of nodes in `grid`; `around`: pixels at the window's sides (top, left, bottom,
        right; multiples of CELL) that are not wanted. Without gradients nothing is left of `deep`.
        """
        reach = self.config.reaches[-1]
        deep = _cut(deep, around, reach, CELL)
        rows, columns = (
            (torch.arange(size, device=deep.device) + 0.5) * CELL + (start + max(0, side - reach))[:, None]
            for size, start, side in zip(deep.shape[1:3], corner, around[:2], strict=True)
        )

        def told(deep: Tensor, rows: Tensor) -> Tensor:
            layout = interpolate(grid, rows / NODE - node[0], columns / NODE - node[1])
            given: Tensor = setting.read(rows, columns) + self.gather(layout)
            return deep + given

        deep = by_bands(told, deep.shape[1], deep, rows, into=deep)
        place = by_bands(lambda _, rows: self.place(setting.places(rows, columns)), deep.shape[1], deep, rows)
        return self._up(mid, deep, setting, place, memory, around=around)

    def finish(self, fine: Tensor, mid: Tensor, setting: Setting, *, around: Around = (0, 0, 0, 0)) -> Tensor:
        """F, (n, 3, h, w) of what is wanted of a window, from its features at 2 pixels and those that rose to 4.

        Without gradients nothing is left of either.
        """
        return self._out(fine, mid, setting, around=around).permute(0, 3, 1, 2)

    def keep(self, mid: Tensor, risen: Tensor, around: Around) -> Tensor:
        """What the level of 8 pixels and the way up added at 4 pixels, for `retouch`: from `descend` and `rise`; `mid`
        becomes the result."""
        mid = _cut(mid, around, self.config.reaches[0], 4)
        return torch.sub(risen, mid, out=mid)

    def retouch(self, x: Tensor, setting: Setting, kept: Tensor, *, around: Around) -> Tensor:
        """F at a window (n, 3, h, w) without `around`, with what is deeper kept from an evaluation at a little more
        noise; `kept` reaches `reaches[0]` pixels beyond what is wanted, but not beyond the canvas.

        Deep features hardly change from step to step (DeepCache: Ma, Fang and Wang, CVPR 2024); where the noise of a
        mean over their cells is next to nothing they see what they saw before.
        """
        fine, mid = self._down(self._mollified(x, self.enter2), setting)
        mid = _cut(mid, around, self.config.reaches[0], 4).add_(kept)
        return self.finish(fine, mid, setting, around=around)

    def paint_points(self, u: Tensor, scatter: Scatter, setting: Setting, grid: Tensor, memory: list[Tensor]) -> Tensor:
        """F at scattered points: mollified values (points, 3) -> (points, 3)."""
        cells = scatter.levels[-1]
        rows, columns, scene = (cells.rows + 0.5) * CELL, (cells.columns + 0.5) * CELL, cells.scene
        layout = interpolate_at(grid, rows / NODE, columns / NODE, scene)
        given = setting.read_points(rows, columns, scene) + self.gather(layout)
        place = self.place(setting.places_of_points(rows, columns, scene))
        fine, mid = self._down(self.enter2(u, scatter.levels[0]), setting, scatter)
        mid = self._up(mid, self.enter8(mid, cells) + given, setting, place, memory, scatter)
        return self._out(fine, mid, setting, scatter)

    def _down(self, fine: Tensor, setting: Setting, scatter: Scatter | None = None) -> tuple[Tensor, Tensor]:
        at2, at4, _ = scatter.levels if scatter is not None else (None, None, None)
        fine = through(self.down2, fine, setting.signal, at2)
        return fine, through(self.down4, self.enter4(fine, at4), setting.signal, at4)

    def _up(
        self, mid: Tensor, u: Tensor, setting: Setting, place: Tensor, memory: list[Tensor],
        scatter: Scatter | None = None, *, around: Around = (0, 0, 0, 0),
    ) -> Tensor:  # fmt: skip
        _, at4, at8 = scatter.levels if scatter is not None else (None, None, None)
        _, mid_reach, reach = self.config.reaches
        for depth, block in enumerate(self.middle8):
            u = through([block], u, setting.signal, at8)
            # every operator leaves out what lies further off than those to come can see
            u = _cut(u, _left(around, reach), reach - CELL, CELL)
            reach -= CELL
            if depth == max(len(self.middle8) // 2, 1) - 1:
                u = self.cross8(u, _cut(place, _left(around, self.config.reaches[-1]), reach, CELL), memory, at8)
                del place
        mid = through(self.up4, self.leave8(u, at8, onto=_cut(mid, around, mid_reach, 4)), setting.signal, at4)
        return _cut(mid, _left(around, mid_reach), self.config.reaches[0], 4)

    def _out(
        self, fine: Tensor, mid: Tensor, setting: Setting, scatter: Scatter | None = None, *,
        around: Around = (0, 0, 0, 0),
    ) -> Tensor:  # fmt: skip
        at2, at4, _ = scatter.levels if scatter is not None else (None, None, None)
        reach = self.config.reaches[0]
        fine = self.leave4(mid, at4, onto=_cut(fine, around, reach, 2), in_place=True)
        fine = through(self.up2, fine, setting.signal, at2)
        out: Tensor = self.leave2(_cut(fine, _left(around, reach), 0, 2), at2)
        return out


def node_mass(scenes: int, rows: int, columns: int) -> Tensor:
    """The quadrature weight of every node of so many blocks, what ones splat: (scenes, rows + 1, columns + 1, 1).

    Exact: 16 cells inside, half as many along an edge, a quarter in a corner.
    """
    side = NODE // CELL
    down, across = torch.full((rows + 1,), float(side)), torch.full((columns + 1,), float(side))
    for edge in (down, across):
        edge[[0, -1]] = side / 2
    return (down[:, None] * across).expand(scenes, -1, -1)[..., None]


def signal_of(sigma: Tensor, mpp: float) -> Tensor:
    """Noise level and pitch as waves: (n,) -> (n, 80)."""
    level = sigma.log()[:, None] / 4
    waves = torch.exp(torch.linspace(math.log(1.0), math.log(100.0), 32, device=sigma.device))
    octave = torch.full_like(level, math.log2(mpp))
    turns = 2 * math.pi * octave / 2.0 ** torch.arange(1, 9, device=sigma.device)
    parts = [(level * waves).sin(), (level * waves).cos(), turns.sin(), turns.cos()]
    return torch.cat(parts, -1)
