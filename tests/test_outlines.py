"""Tissue goes out as polygons and comes in again as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_lossless
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from skimage.measure import euler_number, label, points_in_poly

from wsi_brush.errors import SlideError
from wsi_brush.grid import Grid
from wsi_brush.outlines import Ring, filled, find_outlines, outlines_digest, polygons_of, read_outlines, to_geojson
from wsi_brush.slide import Slide, open_slide
from wsi_brush.tissue import PITCH, Tissue

masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """120 x 160 µm in pixels of 0.25, so 15 x 20 cells of tissue."""
    pixels = np.full((480, 640, 3), 250, np.uint8)
    return open_slide(write_lossless(tmp_path_factory.mktemp("slide") / "s.tif", pixels, mpp=0.25))


def ring_of(points: list[tuple[float, float]]) -> Ring:
    return np.array(points, np.float64)


def area(ring: Ring) -> float:
    """By the shoelace, of row and column."""
    y, x = ring.T
    return float(abs((y * np.roll(x, -1) - np.roll(y, -1) * x).sum()) / 2)


@given(mask=masks)
def test_polygons_are_the_mask_again(mask: NDArray[np.bool_]) -> None:
    again = np.zeros_like(mask)
    for rings in polygons_of(mask):
        again |= filled(rings, mask.shape)  # type: ignore[arg-type]
    assert np.array_equal(again, mask)


@given(mask=masks)
def test_a_piece_is_its_outline_and_its_holes(mask: NDArray[np.bool_]) -> None:
    pieces = list(polygons_of(mask))
    assert len(pieces) == label(mask, connectivity=1).max()
    assert sum(2 - len(rings) for rings in pieces) == euler_number(mask, connectivity=1)
    for outline, *holes in pieces:
        for hole in holes:
            assert area(hole) < area(outline)
            assert points_in_poly(hole, outline).all()


@given(mask=masks)
def test_outlines_keep_to_the_edges_of_cells(mask: NDArray[np.bool_]) -> None:
    """Half-way between centres; a corner is cut by an eighth of a cell, and no point lies on a straight line."""
    for rings in polygons_of(mask):
        for ring in rings:
            assert np.isin(np.mod(ring, 0.5), 0).all()
            before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
            assert (before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]).all()
        assert abs(area(rings[0]) - sum(map(area, rings[1:])) - filled(rings, mask.shape).sum()) <= (  # type: ignore[arg-type]
            sum(map(len, rings)) / 8
        )


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), corners=st.integers(3, 9))
def test_filling_is_that_of_scikit_image(seed: int, corners: int) -> None:
    """Star-shaped polygons with corners anywhere, partly outside: no centre is on an edge."""
    random = np.random.default_rng(seed)
    angles, reach = np.sort(random.uniform(0, 2 * np.pi, corners)), random.uniform(1, 14, corners)
    ring = np.stack([9 + reach * np.sin(angles), 11 + reach * np.cos(angles)], 1)
    centres = np.argwhere(np.ones((18, 22))) + 0.5
    assert np.array_equal(filled([ring], (18, 22)).ravel(), points_in_poly(centres, ring))


def test_polygons_that_share_an_edge_share_no_cell() -> None:
    """The edge runs through centres; each of those is in one of the two."""
    left = filled([ring_of([(0, 0), (0, 2.5), (6, 4.5), (6, 0)])], (6, 6))
    right = filled([ring_of([(0, 2.5), (0, 6), (6, 6), (6, 4.5)])], (6, 6))
    assert not (left & right).any()
    assert (left | right).all()


@settings(max_examples=40, deadline=None)
@given(
    mask=arrays(np.bool_, (15, 20)), synthetic=st.booleans(),
    pixel=st.sampled_from([(0.25, 0.25), (0.2527, 0.2527), (0.5, 0.52)]),
)  # fmt: skip
def test_out_and_in_again_on_a_slide(
    tmp_path_factory: pytest.TempPathFactory,
    slide: Slide,
    mask: NDArray[np.bool_],
    synthetic: bool,
    pixel: tuple[float, float],
) -> None:
    from dataclasses import replace

    slide = replace(slide, pixel=pixel)
    path = tmp_path_factory.mktemp("out") / "s.geojson"
    path.write_text(
        to_geojson(Tissue(mask, slide.grid.at(PITCH)), pixel, synthetic=synthetic, about={"slide": "s.tif"})
    )
    again = read_outlines(path, slide)
    assert again.grid == slide.grid.at(PITCH)
    assert np.array_equal(again.mask, mask)
    said = json.loads(path.read_text())
    assert said["wsi_brush"] == {"slide": "s.tif", "synthetic": synthetic}
    assert all(feature["properties"]["synthetic"] is synthetic for feature in said["features"])
    assert all(feature["properties"]["name"].startswith("SYNTHETIC") is synthetic for feature in said["features"])


def test_geojson_is_what_qupath_reads() -> None:
    """RFC 7946: x before y, closed rings, outlines counter-clockwise and holes clockwise (y up)."""
    mask = np.ones((5, 4), np.bool_)
    mask[2, 1] = False
    text = to_geojson(Tissue(mask, Grid(8.0, 10, 0, 5, 4)), (0.5, 0.5), synthetic=False, about={})
    (feature,) = json.loads(text)["features"]
    assert feature["type"] == "Feature"
    assert feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tissue"
    assert feature["geometry"]["type"] == "Polygon"
    outline, hole = (np.array(ring) for ring in feature["geometry"]["coordinates"])
    assert outline[0].tolist() == outline[-1].tolist()
    assert outline.min(0).tolist() == [0, 160]  # 16 level-0 pixels a cell, from row 10
    assert outline.max(0).tolist() == [64, 240]
    assert hole.mean(0)[0] == pytest.approx(24, abs=4)

    def turn(ring: NDArray[Any]) -> float:
        x, y = ring.T
        return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())

    assert turn(outline) > 0 > turn(hole)


SQUARE = [[[0, 0], [320, 0], [320, 320], [0, 320], [0, 0]], [[64, 64], [64, 128], [128, 128], [128, 64], [64, 64]]]
FAR = [[[320, 320], [640, 320], [640, 480], [320, 480], [320, 320]]]


@pytest.mark.parametrize(
    "value",
    [
        {"type": "FeatureCollection", "features": [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": SQUARE}, "properties": {}},
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": FAR}, "properties": None},
        ]},
        [{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [SQUARE, FAR]}}],
        {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [FAR, SQUARE]}},
        {"type": "MultiPolygon", "coordinates": [SQUARE, FAR, SQUARE]},
        {"type": "GeometryCollection", "geometries": [
            {"type": "Polygon", "coordinates": FAR}, {"type": "Polygon", "coordinates": SQUARE},
        ]},
    ],
)  # fmt: skip
def test_every_shape_of_geojson_is_read(tmp_path: Path, slide: Slide, value: Any) -> None:
    path = tmp_path / "s.geojson"
    path.write_text(json.dumps(value))
    expected = np.zeros((15, 20), np.bool_)
    expected[:10, :10] = True
    expected[2:4, 2:4] = False
    expected[10:, 10:] = True
    assert np.array_equal(read_outlines(path, slide).mask, expected)


def test_no_polygon_is_no_tissue(tmp_path: Path, slide: Slide) -> None:
    path = tmp_path / "s.geojson"
    path.write_text('{"type": "FeatureCollection", "features": []}')
    assert read_outlines(path, slide).fraction == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no GeoJSON that can be read"),
        ("[" * 100_000, "no GeoJSON that can be read"),
        ("3", "int in place of a feature"),
        ('{"type": "Point", "coordinates": [1, 2]}', "holds a Point; expected polygons"),
        ('{"type": "Feature", "geometry": null}', "no GeoJSON"),
        ('{"type": "Polygon"}', "holds a Polygon"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}', "at least three points"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [5, "x"]]]}', "at least three points"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [5, 1e999]]]}', "at least three points"),
        ('{"type": "Polygon", "coordinates": [7]}', "at least three points"),
        ('{"type": "Polygon", "coordinates": []}', "without a ring"),
        ('{"type": "Polygon", "coordinates": [[[900, 0], [990, 0], [900, 90]]]}', r"s\.tif \(640 x 480 pixels\)"),
    ],
)
def test_what_is_no_tissue_is_refused_in_one_line(tmp_path: Path, slide: Slide, text: str, said: str) -> None:
    path = tmp_path / "s.geojson"
    path.write_text(text)
    with pytest.raises(SlideError, match=said) as error:
        read_outlines(path, slide)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_outlines_are_found_by_the_slides_name(tmp_path: Path) -> None:
    path = tmp_path / "a.b.geojson"
    path.write_text("{}")
    assert find_outlines(tmp_path, "a.b") == path
    assert find_outlines(path, "anything") == path
    with pytest.raises(SlideError, match=r"c\.geojson: no such file"):
        find_outlines(tmp_path, "c")
    before = outlines_digest(path)
    path.write_text("{ }")
    assert outlines_digest(path) != before
    with pytest.raises(SlideError, match="cannot be read"):
        outlines_digest(tmp_path)
