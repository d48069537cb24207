"""Between points and the nodes of a coarse grid: sums of points at nodes, nodes read at points, places as features.

The splat of ∞-Brush's grid level is a partition of unity by hat functions, so that every point is heard; nodes are read
back by bilinear interpolation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operators import rows_of


def interpolate(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear reading of lattices (n, r, c, channels) at outer products of row and column positions, in cells.

    rows, columns: (n, R) and (n, C), or one row of either for all. Position 0 is the centre of the first cell; beyond
    the outer centres the edge is continued. Returns (n, R, C, channels). Written as two lerps by index, so a value does
    not depend on the window it is read in.
    """
    n, height, width, _ = table.shape
    low, high, weight = _bracket(rows.expand(n, -1), height)
    first, flat = height * torch.arange(n, device=rows.device)[:, None], table.flatten(0, 1)
    table = torch.lerp(rows_of(flat, first + low), rows_of(flat, first + high), weight[..., None, None])
    low, high, weight = _bracket(columns.expand(n, -1)[:, None], width)
    first = width * torch.arange(table.shape[0] * table.shape[1], device=rows.device).view(n, -1, 1)
    flat = table.flatten(0, 2)
    return torch.lerp(rows_of(flat, first + low), rows_of(flat, first + high), weight[..., None])


def interpolate_at(table: Tensor, rows: Tensor, columns: Tensor, scene: Tensor) -> Tensor:
    """`interpolate` at paired positions, each on the lattice of its `scene`: (points, channels)."""
    _, height, width, _ = table.shape
    top, bottom, down = _bracket(rows, height)
    left, right, across = _bracket(columns, width)
    flat, upper, lower = table.flatten(0, 2), (scene * height + top) * width, (scene * height + bottom) * width
    first = torch.lerp(rows_of(flat, upper + left), rows_of(flat, lower + left), down[:, None])
    second = torch.lerp(rows_of(flat, upper + right), rows_of(flat, lower + right), down[:, None])
    return torch.lerp(first, second, across[:, None])


def _bracket(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    position = position.clamp(0, length - 1)
    low = position.floor().long().clamp_max(max(length - 2, 0))
    return low, (low + 1).clamp_max(length - 1), (position - low).to(torch.float32)


def splat(u: Tensor, cells: int) -> Tensor:
    """A lattice as contributions to the nodes of a coarse grid, one node every `cells` cells, at the blocks' corners.

    Partition of unity by hat functions. Each block of cells x cells reaches its own four corners only, so this is also
    the canonical order of addition: tiles write their blocks, `nodes` adds them. (n, rows, columns, c) ->
    (n, rows / cells, columns / cells, 4, c), corners in raster order.
    """
    n, rows, columns, c = u.shape
    sides = []
    for side in (0, 1):  # towards the upper corners, towards the lower ones
        blocks = u.reshape(n, rows // cells, cells, columns, c)
        sides.append(_hat(blocks.unbind(2), side).reshape(n, rows // cells, columns // cells, cells, c))
    return torch.stack([_hat(half.unbind(3), side) for half in sides for side in (0, 1)], 3)


def _hat(parts: tuple[Tensor, ...], side: int) -> Tensor:
    """The parts of a block weighted by a hat around its near (0) or far (1) end, added in order."""
    total = torch.zeros_like(parts[0])
    for index, part in enumerate(parts):
        towards = (index + 0.5) / len(parts)
        total = torch.add(total, part, alpha=towards if side else 1 - towards)
    return total


def nodes(blocks: Tensor) -> Tensor:
    """Sum the blocks' contributions at the shared corners: (n, r, c, 4, channels) -> (n, r + 1, c + 1, channels)."""
    n, r, c, _, channels = blocks.shape
    total = blocks.new_zeros(n, r + 1, c + 1, channels)
    for corner in range(4):
        down, right = divmod(corner, 2)
        total[:, down : down + r, right : right + c] += blocks[:, :, :, corner]
    return total


def splat_at(u: Tensor, rows: Tensor, columns: Tensor, *, scene: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`nodes(splat(...))` for scattered points at `rows`, `columns` in node units: (n, rows, columns, c) of `shape`."""
    total = u.new_zeros(shape[0] * shape[1] * shape[2], u.shape[-1])
    for down in (0, 1):
        for right in (0, 1):
            row, column = rows.floor().long() + down, columns.floor().long() + right
            weight = (1 - (rows - row).abs()) * (1 - (columns - column).abs())
            index = (scene.long() * shape[1] + row) * shape[2] + column
            total = total.index_add(0, index, u * weight.to(u.dtype)[:, None])
    return total.reshape(*shape, -1)


def positional(rows: Tensor, columns: Tensor, *, shortest: float = 32.0, octaves: int = 9) -> Tensor:
    """Sines and cosines of a place in µm, wavelengths `shortest` x 2^k: (..., 4 octaves)."""
    waves = 2 * math.pi / (shortest * 2.0 ** torch.arange(octaves, dtype=torch.float64, device=rows.device))
    angles = torch.cat([rows.double()[..., None] * waves, columns.double()[..., None] * waves], -1)
    return torch.cat([angles.sin(), angles.cos()], -1).float()
