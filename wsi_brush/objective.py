"""What a training step minimises: the loss of a batch of scenes, at its windows' points and at its scattered points."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from .condition import ConditionMap, Setting
from .coordinates import Scenes
from .denoiser import CELL, NODE, Denoiser, node_mass
from .diffusion import Ladder, Objective, coefficients, loss
from .field import mollifier, mollifier_radius
from .operators import Scatter
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

    Both estimate the scenes' mean loss without bias, so any mixture of them does. Scenes, weights and generator are on
    one device.
    """
    image, device = scenes.images, scenes.images.device
    n, _, size, _ = image.shape
    sigma = draw_sigma(ladder, scenes.mpp, n, drawing, generator)
    wide = sigma[:, None, None, None]
    noisy = image + wide * torch.randn(image.shape, generator=generator, device=device)
    given = noisy * coefficients(wide)[2]
    known = (torch.rand(n, generator=generator, device=device) >= drawing.unconditional).float()
    origin = torch.rand(n, 2, generator=generator, device=device).double() * 8192
    setting = denoiser.setting(sigma, scenes.mpp, conditions(scenes, about), origin=origin, known=known)
    corners = scenes.windows.to(device)
    at_rows, at_columns = (corners[:, axis, None] + torch.arange(scenes.window, device=device) for axis in (0, 1))
    scene = torch.arange(n, device=device)[:, None, None]

    def windows(of: Tensor) -> Tensor:
        return of.permute(0, 2, 3, 1)[scene, at_rows[:, :, None], at_columns[:, None]].permute(0, 3, 1, 2)

    scattered = scenes.weight > 0
    scatter = _scatter(scenes.points) if scattered else None
    values = mollified_at(given, scenes.points, denoiser.config.mollifier) if scattered else given
    window = windows(given)
    grid, tokens = denoiser.layout(
        *_gathered(denoiser, window, corners, setting, size, scatter, values, scenes), setting
    )
    memory = denoiser.memory(tokens, setting)
    said = denoiser.paint(window, setting, grid, memory, corner=(corners[:, 0], corners[:, 1]))
    window = loss(said, windows(image), windows(noisy), wide, objective=drawing.objective).mean()
    if scatter is None:
        return window, window.new_zeros(())
    said = denoiser.paint_points(values, scatter, setting, grid, memory)
    scene, rows, columns = scatter.scene, scatter.rows, scatter.columns
    at = loss(
        said,
        image[scene, :, rows, columns],
        noisy[scene, :, rows, columns],
        sigma[scene][:, None],
        objective=drawing.objective,
    )
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
        standard = (values - mean) / std
        maps.append(ConditionMap(standard * present[..., None], present, corner, cell))
    return maps


def _gathered(
    denoiser: Denoiser, window: Tensor, corners: Tensor, setting: Setting, size: int, scatter: Scatter | None,
    values: Tensor, scenes: Scenes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Node sums and their mass of a batch of scenes, from the windows' cells and the scattered points' cells."""
    n, side = len(window), window.shape[2] // NODE
    count = size // NODE + 1
    own = nodes(denoiser.sketch(window, setting))
    own = torch.cat([own, node_mass(n, side, side).to(own)], -1)
    along = torch.arange(side + 1, device=own.device)
    rows, columns = (corners[:, axis, None] // NODE + along for axis in (0, 1))
    first = torch.arange(n, device=own.device)[:, None] * count
    at = ((first + rows)[:, :, None] * count + columns[:, None]).flatten()
    total = own.new_zeros(n * count * count, own.shape[-1]).index_copy(0, at, own.flatten(0, 2))
    total = total.unflatten(0, (n, count, count))
    if scatter is not None:
        cells = (size**2 - window.shape[2] ** 2) / CELL**2
        occupied = 1 - (1 - 1 / cells) ** scenes.points.shape[1]  # the chance that a cell holds a point
        total = total + denoiser.sketch_points(values, scatter, 1 / occupied, setting, (size, size))
    return total[..., :-1], total[..., -1:]


def mollified_at(image: Tensor, points: Tensor, width: float) -> Tensor:
    """A x at scattered points only: (n, 3, h, w) and (n, k, 2) -> (n k, 3); equals `field.mollify` there."""
    radius, taps = mollifier_radius(width), mollifier(width).to(image.device)
    n, _, h, w = image.shape
    away = torch.arange(-radius, radius + 1, device=image.device)
    rows, columns = points[..., :1] + away, points[..., 1:] + away  # (n, k, taps)
    down, across = ((rows >= 0) & (rows < h)) * taps, ((columns >= 0) & (columns < w)) * taps
    scene = torch.arange(n, device=image.device)[:, None, None, None]
    near = image.permute(0, 2, 3, 1)[scene, rows.clamp(0, h - 1)[..., None], columns.clamp(0, w - 1)[..., None, :]]
    total = torch.einsum("nkijc,nki,nkj->nkc", near, down, across)
    return (total / (down.sum(-1) * across.sum(-1))[..., None]).flatten(0, 1)
