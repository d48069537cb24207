"""Whether a TIFF is whole, and what its first page holds.

OpenSlide and tifffile open a file that was cut in the middle, with fewer levels or with tiles that are
not there. So the directories are walked once, here: every tile and every directory must lie in the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
WIDTHS = {kind: int(code[1]) for kind, code in INTEGERS.items()} | {2: 1, 7: 1, 5: 8, 10: 8, 11: 4, 12: 8}
PRIVATE = 32768  # from here on, tags belong to companies, and what they point to may be anything
WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT, PLANAR = 256, 257, 322, 323, 284
BITS, PHOTOMETRIC, STRIPS, SAMPLES, STRIP_BYTES = 258, 262, 273, 277, 279
TILES, TILE_BYTES, CHILDREN, EXTRA, FORMAT, HAMAMATSU = 324, 325, 330, 338, 339, 65420
READ = {WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT, PLANAR, BITS, PHOTOMETRIC, STRIPS, SAMPLES, STRIP_BYTES}
READ |= {TILES, TILE_BYTES, CHILDREN, EXTRA, FORMAT, HAMAMATSU}
COLOURS = {2, 6}  # RGB, YCbCr
UNSPECIFIED = 0  # of an extra sample: 1 and 2 are alpha
TILE_SIDE, TILE_AREA = 16384, 1 << 26  # pixels; a library makes room for a tile before it sees what is in it
PAGES = 10_000  # more directories than any slide has

Tags = dict[int, NDArray[np.int64]]


class Facts(NamedTuple):
    """What decides which reader may have the file."""

    colour: bool
    """RGB with 8 bits, perhaps with a fourth sample; otherwise grey with 8 bits."""
    tiled: bool
    nested: bool
    """Some levels stand in SubIFDs, where OpenSlide does not look."""
    sparse: bool
    """Some tiles are left out; TiffSlide would paint them black."""
    extra: bool
    """The fourth sample is no alpha but, say, near infrared; OpenSlide would take it for alpha."""


def inspect(path: Path) -> Facts:
    """Walk the directories of a TIFF.

    Raises:
        SlideError: if the file is damaged or cut, or its first page is not RGB or grey with 8 bits.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        big = data[2:4] in (b"+\0", b"\0+")
        try:
            pages = [] if size >= 1 << 32 and not big else list(_pages(data, big))
        except struct.error:  # a place beyond the file
            raise SlideError(
                f"{path}: truncated TIFF, a directory would stand beyond its {size} bytes; copy or download it again"
            ) from None
        except ValueError as error:
            raise SlideError(f"{path}: truncated or damaged TIFF ({error}); copy or download it again") from None
    if not pages or HAMAMATSU in pages[0]:  # NDPI packs 64-bit places into 32-bit tags: left to its reader
        return Facts(colour=True, tiled=True, nested=False, sparse=False, extra=False)
    for tags in pages:
        _gate(path, tags)
    end = max(_end(tags) for tags in pages)
    if end > size:
        raise SlideError(f"{path}: truncated, {size} bytes of at least {end}; copy or download it again")
    return Facts(
        colour=_is_colour(path, pages[0]),
        tiled=TILES in pages[0],
        nested=CHILDREN in pages[0],
        sparse=any((tags.get(TILE_BYTES, np.ones(1)) == 0).any() for tags in pages),
        extra=EXTRA in pages[0] and int(pages[0][EXTRA][0]) == UNSPECIFIED,
    )


def _pages(data: mmap.mmap, big: bool) -> Iterator[Tags]:
    """The tags of every directory, those in SubIFDs of a page right after it."""
    order = "<" if data[:2] == b"II" else ">"
    waiting = [struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]]
    seen: set[int] = set()
    inside: set[int] = set()  # those of pages: some writers also chain them, so they are met twice
    while waiting:
        place = waiting.pop()
        if place in seen and place in inside:
            continue
        if place in seen:
            raise ValueError("its directories run in a circle")
        if len(seen) == PAGES:
            raise ValueError(f"more than {PAGES} directories")
        seen.add(place)
        tags, following = _directory(data, order, place, big)
        yield tags
        children = [int(place) for place in tags.get(CHILDREN, [])[::-1] if place]
        inside.update(children)
        waiting += [following] if following else []
        waiting += children


