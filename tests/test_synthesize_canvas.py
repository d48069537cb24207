"""A canvas to a pyramid: the words, what it says of itself, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import TileStatistics
from numpy.typing import NDArray

from wsi_brush.brush import Brush, save_brush
from wsi_brush.canvas import Canvas, Stroke
from wsi_brush.errors import UsageError
from wsi_brush.grid import Grid
from wsi_brush.ink import pick_ink
from wsi_brush.paint import paint_canvas
from wsi_brush.progress import StoppedError
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.stream import read_plane
from wsi_brush.synthesize import as_pixels, save_painted, synthesize_canvas

GRID, ENCODER = Grid(0.5, 48, 32, 160, 200), TileStatistics()
PAINTING = Painting(seed=2, steps=5, guidance=1.0, mpp=4.0)  # the pitch is the canvas's


@pytest.fixture(scope="module")
def canvas(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strokes of one ink, one of the eraser, saved."""
    ink = pick_ink(open_slide(tissue_slide), (260.0, 250.0), encoder=ENCODER)
    drawn = Canvas.empty(GRID, encoder=ENCODER)
    drawn.add(Stroke(ink, ((60, 50), (80, 90)), 150))
    drawn.add(Stroke(ink, ((60, 50),), 60, 0.5))
    drawn.add(Stroke(None, ((30, 20),), 90))
    target = tmp_path_factory.mktemp("canvas") / "drawn.zarr"
    drawn.save(target)
    return target


@pytest.fixture
def words(words: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Those of `synthesize`."""
    return partial(words, "synthesize")


def pixels_of(path: Path) -> NDArray[np.uint8]:
    slide = open_slide(path)
    return slide.read(slide.grid)


@pytest.mark.usefixtures("one_thread")
def test_it_paints_the_maps_of_the_canvas_and_says_so(
    canvas: Path, brush: Brush, tmp_path: Path, words: Callable[..., tuple[int, str, str]]
) -> None:
    save_brush(brush, tmp_path / "small.brush")
    target, drawn = tmp_path / "new.ome.zarr", Canvas.load(canvas)
    command = ("--canvas", canvas, "--brush", tmp_path / "small.brush", "--steps", 5, "--guidance", 1, "--seed", 2)
    code, out, _ = words(*command, "-o", target, "--json")
    assert code == 0
    said = json.loads(out)
    assert (said["canvas"], said["strokes"], said["height"], said["mpp"]) == (drawn.fingerprint, 3, 160, 0.5)
    about: Any = zarr.open_group(target, mode="r").attrs.asdict()["wsi_brush"]
    assert about["canvas"] == {"fingerprint": drawn.fingerprint, "strokes": 3}
    assert (about["synthetic"], about["encoder"], about["mpp"], "reference" in about) == (
        True,
        "statistics",
        0.5,
        False,
    )
    plane = paint_canvas(brush, drawn.maps(), GRID, replace(PAINTING, mpp=0.5))
    np.testing.assert_array_equal(pixels_of(target), as_pixels(read_plane(plane, Grid(1.0, 0, 0, *GRID.shape))))
    code, out, _ = words(*command, "-o", tmp_path / "second.ome.zarr")
    assert f"canvas {drawn.fingerprint}, 3 strokes, seed 2" in out
    code, _, err = words(*command, "-o", target)
    assert (code, "exists" in err) == (4, True)
    code, out, _ = words(*command, "-o", tmp_path / "third.ome.zarr", "--dry-run")
    assert (code, (tmp_path / "third.ome.zarr").exists()) == (0, False)
    assert "160 x 200 pixels at 0.5 µm" in out
    assert "row 48, column 32" in out


@pytest.mark.usefixtures("one_thread")
def test_stopped_it_goes_on_with_the_same_bytes(canvas: Path, brush: Brush, tmp_path: Path) -> None:
    one, other = tmp_path / "one.ome.zarr", tmp_path / "other.ome.zarr"
    calls: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        synthesize_canvas(canvas, one, PAINTING, brush=brush, tell=stop)
    assert not one.exists()
    first: list[int] = []
    done = synthesize_canvas(
        Canvas.load(canvas), one, PAINTING, brush=brush, tell=lambda what, done, total: first.append(done)
    )
    assert first[0] > calls[0]
    assert (done.region, done.shape, done.cosine) == (None, GRID.shape, {})
    synthesize_canvas(canvas, other, PAINTING, brush=brush)
    np.testing.assert_array_equal(pixels_of(one), pixels_of(other))


def test_what_was_painted_part_by_part_says_so(canvas: Path, brush: Brush, tmp_path: Path) -> None:
    drawn, target = Canvas.load(canvas), tmp_path / "new.ome.zarr"
    pixels = np.random.default_rng(0).integers(0, 256, (*GRID.shape, 3), np.uint8)
    save_painted(drawn, pixels, target, PAINTING, brush=brush)
    np.testing.assert_array_equal(pixels_of(target), pixels)
    about: Any = zarr.open_group(target, mode="r").attrs.asdict()["wsi_brush"]
    assert (about["synthetic"], about["repainted"], about["mpp"], about["seed"]) == (True, True, 0.5, 2)
    with pytest.raises(UsageError, match=r"pixels are uint8 \(9, 200, 3\)"):
        save_painted(drawn, pixels[:9], tmp_path / "other.ome.zarr", PAINTING, brush=brush)


def test_a_brush_for_another_encoder_is_one_line(
    canvas: Path, brush: Brush, tmp_path: Path, words: Callable[..., tuple[int, str, str]]
) -> None:
    other = replace(brush, about=brush.about | {"encoder": "uni", "fingerprint": "1234"})
    with pytest.raises(UsageError, match=r"follows embeddings of uni \(1234\), the canvas has those of statistics"):
        synthesize_canvas(canvas, tmp_path / "new.ome.zarr", PAINTING, brush=other)
    code, out, err = words("--canvas", canvas, "-o", tmp_path / "new.ome.zarr")
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert "follows embeddings of bundled" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--ref", "a.svs"], 1, "--ref and --canvas exclude each other"),
        (["--size", "512"], 1, "--size: a canvas has its own"),
        (["--region", "0,0,9,9"], 1, "--region: is for a reference, and a canvas has none"),
        (["--canvas", "nowhere.zarr"], 4, "nowhere.zarr: no such folder"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    canvas: Path, tmp_path: Path, words: Callable[..., tuple[int, str, str]], arguments: list[str], code: int, line: str
) -> None:
    given = arguments if "--canvas" in arguments else ["--canvas", str(canvas), *arguments]
    found, out, err = words(*given, "-o", tmp_path / "new.ome.zarr")
    assert (found, out, len(err.strip().splitlines())) == (code, "", 1)
    assert line in err
