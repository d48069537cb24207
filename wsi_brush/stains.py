"""The same slide as another laboratory would have stained it.

How long a section lay in each stain, how thick it is and whose dyes they were move the colours of a whole slide
together. By the law of Beer and Lambert each stain adds to the optical density, so all that is one matrix there:
densities are unmixed by the vectors of Ruifrok & Johnston (2001), each stain is scaled (after Tellez et al., 2019), and
they are mixed by vectors that are a little turned. White stays white.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grid import Grid
from .slide import Slide

VECTORS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
"""Optical density of haematoxylin, eosin and DAB in red, green and blue, of length 1 each."""
_FACTOR = (1.6, 1.6, 1.3)  # up to so many times denser or paler; the third is what two stains leave
_TURN = 0.07  # spread of what is added to each number of a vector of length 1, which turns it by about 5 degrees
_BAND = 1 << 20  # pixels that are worked on at once: 36 bytes each

_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)

Mix = tuple[tuple[float, float, float], ...]
"""What makes optical densities (red, green, blue) of others: three rows."""


def draw_stain(generator: np.random.Generator) -> Mix:
    """The way to another stain, at random."""
    factor = np.exp(np.log(_FACTOR) * generator.uniform(-1, 1, 3))
    other = np.abs(VECTORS + generator.normal(0, _TURN, (3, 3)))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    found = other.T @ np.diag(factor) @ np.linalg.inv(VECTORS.T)
    return tuple((float(red), float(green), float(blue)) for red, green, blue in found)


def restained(pixels: NDArray[np.uint8], mix: Mix) -> NDArray[np.uint8]:
    """Pixels (..., 3) whose optical densities, -ln((value + 1) / 256), are multiplied by `mix`: uint8 of that shape."""
    given, turned = pixels.reshape(-1, 3), np.asarray(mix, np.float32).T
    found = np.empty(given.shape, np.uint8)
    for start in range(0, len(given), _BAND):
        light = np.exp(-(_DENSITY[given[start : start + _BAND]] @ turned))
        found[start : start + _BAND] = np.clip(np.rint(256 * light - 1), 0, 255)
    return found.reshape(pixels.shape)


@dataclass(frozen=True)
class _Restained(Slide):
    """See `in_stain`."""

    mix: Mix = field(kw_only=True)

    def read(self, grid: Grid) -> NDArray[np.uint8]:
        return restained(super().read(grid), self.mix)


def in_stain(slide: Slide, mix: Mix) -> Slide:
    """A slide, as it was opened, that is read in another stain. It is for this process: `reading` opens the file anew
    elsewhere, unstained."""
    same: dict[str, Any] = {one.name: getattr(slide, one.name) for one in fields(Slide) if one.init}
    return _Restained(**same, mix=mix)
