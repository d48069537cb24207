"""A slide is embedded once, whole or not at all; a bad one costs itself; a tile is the same tile everywhere."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pyramid
from numpy.typing import NDArray
from PIL import Image

from wsi_brush import commit
from wsi_brush.cohort import embed_slides
from wsi_brush.embed import COVER, PITCHES, embed_region, embed_slide, slide_fingerprint
from wsi_brush.errors import MachineError, RefusedError, SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.info import describe
from wsi_brush.interchange import export_store
from wsi_brush.pyramid import Pyramid
from wsi_brush.slide import Slide, open_slide
from wsi_brush.store import EmbeddingStore
from wsi_brush.tissue import find_tissue

WEIGHTS = Path(__file__).parents[1] / "wsi_brush" / "weights"


class ColourEncoder:
    """Mean and spread of each colour: an encoder without weights."""

    name, dim, tile = "colours", 6, 32

    def __init__(self, fingerprint: str = "1") -> None:
        self.fingerprint = fingerprint
        self.batches: list[int] = []

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert tiles.shape[1:] == (32, 32, 3)
        assert tiles.dtype == np.uint8
        self.batches.append(len(tiles))
        pixels = tiles.astype(np.float32)
        return np.concatenate([pixels.mean(axis=(1, 2)), pixels.std(axis=(1, 2))], axis=1)


class BrokenEncoder(ColourEncoder):
    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return super().__call__(tiles) * np.float32(np.inf)


def paint(path: Path, *, seed: int = 0, blank: bool = False) -> Path:
    """A picture of 640 x 500 pixels: a rough pink and purple patch on paper, to be taken at 0.5 µm."""
    generator = np.random.default_rng(seed)
    rgb = np.full((500, 640, 3), 243, np.uint8)
    if not blank:
        spots = generator.random((300, 320)) < 0.2
        rgb[100:400, 60:380] = np.where(spots[..., None], (110, 80, 150), (225, 150, 185))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return paint(tmp_path / "slides" / "a.png")


@pytest.fixture
def slide(picture: Path) -> Slide:
    return open_slide(picture, assume_mpp=0.5)


def test_a_region_has_the_embeddings_of_the_whole(slide: Slide) -> None:
    """The lattice is anchored at the slide, so cells in common are the same, bit for bit, at every pitch."""
    encoder = ColourEncoder()
    whole = embed_region(slide, slide.grid, encoder=encoder)
    region = embed_region(slide, Grid(0.5, 130, 90, 210, 333), encoder=encoder)
    assert tuple(whole) == PITCHES
    for mpp in PITCHES:
        assert whole[mpp].lattice == slide.grid.at(32 * mpp)
        common = region[mpp].lattice.clip(whole[mpp].lattice)
        assert common.height >= 1
        assert common.width >= 1
        ours, theirs = region[mpp].crop(common), whole[mpp].crop(common)
        assert np.array_equal(ours.values, theirs.values, equal_nan=True)
    assert region[0.5].lattice == Grid(16.0, 4, 2, 7, 12)


def test_each_cell_is_the_embedding_of_its_tile(slide: Slide) -> None:
    """Read tile by tile, without windows or batches; cells without tissue are NaN."""
    encoder, tissue = ColourEncoder(), find_tissue(slide)
    for mpp, one in embed_region(slide, slide.grid, encoder=encoder, tissue=tissue).items():
        cover = tissue.cover(one.lattice)
        assert np.array_equal(one.present, cover >= COVER)
        assert one.present.any()
        for row, column in np.argwhere(one.present):
            tile = slide.read(Grid(mpp, int(row) * 32, int(column) * 32, 32, 32))
            assert np.array_equal(one.values[row, column], encoder(tile[None])[0].astype(np.float16))


def test_windows_without_tissue_are_not_read(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    tissue, read, grids = find_tissue(slide), Slide.read, []

    def watch(self: Slide, grid: Grid) -> NDArray[np.uint8]:
        grids.append(grid)
        return read(self, grid)

    monkeypatch.setattr(Slide, "read", watch)
    embed_region(slide, Grid(0.5, 0, 420, 500, 200), encoder=ColourEncoder(), pitches=[0.5], tissue=tissue)
    assert grids == []
    embed_region(slide, slide.grid, encoder=ColourEncoder(), pitches=[0.5], tissue=tissue)
    assert len(grids) == 1
    assert grids[0].width < 400  # the tiles with tissue, not the window


def test_batches_are_full_and_bounded(tissue_slide: Path) -> None:
    encoder = ColourEncoder()
    slide = open_slide(tissue_slide)
    seen: list[tuple[int, int]] = []
    maps = embed_region(slide, slide.grid, encoder=encoder, progress=lambda done, total: seen.append((done, total)))
    tiles = sum(int(one.present.sum()) for one in maps.values())
    assert sum(encoder.batches) == tiles
    assert max(encoder.batches) <= 128
    assert seen[-1] == (tiles, tiles)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_slide_becomes_a_store(picture: Path, tmp_path: Path) -> None:
    report = embed_slide(picture, tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
    assert (report.status, report.mpp, report.exit_code) == ("done", 0.5, 0)
    assert report.store == tmp_path / "out" / "a.zarr"
    assert commit.verify(report.store) == []
    store = EmbeddingStore.open(report.store)
    assert tuple(store.maps) == PITCHES
    assert report.tiles == sum(store.about["tiles"].values()) > 100
    assert store.about["slide"] == {
        "name": "a.png",
        "mpp": 0.5,
        "mpp_source": report.mpp_source,
        "height": 500,
        "width": 640,
    }
    assert store.about["synthetic"] is False
    assert store.about["parameters"]["encoder"] == "colours"
    assert store.tissue.fraction == pytest.approx(store.about["tissue_fraction"], abs=1e-4)
    assert str(tmp_path) not in (report.store / commit.MANIFEST).read_text("utf-8")  # no paths of this machine


def test_a_store_of_a_painted_slide_says_so(picture: Path, tmp_path: Path) -> None:
    source = open_slide(picture, assume_mpp=0.5)
    path = tmp_path / "painted.ome.zarr"
    with commit.staged(path, kind="pyramid", about={}) as stage:
        pyramid = Pyramid(stage, source.grid, about={"seed": 1})
        pyramid.write(source.grid, source.read(source.grid))
        pyramid.finish()
    report = embed_slide(path, tmp_path / "out", encoder=ColourEncoder())
    assert report.store.name == "painted.zarr"
    assert report.mpp == 0.5
    store = EmbeddingStore.open(report.store)
    assert store.about["synthetic"] is True
    original = embed_region(source, source.grid, encoder=ColourEncoder(), pitches=[0.5])[0.5]
    assert np.array_equal(store.maps[0.5].values, original.values, equal_nan=True)  # a slide again, to the bit


def test_again_is_nothing_to_do(picture: Path, tmp_path: Path) -> None:
    first = embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    before = {path: path.stat().st_mtime_ns for path in first.store.rglob("*")}
    encoder = ColourEncoder()
    for overwrite in (False, True):
        report = embed_slide(picture, tmp_path, encoder=encoder, assume_mpp=0.5, overwrite=overwrite)
        assert report.status == "unchanged"
    assert encoder.batches == []
    assert {path: path.stat().st_mtime_ns for path in first.store.rglob("*")} == before


def test_other_parameters_are_refused_with_the_difference(picture: Path, tmp_path: Path) -> None:
    embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    with pytest.raises(RefusedError, match=r"encoder_weights was 1, is 2; mpp was 0\.5, is 0\.4") as error:
        embed_slide(picture, tmp_path, encoder=ColourEncoder("2"), assume_mpp=0.4)
    assert "\n" not in str(error.value)
    report = embed_slide(picture, tmp_path, encoder=ColourEncoder("2"), assume_mpp=0.4, overwrite=True)
    assert report.status == "done"
    assert EmbeddingStore.open(report.store).about["parameters"]["encoder_weights"] == "2"


def test_another_slide_under_the_same_name_is_refused(picture: Path, tmp_path: Path) -> None:
    embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    paint(picture, seed=1)
    with pytest.raises(RefusedError, match="slide was"):
        embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)


def test_a_damaged_store_is_refused_and_can_be_made_again(picture: Path, tmp_path: Path) -> None:
    report = embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    next(path for path in (report.store / "tissue" / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(RefusedError, match="missing or cut short"):
        embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    embed_slide(picture, tmp_path, encoder=ColourEncoder(), assume_mpp=0.5, overwrite=True)
    assert commit.verify(report.store) == []


def test_a_blank_slide_is_a_valid_empty_store(tmp_path: Path) -> None:
    report = embed_slide(paint(tmp_path / "b.png", blank=True), tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    assert (report.status, report.tiles, report.message) == ("empty", 0, "no tissue found")
    store = EmbeddingStore.open(report.store)
    assert store.tissue.fraction == 0
    assert all(not one.present.any() for one in store.maps.values())
    assert np.isnan(store.maps[2.0].read(Grid(2.0, 0, 0, 8, 8))).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (31, 33)])
def test_a_slide_smaller_than_a_tile_is_embedded(tmp_path: Path, shape: tuple[int, int]) -> None:
    Image.fromarray(np.full((*shape, 3), (225, 150, 185), np.uint8)).save(tmp_path / "tiny.png")
    report = embed_slide(tmp_path / "tiny.png", tmp_path, encoder=ColourEncoder(), assume_mpp=0.5)
    assert report.status in ("done", "empty")
    assert EmbeddingStore.open(report.store).maps[8.0].lattice.shape == (1, 1)


def test_a_bad_slide_costs_one_slide(picture: Path, tmp_path: Path) -> None:
    (picture.parent / "b.svs").write_text("no slide")
    paint(picture.parent / "c.png", seed=2)
    reports = embed_slides(
        [picture.parent, tmp_path / "absent.svs"], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5
    )
    assert [(report.path.name, report.status) for report in reports] == [
        ("a.png", "done"),
        ("b.svs", "failed"),
        ("c.png", "done"),
        ("absent.svs", "failed"),
    ]
    for failed in (reports[1], reports[3]):
        assert failed.path.name in failed.message
        assert "\n" not in failed.message
        assert failed.exit_code == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*.zarr")) == ["a.zarr", "c.zarr"]


def test_a_slide_without_pixel_size_fails_alone_and_names_the_cure(picture: Path, tmp_path: Path) -> None:
    (report,) = embed_slides([picture], tmp_path / "out", encoder=ColourEncoder())
    assert report.status == "failed"
    assert "--assume-mpp" in report.message


def test_an_encoder_of_infinities_is_an_error(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="not finite"):
        embed_slide(picture, tmp_path / "out", encoder=BrokenEncoder(), assume_mpp=0.5)
    assert list((tmp_path / "out").iterdir()) == []


def test_same_names_in_two_folders_do_not_collide(picture: Path, tmp_path: Path) -> None:
    other = paint(tmp_path / "others" / "a.png", seed=3)
    reports = embed_slides([picture, other], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in reports] == ["done", "done"]
    assert len({report.store for report in reports}) == 2
    again = embed_slides([other, picture], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in again] == ["unchanged", "unchanged"]


def test_an_output_that_cannot_be_written_to_stops_everything(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError):
        embed_slides([picture], tmp_path / "file", encoder=ColourEncoder(), assume_mpp=0.5)


def test_fingerprints_follow_the_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.svs", tmp_path / "two.svs"
    one.write_bytes(bytes(3 << 20))
    shutil.copy(one, two)
    assert slide_fingerprint(one) == slide_fingerprint(two)
    with two.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"x")
    assert slide_fingerprint(one) != slide_fingerprint(two)
    (tmp_path / "z.zarr").mkdir()
    (tmp_path / "z.zarr" / "zarr.json").write_text("{}")
    before = slide_fingerprint(tmp_path / "z.zarr")
    (tmp_path / "z.zarr" / "chunk").write_text("x")
    assert slide_fingerprint(tmp_path / "z.zarr") != before


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from test_embed import ColourEncoder
from wsi_brush import embed, store
real, count = store.write_array, 0
def write(*arguments):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
store.write_array = write
embed.embed_slide(sys.argv[1], sys.argv[2], encoder=ColourEncoder(), assume_mpp=0.5)
"""


