"""Outlines: tissue as polygons, in the GeoJSON that QuPath and TRIDENT write and read, in pixels of level 0.

A cell of a mask is inside a polygon if its centre is; outlines run half-way between the centres of the cells inside
and outside. So a mask that goes out comes in again as it was, cell by cell, on the same grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import SlideError
from .tissue import PITCH, Tissue

if TYPE_CHECKING:
    from .slide import Slide

Ring = NDArray[np.float64]
"""The corners of a polygon or of a hole in it: (n, 2), row and column; the last is joined to the first."""

_COLOUR = [200, 60, 120]  # of the annotations, in QuPath


def polygons_of(mask: NDArray[np.bool_]) -> Iterator[list[Ring]]:
    """The pieces of a mask, each as its outline and the outlines of the holes in it, in cells (0 is the upper edge of
    the first).

    Cells that touch at a corner only are two pieces.
    """
    from skimage.measure import find_contours, label, regionprops

    pieces = label(mask, connectivity=1)  # type: ignore[no-untyped-call]
    for piece in regionprops(pieces):  # type: ignore[no-untyped-call]
        top, left = piece.bbox[:2]
        framed = np.pad(np.asarray(piece.image, np.float64), 1)
        found = find_contours(framed, 0.5, fully_connected="low")  # type: ignore[no-untyped-call]
        rings = [_corners(ring[:-1] + np.array((top - 0.5, left - 0.5))) for ring in found]
        yield sorted(rings, key=lambda ring: -abs(_area(ring)))


def filled(rings: Sequence[Ring], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which cells of a mask of `shape` have their centre inside the rings of a polygon: in an odd number of them.

    A centre on an edge is inside on one side of it only: polygons that share an edge share no cell. (scikit-image's
    `polygon2mask` asks every corner for every cell, which for an outline of a slide takes hours.)
    """
    height, width = shape
    crossed = np.zeros((height, width + 1), np.bool_)
    for ring in rings:
        start, end = ring, np.roll(ring, -1, axis=0)
        upper = np.where((start[:, 0] < end[:, 0])[:, None], start, end)
        lower = np.where((start[:, 0] < end[:, 0])[:, None], end, start)
        first, last = (np.ceil(one[:, 0] - 0.5).clip(0, height).astype(np.intp) for one in (upper, lower))
        counts = last - first  # rows whose centre an edge crosses
        edge = np.repeat(np.arange(len(ring)), counts)
        row = np.arange(len(edge)) - np.repeat(counts.cumsum() - counts, counts) + first[edge]
        slope = (lower[edge, 1] - upper[edge, 1]) / (lower[edge, 0] - upper[edge, 0])
        column = np.ceil(upper[edge, 1] + (row + 0.5 - upper[edge, 0]) * slope - 0.5).clip(0, width)
        np.logical_xor.at(crossed, (row, column.astype(np.intp)), True)
    return np.logical_xor.accumulate(crossed, axis=1)[:, :width]


# -- out -----------------------------------------------------------------------------------------------


