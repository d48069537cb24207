"""Slide, open_slide: a colour at every point of the plane."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SlideError
from ..grid import Grid
from . import dicom, tiff
from .jpeg import JpegDecoder
from .pixelsize import PixelSize, choose
from .readers import (
    ImageReader,
    Level,
    OmeZarrReader,
    OpenSlideReader,
    Reader,
    TiffSlideReader,
    UnreadableError,
)
from .resample import resample

READERS: dict[str, type[Reader]] = {
    reader.name: reader for reader in (OpenSlideReader, TiffSlideReader, OmeZarrReader, ImageReader, dicom.DicomReader)
}

COARSER = 0.98  # a level up to 2 % coarser than asked for will do: interpolating it loses less than the eye sees


class _Handle(threading.local):
    """The open reader of one slide in this thread of this process; a copy sent elsewhere is empty."""

    reader: JpegDecoder | None = None
    process: int = 0

    def __reduce__(self) -> tuple[type[_Handle], tuple[()]]:
        return _Handle, ()


@dataclass(frozen=True)
class Slide:
    """A colour at every point; `read` it at any pitch. Holds no open file, so it can be sent to a worker.

    `grid` is level 0 with square pixels of pitch `mpp` µm (where the scanner's are not quite square, of
    the same area). `mpp_source` says where the pitch stands, `reader` what reads the pixels.
    """

    path: Path
    mpp: float
    mpp_source: str
    reader: str
    grid: Grid
    levels: tuple[Level, ...]
    pixel: tuple[float, float]
    """Height and width of a level-0 pixel, µm."""
    synthetic: bool = False
    """Whether the file says of itself that it was painted."""
    sizes: tuple[PixelSize, ...] = field(default=(), compare=False)
    """Every pixel size that the header gives, plausible or not, the first the most trusted."""
    _handle: _Handle = field(default_factory=_Handle, repr=False, compare=False)

    def read(self, grid: Grid) -> NDArray[np.uint8]:
        """The colours on `grid`: (height, width, 3), anti-aliased, white where the slide does not reach.

        A pixel's value depends on its place and pitch alone, never on the window it is read in. On the
        pixels of a level (`grid` at its pitch) they are the stored ones.

        Raises:
            SlideError: if the file is damaged there; other places can still be read.
        """
        level, ratios = self._level_for(grid.mpp)

        def source(top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
            return self._pixels(level, top, left, height, width)

        return resample(source, (level.height, level.width), ratios, grid)

    def _level_for(self, mpp: float) -> tuple[Level, tuple[float, float]]:
        """The coarsest level that is fine enough, and the pitch `mpp` in its pixels, down and across."""

        def ratios(level: Level) -> tuple[float, float]:
            return _ratio(mpp, self.pixel[0] * level.tall), _ratio(mpp, self.pixel[1] * level.broad)

        fine_enough = [level for level in self.levels if min(ratios(level)) >= COARSER] or [self.levels[0]]
        best = max(fine_enough, key=lambda level: level.tall * level.broad)
        return best, ratios(best)

    def _pixels(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        handle = self._handle
        try:
            if handle.reader is None or handle.process != os.getpid():
                reader = READERS[self.reader](self.path)
                handle.reader, handle.process = JpegDecoder(reader, self.path), os.getpid()
            return handle.reader.read(level, top, left, height, width)
        except UnreadableError as error:
            if handle.reader is not None:  # OpenSlide answers every later read with the same error
                handle.reader.close()
                handle.reader = None
            place = f"rows {top}-{top + height}, columns {left}-{left + width} of level {level.number}"
            raise SlideError(f"{self.path}: {place} cannot be read ({error})") from None


@dataclass(frozen=True)
class _Moved(Slide):
    """See `moved`."""

    down: float = 0.0
    right: float = 0.0

    def read(self, grid: Grid) -> NDArray[np.uint8]:
        top, left = (round(shift / grid.mpp) for shift in (self.down, self.right))
        return super().read(replace(grid, top=grid.top + top, left=grid.left + left))


def moved(slide: Slide, down: float, right: float) -> Slide:
    """The slide with a plane that begins `down` and `right` µm farther, to the nearest pixel of what is read. It is for
    this process: `reading` opens the file anew elsewhere."""
    return _Moved(**{one.name: getattr(slide, one.name) for one in fields(Slide)}, down=down, right=right)


def open_slide(path: str | Path, *, assume_mpp: float | None = None, force_mpp: float | None = None) -> Slide:
    """Open a slide: whatever OpenSlide or TiffSlide reads, an OME-Zarr, a DICOM series, or a plain image.

    The format is found in the content, not in the name. Of a DICOM series any file may be named, or the folder, where
    there is no other in it; the slide's path is then the file of its level 0. `assume_mpp` stands in for a pixel size
    that the header lacks, `force_mpp` replaces the header's.

    Raises:
        SlideError: if there is no such file, or it is damaged, or no RGB image of 8 bits.
        PixelSizeError: if the pixel size is missing or implausible.
        UsageError: if the pixel size given is itself implausible.
    """
    path, reader, sizes = _open_reader(Path(path))
    reader.close()
    size = choose(path, sizes, assume_mpp=assume_mpp, force_mpp=force_mpp)
    full = reader.levels[0]
    pixel = (size.height, size.width)
    if abs(size.height - size.width) * max(full.height, full.width) < 0.5 * size.pitch:
        pixel = (size.pitch, size.pitch)  # less than half a pixel over the whole slide: the header's rounding
    height, width = round(full.height * pixel[0] / size.pitch), round(full.width * pixel[1] / size.pitch)
    grid = Grid(size.pitch, 0, 0, height, width)
    found = tuple(dict.fromkeys(sizes))
    return Slide(path, size.pitch, size.source, reader.name, grid, reader.levels, pixel, reader.synthetic, found)


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def _open_reader(path: Path) -> tuple[Path, Reader, list[PixelSize]]:
    """Where the slide at `path` stands, the reader for it, and every pixel size that its header gives."""
    reader: Reader
    try:
        if path.is_dir() and is_zarr(path):
            reader = OmeZarrReader(path)
            return path, reader, reader.sizes
        path = dicom.slide_file(path)
        if path.is_dir():
            raise SlideError(
                f"{path}: a folder, but no OME-Zarr (no zarr.json or .zgroup) and no DICOM; expected a slide file"
            )
        if path.exists() and not path.is_file():
            raise SlideError(f"{path}: neither a file nor a folder; expected a slide")
        with path.open("rb") as file:
            magic = file.read(dicom.AT + len(dicom.MAGIC))
        if not magic:
            raise SlideError(f"{path}: an empty file; expected a slide")
        if magic[:4] in tiff.MAGICS:
            return path, *_open_tiff(path)
        if magic[dicom.AT :] == dicom.MAGIC:
            return path, *_open_dicom(path)
        reader = ImageReader(path) if magic.startswith((b"\x89PNG", b"\xff\xd8\xff")) else OpenSlideReader(path)
        return path, reader, reader.sizes
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnreadableError as error:
        raise SlideError(f"{path}: not a slide that can be read ({error})") from None


def _open_dicom(path: Path) -> tuple[Reader, list[PixelSize]]:
    """wsidicom, which reads three times as fast as OpenSlide (measured on H&E as JPEG; the pixels are the same) and all
    levels exactly; where it refuses, or is not there, OpenSlide."""
    first, refusal = _try(dicom.DicomReader, path)
    if first:
        return first, first.sizes
    second, refusal_too = _try(OpenSlideReader, path)
    wanted = {(header.height, header.width) for _, header in dicom.levels_beside(path)}
    if isinstance(second, OpenSlideReader) and not wanted <= _shapes(second.all_levels):
        second.close()
        second, refusal_too = None, "a level of its series cannot be read"
    if second:
        return second, second.sizes
    raise UnreadableError(f"wsidicom: {refusal}; OpenSlide: {refusal_too}")


def _open_tiff(path: Path) -> tuple[Reader, list[PixelSize]]:
    """OpenSlide if it shows all levels exactly, else TiffSlide, else a plain image."""
    facts = tiff.inspect(path)
    if not facts.colour:
        image = ImageReader(path)
        return image, image.sizes
    first, refusal = _try(OpenSlideReader, path) if not facts.extra else (None, "a fourth sample that is no alpha")
    exact = isinstance(first, OpenSlideReader) and first.levels == first.all_levels
    if first and (facts.sparse or (exact and not facts.nested)):
        return first, first.sizes
    second, refusal_too = _try(TiffSlideReader, path) if not facts.sparse else (None, "some tiles are missing")
    if isinstance(first, OpenSlideReader) and second and not _shapes(first.all_levels) <= _shapes(second.levels):
        second.close()  # it does not see the same slide
        second = None
    if second:
        return second, [*(first.sizes if first else []), *second.sizes]
    if first:
        return first, first.sizes
    raise UnreadableError(f"OpenSlide: {refusal}; TiffSlide: {refusal_too}")


def _try(reader: type[Any], path: Path) -> tuple[Reader | None, str]:
    try:
        return reader(path), ""
    except UnreadableError as error:
        return None, str(error)


def _shapes(levels: tuple[Level, ...]) -> set[tuple[int, int]]:
    return {(level.height, level.width) for level in levels}


def _ratio(mpp: float, pixel: float) -> float:
    """How many pixels of a level a pixel of pitch `mpp` covers; whole where only rounding says otherwise."""
    ratio = mpp / pixel
    return float(round(ratio)) if math.isclose(ratio, round(ratio), rel_tol=1e-9) else ratio