def test_a_killed_run_leaves_nothing_that_looks_done(picture: Path, tmp_path: Path) -> None:
    out, here = tmp_path / "out", Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(picture), str(out), str(here), str(here.parent)]
    run = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    (stage,) = out.glob(f"{commit.STAGE}*")
    assert not (out / "a.zarr").exists()
    assert list((stage / "embeddings").iterdir())  # it had begun to write
    with pytest.raises(RefusedError):
        EmbeddingStore.open(stage)
    report = embed_slide(picture, out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert report.status == "done"
    assert list(out.iterdir()) == [report.store]


@pytest.mark.skipif(not list(WEIGHTS.glob("**/*.safetensors")), reason="no bundled weights in this checkout yet")
def test_the_bundled_encoder_tells_tissues_apart(slide: Slide) -> None:
    from wsi_brush.encoder import load_encoder

    encoder = load_encoder()
    one = embed_region(slide, slide.grid, encoder=encoder, pitches=[0.5])[0.5]
    assert one.values.shape == (*slide.grid.at(encoder.tile * 0.5).shape, encoder.dim)
    vectors = one.values[one.present].astype(np.float64)
    assert np.isfinite(vectors).all()
    assert vectors.std(axis=0).max() > 0


def draw(path: Path, *squares: tuple[int, int, int, int]) -> Path:
    """A GeoJSON of rectangles: top, left, bottom, right in level-0 pixels."""
    rings = [[[left, top], [right, top], [right, bottom], [left, bottom]] for top, left, bottom, right in squares]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}))
    return path


