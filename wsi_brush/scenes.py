"""What is trained on: scenes, functions that are read where they are needed and nowhere else.

A scene may be of any size: what a training step reads of it is a window and some scattered points. The pixels of all
slides at a pitch are one table, and a scene is an affine map from its places to the table's rows, whichever symmetry it
is turned by, so that a whole batch is read at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """The slides at one pitch: `parts`, an image (h, w, 3) each. Their pixels are the rows of one table, slide after
    slide.

    In memory the images are views of `table`, (pixels, 3); without it they are zarr arrays, read by chunks.
    """

    parts: Sequence[Any]
    table: Tensor | None = None

    @staticmethod
    def of(arrays: Sequence[Any], device: torch.device | None) -> Images:
        """Arrays on disk, left there or read into the memory of a device."""
        if device is None:
            return Images(arrays)
        sizes = [math.prod(array.shape[:2]) for array in arrays]
        table = torch.empty(sum(sizes), 3, dtype=torch.uint8, device=device)
        parts = [part.view(array.shape) for part, array in zip(table.split(sizes), arrays, strict=True)]
        for part, array in zip(parts, arrays, strict=True):
            part.copy_(torch.from_numpy(array[...]))
        return Images(parts, table)

    @cached_property
    def shapes(self) -> NDArray[np.int64]:
        """Height and width of every slide, (slides, 2)."""
        return np.array([part.shape[:2] for part in self.parts], np.int64)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The row of every slide's first pixel, (slides,)."""
        return np.cumsum([0, *self.shapes.prod(1)])[:-1]

    def read(self, rows: Tensor) -> Tensor:
        """Rows of the table, (n, ...), of one slide in each of the n -> (n, ..., 3); the device is that of `rows`."""
        if self.table is None:
            found = torch.from_numpy(np.stack([self._from_disk(one) for one in rows.cpu().numpy()]))
        else:
            found = self.table.index_select(0, rows.flatten().to(self.table.device)).view(*rows.shape, 3)
        return found.to(rows.device)

    def _from_disk(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Each chunk is read once, and then no longer held."""
        slide = int(np.searchsorted(self.starts, rows.flat[0], side="right")) - 1
        image, width = self.parts[slide], self.shapes[slide, 1]
        across = rows.ravel() - self.starts[slide]
        down = across // width
        across -= down * width  # numpy divides by one number fast, and has no such `divmod`
        high, wide = image.chunks[:2]
        chunk = down // high * -(-width // wide) + across // wide
        order = np.argsort(chunk.astype(np.min_scalar_type(chunk.max())), kind="stable")  # small integers: in one pass
        found = np.empty((len(order), 3), np.uint8)
        for some in np.split(order, np.flatnonzero(np.diff(chunk[order])) + 1):
            top, left = down[some[0]] // high * high, across[some[0]] // wide * wide
            found[some] = image[top : top + high, left : left + wide][down[some] - top, across[some] - left]
        return found.reshape(*rows.shape, 3)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes of one pitch: functions on squares of `size` pixels, read where they are needed.

    images: the slides; lines: (n, 3) the row of their table that is a scene's first pixel, and the steps from a pixel
    to the one below it and to the one beside it; maps: by pitch of the embeddings (values (n, r, c, dim) not
    standardised, zeros where absent; present (n, r, c); corner (n, 2) in pixels; cell in pixels); windows: (n, 2)
    corner of the contiguous window of side `window`; points: (n, k, 2) scattered places outside the windows.
    """

    mpp: float
    size: int
    images: Images
    lines: Tensor
    maps: dict[float, tuple[Tensor, Tensor, Tensor, float]]
    windows: Tensor
    window: int
    points: Tensor
    _seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def read_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Pixels in [-1, 1] at any places: integers (n, ...) that broadcast -> (n, ..., 3); beyond an edge, its own."""
        first, down, across = self.lines.view(-1, 3, *(1,) * (rows.ndim - 1)).unbind(1)
        rows, columns = (places.clamp(0, self.size - 1) for places in (rows, columns))
        return self.images.read(first + rows * down + columns * across).float() / 127.5 - 1

    def seen(self, reach: int) -> tuple[Tensor, Tensor]:
        """What the operator is shown: the windows, (n, side, side, 3), and the pixels within `reach` of each scattered
        point, (n, k, 2 reach + 1, 2 reach + 1, 3). Read at once, as both lie in the same chunks, and only once."""
        if reach not in self._seen:
            parts = [square(self.windows, self.window), square(self.points - reach, 2 * reach + 1)]
            shapes = [torch.broadcast_shapes(rows.shape, columns.shape) for rows, columns in parts]
            rows, columns = (
                torch.cat([part[axis].expand(shape).flatten(1) for part, shape in zip(parts, shapes, strict=True)], 1)
                for axis in (0, 1)
            )
            window, around = self.read_at(rows, columns).split([math.prod(shape[1:]) for shape in shapes], 1)
            self._seen[reach] = window.reshape(*shapes[0], 3), around.reshape(*shapes[1], 3)
        return self._seen[reach]

    def whole(self) -> Tensor:
        """All their pixels, (n, 3, size, size)."""
        return self.read_at(*square(self.windows.new_zeros(1, 2), self.size)).permute(0, 3, 1, 2)


def square(corners: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The places of squares at `corners` (..., 2): rows (..., side, 1) and columns (..., 1, side)."""
    along = torch.arange(side, device=corners.device)
    return corners[..., :1, None] + along[:, None], corners[..., 1:, None] + along
