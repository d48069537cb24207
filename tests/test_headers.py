"""What is suspicious in the header of a slide, seen on real files made so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import levels_of, write_aperio, write_lossless, write_ome_zarr, write_pyramid

from wsi_brush import headers, machine
from wsi_brush.commit import staged
from wsi_brush.errors import SlideError, UsageError
from wsi_brush.headers import Examined, Finding, check_cohort, check_slide, shown_bytes
from wsi_brush.info import describe

LEVELS = levels_of((512, 768), (1, 2, 4))
APART = headers._open


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened in this process, for time; those that ask for `apart` begin another."""
    monkeypatch.setattr(headers, "_open", lambda path, one, two: describe(path, assume_mpp=one, force_mpp=two))


@pytest.fixture
def apart(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_open", APART)


def said(examined: Examined, status: str) -> list[str]:
    assert {one.about for one in examined.findings} == {str(examined.path)}
    return [one.said for one in examined.findings if one.status == status]


def test_a_good_slide_is_one_line_with_tiles_time_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = check_slide(write_aperio(tmp_path / "a.svs", LEVELS, mpp="0.25"))
    (line,) = said(found, "OK")
    assert len(found.findings) == 1
    # 128 x 192 µm in tiles of 64, 256 and 1024 µm, of 368 numbers of 2 bytes each
    assert (found.tiles, found.bytes) == (2 * 3 + 1 + 1, 8 * 368 * 2)
    assert found.seconds == pytest.approx(8 / headers.TILES_PER_CORE, abs=0.06)
    assert line == (
        "512 x 768 pixels of 0.25 µm (openslide.mpp-x), 0.128 x 0.192 mm, 3 levels to 1 µm, openslide; "
        "embedding: at most 8 tiles, 1 s, 0.1 MB"
    )


def test_a_slide_without_a_pixel_size_says_what_to_pass(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", LEVELS, mpp=None)
    found = check_slide(path)
    (line,) = said(found, "bad")
    assert "no pixel size in the header; pass it with --assume-mpp" in line
    assert found.tiles is None
    assert said(check_slide(path, assume_mpp=0.5), "OK")
    with pytest.raises(UsageError, match="--assume-mpp 700"):
        check_slide(path, assume_mpp=700)


@pytest.mark.parametrize(
    ("mpp", "status", "line"),
    [
        ("0.027", "bad", "implausible pixel size, 0.027 µm"),
        ("0.06", "look", "0.06 µm is implausible"),
        ("25", "look", "25 µm is implausible"),
        ("1.0", "look", "1 µm is coarser than the tiles at 0.5 µm"),
    ],
)
def test_pixel_sizes_that_no_scanner_makes(tmp_path: Path, mpp: str, status: str, line: str) -> None:
    found = check_slide(write_aperio(tmp_path / "a.svs", LEVELS, mpp=mpp))
    (one,) = said(found, status)
    assert line in one


def test_a_resolution_for_print(tmp_path: Path) -> None:
    """In inches it is no pixel size; in centimetres it passes for one."""
    path = write_lossless(tmp_path / "a.tif", LEVELS[0], mpp=25400 / 300)
    (line,) = said(check_slide(path), "look")
    assert line.startswith("84.67 µm is 300 dots per inch, a resolution for print; pass the true size with --force-mpp")


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    options = {"metadata": None, "tile": (128, 128), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    import tifffile

    for name, down in (("some", 0.26), ("many", 0.4)):
        tifffile.imwrite(tmp_path / f"{name}.tif", LEVELS[0], resolution=(1e4 / 0.25, 1e4 / down), **options)
    (line,) = said(check_slide(tmp_path / "some.tif"), "look")
    assert line.startswith("its pixels are not square, 0.26 x 0.25 µm")
    (line,) = said(check_slide(tmp_path / "many.tif"), "bad")
    assert "not square within 10 %" in line


def test_two_fields_that_differ(tmp_path: Path) -> None:
    """As users of HEST had it: 0.0274 in one field, 0.274 in another."""
    import tifffile

    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.274, "PhysicalSizeY": 0.274}
    options = {"ome": True, "tile": (128, 128), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    for resolution, line in (
        (0.0274, "tiff resolution says 0.0274 µm, ome-xml 0.274; if that is wrong, pass another --force-mpp"),
        (0.25, "ome-xml says 0.274 µm, tiff resolution 0.25; if that is wrong, pass another --force-mpp"),
    ):
        tifffile.imwrite(path, LEVELS[0], metadata=metadata, resolution=(1e4 / resolution,) * 2, **options)
        assert said(check_slide(path), "look") == [line]
    (line,) = said(check_slide(path, force_mpp=0.274), "look")
    assert line == "tiff resolution says 0.25 µm, forced 0.274; if that is wrong, pass another --force-mpp"
    svs = check_slide(write_aperio(tmp_path / "a.svs", LEVELS, mpp="0.0274"), assume_mpp=0.274)
    (line,) = said(svs, "look")
    assert line == "openslide.mpp-x says 0.0274 µm, assumed 0.274; if that is wrong, pass another --assume-mpp"


def test_levels_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "gap.tif", levels_of((512, 1024), (1, 16)))
    (line,) = said(check_slide(path), "look")
    assert line.startswith("levels are missing, one is 16 times coarser than the one before it")
    monkeypatch.setattr(headers, "_GIANT", 500 * 700)
    (line,) = said(check_slide(write_lossless(tmp_path / "one.tif", LEVELS[0], mpp=0.5)), "look")
    assert line.startswith("one level of 0 megapixels, coarse pitches are slow")
    monkeypatch.setattr(headers, "_TOP", 150)
    (line,) = said(check_slide(write_pyramid(tmp_path / "top.tif", LEVELS)), "look")
    assert line.startswith("coarse levels are missing, the last has 128 x 192 pixels")


def test_a_slide_larger_than_glass(tmp_path: Path) -> None:
    """A made header: 50,000 pixels of 2 µm; what is in them does not matter."""
    import zarr

    path = write_ome_zarr(tmp_path / "a.ome.zarr", LEVELS[:1], version="0.5", mpp=2.0)
    group = zarr.open_group(path, mode="r+")
    del group["0"]
    group.create_array("0", shape=(3, 1000, 50000), chunks=(3, 1000, 1000), dtype="uint8", fill_value=255)
    lines = said(check_slide(path), "look")
    assert "100 mm long, a glass slide is 76; if that is wrong, pass the true size with --force-mpp" in lines


def test_what_cannot_be_read_is_bad_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    cut = write_pyramid(tmp_path / "cut.tif", LEVELS)
    cut.write_bytes(cut.read_bytes()[:-2000])
    with staged(tmp_path / "report", kind="report", about={}):
        pass
    for path, line in (
        (tmp_path / "text.svs", "not a slide that can be read"),
        (cut, "truncated"),
        (tmp_path / "report", "a report of wsi-brush"),
        (tmp_path / "none.svs", "no such file"),
    ):
        found = check_slide(path)
        (one,) = said(found, "bad")
        assert line in one
        assert str(tmp_path) not in one
        assert (found.facts, found.tiles) == (None, None)


def test_a_slow_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_SLOW", 0.0)
    (line,) = said(check_slide(write_lossless(tmp_path / "a.tif", LEVELS[0], mpp=0.5)), "look")
    assert "copy it to a faster disk" in line


def test_whatever_opening_raises_stays_with_its_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, *_: Any) -> dict[str, Any]:
        raise SlideError(f"{path}: its reader died")

    monkeypatch.setattr(headers, "_open", opened)
    assert said(check_slide(tmp_path / "a.svs"), "bad") == ["its reader died"]


def test_a_cohort_is_summed_and_held_against_the_disk(tmp_path: Path) -> None:
    one = check_slide(write_lossless(tmp_path / "a.tif", np.zeros((300, 300, 3), np.uint8), mpp=0.5))
    assert one.tiles is not None
    many = [dataclasses.replace(one, seconds=3600.0, bytes=2 * 10**9)] * 3
    bad = Examined(tmp_path / "b.tif", (Finding("bad", "b.tif", "damaged"),))
    assert check_cohort(many, 10**12) == Finding(
        "OK", "slides", "0 bad of 3; embedding takes at most 3.0 h and 6.0 GB of disk"
    )
    assert check_cohort([*many, bad], 10**12).status == "look"
    full = check_cohort(many, 10**9)
    assert full.status == "look"
    assert full.said.endswith("of which 1.0 GB are free; give another --out")


def test_sizes_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [shown_bytes(count) for count in (10, 2.5e6, 3e9)] == ["0.1 MB", "2.5 MB", "3.0 GB"]
    monkeypatch.setattr(machine, "shown_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert headers._threads() <= 8
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert headers._threads() == 1


def test_a_process_of_its_own_finds_the_same(tmp_path: Path, apart: None) -> None:
    path = write_pyramid(tmp_path / "µ a.tif", LEVELS, mpp=None)
    assert check_slide(path, assume_mpp=0.5).facts == describe(path, assume_mpp=0.5)
    assert "--assume-mpp" in said(check_slide(path), "bad")[0]
    with pytest.raises(UsageError, match="--force-mpp 700"):
        check_slide(path, force_mpp=700)
    assert said(check_slide(tmp_path / "none.tif"), "bad")[0].startswith("no such file")
