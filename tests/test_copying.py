"""Copies are told from tissue of the same kind, wherever they lie and however turned they are."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pyramid
from numpy.typing import NDArray
from PIL import Image

from wsi_brush import copying
from wsi_brush.coordinates import turned
from wsi_brush.copying import limit
from wsi_brush.errors import SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.nearest import PITCH, SIDE, _density, _inner, detail, nearest, search_seconds, whole
from wsi_brush.samples import Codec
from wsi_brush.sides import Sides, open_sides
from wsi_brush.slide import Slide, open_slide

pytestmark = pytest.mark.usefixtures("one_thread")

Pixels = NDArray[np.uint8]
JPEG = Codec("jpeg:90")


def tissue(height: int, width: int, seed: int) -> Pixels:
    """Nuclei of 5 to 10 µm where chance puts them, on mottled stroma: (height, width, 3) at 2 µm."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: 2 * height, : 2 * width].astype(np.float32)
    grain = random.normal(0, 1, (height // 4, width // 4)).repeat(8, 0).repeat(8, 1)
    nuclei = np.zeros(rows.shape, np.float32)
    for _ in range(height * width // 22):
        row, column, radius = random.uniform(0, 2 * height), random.uniform(0, 2 * width), random.uniform(2.5, 5)
        part = (slice(max(0, int(row) - 6), int(row) + 7), slice(max(0, int(column) - 6), int(column) + 7))
        shade = np.clip(radius - np.hypot(rows[part] - row, columns[part] - column), 0, 1)
        np.maximum(nuclei[part], shade, out=nuclei[part])
    stroma = np.array([226.0, 150.0, 190.0]) + np.array([7.0, 18.0, 11.0]) * grain[..., None]
    colour = stroma + nuclei[..., None] * (np.array([96.0, 58.0, 134.0]) - stroma)
    return np.rint(colour.reshape(height, 2, width, 2, 3).mean((1, 3))).clip(0, 255).astype(np.uint8)


def written(path: Path, pixels: Pixels, mpp: float = PITCH) -> Path:
    return write_pyramid(path, [pixels], mpp=mpp, compression="zlib", compressionargs={})


def coded(pixels: Pixels, quality: int) -> Pixels:
    """As another program would save it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`training.tif` (256 x 320 pixels of 2 µm), and `held.tif` and `other.tif` (640 x 640) of the same kind."""
    found = tmp_path_factory.mktemp("copying")
    written(found / "training.tif", tissue(256, 320, 1))
    written(found / "held.tif", tissue(640, 640, 2))
    written(found / "other.tif", tissue(640, 640, 3))
    return found


def audit(real: Path, synthetic: Path, training: Path | list[Path], **options: Any) -> tuple[dict[str, Any], Sides]:
    sides = open_sides([real], [synthetic])
    paths = training if isinstance(training, list) else [training]
    return copying.copying(sides, paths, JPEG, **{"most": 1000, "seed": 0} | options), sides


# -- the controls ------------------------------------------------------------------------------------------


def test_tissue_of_the_same_kind_is_no_copy(folder: Path) -> None:
    """The negative control."""
    found, sides = audit(folder / "held.tif", folder / "other.tif", folder / "training.tif")
    assert (found["held_out"], found["synthetic"]) == (400, 400)
    assert found["share"]["value"] <= 0.01
    assert found["share"]["floor"] <= 0.01
    assert found["share"]["high"] <= 0.02
    near = found["correlation"]
    assert near["value"] == pytest.approx(near["floor"], abs=0.02)
    assert near["low"] <= near["value"] <= near["high"]
    assert sum(found["counts"]["synthetic"]) == 400
    assert not sides.notes
    scores = [one["correlation"] for one in found["worst"]]
    assert scores == sorted(scores, reverse=True)
    assert found == audit(folder / "held.tif", folder / "other.tif", folder / "training.tif")[0]


@pytest.mark.parametrize("turn", [0, 3, 5, 6])
def test_a_part_of_a_training_slide_is_a_copy(folder: Path, tmp_path: Path, turn: int) -> None:
    """Cut where no lattice is, turned, darker, and saved badly."""
    part = open_slide(folder / "training.tif").read(Grid(PITCH, 37, 51, 192, 224))
    part = coded(np.ascontiguousarray(turned((part * 0.9).astype(np.uint8), turn)), 60)
    found, _ = audit(folder / "held.tif", written(tmp_path / "copy.tif", part), folder / "training.tif")
    assert found["share"]["value"] >= 0.95
    assert found["share"]["low"] >= 0.9
    assert found["share"]["floor"] <= 0.01
    assert found["correlation"]["value"] > 0.85 > 0.5 > found["threshold"] > found["correlation"]["floor"]


# -- where and how it is found -----------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(8))
def test_the_place_and_the_turn_are_the_right_ones(tmp_path: Path, turn: int) -> None:
    """Also between the pixels of 2 µm, where the tile and its place share none."""
    fine = tissue(256, 288, 7).repeat(2, 0).repeat(2, 1)  # 1 µm
    training = open_slide(written(tmp_path / "training.tif", fine, mpp=1.0))
    top, left = 101 + turn, 203 - turn
    around = training.read(Grid(1.0, top, left, 64, 64).pad(32))
    slide = open_slide(written(tmp_path / "tile.tif", np.ascontiguousarray(turned(around, turn)), mpp=1.0))
    everywhere = Grid(PITCH, 0, 0, 256, 288)
    (hit,) = nearest([(slide, Grid(PITCH, 16, 16, SIDE, SIDE))], [(training, everywhere)], JPEG)
    assert (hit.slide, hit.turn, hit.grid.mpp, hit.grid.shape) == (0, turn, 1.0, (64, 64))
    assert abs(hit.grid.top - top) <= 1
    assert abs(hit.grid.left - left) <= 1
    assert hit.correlation > 0.8
    seen = turned(training.read(hit.grid), hit.turn).astype(float)
    assert np.corrcoef(seen.ravel(), slide.read(Grid(1.0, 32, 32, 64, 64)).astype(float).ravel())[0, 1] > 0.9


def test_the_nearest_of_all_slides_is_found(folder: Path, tmp_path: Path) -> None:
    slides = [open_slide(folder / name) for name in ("training.tif", "held.tif", "other.tif")]
    tiles = [(slides[k], Grid(PITCH, 111 + 32 * k, 77, SIDE, SIDE)) for k in range(3)]
    parts = [(slide, Grid(PITCH, 0, 0, 256, 256)) for slide in slides]
    hits = nearest(tiles, parts, Codec("none"))
    assert [hit.slide for hit in hits] == [0, 1, 2]
    assert [(hit.grid.top, hit.grid.left, hit.turn) for hit in hits] == [(222 + 64 * k, 154, 0) for k in range(3)]
    assert min(hit.correlation for hit in hits) > 0.999
    away = nearest(tiles[:1], [(slides[0], Grid(PITCH, 0, 128, 256, 192))], Codec("none"))[0]  # not where it was cut
    assert away.correlation < 0.6
    assert away.grid.left >= 256


def test_what_is_nearly_blank_is_near_to_nothing(folder: Path, tmp_path: Path) -> None:
    """One nucleus on glass lies on any nucleus at the edge of glass."""
    pixels = np.full((256, 256, 3), 245, np.uint8)
    pixels[:, 128:] = tissue(256, 128, 5)
    pixels[100:104, 60:64] = (96, 58, 134)
    slide = open_slide(written(tmp_path / "edge.tif", pixels))
    parts = [(slide, Grid(PITCH, 0, 0, 256, 256))]
    blank, speck, full = nearest([(slide, Grid(PITCH, 84, c, SIDE, SIDE)) for c in (4, 46, 180)], parts, Codec("none"))
    assert blank.correlation < 0.1
    assert speck.correlation < 0.6
    assert full.correlation > 0.999
    nowhere = nearest([(slide, Grid(PITCH, 84, 180, SIDE, SIDE))], [(slide, Grid(PITCH, 0, 0, 31, 256))], Codec("none"))
    assert nowhere[0].correlation == -1


def test_detail_does_not_depend_on_stain_or_light(folder: Path) -> None:
    density = _density(open_slide(folder / "held.tif"), Grid(PITCH, 64, 64, 64, 64), Codec("none"))
    plain, faint = (_inner(detail(one, PITCH), 12) for one in (density, 0.5 * density + 0.2))
    assert np.corrcoef(plain.ravel(), faint.ravel())[0, 1] > 0.99
    assert 0.6 < plain.std() < 1.2
    assert np.abs(detail(np.full((40, 40), 0.7, np.float32), PITCH)).max() < 1e-3


def test_training_slides_are_read_a_little_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory does not grow with them, nor with how many they are."""
    read, largest = Slide.read, [0]

    def watched(self: Slide, grid: Grid) -> Pixels:
        if grid.mpp == PITCH:
            largest.append(grid.height * grid.width)
        return read(self, grid)

    monkeypatch.setattr(Slide, "read", watched)
    slide = open_slide(folder / "held.tif")
    nearest([(slide, Grid(PITCH, 64, 64, SIDE, SIDE))], [(slide, Grid(PITCH, 0, 0, 640, 640))], JPEG)
    assert 256**2 <= max(largest) <= (256 + 32 + 2 * 12) ** 2


# -- what is held out --------------------------------------------------------------------------------------


def test_at_most_one_in_a_hundred_is_above_the_limit() -> None:
    """Of held-out tiles, 95 % sure, whatever their distribution is; one in a thousand where its tail is exponential."""
    random = np.random.default_rng(0)
    for count in (299, 600, 3000):
        flat = np.array([1 - limit(random.random(count)) for _ in range(500)])
        heavy = np.array([1 - 2 / np.pi * np.arctan(limit(abs(random.standard_cauchy(count)))) for _ in range(500)])
        exponential = np.array([np.exp(-limit(random.exponential(size=count))) for _ in range(500)])
        for beyond in (flat, heavy, exponential):
            assert (beyond > 0.01).mean() < 0.07
        assert 0.0005 < exponential.mean() < 0.002


@pytest.mark.parametrize("how", ["named", "copied", "saved anew"])
def test_a_training_slide_is_not_held_out(folder: Path, tmp_path: Path, how: str) -> None:
    real = folder / "training.tif"
    if how == "copied":
        real = Path(shutil.copy(real, tmp_path / "renamed.tif"))
    elif how == "saved anew":
        slide = open_slide(real)
        real = tmp_path / "anew.png"
        Image.fromarray(coded(slide.read(slide.grid), 80)[3:, 5:]).save(real)
    options = {"assume_mpp": PITCH} if how == "saved anew" else {}
    sides = open_sides([real, folder / "held.tif"], [folder / "other.tif"], assume_mpp=options.get("assume_mpp"))
    found = copying.copying(sides, [folder / "training.tif"], JPEG, most=1000, seed=0, **options)
    assert found["held_out"] >= 0.7 * 400  # of the 400 that are drawn, those of the other slide
    assert found["threshold"] < 0.5
    assert any(real.name in note and "held out" in note and "held.tif" not in note for note in sides.notes)
    alone = open_sides([real], [folder / "other.tif"], assume_mpp=options.get("assume_mpp"))
    found = copying.copying(alone, [folder / "training.tif"], JPEG, most=64, seed=0, **options)
    assert found["missing"].startswith("0 held-out")
    assert len(found["worst"]) == 12


def test_what_lies_beyond_what_was_trained_on_is_held_out(folder: Path) -> None:
    found, sides = audit(folder / "held.tif", folder / "training.tif", folder / "held.tif", until=0.5)
    assert found["held_out"] == 200
    assert found["until"] == 0.5
    assert found["share"]["value"] <= 0.02
    assert all(one["there"][1] + one["side"] <= 640 for one in found["worst"])
    assert any("held.tif" in note for note in sides.notes)
    assert any("200 held-out tiles: fewer than the 299" in note for note in sides.notes)


def test_each_place_counts_once(folder: Path) -> None:
    """Two paintings may follow one reference."""
    sides = open_sides([folder / "held.tif"] * 2, [folder / "training.tif"] * 2)
    found = copying.copying(sides, [folder / "other.tif"], JPEG, most=1000, seed=0)
    assert (found["held_out"], found["synthetic"]) == (400, 160)


# -- what cannot be done is said ---------------------------------------------------------------------------


def test_what_cannot_be_searched_is_said(folder: Path, tmp_path: Path) -> None:
    coarse = written(tmp_path / "coarse.tif", tissue(64, 64, 0), mpp=4.0)
    blank = written(tmp_path / "blank.tif", np.full((256, 256, 3), 245, np.uint8))
    small = folder / "training.tif"
    found, sides = audit(folder / "held.tif", small, coarse)
    assert "copies are looked for at 2 µm" in found["missing"]
    assert any("coarse.tif: pixels of 4 µm, too coarse" in note for note in sides.notes)
    assert "no place" in audit(folder / "held.tif", small, blank, most=32)[0]["missing"]
    found, _ = audit(folder / "held.tif", small, [blank, folder / "other.tif"], most=40)
    assert found["training"] == ["blank.tif", "other.tif"]
    assert {one["training"] for one in found["worst"]} == {1}
    assert "missing" in audit(folder / "held.tif", small, folder / "other.tif", most=20)[0]
    (tmp_path / "empty").mkdir()
    for path, error in ((tmp_path / "empty", UsageError), (tmp_path / "none.tif", SlideError)):
        with pytest.raises(error):
            audit(folder / "held.tif", small, path)


def test_progress_and_plan(folder: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    audit(
        folder / "held.tif", folder / "training.tif", [folder / "other.tif"] * 2, most=32,
        tell=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )  # fmt: skip
    assert {what: steps[-1] for what, steps in told.items()} == {
        "looking for copies": (18, 18), "looking at the nearest places": (64, 64),
    }  # fmt: skip
    assert 0 < search_seconds(64, [whole(open_slide(folder / "other.tif"))]) < 60
    assert search_seconds(64, [whole(open_slide(folder / "other.tif"), 0.2)]) > search_seconds(64, [])