def to_geojson(tissue: Tissue, pixel: tuple[float, float], *, synthetic: bool, about: Mapping[str, Any]) -> str:
    """A GeoJSON collection of annotations of the class Tissue: x and y in level-0 pixels of `pixel` µm (height, width).

    `about` (JSON values) stands beside them as `wsi_brush`; QuPath passes over it.
    """
    features = []
    for number, rings in enumerate(polygons_of(tissue.mask), start=1):
        corner = np.array((tissue.grid.top, tissue.grid.left))
        placed = [(ring + corner) * tissue.grid.mpp / pixel for ring in rings]
        turned = [ring if (_area(ring) < 0) == (index == 0) else ring[::-1] for index, ring in enumerate(placed)]
        name = f"{'SYNTHETIC tissue' if synthetic else 'Tissue'} {number}"
        properties = {
            "objectType": "annotation", "name": name, "synthetic": synthetic,
            "classification": {"name": "Tissue", "color": _COLOUR},
        }  # fmt: skip
        geometry = {"type": "Polygon", "coordinates": [_closed(ring) for ring in turned]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    collection = {"type": "FeatureCollection", "wsi_brush": {**about, "synthetic": synthetic}, "features": features}
    return json.dumps(collection, ensure_ascii=False) + "\n"


def _closed(ring: Ring) -> list[list[float]]:
    """A ring as GeoJSON has it: x before y, the first corner again at the end."""
    corners: list[list[float]] = np.round(ring[:, ::-1], 3).tolist()
    return [*corners, corners[0]]


def _corners(ring: Ring) -> Ring:
    """A ring without the points that lie on a straight line."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return np.asarray(ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]])


def _area(ring: Ring) -> float:
    """The area of a ring; below zero where it runs counter-clockwise for who has x to the right and y up."""
    after = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * after[:, 1] - ring[:, 1] * after[:, 0]).sum() / 2)


# -- in ------------------------------------------------------------------------------------------------


def find_outlines(place: Path, name: str) -> Path:
    """The outlines of the slide called `name`: the file `place`, or NAME.geojson in the folder `place`.

    Raises:
        SlideError: if there are none.
    """
    found = place / f"{name}.geojson" if place.is_dir() else place
    if not found.is_file():
        raise SlideError(f"{found}: no such file; expected the tissue of this slide, draw it or leave --tissue out")
    return found


def read_outlines(path: Path, slide: Slide) -> Tissue:
    """The cells of a slide inside any polygon of a GeoJSON, whatever its class; none at all is a valid answer.

    Raises:
        SlideError: if it cannot be read, has shapes without an area, or none of it lies on the slide.
    """
    grid = slide.grid.at(PITCH)
    mask, near, polygons = np.zeros(grid.shape, np.bool_), False, 0
    scale = np.array(slide.pixel) / grid.mpp
    for rings in _polygons(path):
        polygons += 1
        cells = [ring * scale - (grid.top, grid.left) for ring in rings]
        corners = np.concatenate(cells)
        top, left = np.floor(corners.min(0)).clip(0, grid.shape).astype(int).tolist()
        bottom, right = np.ceil(corners.max(0)).clip(0, grid.shape).astype(int).tolist()
        if bottom > top and right > left:
            near = True
            mask[top:bottom, left:right] |= filled([ring - (top, left) for ring in cells], (bottom - top, right - left))
    if polygons and not near:
        height, width = (
            round(side * slide.mpp / pixel) for side, pixel in zip(slide.grid.shape, slide.pixel, strict=True)
        )
        raise SlideError(
            f"{path}: no polygon lies on {slide.path.name} ({width} x {height} pixels); expected x and y in pixels of "
            "its level 0"
        )
    return Tissue(mask, grid)


def outlines_digest(path: Path) -> str:
    """A digest of what a file of outlines says."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror or error})") from None


def _polygons(path: Path) -> Iterator[list[Ring]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SlideError(f"{path}: no GeoJSON that can be read ({error}); export it again") from None
    for geometry in _geometries(value, path):
        kind, coordinates = geometry.get("type"), geometry.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon") or not isinstance(coordinates, list):
            raise SlideError(
                f"{path}: holds a {kind}; expected polygons and multipolygons, which have an area: export those alone"
            )
        for polygon in [coordinates] if kind == "Polygon" else coordinates:
            if not isinstance(polygon, list) or not polygon:
                raise SlideError(f"{path}: a polygon without a ring; export it again")
            yield [_ring(corners, path) for corners in polygon]


def _geometries(value: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The geometries of a collection, of a list of features as older QuPaths write it, or of one alone."""
    if isinstance(value, dict) and isinstance(value.get("features"), list):
        value = value["features"]
    for one in value if isinstance(value, list) else [value]:
        geometry = one.get("geometry", one) if isinstance(one, dict) else None
        if not isinstance(geometry, dict):
            raise SlideError(f"{path}: no GeoJSON (a {type(one).__name__} in place of a feature); export it again")
        if geometry.get("type") == "GeometryCollection" and isinstance(geometry.get("geometries"), list):
            yield from _geometries(geometry["geometries"], path)
        else:
            yield geometry


def _ring(corners: Any, path: Path) -> Ring:
    try:
        ring = np.array([[point[1], point[0]] for point in corners], np.float64)
    except (TypeError, ValueError, LookupError):
        ring = np.empty((0, 2))
    if len(ring) < 3 or not (np.abs(ring) < 1e9).all():
        raise SlideError(f"{path}: a ring that is no list of at least three points [x, y]; export it again")
    return ring
