"""Whether a loaded encoder is the one that its name promises: it is run on a made tile.

Shape and finite numbers are always asked; where `zoo.toml` has a golden vector (the first 8 numbers and the length),
direction and length are held against it, with a tolerance: other machines, batches and libraries round otherwise
(prov-gigapath#108), so equal bits are never asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .encoder import Encoder
from .zoo import find

SHOWN = 8
COSINE, LENGTH = 0.999, 0.01
"""The least cosine of the shown numbers, and the most relative difference of the vector's length."""


@dataclass(frozen=True)
class Trial:
    """What came of it. `golden`: agrees, differs or none known. `problem`: one line, None where all is well."""

    name: str
    tile: int
    dim: int
    fingerprint: str
    head: tuple[float, ...]
    length: float
    golden: Literal["agrees", "differs", "none known"]
    problem: str | None


def made_tile(side: int) -> NDArray[np.uint8]:
    """A square that every machine makes alike: purple discs on pink, by whole numbers. (side, side, 3)."""
    rows, columns = np.mgrid[:side, :side].astype(np.int64)
    cell_row, cell_column = rows // 16, columns // 16
    hashed = (cell_row * 7919 + cell_column * 104729 + 12345) * 2654435761 % 2**32
    top, left, reach = (hashed >> 8) % 7, (hashed >> 16) % 7, 3 + (hashed >> 24) % 4
    inside = (rows % 16 - 4 - top) ** 2 + (columns % 16 - 4 - left) ** 2 < reach**2
    grain = (rows * rows + 3 * rows * columns + 7 * columns) % 17
    pink, purple = np.array([228, 160, 196]), np.array([104, 62, 140])
    colours = np.where(inside[..., None], purple, pink) + grain[..., None]
    return np.asarray(colours, np.uint8)


def verify(encoder: Encoder) -> Trial:
    """Run an encoder on the made tile."""
    (vector,) = encoder(made_tile(encoder.tile)[None]).astype(np.float64)
    head, length = vector[:SHOWN], float(np.linalg.norm(vector))
    entry = find(encoder.name)
    expected = None if entry is None else entry.golden
    golden: Literal["agrees", "differs", "none known"] = "none known"
    problem = None
    if not np.isfinite(vector).all():
        problem = f"{encoder.name}: gives numbers that are not finite on the made tile"
    elif not vector.any():
        problem = f"{encoder.name}: gives nothing but zeros on the made tile"
    elif expected is not None:
        values = np.asarray(expected["head"], np.float64)
        cosine = float(head @ values / max(np.linalg.norm(head) * np.linalg.norm(values), 1e-12))
        golden = "agrees"
        if cosine < COSINE or abs(length / expected["length"] - 1) > LENGTH:
            golden = "differs"
            problem = (
                f"{encoder.name}: its vector of the made tile differs from the golden one (cosine {cosine:.4f}, length "
                f"{length:.4g} for {expected['length']:.4g}); these are other weights, or they are used otherwise"
            )
    shown = tuple(round(float(value), 5) for value in head) if np.isfinite(head).all() else ()
    return Trial(
        encoder.name, encoder.tile, encoder.dim, encoder.fingerprint, shown,
        round(length, 5) if np.isfinite(length) else 0.0, golden, problem,
    )  # fmt: skip
