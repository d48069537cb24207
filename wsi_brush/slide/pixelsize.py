"""How large a pixel is, and who says so. Never guessed, never rounded to a magnification."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ..errors import PixelSizeError, UsageError

PLAUSIBLE = (0.05, 100.0)  # µm per pixel at level 0
PRINTED = 10.0  # µm; above it, dots per inch are for paper: 300 dpi is 84.7 µm, which no scanner makes
SQUARE = 1.1
UNITS = {
    "angstrom": 1e-4,
    "å": 1e-4,
    "nanometer": 1e-3,
    "nm": 1e-3,
    "micrometer": 1.0,
    "um": 1.0,
    "µm": 1.0,  # micro sign
    "μm": 1.0,  # Greek mu
    "millimeter": 1e3,
    "mm": 1e3,
    "centimeter": 1e4,
    "cm": 1e4,
    "inch": 25400.0,
    "in": 25400.0,
    "meter": 1e6,
    "m": 1e6,
}


class PixelSize(NamedTuple):
    """Height and width of a level-0 pixel in µm, and where that stands."""

    source: str
    height: float
    width: float

    @property
    def pitch(self) -> float:
        """The side of the square pixel of the same area, µm."""
        return self.height if self.height == self.width else math.sqrt(self.height * self.width)

    @property
    def plausible(self) -> bool:
        """Whether a scanner could have made such pixels."""
        return all(PLAUSIBLE[0] <= side <= PLAUSIBLE[1] for side in (self.height, self.width))

    @property
    def square(self) -> bool:
        """Whether the sides differ by no more than a tenth."""
        return max(self.height, self.width) <= SQUARE * min(self.height, self.width)


def from_properties(source: str, x: Any, y: Any) -> list[PixelSize]:
    """Pixel size from two properties in µm; one alone stands for both."""
    width, height = _number(x), _number(y)
    if width is None and height is None:
        return []
    return [PixelSize(source, height or width or 0.0, width or height or 0.0)]


def from_resolution(properties: Mapping[str, Any]) -> list[PixelSize]:
    """Pixel size from the TIFF tags XResolution, YResolution (pixels per unit) and ResolutionUnit."""
    name = str(properties.get("tiff.ResolutionUnit", "")).lower()
    x, y = (_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
    if name not in ("inch", "centimeter") or not x or not y:
        return []
    size = PixelSize("tiff resolution", UNITS[name] / y, UNITS[name] / x)
    return [] if name == "inch" and size.pitch > PRINTED else [size]


def from_ome_xml(text: str | None) -> list[PixelSize]:
    """Pixel size of the first image of an OME-XML text."""
    if not text or "<OME" not in text[:4096]:
        return []
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return []
    pixels = next((node for node in root.iter() if node.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return []
    x, y = (in_micrometres(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit", "µm")) for a in "XY")
    return from_properties("ome-xml", x, y)


def in_micrometres(value: Any, unit: str | None) -> float | None:
    """A length in µm, or None if there is none or its unit is unknown."""
    number, scale = _number(value), UNITS.get(re.sub(r"metre$", "meter", (unit or "").strip().lower()))
    return None if number is None or scale is None else number * scale


def choose(
    path: Path, found: Sequence[PixelSize], *, assume_mpp: float | None = None, force_mpp: float | None = None
) -> PixelSize:
    """The first plausible size found, else the assumed one; a forced one before all.

    Raises:
        PixelSizeError: if nothing plausible is found and nothing assumed, or pixels are far from square.
        UsageError: if the assumed or forced size is itself implausible.
    """
    for word, given in (("--force-mpp", force_mpp), ("--assume-mpp", assume_mpp)):
        if given is not None and not PLAUSIBLE[0] <= given <= PLAUSIBLE[1]:
            raise UsageError(f"{word} {given:g}: expected a pixel size between 0.05 and 100 µm")
    if force_mpp is not None:
        return PixelSize("forced", force_mpp, force_mpp)
    for size in found:
        if size.plausible and not size.square:
            raise PixelSizeError(
                f"{path}: pixels of {size.height:g} x {size.width:g} µm ({size.source}) are not square within 10 %; "
                "if that is wrong, pass the true size with --force-mpp"
            )
        if size.plausible:
            return size
    if assume_mpp is not None:
        return PixelSize("assumed", assume_mpp, assume_mpp)
    if found:
        raise PixelSizeError(
            f"{path}: implausible pixel size, {found[0].width:g} µm ({found[0].source}), expected 0.05 to 100 µm; "
            "pass the true size with --assume-mpp, e.g. --assume-mpp 0.25"
        )
    raise PixelSizeError(
        f"{path}: no pixel size in the header; pass it with --assume-mpp, e.g. --assume-mpp 0.25 for a 40x scan (in a "
        "recipe: assume_mpp = 0.25)"
    )


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
