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

    def in_cells(self, rows: Tensor, columns: Tensor, scene: int) -> tuple[Tensor, Tensor]:
        """Pixels of a scene as positions on the lattice, 0 at the first cell's centre."""
        corner = self.corner[scene]
        return (rows - corner[0]) / self.cell - 0.5, (columns - corner[1]) / self.cell - 0.5


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
        """`read_scene` of every scene: (n, len(rows), len(columns), channels)."""
        return torch.stack([self.read_scene(rows, columns, scene) for scene in range(len(self.signal))])

    def read_scene(self, rows: Tensor, columns: Tensor, scene: int) -> Tensor:
        """The sum of the embeddings at the outer product of rows and columns, in pixels."""
        total = torch.zeros(len(rows), len(columns), self.tables[0].shape[-1], device=rows.device)
        for table, lattice in zip(self.tables, self.maps, strict=True):
            total = total + interpolate(table[scene], *lattice.in_cells(rows, columns, scene))
        return total

    def read_points(self, rows: Tensor, columns: Tensor, scene: int) -> Tensor:
        """The same at paired rows and columns: (points, channels)."""
        found = [
            interpolate_at(table[scene], *lattice.in_cells(rows, columns, scene))
            for table, lattice in zip(self.tables, self.maps, strict=True)
        ]
        return torch.as_tensor(sum(found))

    def places(self, rows: Tensor, columns: Tensor, scene: int) -> Tensor:
        """Positional features at the outer product of rows and columns, in pixels: (rows, columns, PLACES)."""
        return self.places_of_points(rows[:, None] + 0 * columns, 0 * rows[:, None] + columns, scene)

    def places_of_points(self, rows: Tensor, columns: Tensor, scene: int) -> Tensor:
        """Positional features of paired rows and columns: (..., PLACES)."""
        return positional(
            self.origin[scene, 0] + rows.double() * self.mpp, self.origin[scene, 1] + columns.double() * self.mpp
        )
