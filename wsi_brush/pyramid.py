"""Pyramid: an OME-Zarr 0.5 slide being written.

The painted pixels stand at path `0`, every further level is the 2 x 2 mean of the one below. The
shard is the unit of writing: two writers inside one shard lose each other's pixels without a word,
so parts that are not whole shards are refused. Background is written as well (a shard that is not
there was never painted), and the `ome` attributes come last, when every level is complete.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from .grid import Grid

CHUNK = 512
SHARD = 2048
SMALLEST = 256
WHITE = 255


class Pyramid:
    """An RGB slide of the pixels of `grid`, written into the empty folder `stage`.

    `stage` comes from `commit.staged(target, kind="pyramid", ...)`, which makes the finished slide
    appear. `about` (JSON values: brush sha256, encoder, seed, steps, guidance, versions) stands as
    attribute `wsi_brush` on the root and on every level, always with ``"synthetic": true``. What it
    may hold is the caller's allow-list; nothing else of the reference slide gets here.

    A pyramid can be pickled: several processes may `write` different parts, then one calls `finish`.

    Raises:
        ValueError: if `grid` has no pixels.
    """

    def __init__(self, stage: Path, grid: Grid, *, about: dict[str, Any]) -> None:
        if not (grid.height and grid.width):
            raise ValueError(f"a pyramid needs at least one pixel, not {grid.height} x {grid.width}")
        self.grid = grid
        self.about = {**about, "synthetic": True}
        self._stage = stage
        self._root = zarr.create_group(stage, zarr_format=3, attributes={"wsi_brush": self.about})
        self._levels = [self._create(number, shape) for number, shape in enumerate(_shapes(grid.shape))]

    @property
    def shard(self) -> tuple[int, int]:
        """(height, width) in pixels of what one writer owns at level 0, at most `SHARD` each."""
        return _shard(self.grid.shape)

    def write(self, part: Grid, pixels: NDArray[np.uint8]) -> None:
        """Write `pixels` (h, w, 3) where `part` lies at level 0.

        `grid.tiles(SHARD)` are always right parts, in any order.

        Raises:
            ValueError: if `part` is not inside the grid or cuts a shard, or `pixels` do not fit it.
        """
        rows, columns = part.within(self.grid)
        for edge, size, shard in zip((rows, columns), self.grid.shape, self.shard, strict=True):
            if edge.start % shard or (edge.stop % shard and edge.stop != size):
                raise ValueError(f"{part} cuts a shard of {self.shard} pixels counted from the corner of {self.grid}")
        if pixels.dtype != np.uint8 or pixels.shape != (*part.shape, 3):
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 {(*part.shape, 3)}")
        self._levels[0][:, rows, columns] = np.moveaxis(pixels, -1, 0)

    def finish(self) -> None:
        """Build the coarser levels from the level below, a shard at a time, then say what it all is.

        Raises:
            ValueError: if a part of level 0 was never written.
        """
        missing = [part for part in self.grid.tiles(SHARD) if not self._written(part)]
        if missing:
            raise ValueError(f"{len(missing)} shards were never written, the first at {missing[0]}")
        for fine, coarse in itertools.pairwise(self._levels):
            for rows, columns in _shards(coarse.shape[1:]):
                wide = slice(2 * columns.start, 2 * columns.stop)
                strips = [
                    _halved(np.asarray(fine[:, 2 * top : 2 * min(top + CHUNK, rows.stop), wide]))
                    for top in range(rows.start, rows.stop, CHUNK)
                ]
                coarse[:, rows, columns] = np.concatenate(strips, axis=1)
        self._root.attrs["ome"] = self._ome()

    def _create(self, number: int, shape: tuple[int, int]) -> zarr.Array[Any]:
        return self._root.create_array(
            str(number),
            shape=(3, *shape),
            dtype="uint8",
            chunks=(3, *(min(CHUNK, size) for size in shape)),
            shards=(3, *_shard(shape)),
            compressors=ZstdCodec(level=3, checksum=True),
            fill_value=WHITE,
            dimension_names=["c", "y", "x"],
            attributes={"wsi_brush": self.about},
            config={"write_empty_chunks": True},
        )

    def _written(self, part: Grid) -> bool:
        """Whether the shard at the corner of `part` is there; white shards are."""
        row, column = (edge.start // shard for edge, shard in zip(part.within(self.grid), self.shard, strict=True))
        return (self._stage / "0" / "c" / "0" / str(row) / str(column)).is_file()

    def _ome(self) -> dict[str, Any]:
        """The `ome` attributes of version 0.5: what axes, levels and channels are, in µm."""
        space = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
        return {
            "version": "0.5",
            "multiscales": [
                {
                    "name": "synthetic",
                    "axes": [{"name": "c", "type": "channel"}, *space],
                    "datasets": [self._dataset(number) for number in range(len(self._levels))],
                    "type": "mean",
                    "metadata": {"description": "2x2 mean, rounded half to even"},
                }
            ],
            "omero": {
                "channels": [
                    _channel("Red", "FF0000"),
                    _channel("Green", "00FF00"),
                    _channel("Blue", "0000FF"),
                ],
                "rdefs": {"model": "color", "defaultT": 0, "defaultZ": 0},
            },
        }

    def _dataset(self, number: int) -> dict[str, Any]:
        """Level `number`: its pitch, and how far its first pixel's centre lies from the reference slide's first."""
        mpp, shift = self.grid.mpp, (2**number - 1) / 2
        offset = [(self.grid.top + shift) * mpp, (self.grid.left + shift) * mpp]
        return {
            "path": str(number),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, mpp * 2**number, mpp * 2**number]},
                {"type": "translation", "translation": [0.0, *offset]},
            ],
        }


def _channel(label: str, color: str) -> dict[str, Any]:
    return {
        "label": label,
        "color": color,
        "active": True,
        "coefficient": 1,
        "family": "linear",
        "inverted": False,
        "window": {"min": 0, "max": 255, "start": 0, "end": 255},
    }


def _shapes(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(height, width) of the levels, finest first, down to `SMALLEST` on the longer side."""
    yield shape
    while max(shape) > SMALLEST:
        shape = (shape[0] + 1) // 2, (shape[1] + 1) // 2
        yield shape


def _shard(shape: tuple[int, int]) -> tuple[int, int]:
    """The shard of a level of this shape: whole chunks, and no more of them than the level needs."""
    height, width = (min(SHARD, size if size <= CHUNK else math.ceil(size / CHUNK) * CHUNK) for size in shape)
    return height, width


def _shards(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """The shards of a level of (height, width) `shape`, as slices that end at the level's edge."""
    height, width = shape
    for top in range(0, height, SHARD):
        for left in range(0, width, SHARD):
            yield slice(top, min(top + SHARD, height)), slice(left, min(left + SHARD, width))


def _halved(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 2 x 2 mean of (3, h, w), rounded half to even; an odd last row or column stands for two.

    Others truncate, which darkens the slide a little with every level.
    """
    _, height, width = pixels.shape
    even = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge").astype(np.uint16)
    total = even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]
    return np.rint(total / np.float32(4)).astype(np.uint8)
