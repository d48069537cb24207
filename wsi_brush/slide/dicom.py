"""DICOM: which files are one slide, and the pixels of their levels.

A whole-slide image is a series: a file (or several) for each level, others for the label and the overview, under
names that say nothing. Of a header only what `Header` has is kept: no other field of it, so nothing of the patient.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from .pixelsize import PixelSize, from_properties
from .readers import DAMAGE, Level, UnreadableError, levels_from, one_line

MAGIC, AT = b"DICM", 128
"""What stands at byte `AT` of a DICOM file."""
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""The class of VL Whole Slide Microscopy Images (DICOM PS3.3, A.32.8)."""
INSTALL = 'pip install "wsi-brush[dicom]"'

_SYNTAX, _TYPE, _CLASS, _SERIES, _COLUMNS, _ROWS = (
    0x00020010,
    0x00080008,
    0x00080016,
    0x0020000E,
    0x00480006,
    0x00480007,
)
_WANTED = frozenset((_SYNTAX, _TYPE, _CLASS, _SERIES, _COLUMNS, _ROWS))
_IMPLICIT = "1.2.840.10008.1.2"
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_CACHES = {"decoded_frame_cache_size": 1 << 25, "encoded_frame_cache_size": 1 << 20}  # bytes; OpenSlide has as much
_NESTED, _LONGEST = 16, 1024  # sequences inside sequences, and bytes of a value: more has no header of ours


class Header(NamedTuple):
    """What decides which slide a file is part of. `kind` is VOLUME (a level), LABEL, OVERVIEW or THUMBNAIL."""

    sop_class: str
    series: str
    kind: str
    height: int
    width: int

    @property
    def is_level(self) -> bool:
        """Whether it holds pixels of a level, or some of them."""
        return self.sop_class == WHOLE_SLIDE and self.kind == "VOLUME" and bool(self.series)


def read_header(path: Path) -> Header | None:
    """The header of a DICOM file; None of any other.

    Raises:
        OSError: if there is none that can be read.
    """
    with path.open("rb") as file:
        if file.read(AT + len(MAGIC))[AT:] != MAGIC:
            return None
        found: dict[int, bytes] = {}
        try:
            _elements(file, found)
        except (struct.error, ValueError, OverflowError):
            found = {}  # what it is the libraries will say
    words = {tag: value.decode("latin-1").strip("\0 ") for tag, value in found.items()}
    height, width = (int.from_bytes(found.get(tag, b"")[:4], "little") for tag in (_ROWS, _COLUMNS))
    kind = (words.get(_TYPE, "").split("\\") + [""] * 3)[2]
    return Header(words.get(_CLASS, ""), words.get(_SERIES, ""), kind, height, width)


def slides_of(files: Iterable[Path]) -> dict[Path, Path | None]:
    """Of the DICOM files among those of a folder, the file of level 0 of the series that each belongs to; None where
    that is no whole slide (another kind of image, a label without its slide)."""
    headers = {file: header for file in files if (header := read_header(file)) is not None}
    base: dict[str, Path] = {}
    for file, header in sorted(headers.items(), key=lambda one: (-one[1].height * one[1].width, one[0])):
        if header.is_level:
            base.setdefault(header.series, file)
    return {file: base.get(one.series) if one.sop_class == WHOLE_SLIDE else None for file, one in headers.items()}


def candidates(folder: Path, like: str = ".dcm") -> list[Path]:
    """The files of a folder that may be DICOM by their names: .dcm or `like`, none at all, or a UID's last number."""
    found = []
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if (suffix in ("", ".dcm", like.lower()) or suffix[1:].isdigit()) and path.is_file():
            found.append(path)
    return [path for path in found if not path.name.startswith(".") and os.access(path, os.R_OK)]


def slide_file(path: Path) -> Path:
    """The file that stands for the DICOM slide at `path`, a file of its series or their folder: that of level 0.
    Any other path as it is.

    Raises:
        SlideError: if a folder holds several slides, or a DICOM file none.
        OSError: if it cannot be read.
    """
    if path.is_dir():
        found = sorted({base for base in slides_of(candidates(path)).values() if base is not None})
        if len(found) > 1:
            raise SlideError(f"{path}: a folder of {len(found)} DICOM slides; name a file of one, e.g. {found[0].name}")
        return found[0] if found else path
    header = read_header(path) if path.is_file() else None
    if header is None:
        return path
    if header.sop_class and header.sop_class != WHOLE_SLIDE:
        raise SlideError(
            f"{path}: a DICOM file of class {header.sop_class}; expected a whole-slide image ({WHOLE_SLIDE})"
        )
    base = slides_of([*candidates(path.parent, path.suffix), path]).get(path)
    if header.sop_class and base is None:
        raise SlideError(
            f"{path}: a DICOM {header.kind or 'image'} without its slide; put all files of the series beside it"
        )
    return base or path


