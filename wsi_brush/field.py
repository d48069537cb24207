"""Noise that is a function, read by address.

A value of the field is a pure function of (seed, stream, channel, row, column): any window, order,
process or machine draws the same integers, so tiles may be painted in any order, resumed, or painted
again one at a time. White noise on a lattice of pitch `mpp` stands for the state that is stored; the
noise of the paper, A ξ with A a truncated Gaussian, is `mollify` of it, read beyond the border so
that it is stationary up to the edge (no reflecting transform, which doubles the variance there).

Counter-based generation: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); the
mixing function is SplitMix64's (Steele, Lea and Flood, 2014), in 64-bit integers that wrap alike on
CPU and GPU; normals by Box and Muller (1958) in float64, rounded once to float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from .grid import Grid

_TRUNCATION = 4.0  # radius of A in standard deviations: 6e-5 of its mass lies outside


@dataclass(frozen=True)
class NoiseField:
    """White Gaussian noise of unit variance on every lattice of the plane; of seeds (n,), n such fields."""

    seed: int | Tensor
    channels: int = 3

    def read(self, grid: Grid, *, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """The noise at the grid's pixels, (channels, height, width), float32, of one seed.

        `stream` separates the uses of one seed: the start, the details of each level, a step.
        """
        rows = torch.arange(grid.top, grid.bottom, dtype=torch.int64, device=device)
        columns = torch.arange(grid.left, grid.right, dtype=torch.int64, device=device)
        return torch.stack(self._planes(rows[:, None], columns, stream))

    def read_at(self, rows: Tensor, columns: Tensor, *, stream: int = 0) -> Tensor:
        """The same noise at any places, integers that broadcast to (...): (..., channels).

        Of seeds (n,) the places are (n, ...), each field's own.
        """
        return torch.stack(self._planes(rows, columns, stream), -1)

    def _planes(self, rows: Tensor, columns: Tensor, stream: int) -> list[Tensor]:
        planes = []
        for channel in range(self.channels):
            key: int | Tensor
            if isinstance(self.seed, Tensor):
                key = _mix(_mix(_mix(self.seed) + stream) + channel).view(-1, *(1,) * (rows.ndim - 1))
            else:
                key = int(_mix(_mix(_mix(torch.tensor(self.seed)) + stream) + channel))  # here: no device is waited for
            planes.append(_normal(_mix(_mix(key + rows * _ODD_ROW) + columns * _ODD_COLUMN)))
        return planes

    def read_mollified(
        self, grid: Grid, *, width: float, stream: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:  # fmt: skip
        """A ξ at the grid's pixels, (channels, height, width): stationary up to the border.

        `width` is the standard deviation of A in pixels.
        """
        margin = mollifier_radius(width)
        white = self.read(grid.pad(margin), stream=stream, device=device)
        smooth = mollify(white[None], width)[0]
        return smooth[:, margin : margin + grid.height, margin : margin + grid.width]


def mollifier_radius(width: float) -> int:
    """Pixels that A reaches to either side."""
    return math.ceil(_TRUNCATION * width) if width > 0 else 0


def mollifier(width: float, *, device: torch.device | str = "cpu") -> Tensor:
    """The one-dimensional weights of A, a truncated Gaussian of standard deviation `width` pixels; their sum is 1."""
    return torch.tensor(_taps(width), dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _taps(width: float) -> tuple[float, ...]:
    """As numbers: read from a GPU at every tile they would be waited for."""
    radius = mollifier_radius(width)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / width) ** 2) if width > 0 else torch.ones(1, dtype=torch.float64)
    return tuple((taps / taps.sum()).to(torch.float32).tolist())


def mollify(image: Tensor, width: float) -> Tensor:
    """A applied to (n, c, h, w): a mean over the present neighbours, so that it needs nothing from beyond an edge.

    Taps are added one by one in a fixed order: a pixel's value does not depend on the window it is read in.
    """
    radius = mollifier_radius(width)
    if radius == 0:
        return image
    taps = _taps(width)
    whole = sum(taps)
    for axis in (2, 3):
        pads = (0, 0, radius, radius) if axis == 2 else (radius, radius)
        length = image.shape[axis]
        padded = functional.pad(image, pads)
        total = torch.zeros_like(image)
        for offset, tap in enumerate(taps):
            total.add_(padded.narrow(axis, offset, length), alpha=tap)
        here = functional.pad(torch.ones(length, dtype=torch.float64, device=image.device), (radius, radius))
        mass = sum(tap * here[offset : offset + length] for offset, tap in enumerate(taps))
        scale = torch.as_tensor(whole / mass).to(image.dtype)
        image = total * (scale[:, None] if axis == 2 else scale)
    return image


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_ODD_ROW = _signed(0x9E3779B97F4A7C15)
_ODD_COLUMN = _signed(0xD1B54A32D192ED03)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(bits: Tensor, by: int) -> Tensor:
    """A logical right shift; the integers are signed, so the sign's copies are masked off."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = bits + _ODD_ROW
    bits = (bits ^ _shift(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shift(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shift(bits, 31)


def _normal(bits: Tensor) -> Tensor:
    """One standard normal from each 64 bits: 32 for the radius, 32 for the angle."""
    radius = (_shift(bits, 32).double() + 0.5) * 2.0**-32
    angle = (bits & 0xFFFFFFFF).double() * (2.0 * math.pi * 2.0**-32)
    return (torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(angle)).float()
