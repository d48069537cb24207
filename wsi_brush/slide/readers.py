"""The pixels of a slide's levels, through the library that knows its format.

A reader is an open file: it belongs to one thread of one process, and after an error it is thrown away.
Labels and macro images are never asked for.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import tiff
from .pixelsize import PixelSize, from_ome_xml, from_properties, from_resolution, in_micrometres

# What tifffile, zarr, imagecodecs and Pillow raise on damaged or foreign files.
DAMAGE = (OSError, ValueError, LookupError, RuntimeError, TypeError, struct.error, zlib.error)
MARK = "synthetic=true"
"""Stands in the description of every TIFF, PNG or JPEG that shows a painting; an OME-Zarr has an attribute."""
_DESCRIPTION = 270  # the tag of a TIFF, and of a JPEG's Exif


class UnreadableError(Exception):
    """Why a library does not read this file, or this part of it."""


class Level(NamedTuple):
    """A level of a pyramid: its number in the file, its pixels, and theirs in level-0 pixels."""

    number: int
    height: int
    width: int
    tall: float
    broad: float


class Reader(Protocol):
    """An open slide file."""

    name: ClassVar[str]
    levels: tuple[Level, ...]
    sizes: list[PixelSize]
    synthetic: bool
    """Whether the file says of itself that it was painted."""
    plain: bool
    """Whether every level is a page of a TIFF as it stands there."""

    def __init__(self, path: Path) -> None: ...

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """(height, width, 3) from inside `level`.

        Raises:
            UnreadableError: if the file is damaged there.
        """
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


def levels_from(shapes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their (height, width).

    Writers halve and drop or repeat the last line, so 17883 pixels over 4470 are pixels of exactly 4,
    not of 4.0007: the quotient would be three pixels off at the far edge.
    """
    levels = []
    for number, (height, width) in enumerate(shapes):
        across, down = shapes[0][1] / width, shapes[0][0] / height
        mean = math.sqrt(across * down)
        for whole in (2 ** round(math.log2(mean)), round(mean)):
            if abs(shapes[0][0] - whole * height) < whole and abs(shapes[0][1] - whole * width) < whole:
                across = down = float(whole)
                break
        levels.append(Level(number, height, width, down, across))
    return tuple(levels)


class OpenSlideReader:
    """What OpenSlide reads, at the levels it reads exactly.

    OpenSlide takes places in level-0 pixels. Where a level's factor is no integer, they fall between its
    pixels, and it interpolates: the pixels would depend on the window. Such levels are left out.
    """

    name: ClassVar[str] = "openslide"

    def __init__(self, path: Path) -> None:
        import openslide

        self._error = openslide.OpenSlideError
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise UnreadableError(str(error)) from None
        self.all_levels = levels_from([(height, width) for width, height in self._slide.level_dimensions])
        self._factors = self._slide.level_downsamples
        self.levels = tuple(level for level in self.all_levels if self._factors[level.number].is_integer())
        about = self._slide.properties
        self.sizes: list[PixelSize] = []
        self.plain = about.get("openslide.vendor") in ("generic-tiff", "aperio")
        if about.get("openslide.vendor") != "generic-tiff":  # there it is the resolution, even one for print
            self.sizes += from_properties("openslide.mpp-x", about.get("openslide.mpp-x"), about.get("openslide.mpp-y"))
        self.sizes += from_resolution(about) + from_ome_xml(about.get("tiff.ImageDescription"))
        self.synthetic = MARK in about.get("tiff.ImageDescription", "")

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        factor = int(self._factors[level.number])
        try:
            region = self._slide.read_region((left * factor, top * factor), level.number, (width, height))
        except self._error as error:
            raise UnreadableError(str(error)) from None
        if region.getchannel("A").getextrema() == (255, 255):
            return np.asarray(region.convert("RGB"))  # Pillow drops alpha five times as fast as NumPy
        return on_white(np.asarray(region))

    def close(self) -> None:
        self._slide.close()


class TiffSlideReader:
    """What TiffSlide reads: TIFFs that OpenSlide refuses, and levels that OpenSlide would interpolate."""

    name: ClassVar[str] = "tiffslide"

    def __init__(self, path: Path) -> None:
        import tiffslide

        try:
            self._slide = tiffslide.TiffSlide(path)
            about: dict[str, Any] = self._slide.properties
            group = self._slide.zarr_group
            self._arrays: list[Any] = [group[str(number)] for number in range(self._slide.level_count)]
            xml = self._slide.ts_tifffile.ome_metadata
            extra = tuple(self._slide.ts_tifffile.pages.first.extrasamples)
        except DAMAGE as error:
            raise UnreadableError(one_line(error)) from None
        self._planar = about.get("tiffslide.series-axes") == "SYX"
        self._alpha = tiff.UNSPECIFIED not in extra
        shapes = [tuple(array.shape) for array in self._arrays]
        colours = {shape[0 if self._planar else -1] for shape in shapes}
        axes = about.get("tiffslide.series-axes")
        if axes not in ("YXS", "SYX") or not colours <= {3, 4} or {str(a.dtype) for a in self._arrays} != {"uint8"}:
            found = f"{shapes[0]} {self._arrays[0].dtype} with axes {axes}"
            self.close()
            raise UnreadableError(f"{found}; expected RGB of 8 bits")
        self.levels = levels_from([shape[1:] if self._planar else shape[:2] for shape in shapes])
        self.sizes: list[PixelSize] = []
        self.plain = about.get("tiffslide.vendor") in (None, "generic-tiff", "aperio") and not self._planar
        if about.get("tiffslide.vendor") not in (None, "generic-tiff"):
            self.sizes += from_properties("tiffslide.mpp-x", about["tiffslide.mpp-x"], about["tiffslide.mpp-y"])
        self.sizes += from_resolution(about) + from_ome_xml(xml)
        self.synthetic = MARK in str(about.get("tiff.ImageDescription"))

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        window = (slice(top, top + height), slice(left, left + width))
        array = self._arrays[level.number]
        try:
            pixels = np.asarray(array[(slice(None), *window)] if self._planar else array[window])
        except DAMAGE as error:
            raise UnreadableError(one_line(error)) from None
        pixels = pixels.transpose(1, 2, 0) if self._planar else pixels
        return on_white(pixels if self._alpha else pixels[..., :3])

    def close(self) -> None:
        self._slide.close()

    def __del__(self) -> None:
        if hasattr(self, "_slide"):
            self.close()


