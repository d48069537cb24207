"""Patch-based painting: Graikos et al., "Learned representation-guided diffusion models for large-image generation"
(CVPR 2024), on pixels where they have latents.

A denoiser of patches of one size is told one embedding, the patch's own. A canvas is painted by windows of that size,
a quarter of it apart: at every step the images that the windows see are averaged, and the state moves towards the
average. Nothing joins what lies further apart than a window but the embeddings and the overlaps.

With σ² = (1 - ᾱ) / ᾱ and x = u_0 + σ ξ, their step (x̂_0 averaged, ε = (x - x̂_0) / σ, DDIM with η = 1: Song et al.
2021, Eq. 12 and 16) is the move `ancestral` of `diffusion.moves`. The noise levels are ours, evenly spaced in log-SNR.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..condition import ConditionMap
from ..diffusion import Ladder, Move, coefficients, loss, moves
from ..field import NoiseField
from ..grid import Grid
from ..objective import Drawing, conditions
from ..progress import Tell, Told
from ..scenes import Scenes, square
from . import System, check_counts

BATCH, GPU_BATCH = 16, 256
"""Windows seen at once."""
ALIKE = 0.9995
"""Cosine from which on two embeddings are mixed in a straight line."""
_SIGNAL = 256
_WAVES = 32


@dataclass(frozen=True)
class PatchesConfig:
    """Sizes; `dim` is the encoder's.

    side: of a patch, pixels; width: channels at the patch's pitch, doubled at every level; blocks: residual blocks a
    level, each way; heads: of the attention at the coarsest level; apart: windows are side / apart pixels apart (theirs
    are a quarter, so a pixel is asked for 16 times a step; 2 makes that 4 times, and is not theirs).
    """

    dim: int
    side: int = 64
    width: int = 32
    levels: int = 3
    blocks: int = 2
    heads: int = 4
    apart: int = 4

    def __post_init__(self) -> None:
        """Raises:
        ValueError: if a size is not what it has to be.
        """
        check_counts(self)
        if self.side < 8 or self.side % math.lcm(self.apart, 1 << (self.levels - 1)):
            raise ValueError(
                f"side {self.side}, apart {self.apart}, levels {self.levels}; expected a side from 8 on that "
                f"apart divides and that halves {self.levels - 1} times"
            )
        if self.width % 8 or (self.width << (self.levels - 1)) % self.heads:
            raise ValueError(
                f"width {self.width}, heads {self.heads}; expected a width that 8 divides, and heads that "
                "divide the coarsest level's"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, for the brush's JSON."""
        return asdict(self)

    @property
    def stride(self) -> int:
        """Pixels from one window to the next."""
        return self.side // self.apart