def levels_beside(path: Path) -> list[tuple[Path, Header]]:
    """The files of the levels of the series that `path` belongs to."""
    mine = read_header(path)
    if mine is None or not mine.series:
        return []
    headers = [(file, read_header(file)) for file in candidates(path.parent, path.suffix)]
    return [(file, one) for file, one in headers if one is not None and one.is_level and one.series == mine.series]


class DicomReader:
    """What wsidicom reads. It takes places in pixels of the level, so every level is exact; it refuses a series without
    a pixel size, and levels that are no halves."""

    name: ClassVar[str] = "dicom"

    def __init__(self, path: Path) -> None:
        try:
            import wsidicom
            from wsidicom import config, errors
        except ImportError:
            raise UnreadableError(f"not installed, {INSTALL}") from None
        # It says on stderr what it leaves out; what is left out is looked for below.
        logging.getLogger("wsidicom").addHandler(logging.NullHandler())
        theirs = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
        self._damage: tuple[type[Exception], ...] = (*DAMAGE, AttributeError, EOFError, *theirs)
        files = levels_beside(path)
        try:
            self._slide = wsidicom.WsiDicom.open([file for file, _ in files], settings=config.Settings(**_CACHES))
        except self._damage as error:
            raise UnreadableError(one_line(error)) from None
        pyramid = self._slide.pyramid
        found = [(one.size.height, one.size.width) for one in pyramid]
        images = [one.default_instance.image_data for one in pyramid]
        fault = ""
        if not {(header.height, header.width) for _, header in files} <= set(found):
            fault = "a level of its series cannot be read"
        elif any((image.samples_per_pixel, image.bits) != (3, 8) for image in images):
            fault = f"{images[0].samples_per_pixel} channel(s) of {images[0].bits} bits; expected RGB of 8 bits"
        if fault:
            self.close()
            raise UnreadableError(fault)
        self._numbers = [one.level for one in pyramid]
        self.levels = levels_from(found)
        spacing: Any = pyramid.pixel_spacing  # mm
        self.sizes: list[PixelSize] = from_properties(
            "dicom pixel spacing", 1000 * float(spacing.width), 1000 * float(spacing.height)
        )
        self.synthetic = False  # no painting is written so
        self.plain = False

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        number = self._numbers[level.number]
        try:
            pixels = self._slide.read_region((left, top), number, (width, height), threads=1, as_array=True)
        except self._damage as error:
            raise UnreadableError(one_line(error)) from None
        return np.asarray(pixels, np.uint8)

    def close(self) -> None:
        self._slide.close()

    def __del__(self) -> None:
        if hasattr(self, "_slide"):
            self.close()


def _elements(file: BinaryIO, found: dict[int, bytes], *, explicit: bool = True, depth: int = 0) -> None:
    """Go through the elements of a data set, or of an item of a sequence (`depth`), and keep what is wanted of the
    outermost (DICOM PS3.5, 7.1)."""
    if depth > _NESTED:
        raise ValueError("sequences too deep")
    while len(head := file.read(8)) == 8:
        group, element = struct.unpack_from("<HH", head)
        tag = group << 16 | element
        if tag == _ITEM_END or (not depth and tag > _ROWS):
            return
        if not depth and group > 2:
            explicit = found.get(_SYNTAX, b"").decode("latin-1").strip("\0 ") != _IMPLICIT
        kind = head[4:6] if explicit else b""
        if not explicit:
            (length,) = struct.unpack_from("<I", head, 4)
        elif kind in _LONG:
            (length,) = struct.unpack("<I", file.read(4))
        else:
            (length,) = struct.unpack_from("<H", head, 6)
        if length == _UNDEFINED:
            _pass_items(file, explicit=explicit and kind != b"UN", depth=depth + 1)
        elif not depth and tag in _WANTED and length <= _LONGEST:
            found[tag] = file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)


def _pass_items(file: BinaryIO, *, explicit: bool, depth: int) -> None:
    """Go past the items of a sequence of undefined length."""
    while len(head := file.read(8)) == 8:
        group, element, length = struct.unpack("<HHI", head)
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise ValueError(f"tag {tag:08x} in place of an item")
        if length == _UNDEFINED:
            _elements(file, {}, explicit=explicit, depth=depth)
        else:
            file.seek(length, os.SEEK_CUR)
