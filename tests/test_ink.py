"""Inks: what a tile shows, picked up at a place; palettes on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TileStatistics

from wsi_brush.commit import read_manifest
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.ink import THUMBNAIL, Ink, load_palette, pick_ink, save_palette
from wsi_brush.slide import open_slide

PITCHES = (0.5, 2.0)


def picked(tissue_slide: Path, name: str = "pink") -> Ink:
    return pick_ink(open_slide(tissue_slide), (260.0, 250.0), encoder=TileStatistics(), pitches=PITCHES, name=name)


def test_an_ink_is_the_tiles_around_a_place(tissue_slide: Path) -> None:
    ink, slide, encoder = picked(tissue_slide), open_slide(tissue_slide), TileStatistics()
    for mpp, grid in ((0.5, Grid(0.5, 456, 436, 128, 128)), (2.0, Grid(2.0, 66, 61, 128, 128))):
        np.testing.assert_array_equal(ink.vectors[mpp], encoder(slide.read(grid)[None])[0])
    assert ink.thumbnail.shape == (THUMBNAIL, THUMBNAIL, 3)
    mean = slide.read(Grid(0.5, 456, 436, 128, 128)).mean((0, 1))
    assert np.abs(ink.thumbnail.mean((0, 1)) - mean).max() < 2
    assert (ink.encoder, ink.fingerprint, ink.tile, ink.place) == ("statistics", "none", 128, (260.0, 250.0))


@pytest.mark.parametrize(
    ("place", "line"), [((8.0, 8.0), "no tissue"), ((-1.0, 50.0), "not on tissue.tif"), ((50.0, 512.0), "not on")]
)
def test_where_there_is_none(tissue_slide: Path, place: tuple[float, float], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        pick_ink(open_slide(tissue_slide), place, encoder=TileStatistics(), pitches=PITCHES)


def test_glass_is_an_ink_of_pictures_that_are_no_tissue(tissue_slide: Path) -> None:
    ink = pick_ink(open_slide(tissue_slide), (8.0, 8.0), encoder=TileStatistics(), pitches=PITCHES, everywhere=True)
    assert ink.name == "ink at 8, 8 µm"


def test_a_palette_is_what_was_saved(tissue_slide: Path, tmp_path: Path) -> None:
    inks = [picked(tissue_slide), replace(picked(tissue_slide, "other"), place=(1.0, 0.1))]
    save_palette(inks, tmp_path / "two.palette")
    found = load_palette(tmp_path / "two.palette")
    assert [ink.digest for ink in found] == [ink.digest for ink in inks]
    assert found[1].facts() == inks[1].facts()
    assert inks[0].digest != inks[1].digest
    with pytest.raises(RefusedError, match="exists"):
        save_palette(inks, tmp_path / "two.palette")
    save_palette(inks[:1], tmp_path / "two.palette", overwrite=True)
    assert len(load_palette(tmp_path / "two.palette")) == 1


def test_nothing_on_disk_names_the_slide(tissue_slide: Path, tmp_path: Path) -> None:
    save_palette([picked(tissue_slide)], tmp_path / "one.palette")
    for file in (tmp_path / "one.palette").rglob("*"):
        assert file.is_dir() or b"tissue.tif" not in file.read_bytes(), file


def test_what_is_no_palette_is_refused(tissue_slide: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such folder"):
        load_palette(tmp_path / "none")
    (tmp_path / "plain").mkdir()
    with pytest.raises(RefusedError, match="is no palette"):
        load_palette(tmp_path / "plain")
    with pytest.raises(UsageError, match="pick one first"):
        save_palette([], tmp_path / "empty.palette")
    inks = [picked(tissue_slide), replace(picked(tissue_slide), encoder="uni", fingerprint="another")]
    with pytest.raises(UsageError, match=r"statistics, uni"):
        save_palette(inks, tmp_path / "mixed.palette")
    assert not (tmp_path / "mixed.palette").exists()


def test_a_damaged_palette_is_refused(tissue_slide: Path, tmp_path: Path) -> None:
    target = tmp_path / "one.palette"
    save_palette([picked(tissue_slide)], target)
    chunk = next(file for file in (target / "vectors" / "2" / "c").rglob("*") if file.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RefusedError, match=r"damaged \(vectors/2/c/0/0"):
        load_palette(target)
    chunk.write_bytes(whole)
    load_palette(target)
    manifest = read_manifest(target)
    assert manifest is not None
    (target / "wsi-brush.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(RefusedError, match="format 9"):
        load_palette(target)