def test_drawn_tissue_takes_the_place_of_what_is_found(picture: Path, tmp_path: Path) -> None:
    drawn = draw(tmp_path / "drawn.geojson", (0, 0, 64, 128), (448, 576, 500, 640))  # on bare paper
    options: dict[str, Any] = {"encoder": ColourEncoder(), "assume_mpp": 0.5}
    report = embed_slide(picture, tmp_path / "out", outlines=drawn, **options)
    store = EmbeddingStore.open(report.store)
    assert store.tissue.mask.sum() == 4 * 8 + 3 * 4  # the centres of the last row of cells are off the slide
    present = np.zeros((16, 20), np.bool_)
    present[:2, :4] = present[14:, 18:] = True
    assert np.array_equal(store.maps[0.5].present, present)
    assert embed_slide(picture, tmp_path / "out", outlines=drawn, **options).status == "unchanged"
    with pytest.raises(RefusedError, match=r"tissue_rules was outlines [0-9a-f]{16}, is 1"):
        embed_slide(picture, tmp_path / "out", **options)
    draw(drawn, (0, 0, 64, 64))
    with pytest.raises(RefusedError, match=r"tissue_rules was outlines"):
        embed_slide(picture, tmp_path / "out", outlines=drawn, **options)


def test_exported_tissue_comes_in_again(picture: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"encoder": ColourEncoder(), "assume_mpp": 0.5}
    found = EmbeddingStore.open(embed_slide(picture, tmp_path / "found", **options).store)
    (tmp_path / "tissue").mkdir()
    export_store(found, tmp_path / "tissue" / "a.geojson", "geojson")
    drawn = EmbeddingStore.open(embed_slide(picture, tmp_path / "drawn", outlines=tmp_path / "tissue", **options).store)
    assert np.array_equal(drawn.tissue.mask, found.tissue.mask)
    for mpp in PITCHES:
        assert np.array_equal(drawn.maps[mpp].values, found.maps[mpp].values, equal_nan=True)


