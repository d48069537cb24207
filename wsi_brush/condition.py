"""What a scene shows: embeddings of several pitches as functions on it, and as sets of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .splat import interpolate, interpolate_at, positional

PLACES = 36  # positional features


@dataclass(frozen=True)
class ConditionMap:
    """Embeddings of one pitch for a batch of scenes, in the scenes' own pixels.

    values: (n, rows, columns, dim), zeros where absent; present: (n, rows, columns), 0 or 1; corner: (n, 2) row and
    column of the first cell's outer corner in pixels; cell: side of a cell in pixels.
    """

    values: Tensor
    present: Tensor
    corner: Tensor
    cell: float

    def centres(self) -> tuple[Tensor, Tensor]:
        """Rows (n, rows) and columns (n, columns) of the cells' centres, pixels."""
        rows, columns = (torch.arange(size, device=self.corner.device) + 0.5 for size in self.values.shape[1:3])
        return self.corner[:, :1] + rows * self.cell, self.corner[:, 1:] + columns * self.cell

    def in_cells(self, rows: Tensor, columns: Tensor, scene: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels as positions on the lattice, 0 at the first cell's centre: (n or 1, ...) of every scene, or each of
        its own `scene`."""
        top, left = _axes(self.corner, rows, scene)
        return (rows - top) / self.cell - 0.5, (columns - left) / self.cell - 0.5


@dataclass(frozen=True)
class Setting:
    """All that does not change within one evaluation: noise level, pitch, where the scene lies, what it shows.

    signal: (n, signal); mpp: µm per pixel; origin: (n, 2) µm of the scenes' corner; tables: per set the projected
    embeddings (n, rows, columns, channels); maps: where they lie; memory: sums of the sets for the cross-attention.
    """

    signal: Tensor
    mpp: float
    origin: Tensor
    tables: list[Tensor]
    maps: list[ConditionMap]
    memory: list[Tensor]

    def read(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The sum of the embeddings at outer products of rows (n or 1, R) and columns (n or 1, C), in pixels:
        (n, R, C, channels)."""
        read = zip(self.tables, self.maps, strict=True)
        return torch.as_tensor(sum(interpolate(table, *lattice.in_cells(rows, columns)) for table, lattice in read))

    def read_points(self, rows: Tensor, columns: Tensor, scene: Tensor) -> Tensor:
        """The same at paired rows and columns, each of its own scene: (points, channels)."""
        read = zip(self.tables, self.maps, strict=True)
        return torch.as_tensor(
            sum(interpolate_at(table, *lattice.in_cells(rows, columns, scene), scene) for table, lattice in read)
        )

    def places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Positional features at outer products of rows (n or 1, R) and columns (n or 1, C): (n, R, C, PLACES)."""
        rows, columns = rows[:, :, None], columns[:, None]
        return self.places_of_points(rows + 0 * columns, 0 * rows + columns)

    def places_of_points(self, rows: Tensor, columns: Tensor, scene: Tensor | None = None) -> Tensor:
        """Positional features of paired rows and columns, as `ConditionMap.in_cells` takes them: (..., PLACES)."""
        top, left = _axes(self.origin, rows, scene)
        return positional(top + rows.double() * self.mpp, left + columns.double() * self.mpp)


def _axes(corner: Tensor, rows: Tensor, scene: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two parts of corners (n, 2), shaped so that they go with `rows` of every scene, or of each its own."""
    corner = (corner if scene is None else corner[scene]).reshape(-1, *[1] * (rows.ndim - 1), 2)
    return corner[..., 0], corner[..., 1]