class OmeZarrReader:
    """OME-Zarr 0.4 and 0.5: an RGB image of 8 bits as multiscales."""

    name: ClassVar[str] = "ome-zarr"
    plain = False

    def __init__(self, path: Path) -> None:
        import zarr

        try:
            group = zarr.open_group(path, mode="r")
            about: Any = group.attrs.asdict()
            scales = about.get("ome", about)["multiscales"][0]
            axes = [(axis["name"], axis.get("unit")) for axis in scales["axes"]]
            self._arrays: list[Any] = [group[dataset["path"]] for dataset in scales["datasets"]]
            pitches = [_pitches(dataset, scales) for dataset in scales["datasets"]]
        except DAMAGE as error:
            raise UnreadableError(f"no OME-Zarr image: {one_line(error)}") from None
        self._axes = [name for name, _ in axes]
        shapes = [dict(zip(self._axes, array.shape, strict=True)) for array in self._arrays]
        others = {length for name, length in shapes[0].items() if name not in "cyx"}
        if not {"c", "y", "x"} <= set(self._axes) or shapes[0]["c"] != 3 or others - {1}:
            raise UnreadableError(f"an image of {shapes[0]}; expected c=3 and no time or depth")
        if {str(array.dtype) for array in self._arrays} != {"uint8"}:
            raise UnreadableError(f"pixels of {self._arrays[0].dtype}; expected uint8")
        y, x = self._axes.index("y"), self._axes.index("x")
        plain = levels_from([(shape["y"], shape["x"]) for shape in shapes])
        self.levels = tuple(
            level._replace(tall=pitch[y] / pitches[0][y], broad=pitch[x] / pitches[0][x]) if pitch else level
            for level, pitch in zip(plain, pitches, strict=True)
        )
        self.sizes = []
        if pitches[0]:
            height, width = (in_micrometres(pitches[0][axis], axes[axis][1]) for axis in (y, x))
            self.sizes = from_properties("ome-zarr scale", width, height)
        ours = about.get("wsi_brush")  # as `pyramid` writes it
        self.synthetic = isinstance(ours, dict) and ours.get("synthetic") is True

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        places: dict[str, Any] = {"y": slice(top, top + height), "x": slice(left, left + width), "c": slice(None)}
        try:
            pixels = np.asarray(self._arrays[level.number][tuple(places.get(name, 0) for name in self._axes)])
        except DAMAGE as error:
            raise UnreadableError(one_line(error)) from None
        kept = [name for name in self._axes if name in places]
        return pixels.transpose([kept.index(name) for name in "yxc"])

    def close(self) -> None:
        """Nothing stays open."""


class ImageReader:
    """A plain image: PNG, JPEG, or a TIFF that no slide library takes. Its dots per inch are for print."""

    name: ClassVar[str] = "image"
    plain = False

    def __init__(self, path: Path) -> None:
        from PIL import Image

        try:
            self._image = Image.open(path, formats=("PNG", "JPEG", "TIFF"))
        except (*DAMAGE, Image.DecompressionBombError) as error:
            raise UnreadableError(one_line(error)) from None
        deep = any("16" in str(tile[3]) for tile in self._image.tile)
        if deep or self._image.mode not in ("L", "LA", "P", "RGB", "RGBA"):
            found = "16 bits" if deep else f"mode {self._image.mode}"
            self.close()
            raise UnreadableError(f"an image of {found}; expected RGB or grey of 8 bits")
        self._pixels: NDArray[np.uint8] | None = None
        self.levels = levels_from([(self._image.height, self._image.width)])
        self.sizes: list[PixelSize] = []
        self.synthetic = MARK in f"{self._image.info} {self._image.getexif().get(_DESCRIPTION)}"

    def read(self, level: Level, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        if self._pixels is None:
            try:
                see_through = self._image.mode in ("LA", "P", "RGBA")
                self._pixels = on_white(np.asarray(self._image.convert("RGBA" if see_through else "RGB")))
            except DAMAGE as error:
                raise UnreadableError(one_line(error)) from None
        return self._pixels[top : top + height, left : left + width]

    def close(self) -> None:
        self._image.close()

    def __del__(self) -> None:
        if hasattr(self, "_image"):
            self.close()


def on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB as it is; RGBA composited on white."""
    if pixels.shape[2] == 3:
        return pixels
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min(initial=255) == 255:
        return colour
    share = alpha.astype(np.uint32)
    return ((colour * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its name if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _pitches(dataset: dict[str, Any], scales: dict[str, Any]) -> list[float]:
    """Pixel pitches of a level along its axes, in their units; empty if none are given.

    Translations are left aside: all levels of a pyramid begin at the same corner.
    """
    pitches: list[float] = []
    for transform in [*dataset.get("coordinateTransformations", []), *scales.get("coordinateTransformations", [])]:
        if transform.get("type") == "scale":
            scale = [float(value) for value in transform["scale"]]
            pitches = [a * b for a, b in zip(pitches or [1.0] * len(scale), scale, strict=True)]
    return pitches