def test_a_folder_of_outlines_has_one_for_each_slide(picture: Path, tmp_path: Path) -> None:
    paint(picture.parent / "b.png", seed=2)
    paint(picture.parent / "c.png", seed=3)
    drawn = tmp_path / "tissue"
    draw(drawn / "a.geojson", (0, 0, 64, 64))
    (drawn / "c.geojson").write_text("nonsense")
    options: dict[str, Any] = {"encoder": ColourEncoder(), "assume_mpp": 0.5}
    reports = embed_slides([picture.parent], tmp_path / "out", outlines=drawn, **options)
    assert [report.status for report in reports] == ["done", "failed", "failed"]
    assert "b.geojson: no such file" in reports[1].message
    assert "c.geojson: no GeoJSON" in reports[2].message
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*.zarr")) == ["a.zarr"]
    with pytest.raises(UsageError, match="the tissue of one slide, for 3"):
        embed_slides([picture.parent], tmp_path / "out", outlines=drawn / "a.geojson", **options)
    with pytest.raises(UsageError, match="no such file or folder"):
        embed_slides([picture], tmp_path / "out", outlines=tmp_path / "absent", **options)


def damage(path: Path, *numbers: int) -> None:
    """Overwrite tiles of the first page of a TIFF with zeros."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        places = [(page.dataoffsets[number], page.databytecounts[number]) for number in numbers]
    with path.open("r+b") as raw:
        for place, size in places:
            raw.seek(place)
            raw.write(bytes(size))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_tile_costs_one_tile(tissue_slide: Path, tmp_path: Path, workers: int) -> None:
    """A tile of the file is 4 x 4 of ours at 0.5 µm, and none at 2 and 8 µm, which are read from other levels."""
    path = Path(shutil.copy(tissue_slide, tmp_path / "a.tif"))
    damage(path, 3 * 8 + 4)
    good = EmbeddingStore.open(embed_slide(tissue_slide, tmp_path / "good", encoder=ColourEncoder()).store)
    report = embed_slide(path, tmp_path / "out", encoder=ColourEncoder(), workers=workers)
    store = EmbeddingStore.open(report.store)
    cells = [[row, column] for row in range(12, 16) for column in range(16, 20)]
    assert (report.status, report.exit_code, report.bad_tiles) == ("done", 0, 16)
    assert "16 tiles could not be read" in report.message
    assert store.about["damaged"]["0.5"]["tiles"] == 16
    assert sorted(store.about["damaged"]["0.5"]["cells"]) == cells
    assert list(store.about["damaged"]) == ["0.5"]
    assert "damaged" not in good.about
    for mpp in PITCHES:
        expected = good.maps[mpp].values.copy()
        if mpp == 0.5:
            expected[tuple(np.array(cells).T)] = np.nan
        assert np.array_equal(store.maps[mpp].values, expected, equal_nan=True)
    assert describe(report.store)["maps"][0]["could_not_be_read"] == 16
    again = embed_slide(path, tmp_path / "out", encoder=ColourEncoder())
    assert (again.status, again.bad_tiles) == ("unchanged", 16)
    for out in ("out", "strict"):
        with pytest.raises(SlideError, match=r"a\.tif: .*(rows 384-416, columns 512-544|16 tiles could not)"):
            embed_slide(path, tmp_path / out, encoder=ColourEncoder(), workers=workers, strict=True)
    assert list((tmp_path / "strict").iterdir()) == []


def test_a_region_with_a_damaged_tile_is_an_error(tissue_slide: Path, tmp_path: Path) -> None:
    """What is painted after it would have a hole that looks like glass."""
    path = Path(shutil.copy(tissue_slide, tmp_path / "a.tif"))
    damage(path, 3 * 8 + 4)
    slide = open_slide(path)
    with pytest.raises(SlideError, match="rows 384-"):
        embed_region(slide, Grid(0.5, 380, 500, 64, 64), encoder=ColourEncoder(), pitches=[0.5])
    embed_region(slide, Grid(0.5, 192, 192, 64, 64), encoder=ColourEncoder(), pitches=[0.5])


def test_a_slide_of_damaged_tiles_fails(tissue_slide: Path, tmp_path: Path) -> None:
    """What cannot be read where tissue is looked for may be tissue."""
    import tifffile

    path = tmp_path / "a.tif"
    with tifffile.TiffFile(tissue_slide) as file:
        write_pyramid(path, [file.pages.first.asarray()])
    damage(path, *range(64))
    (report,) = embed_slides([path], tmp_path / "out", encoder=ColourEncoder())
    assert (report.status, report.exit_code) == ("failed", 3)
    assert "none of its 1092 tiles can be read" in report.message
    assert not list((tmp_path / "out").glob("*a.zarr*"))  # neither a store nor what was begun of it


def test_damage_where_tissue_is_looked_for_costs_what_is_there(tissue_slide: Path, tmp_path: Path) -> None:
    """A slide of one level: its only level is read for the tissue too."""
    import tifffile

    path = tmp_path / "a.tif"
    with tifffile.TiffFile(tissue_slide) as file:
        write_pyramid(path, [file.pages.first.asarray()])
    good = EmbeddingStore.open(embed_slide(path, tmp_path / "good", encoder=ColourEncoder()).store)
    damage(path, 3 * 8 + 4)
    report = embed_slide(path, tmp_path / "out", encoder=ColourEncoder())
    store = EmbeddingStore.open(report.store)
    hole = ~store.maps[0.5].present & good.maps[0.5].present
    assert hole.sum() == store.about["damaged"]["0.5"]["tiles"] == 16
    assert (store.tissue.mask >= good.tissue.mask).all()  # what could not be read may be tissue
    assert (store.tissue.mask != good.tissue.mask).mean() < 0.01
    assert report.bad_tiles == sum(one["tiles"] for one in store.about["damaged"].values()) > 16


SLOW = """
import sys
sys.path[:0] = sys.argv[3:]
from test_embed import ColourEncoder
from wsi_brush import blocks, embed
blocks.SECONDS = 0
class Slow(ColourEncoder):
    def __call__(self, tiles):
        print("batch", flush=True)
        sys.stdin.readline()
        return super().__call__(tiles)
