"""The diffusion of ∞-Diff and ∞-Brush: mollified images, mollified noise, scattered points, and a Wiener read-out.

The state is u = A u_0 + σ A ξ with A a truncated Gaussian and white ξ; the network says A ξ at the points it is given.
What is left after the last step is A u_0, and is divided by A's response g as g / (g² + 0.05²).

Noise levels are the cosine schedule of Nichol and Dhariwal (2021) with 1000 times, as both papers train and sample, and
not this project's ladder, which is part of what they are compared with; it is cut to the ladder's range of σ, since the
first of DDIM's steps would else lead from σ = 20,000 to 32 at once.

Departures: A is normalised by the present neighbours at a border, and the noise of a painting is read beyond it, where
theirs reflects and has twice the variance there; places are in µm, so that a canvas may be larger than the scenes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..condition import ConditionMap
from ..diffusion import SIGMA_DATA, Ladder
from ..field import NoiseField, mollifier, mollifier_radius
from ..grid import Grid
from ..objective import Drawing, conditions, mollified_at
from ..progress import Tell, Told
from ..scenes import Scenes, square
from . import System
from .points import Domain

Weighting = Literal["plain", "theorem1"]
TIMES = 1000
NOISE_TO_SIGNAL = 0.05
"""Of the Wiener filter: below this response frequencies are given up."""
_STATE = 24  # numbers a pixel beside features: state, input, both noises, image, and what is made of them


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule; `kept[t]` is ᾱ_t for t = 0 to TIMES, and only σ from `low` to `high` are used."""

    kept: Tensor
    low: float
    high: float

    @staticmethod
    def within(ladder: Ladder) -> Cosine:
        """Cut to a ladder's range."""
        angle = (torch.arange(TIMES + 1, dtype=torch.float64) / TIMES + 0.008) / 1.008 * math.pi / 2
        shares = (angle.cos() ** 2).clamp_min(0)
        ratios = (shares[1:] / shares[:-1]).clamp_min(0.001)  # β is 0.999 at most
        return Cosine(torch.cat([torch.ones(1).double(), ratios.cumprod(0)]), ladder.sigma_min, ladder.sigma_max)

    @property
    def sigmas(self) -> Tensor:
        """σ_t = √((1 - ᾱ_t) / ᾱ_t)."""
        return ((1 - self.kept) / self.kept).sqrt()

    @property
    def times(self) -> Tensor:
        """The times that are used; never the first, whose posterior has no width."""
        inside = (self.sigmas >= self.low) & (self.sigmas <= self.high)
        inside[:2] = False
        return torch.nonzero(inside).flatten()

    def path(self, steps: int) -> list[float]:
        """Noise levels of so many evaluations, evenly spaced in time, and the end, 0."""
        times = self.times.flip(0)
        places = torch.linspace(0, len(times) - 1, min(steps, len(times))).round().long()
        return [*self.sigmas[times[places]].tolist(), 0.0]

    def theorem1(self, times: Tensor) -> Tensor:
        """λ_t = β_t² / (2 β̃_t (1 - β_t) (1 - ᾱ_t)): ∞-Brush, Theorem 1, with white noise, C = 1, so C^-½ is 1 too.

        With it the squared error of the noise is the divergence of the reverse step from the posterior, where both have
        the covariance β̃_t C. (For the process's own covariance, A C Aᵀ, the error would have to be that of ξ itself,
        before A: at scattered points it cannot be had.)
        """
        kept, before = self.kept[times], self.kept[times - 1]
        beta = 1 - kept / before
        posterior = (1 - before) / (1 - kept) * beta
        return beta**2 / (2 * posterior * (1 - beta) * (1 - kept))


def wiener(image: Tensor, width: float) -> Tensor:
    """A⁻¹ of (c, h, w) where A, of `width` pixels, has left something: g / (g² + 0.05²) of every cosine (DCT-II).

    Exact for the A of `field.mollify` but within its radius of a border.
    """
    from scipy.fft import dctn, idctn

    responses = [_response(side, width) for side in image.shape[1:]]
    gain = responses[0][:, None] * responses[1]
    gain /= gain**2 + NOISE_TO_SIGNAL**2
    found = [idctn(dctn(plane.cpu().numpy(), norm="ortho") * gain, norm="ortho") for plane in image]
    return torch.from_numpy(np.stack(found).astype(np.float32))


@lru_cache(maxsize=16)
def _left(width: float) -> float:
    """The variance that A leaves of white noise."""
    return float((mollifier(width) ** 2).sum()) ** 2


