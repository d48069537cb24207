"""What a training step minimises: the loss of a batch of scenes, at its windows' points and at its scattered points."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .condition import ConditionMap, Setting
from .denoiser import CELL, NODE, Denoiser, node_mass
from .diffusion import Ladder, Objective, coefficients, loss
from .field import NoiseField, mollifier, mollifier_radius
from .operators import Scatter
from .scenes import Scenes, square
from .splat import nodes


class Drawing(Protocol):
    """How noise levels and conditions are drawn, and what the operator says; `train.Optimisation` is one."""

    @property
    def objective(self) -> Objective:
        """`v` or `x0`."""

    @property
    def unconditional(self) -> float:
        """Part of the scenes whose condition is withheld."""

    @property
    def full_range(self) -> float:
        """Part of the scenes whose noise is drawn from the whole range, whatever their pitch."""

    @property
    def margin(self) -> float:
        """Factor beyond the noise levels that the solver visits."""


def draw_sigma(ladder: Ladder, mpp: float, count: int, drawing: Drawing, generator: torch.Generator) -> Tensor:
    """Noise levels for scenes of a pitch: log-uniform over what the solver visits there, some over the whole range."""
    level, device = ladder.pitches.index(mpp), generator.device
    low, high = ladder.span(level)
    low, high = low / drawing.margin, high * (drawing.margin if level < len(ladder.pitches) - 1 else 1.0)
    whole = torch.rand(count, generator=generator, device=device) < drawing.full_range
    place = torch.rand(count, generator=generator, device=device)
    near = math.log(low) + place * math.log(high / low)
    far = math.log(ladder.sigma_min) + place * math.log(ladder.sigma_max / ladder.sigma_min)
    return torch.where(whole, far, near).exp()


def losses(
    denoiser: Denoiser,
    ladder: Ladder,
    scenes: Scenes,
    about: dict[str, Any],
    drawing: Drawing,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean loss over the windows' points and over the scattered points of a batch of scenes.

    Neither alone is the scenes' mean loss: windows see the middle of a scene more often than its edge; points, outside
    them, the reverse. Scenes, weights and generator are on one device. A scene and its noise are read at its
    window and around its points, and nowhere else: where the two overlap they are the same.
    """
    n, device = len(scenes.windows), scenes.windows.device
    sigma = draw_sigma(ladder, scenes.mpp, n, drawing, generator)
    wide = sigma[:, None, None, None]
    noise = NoiseField(torch.randint(1 << 62, (n,), generator=generator, device=device))
    known = (torch.rand(n, generator=generator, device=device) >= drawing.unconditional).float()
    origin = torch.rand(n, 2, generator=generator, device=device).double() * 8192
    setting = denoiser.setting(sigma, scenes.mpp, conditions(scenes, about), origin=origin, known=known)
    reach = mollifier_radius(denoiser.config.mollifier)
    image, around = scenes.seen(reach)
    image = image.permute(0, 3, 1, 2)
    noisy = image + wide * noise.read_at(*square(scenes.windows, scenes.window)).permute(0, 3, 1, 2)
    scatter, values, near = None, noisy, noisy
    if scenes.points.shape[1]:
        scatter = _scatter(scenes.points)
        near = around + wide[..., None] * noise.read_at(*square(scenes.points - reach, 2 * reach + 1))
        values = mollified_at(near, scenes.points, scenes.size, denoiser.config.mollifier)
        values = (values * coefficients(sigma[:, None, None])[2]).flatten(0, 1)
    window = noisy * coefficients(wide)[2]
    grid, tokens = denoiser.layout(*_gathered(denoiser, window, setting, scatter, values, scenes), setting)
    memory = denoiser.memory(tokens, setting)
    said = denoiser.paint(window, setting, grid, memory, corner=(scenes.windows[:, 0], scenes.windows[:, 1]))
    window = loss(said, image, noisy, wide, objective=drawing.objective).mean()
    if scatter is None:
        return window, window.new_zeros(())
    said = denoiser.paint_points(values, scatter, setting, grid, memory)
    image, noisy = (u[:, :, reach, reach].flatten(0, 1) for u in (around, near))
    at = loss(said, image, noisy, sigma[scatter.scene][:, None], objective=drawing.objective)
    return window, at.mean()


def _scatter(points: Tensor) -> Scatter:
    scene = torch.arange(len(points), device=points.device)[:, None].expand(points.shape[:2]).flatten()
    return Scatter.of(scene, points[..., 0].flatten(), points[..., 1].flatten(), levels=3)


def conditions(scenes: Scenes, about: dict[str, Any]) -> list[ConditionMap]:
    """What the scenes show, in units of the embeddings' spread over the training data, finest pitch first."""
    maps = []
    for mpp, (values, present, corner, cell) in sorted(scenes.maps.items()):
        moments = about["embeddings"][f"{mpp:g}"]
        mean, std = (torch.tensor(moments[name], device=values.device) for name in ("mean", "std"))
        limit = moments.get("limit", math.inf)
        standard = ((values - mean) / std).clamp(-limit, limit)
        maps.append(ConditionMap(standard * present[..., None], present, corner, cell))
    return maps


def _gathered(
    denoiser: Denoiser, window: Tensor, setting: Setting, scatter: Scatter | None, values: Tensor, scenes: Scenes
) -> tuple[Tensor, Tensor]:
    """Node sums and their mass of a batch of scenes, from the windows' cells and the scattered points' cells."""
    n, side, size = len(window), scenes.window // NODE, scenes.size
    count = size // NODE + 1
    own = nodes(denoiser.sketch(window, setting))
    own = torch.cat([own, node_mass(n, side, side).to(own)], -1)
    along = torch.arange(side + 1, device=own.device)
    rows, columns = (scenes.windows[:, axis, None] // NODE + along for axis in (0, 1))
    first = torch.arange(n, device=own.device)[:, None] * count
    at = ((first + rows)[:, :, None] * count + columns[:, None]).flatten()
    total = own.new_zeros(n * count * count, own.shape[-1]).index_copy(0, at, own.flatten(0, 2))
    total = total.unflatten(0, (n, count, count))
    if scatter is not None:
        cells = (size**2 - scenes.window**2) / CELL**2
        # the chance that a cell holds a point: by its inverse, sums over those that do estimate sums over all of them
        # (Horvitz and Thompson, 1952)
        occupied = 1 - (1 - 1 / cells) ** scenes.points.shape[1]
        total = total + denoiser.sketch_points(values, scatter, 1 / occupied, setting, (size, size))
    return total[..., :-1], total[..., -1:]


def mollified_at(near: Tensor, points: Tensor, size: int, width: float) -> Tensor:
    """A x at points (n, k, 2) of scenes of `size` pixels, from x within A's radius of them, (n, k, taps, taps, 3): as
    `field.mollify` there, (n, k, 3)."""
    radius, taps = mollifier_radius(width), mollifier(width, device=near.device)
    rows, columns = square(points - radius, 2 * radius + 1)
    down, across = (((at >= 0) & (at < size)).flatten(2) * taps for at in (rows, columns))
    total = torch.einsum("nkijc,nki,nkj->nkc", near, down, across)
    return total / (down.sum(-1) * across.sum(-1))[..., None]
