"""The levels of a TIFF that are nothing but JPEGs side by side, decoded into the picture that is asked for.

OpenSlide draws every tile on a canvas, from which the colours must be taken again: four times the work of decoding it
(measured, see tests/benchmarks). Where a level is so plain that the detour changes no pixel, it is spared. All else is
left to the reader: other vendors and codecs, a tile that is missing, and one whose JPEG is in any way damaged, so that
one library alone says what damage is. The first tile read of each level is read both ways, and must be the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .readers import DAMAGE, Level, Reader

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it finds odd in a header others judge

_JPEG, _UPRIGHT = 7, 1  # values of TIFF's tags
_START, _END = b"\xff\xd8", b"\xff\xd9"
# By what the page says of colours: a marker that makes a JPEG say the same (Adobe's, of numbers that are RGB already),
# and what it must say then.
_COLOURS = {2: (b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00", "RGB"), 6: (b"", "YCbCr")}
_KEPT = 32 << 20  # bytes of tiles that reach into the next window, as OpenSlide keeps


class JpegDecoder:
    """Reads as `reader` does, and the same pixels, sooner where a level is plain JPEGs. It owns the reader."""

    def __init__(self, reader: Reader, path: Path) -> None:
        self._reader = reader
        self._plain = _plain_levels(path, reader.levels) if reader.plain else {}
        self._compared: set[int] = set()

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """As `Reader.read`."""
        tiles = self._plain.get(level.number)
        pixels = None if tiles is None else tiles.read(top, left, height, width)
        if tiles is None or pixels is None:
            return self._reader.read(level, top, left, height, width)
        if level.number not in self._compared:
            place = tiles.around(top, left)
            direct = tiles.read(*place)
            if direct is None or not np.array_equal(direct, self._reader.read(level, *place)):
                self._plain.pop(level.number).file.close()
                return self._reader.read(level, top, left, height, width)
            self._compared.add(level.number)
        return pixels

    def close(self) -> None:
        """Give the file back."""
        self._reader.close()
        for tiles in self._plain.values():
            tiles.file.close()

    def __del__(self) -> None:
        for tiles in getattr(self, "_plain", {}).values():
            tiles.file.close()


@dataclass
class _Tiles:
    """A level of `shape` in JPEGs of `side` (height, width), row by row: where each stands in the file, its bytes, and
    what every one begins with."""

    file: FileIO
    shape: tuple[int, int]
    side: tuple[int, int]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    head: bytes
    colours: str
    _kept: OrderedDict[int, NDArray[np.uint8]] = field(default_factory=OrderedDict)

    def around(self, top: int, left: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the tile that has this pixel."""
        tall, broad = self.side
        top, left = top // tall * tall, left // broad * broad
        return top, left, min(tall, self.shape[0] - top), min(broad, self.shape[1] - left)

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8] | None:
        """(height, width, 3) from inside the level, or None if a tile of it is not a whole JPEG as it should be."""
        tall, broad = self.side
        out = np.empty((height, width, 3), np.uint8)
        across = -(-self.shape[1] // broad)
        for y in range(top // tall * tall - top, height, tall):
            for x in range(left // broad * broad - left, width, broad):
                number = (top + y) // tall * across + (left + x) // broad
                bottom, right = min(y + tall, self.shape[0] - top), min(x + broad, self.shape[1] - left)
                tile = self._tile(number, keep=y < 0 or x < 0 or bottom > height or right > width)
                if tile is None:
                    return None
                part = tile[max(-y, 0) : height - y, max(-x, 0) : width - x]
                out[max(y, 0) : y + tall, max(x, 0) : x + broad] = part
        return out

    def _tile(self, number: int, *, keep: bool) -> NDArray[np.uint8] | None:
        from simplejpeg import decode_jpeg, decode_jpeg_header

        if number in self._kept:
            return self._kept[number]
        try:
            self.file.seek(int(self.places[number]))
            data = self.file.read(int(self.sizes[number]))
            if not data.startswith(_START):
                return None
            data = self.head + data[len(_START) :]
            if decode_jpeg_header(data)[:3] != (*self.side, self.colours):
                return None
            tile: NDArray[np.uint8] = decode_jpeg(data, "RGB", strict=True)
        except (OSError, ValueError):  # the reader will find it too, and say so
            return None
        if keep:
            self._kept[number] = tile
            if len(self._kept) * tile.nbytes > _KEPT:
                self._kept.popitem(last=False)
        return tile


def _plain_levels(path: Path, levels: tuple[Level, ...]) -> dict[int, _Tiles]:
    """The levels that are one page of the file, and no other, which is a lattice of JPEGs; by number."""
    import tifffile

    found = {}
    with contextlib.suppress(*DAMAGE), tifffile.TiffFile(path) as tiff:
        pages = list(_pages(tiff.pages))
        for level in levels:
            same = [page for page in pages if page.is_tiled and page.shape[:2] == (level.height, level.width)]
            if len(same) == 1 and (tiles := _tiles_of(same[0], path)):
                found[level.number] = tiles
    return found


def _pages(pages: Any) -> Iterator[Any]:
    """All pages of a TIFF, those in SubIFDs after the page that has them."""
    for page in pages:
        yield page
        yield from _pages(getattr(page, "pages", None) or ())


def _tiles_of(page: Any, path: Path) -> _Tiles | None:
    """The tiles of a page, if it is 8 bits of RGB, upright, and JPEG."""
    orientation = page.tags.get("Orientation")
    if (
        int(page.compression) != _JPEG
        or int(page.photometric) not in _COLOURS
        or (page.samplesperpixel, int(page.planarconfig), page.bitspersample) != (3, 1, 8)
        or (orientation is not None and int(orientation.value) != _UPRIGHT)
    ):
        return None
    places, sizes = (np.array(numbers, np.int64) for numbers in (page.dataoffsets, page.databytecounts))
    side = (page.tilelength, page.tilewidth)
    if len(places) != len(sizes) or len(places) < -(-page.imagelength // side[0]) * -(-page.imagewidth // side[1]):
        return None
    marker, colours = _COLOURS[int(page.photometric)]
    head = _START + marker + (page.jpegtables or b"").removeprefix(_START).removesuffix(_END)
    return _Tiles(path.open("rb", buffering=0), page.shape[:2], side, places, sizes, head, colours)