class Patches(System):
    """F(c_in x, σ, pitch, embedding) of a patch, and painting by averaged windows of it."""

    name = "patches"
    sizes = PatchesConfig
    config: PatchesConfig

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config = config
        self.signal = nn.Sequential(nn.Linear(2 * _WAVES + 1, _SIGNAL), nn.SiLU(), nn.Linear(_SIGNAL, _SIGNAL))
        # Attention to a set of one token gives that token's value everywhere: their cross-attention is this sum.
        self.embed = nn.Linear(config.dim, _SIGNAL)
        self.absent = nn.Parameter(torch.randn(_SIGNAL) * 0.02)  # a patch without tissue
        self.unknown = nn.Parameter(torch.randn(_SIGNAL) * 0.02)  # no condition: classifier-free guidance
        widths = [config.width << level for level in range(config.levels)]
        self.enter = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.coarser, self.finer = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            sizes = [before, *[width] * (config.blocks - 1)]
            self.down.append(nn.ModuleList(_Residual(size, width) for size in sizes))
            self.coarser.append(
                nn.Conv2d(width, width, 3, stride=2, padding=1) if width < widths[-1] else nn.Identity()
            )
            sizes = [2 * width] * config.blocks
            self.up.append(nn.ModuleList(_Residual(size, width) for size in sizes))
            self.finer.append(nn.Conv2d(width, before, 3, padding=1) if level else nn.Identity())
        self.middle = nn.ModuleList([_Residual(widths[-1], widths[-1]), _Residual(widths[-1], widths[-1])])
        self.attention = _Attention(widths[-1], config.heads)
        self.leave = nn.Sequential(
            nn.GroupNorm(8, widths[0]), nn.SiLU(), _silent(nn.Conv2d(widths[0], 3, 3, padding=1))
        )

    # -- one patch -----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: Tensor, mpp: float, told: Tensor) -> Tensor:
        """F of patches (n, 3, side, side), already scaled by c_in; sigma (n,); told (n, channels) from `tell_of`."""
        signal = functional.silu(self.signal(_waves(sigma, mpp)) + told)
        u, kept = self.enter(x.contiguous(memory_format=torch.channels_last)), list[Tensor]()
        for blocks, halve in zip(self.down, self.coarser, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                u = block(u, signal)
                kept.append(u)
            u = halve(u)
        u = self.middle[1](self.attention(self.middle[0](u, signal)), signal)
        for blocks, double in zip(reversed(self.up), reversed(self.finer), strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                u = block(torch.cat([u, kept.pop()], 1), signal)
            if kept:
                u = double(functional.interpolate(u, scale_factor=2.0, mode="nearest"))
        said: Tensor = self.leave(u)
        return said

    def tell_of(self, embedding: Tensor, present: Tensor, known: Tensor) -> Tensor:
        """What the network is told of patches: embeddings (n, dim), presence and `known` (n,) from 0 to 1."""
        embedded = self.embed(embedding).to(present)
        told = torch.lerp(self.absent.expand_as(embedded), embedded, present[:, None])
        return torch.lerp(self.unknown.expand_as(told), told, known[:, None])

    def image(
        self, x: Tensor, sigma: float, mpp: float, embedding: Tensor, present: Tensor, *, guidance: float
    ) -> Tensor:
        """The image that patches (n, 3, side, side) are thought to show.

        Guided by ε = (1 + w) ε_c - w ε_u with w = guidance - 1, which is the same sum of the two images.
        """
        level = torch.full((len(x),), sigma, device=x.device)
        skip, out, into = coefficients(torch.tensor(sigma))

        def said(known: float) -> Tensor:
            told = self.tell_of(embedding, present, torch.full_like(level, known))
            found: Tensor = skip * x + out * self(x * into, level, mpp, told)
            return found

        return said(1.0) if guidance == 1 else torch.lerp(said(0.0), said(1.0), guidance)

    # -- training ------------------------------------------------------------------------------------------

    @property
    def least(self) -> int:
        """Pixels of a side of a patch."""
        return self.config.side

    def losses(
        self, ladder: Ladder, scenes: Scenes, about: dict[str, Any], drawing: Drawing, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Of patches at random places of the scenes, as many as fill the window; there are no scattered points.

        Noise is drawn from the ladder's whole range, as one pitch does all of it.
        """
        side, n, size = self.config.side, len(scenes.windows), scenes.size
        count = max(1, (scenes.window // side) ** 2)
        scene = torch.arange(n).repeat_interleave(count)
        corner = torch.randint(size - side + 1, (n, count, 2), generator=generator)
        image = scenes.read_at(*square(corner, side)).flatten(0, 1).permute(0, 3, 1, 2)
        span = math.log(ladder.sigma_max / ladder.sigma_min)
        sigma = ladder.sigma_min * (span * torch.rand(len(scene), generator=generator)).exp()
        wide = sigma[:, None, None, None]
        noisy = image + wide * torch.randn(image.shape, generator=generator)
        embedding, present = embedding_at(own(conditions(scenes, about), side), scene, corner.flatten(0, 1) + side / 2)
        known = (torch.rand(len(scene), generator=generator) >= drawing.unconditional).float()
        said = self(noisy * coefficients(wide)[2], sigma, scenes.mpp, self.tell_of(embedding, present, known))
        return loss(said, image, noisy, wide, objective=drawing.objective).mean(), torch.zeros(())

    # -- painting ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def paint(
        self, condition: list[ConditionMap], canvas: Grid, ladder: Ladder, *, seed: int, steps: int, guidance: float,
        tell: Tell | None = None,
    ) -> Tensor:  # fmt: skip
        """(3, height, width). Noise is read by its address, so a canvas is a function of the seed and its place.

        Raises:
            UsageError: if the ladder does not have the canvas's pitch.
        """
        ladder = ladder.starting_at(canvas.mpp)
        ratio = ladder.sigma_min / ladder.sigma_max
        sigmas = [ladder.sigma_max * ratio ** (index / max(steps - 1, 1)) for index in range(steps)]
        area, field, lattice = self._area(canvas), NoiseField(seed), own(condition, self.config.side)
        x = torch.empty(3, *area.shape, device=self.device)
        for band in _bands(area, self.config.side):
            x[:, band.within(area)[0]] = sigmas[0] * field.read(band, device=x.device)
        told = Told(tell, "painting", steps * area.height * area.width)
        for move in moves([*sigmas, 0.0], "ancestral"):
            self._advance(x, move, area, field, lattice, guidance, told)
        return x[:, : canvas.height, : canvas.width]

    def _area(self, canvas: Grid) -> Grid:
        """The canvas grown down and right until windows fill it."""
        side, stride = self.config.side, self.config.stride
        height, width = (side + -(-max(length - side, 0) // stride) * stride for length in canvas.shape)
        return Grid(canvas.mpp, canvas.top, canvas.left, height, width)

    def _advance(
        self, x: Tensor, move: Move, area: Grid, field: NoiseField, lattice: ConditionMap, guidance: float, told: Told
    ) -> None:
        """One step, in place: rows that no later window reads are averaged and moved while the windows go down."""
        side, stride = self.config.side, self.config.stride
        left, most = range(0, area.width - side + 1, stride), BATCH if x.device.type == "cpu" else GPU_BATCH
        down, across = (_windows_over(length, side, stride).to(x.device) for length in area.shape)
        total = torch.zeros(3, side, area.width, device=x.device)
        for top in range(0, area.height - side + 1, stride):
            band = x[:, top : top + side]
            for lefts in (left[first : first + most] for first in range(0, len(left), most)):
                corners = torch.tensor([(top, start) for start in lefts], device=x.device)
                embedding, present = embedding_at(lattice, torch.zeros_like(corners[:, 0]), corners + side / 2)
                windows = torch.stack([band[:, :, start : start + side] for start in lefts])
                images = self.image(windows, move.sigma, area.mpp, embedding, present, guidance=guidance)
                for start, image in zip(lefts, images, strict=True):
                    total[:, :, start : start + side] += image
            rows = slice(top, top + (stride if top + side < area.height else side))
            place = Grid(area.mpp, area.top + top, area.left, rows.stop - top, area.width)
            average = total[:, : place.height] / (down[rows, None] * across)
            noise = field.read(place, stream=move.stream, device=x.device) if move.fresh else None
            x[:, rows] = move.of(x[:, rows], average, None, noise)
            total = torch.cat([total[:, place.height :], total.new_zeros(3, place.height, area.width)], 1)
            told.add(place.height * area.width)

    def bytes_for(self, canvas: Grid) -> int:
        """The state, its noise and sums in bands of a window's height, and the features of a batch of windows."""
        area, side, width = self._area(canvas), self.config.side, self.config.width
        state, bands = 12 * area.height * area.width, 160 * side * area.width
        # At the patch's pitch what is kept for the way up, its double where it comes in, and a block's own; every
        # further level has half as much. The figures were measured.
        features = 4 * BATCH * side**2 * width * 2 * (self.config.blocks + 8)
        return state + bands + features


def own(condition: list[ConditionMap], side: int) -> ConditionMap:
    """The set whose tiles are most nearly as large as a patch, scaled to unit spread; of two the finer one.

    At the finest pitch that is the finest set. Embeddings get the length √dim, as theirs get 1.
    """
    lattice = min(condition, key=lambda lattice: (abs(math.log(lattice.cell / side)), lattice.cell))
    values = functional.normalize(lattice.values, dim=-1) * math.sqrt(lattice.values.shape[-1])
    return ConditionMap(values, lattice.present, lattice.corner, lattice.cell)


def embedding_at(lattice: ConditionMap, scene: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of patches by the centres (k, 2) in pixels of their scenes (k,): (k, dim), and how present (k,).

    Spherical interpolation between the four cells around, two pairs along the rows and then down; beyond the border
    the edge goes on. Where a patch is as large as a cell, this is theirs by the patch's corner. A cell without tissue
    counts for nothing in the direction and for its weight in the presence.
    """
    position = (centre - lattice.corner[scene]) / lattice.cell - 0.5
    rows, columns = lattice.present.shape[1:]
    place = torch.stack([position[:, 0].clamp(0, rows - 1), position[:, 1].clamp(0, columns - 1)])
    low = place.floor().long()
    down, across = place - low
    high = torch.stack([(low[0] + 1).clamp_max(rows - 1), (low[1] + 1).clamp_max(columns - 1)])

    def cell(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        return lattice.values[scene, row, column], lattice.present[scene, row, column]

    upper = _between(cell(low[0], low[1]), cell(low[0], high[1]), across)
    lower = _between(cell(high[0], low[1]), cell(high[0], high[1]), across)
    return _between(upper, lower, down)


def _between(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    (start, here), (end, there) = first, second
    mixed = slerp(start, end, weight)
    mixed = torch.where((there > 0)[:, None], mixed, start)
    mixed = torch.where((here > 0)[:, None], mixed, end)
    return mixed, torch.lerp(here, there, weight)


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation, Shoemake (1985): (k, dim) twice and (k,) -> (k, dim); a straight line where the two are
    parallel or opposite."""
    cosine = functional.cosine_similarity(first, second, dim=-1, eps=1e-12)
    straight = cosine.abs() > ALIKE
    angle = torch.where(straight, 1.0, cosine.clamp(-1, 1).acos())
    start = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / angle.sin())
    end = torch.where(straight, weight, (weight * angle).sin() / angle.sin())
    return first * start[:, None] + second * end[:, None]


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that says nothing before it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Residual(nn.Module):
    """Two convolutions with the signal between them: Dhariwal and Nichol (2021), (n, c, h, w)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels), nn.GroupNorm(8, width)])
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = _silent(nn.Conv2d(width, width, 3, padding=1))
        self.hear = nn.Linear(_SIGNAL, 2 * width)
        self.past = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, u: Tensor, signal: Tensor) -> Tensor:
        scale, shift = self.hear(signal)[:, :, None, None].chunk(2, 1)
        v = self.norms[1](self.first(functional.silu(self.norms[0](u)))) * (1 + scale) + shift
        found: Tensor = self.past(u) + self.second(functional.silu(v))
        return found


class _Attention(nn.Module):
    """Self-attention over the points of a patch, (n, c, h, w)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, width)
        self.ask, self.answer = nn.Conv2d(width, 3 * width, 1), _silent(nn.Conv2d(width, width, 1))

    def forward(self, u: Tensor) -> Tensor:
        n, c, h, w = u.shape
        parts = self.ask(self.norm(u)).reshape(n, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        mixed = functional.scaled_dot_product_attention(*(part.contiguous() for part in parts))
        found: Tensor = u + self.answer(mixed.transpose(2, 3).reshape(n, c, h, w))
        return found


def _waves(sigma: Tensor, mpp: float) -> Tensor:
    """Noise level and pitch as numbers: (n,) -> (n, 2 waves + 1)."""
    level = sigma.log()[:, None] / 4 * torch.exp(torch.linspace(0, math.log(100.0), _WAVES, device=sigma.device))
    return torch.cat([level.sin(), level.cos(), torch.full_like(level[:, :1], math.log2(mpp))], -1)


def _windows_over(length: int, side: int, stride: int) -> Tensor:
    """How many windows lie over each pixel of a line: (length,)."""
    count = torch.zeros(length)
    for start in range(0, length - side + 1, stride):
        count[start : start + side] += 1
    return count


def _bands(area: Grid, rows: int) -> list[Grid]:
    return [
        Grid(area.mpp, top, area.left, min(rows, area.bottom - top), area.width)
        for top in range(area.top, area.bottom, rows)
    ]