def _response(side: int, width: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What A makes of cos(π k (i + ½) / side), for every k."""
    reach = mollifier_radius(width)
    angles = math.pi / side * torch.arange(side).double()[:, None] * torch.arange(-reach, reach + 1)
    return np.asarray((angles.cos() * mollifier(width).double()).sum(1), np.float32)


def _places(scenes: int, count: int, size: int, seed: int) -> Tensor:
    """Distinct places in squares of `size`, uniform and in raster order, (scenes, count, 2): of a few among many numpy
    draws no permutation of all."""
    rng = np.random.default_rng(seed)
    flat = np.stack([rng.choice(size * size, count, replace=False, shuffle=False) for _ in range(scenes)])
    flat.sort()
    return torch.from_numpy(np.stack(np.divmod(flat, size), -1))


class Mollified(System):
    """What the systems of this kind share; `config` has `width`, `grid`, `node`, `mollifier` and `kernel`."""

    precisions = ("float32",)
    conditional: ClassVar[bool] = True
    weighting: Weighting = "plain"

    @abstractmethod
    def noise(
        self, values: Tensor, domain: Domain, sigma: Tensor, condition: list[ConditionMap], known: Tensor
    ) -> Tensor:
        """A ξ at a domain, (n, rows, columns, 3), from values there of about unit variance; `known` (n,) is 0 where
        the condition is withheld."""
        ...

    def losses(
        self, ladder: Ladder, scenes: Scenes, about: dict[str, Any], drawing: Drawing, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of A ξ at scattered points, and nothing at windows.

        There are as many points as the window and the scattered points of the recipe have together, uniform over the
        scene without repetition.
        """
        n, size, width = len(scenes.windows), scenes.size, self.config.mollifier
        schedule = Cosine.within(ladder)
        drawn = torch.randint(len(schedule.times), (n,), generator=generator)
        times = schedule.times[drawn]
        sigma = schedule.sigmas[times].float()
        field = NoiseField(torch.randint(1 << 62, (n,), generator=generator))
        known = (torch.rand(n, generator=generator) >= drawing.unconditional).float()
        origin = torch.rand(n, 2, generator=generator).double() * 8192
        count = min(size * size, scenes.window**2 + scenes.points.shape[1])
        places = _places(n, count, size, int(torch.randint(1 << 62, (), generator=generator))).to(sigma.device)
        radius = mollifier_radius(width)
        near = square(places - radius, 2 * radius + 1)
        image, noise = (mollified_at(u.read_at(*near), places, size, width) for u in (scenes, field))
        domain = Domain.scattered(places, (size, size), scenes.mpp, origin, side=self.config.kernel)
        values = self._scaled((image + sigma[:, None, None] * noise)[:, :, None], sigma)
        said = self.noise(values, domain, sigma, conditions(scenes, about), known)
        error = ((said[:, :, 0] - noise) ** 2).mean((1, 2))
        if self.weighting == "theorem1":
            error = error * schedule.theorem1(times).float()
        return error.mean(), torch.zeros(())

    def _scaled(self, values: Tensor, sigma: Tensor) -> Tensor:
        """In units of their spread: A leaves white noise the variance that its squared taps sum to."""
        noise = _left(self.config.mollifier)
        return values / (SIGMA_DATA**2 + noise * sigma**2).sqrt()[:, None, None, None]

    def paint(
        self, condition: list[ConditionMap], canvas: Grid, ladder: Ladder, *, seed: int, steps: int, guidance: float,
        tell: Tell | None = None,
    ) -> Tensor:  # fmt: skip
        """DDIM on the mollified state, every u_0 cut to [-1, 1] as in both papers, then the Wiener read-out."""
        area, width = canvas.rounded(self.config.node), self.config.mollifier
        path = Cosine.within(ladder).path(steps)
        device = self.device
        origin = torch.tensor([canvas.extent[:2]], dtype=torch.float64, device=device)
        domain = Domain.lattice(area.shape, canvas.mpp, origin)
        state = NoiseField(seed).read_mollified(area, width=width, device=device).mul_(path[0])
        told = Told(tell, "painting", len(path) - 1)
        for sigma, following in pairwise(path):
            image = (state - sigma * self._guided(state, domain, sigma, condition, guidance)).clamp_(-1, 1)
            state = torch.lerp(image, state, following / sigma)
            told.add()
        return wiener(state[:, : canvas.height, : canvas.width], width)

    def _guided(
        self, state: Tensor, domain: Domain, sigma: float, condition: list[ConditionMap], guidance: float
    ) -> Tensor:
        level = torch.full((1,), sigma, device=state.device)
        values = self._scaled(state.permute(1, 2, 0)[None], level)
        said = self.noise(values, domain, level, condition, torch.ones_like(level))
        if self.conditional and guidance != 1:
            said = torch.lerp(self.noise(values, domain, level, condition, torch.zeros_like(level)), said, guidance)
        return said[0].permute(2, 0, 1)

    def bytes_for(self, canvas: Grid) -> int:
        """Four maps of features over all pixels, and the nodes' features."""
        area, sizes = canvas.rounded(self.config.node), self.config
        pixels = area.height * area.width
        return int(4 * pixels * (4 * sizes.width + _STATE) + 4 * pixels // sizes.node**2 * 16 * sizes.grid)