def _directory(data: mmap.mmap, order: str, place: int, big: bool) -> tuple[Tags, int]:
    """The tags that matter of the directory at `place`, and where the next one stands (0: nowhere)."""
    entry, head, word = (20, 8, "Q") if big else (12, 2, "I")
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, place)
    if count > 4096:
        raise ValueError(f"a directory of {count} tags")
    tags: Tags = {}
    for at in range(place + head, place + head + count * entry, entry):
        tag, kind, number = struct.unpack_from(order + "HH" + word, data, at)
        room = number * WIDTHS.get(kind, 0)
        inline = at + entry - (8 if big else 4)
        start = inline if room <= (8 if big else 4) else struct.unpack_from(order + word, data, inline)[0]
        if start + room > len(data) and tag < PRIVATE:
            raise ValueError(f"tag {tag} needs {start + room} bytes, the file has {len(data)}")
        if tag in READ and kind in INTEGERS and number:
            tags[tag] = np.frombuffer(data[start : start + room], order + INTEGERS[kind], number).astype(np.int64)
    (following,) = struct.unpack_from(order + word, data, place + head + count * entry)
    return tags, following


def _gate(path: Path, tags: Tags) -> None:
    """Whether the sizes of a page are such as tiles have, and fit the number of its tiles.

    Raises:
        SlideError: if not; libraries would believe them, and ask for as much memory.
    """
    if TILES not in tags:
        return
    sides = [int(tags[tag][0]) if tag in tags else 0 for tag in (HEIGHT, WIDTH, TILE_HEIGHT, TILE_WIDTH)]
    height, width, tall, broad = sides
    if min(sides) < 1 or max(tall, broad) > TILE_SIDE or tall * broad > TILE_AREA:
        raise SlideError(
            f"{path}: damaged header, {height} x {width} pixels in tiles of {tall} x {broad}; expected tiles of at "
            f"most {TILE_SIDE} a side and {TILE_AREA >> 20} megapixels"
        )
    planes = int(tags[SAMPLES][0]) if SAMPLES in tags and int(tags.get(PLANAR, np.ones(1))[0]) == 2 else 1
    needed = -(-height // tall) * -(-width // broad) * planes
    if needed > len(tags[TILES]):
        raise SlideError(
            f"{path}: damaged header, {height} x {width} pixels need {needed} tiles of {tall} x {broad}, it has "
            f"{len(tags[TILES])}"
        )


def _end(tags: Tags) -> int:
    """The byte after the last tile or strip of a page."""
    ends = [0]
    for places, sizes in ((tags.get(TILES), tags.get(TILE_BYTES)), (tags.get(STRIPS), tags.get(STRIP_BYTES))):
        if places is not None and sizes is not None and len(places) == len(sizes) and len(places):
            ends.append(int(np.where(sizes > 0, places + sizes, 0).max()))
    return max(ends)


def _is_colour(path: Path, tags: Tags) -> bool:
    samples = int(tags.get(SAMPLES, np.ones(1))[0])
    bits = {int(bit) for bit in tags.get(BITS, [1])}
    whole = bits == {8} and not set(tags.get(FORMAT, np.ones(1)).tolist()) - {1}
    colours = samples in (3, 4) and int(tags.get(PHOTOMETRIC, np.full(1, 2))[0]) in COLOURS
    if not whole or not (colours or (samples == 1 and TILES not in tags)):
        depth = "/".join(map(str, sorted(bits)))
        raise SlideError(f"{path}: {samples} channel(s) of {depth} bits; expected RGB of 8 bits, convert it first")
    return colours