print(embed.embed_slide(sys.argv[1], sys.argv[2], encoder=Slow()).status, flush=True)
"""


def test_a_killed_run_goes_on_at_the_block(tissue_slide: Path, tmp_path: Path) -> None:
    """Killed again and again, each time after a batch: no batch is made twice, and the store is the same."""
    here, out = Path(__file__).parent, tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(tissue_slide), str(out), str(here), str(here.parent)]
    whole = ColourEncoder()
    expected = embed_slide(tissue_slide, tmp_path / "whole", encoder=whole)
    made = 0
    for batches in (1, 1):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
            assert run.stdin is not None
            assert run.stdout is not None
            for _ in range(batches):
                assert run.stdout.readline() == b"batch\n"
                run.stdin.write(b"\n")
                run.stdin.flush()
            assert run.stdout.readline() == b"batch\n"  # what was asked for before is kept
            run.send_signal(signal.SIGKILL)
        made += batches
        assert not (out / expected.store.name).exists()
    rest = ColourEncoder()
    other = ColourEncoder("2")
    with pytest.raises(RefusedError, match=r"encoder_weights 1 -> 2"):
        embed_slide(tissue_slide, out, encoder=other)
    assert other.batches == []
    report = embed_slide(tissue_slide, out, encoder=rest)
    assert rest.batches == whole.batches[made:]
    assert report.tiles == expected.tiles
    for path in expected.store.rglob("*"):
        if path.is_file():
            assert (report.store / path.relative_to(expected.store)).read_bytes() == path.read_bytes()
    assert [path.name for path in out.iterdir()] == [report.store.name]
