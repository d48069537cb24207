"""Which slides stand on which side, and which of them follow one another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_ome_zarr, write_pyramid

from wsi_brush.commit import staged
from wsi_brush.embed import slide_fingerprint
from wsi_brush.grid import Grid
from wsi_brush.pyramid import Pyramid
from wsi_brush.samples import blocks, spots_of
from wsi_brush.sides import Pair, open_all, open_sides, painted_after
from wsi_brush.slide import Slide, open_slide


@pytest.fixture(scope="module")
def slide(tissue_slide: Path) -> Slide:
    return open_slide(tissue_slide)


def copied(slide: Slide, path: Path, area: Grid | None = None) -> Path:
    return write_pyramid(path, [slide.read(area or slide.grid)], compression="zlib", compressionargs={})


def painted(slide: Slide, target: Path, place: Grid, *, fingerprint: str | None = None, mpp: float = 0.5) -> Path:
    """A painting that shows what its reference shows; older ones have no fingerprint."""
    region = [round(length * place.mpp / mpp) for length in (place.top, place.left, *place.shape)]
    about = {"synthetic": True, "reference": {"mpp": mpp, "region": region}}
    if fingerprint is not None:
        about["reference"] |= {"fingerprint": fingerprint}  # type: ignore[operator]
    with staged(target, kind="pyramid", about={"format": 1}) as stage:
        pyramid = Pyramid(stage, place, about=about)
        for part in place.tiles(1024):
            pyramid.write(part, slide.read(part))
        pyramid.finish()
    return target


class TestSides:
    def test_of_the_same_size_they_are_pairs(self, slide: Slide, tmp_path: Path) -> None:
        copy = copied(slide, tmp_path / "copy.tif")
        sides = open_sides([slide.path], [copy])
        assert sides.pairs == [Pair(0, 0, 0.0, 0.0)]
        assert sides.notes == ["paired by their order: tissue.tif with copy.tif"]
        sides = open_sides([slide.path], [copy], by_order=False)
        assert (sides.pairs, sides.paired) == ([], False)
        assert sides.notes == ["1 real and 1 synthetic: not paired, so nothing is said about control"]

    def test_of_another_size_they_are_none(self, slide: Slide, tmp_path: Path) -> None:
        part = copied(slide, tmp_path / "part.tif", Grid(0.5, 256, 256, 512, 512))
        sides = open_sides([slide.path], [part])
        assert sides.pairs == []
        assert sides.notes == ["part.tif: of another size than tissue.tif, so no pair"]

    def test_two_may_follow_one(self, slide: Slide, tmp_path: Path) -> None:
        copies = [copied(slide, tmp_path / name) for name in ("one.tif", "two.tif")]
        sides = open_sides([slide.path, slide.path], copies)
        assert sides.pairs == [Pair(0, 0, 0.0, 0.0), Pair(0, 1, 0.0, 0.0)]
        assert len(sides.real) == 1  # one slide named twice is one slide, and its tiles are no two tiles
        assert sides.notes == ["paired by their order: tissue.tif with one.tif, and 1 more"]

    def test_a_painting_is_looked_at_where_its_reference_has_tissue(self, slide: Slide, tmp_path: Path) -> None:
        blank = write_pyramid(tmp_path / "blank.tif", [np.full((*slide.grid.shape, 3), 250, np.uint8)])
        half = slide.read(slide.grid)
        half[:, : half.shape[1] // 2] = 250
        torn = write_pyramid(tmp_path / "torn.tif", [half], compression="zlib", compressionargs={})
        sides = open_sides([slide.path] * 2, [blank, torn])
        real, synthetic = sides.spots(0.5, 64)
        assert [spot.grid for spot in synthetic[::2]] == [spot.grid for spot in real]
        assert [spot.field for spot in synthetic] == [0, 1] * len(real)
        assert "blank.tif: no tissue; is it H&E, and is its pixel size right?" in sides.notes
        assert len(sides.spots(0.5, 64, most=9)[1]) == 9
        assert not open_sides([slide.path], [blank], by_order=False).spots(0.5, 64)[1]

    def test_one_slide_is_one_however_its_name_is_spelt(
        self, slide: Slide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copies = [copied(slide, tmp_path / name) for name in ("one.tif", "two.tif")]
        monkeypatch.chdir(slide.path.parent)
        sides = open_sides([slide.path, Path(slide.path.name)], copies)
        assert len(sides.real) == 1
        sides = open_sides([slide.path] * 2, copies[:1] * 2)
        assert "one.tif: given more than once, and counted as often" in sides.notes

    def test_real_slides_after_which_nothing_was_painted_are_left_out(self, slide: Slide, tmp_path: Path) -> None:
        """They would take the places at which paintings are looked at."""
        place = Grid(0.5, 320, 256, 384, 384)
        followed = painted(slide, tmp_path / "p.ome.zarr", place, fingerprint=slide_fingerprint(slide.path)[:16])
        other = write_pyramid(tmp_path / "other.tif", [slide.read(slide.grid)[::-1]])
        sides = open_sides([other, slide.path], [followed])
        assert [one.name for one in sides.real] == ["tissue.tif"]
        assert sides.notes == ["other.tif: left out, as nothing was painted after it"]
        real, synthetic = sides.spots(0.5, 64)
        assert sides.followed(synthetic) == real
        ours, theirs = sides.groups(real, synthetic)
        assert np.array_equal(ours, blocks(sides.real, real))
        assert np.array_equal(theirs, ours)

    def test_a_coarse_painting_of_all_of_a_slide_ends_where_its_last_pixel_does(
        self, slide: Slide, tmp_path: Path
    ) -> None:
        """1006 pixels of 0.5 µm are 251.5 of 2 µm, and 252 are painted: two of level 0 too many."""
        odd = open_slide(copied(slide, tmp_path / "odd.tif", Grid(0.5, 0, 0, 1006, 1006)))
        name = slide_fingerprint(odd.path)[:16]
        whole = painted(odd, tmp_path / "whole.ome.zarr", Grid(2.0, 0, 0, 252, 252), fingerprint=name)
        more = painted(odd, tmp_path / "more.ome.zarr", Grid(2.0, 0, 0, 254, 254), fingerprint=name)
        assert open_sides([odd], [whole]).pairs == [Pair(0, 0, 0.0, 0.0)]
        sides = open_sides([odd], [more])
        assert (sides.pairs, sides.notes[0]) == ([], "more.ome.zarr: painted after more than odd.tif holds, so no pair")

    def test_a_square_that_is_not_whole_in_a_painting_is_not_looked_at(self, slide: Slide, tmp_path: Path) -> None:
        short = copied(slide, tmp_path / "short.tif", Grid(0.5, 0, 0, slide.grid.height - 1, slide.grid.width))
        sides = open_sides([slide.path], [short])
        assert sides.paired
        real, synthetic = sides.spots(0.5, 64)
        last = slide.grid.height - 64
        assert any(spot.grid.top == last for spot in spots_of(sides.real, 0.5, 64)) == (len(synthetic) < len(real))
        assert all(spot.grid.bottom < slide.grid.height for spot in synthetic)

    def test_of_many_slides_that_are_not_paired_the_halves_are_of_other_slides(
        self, slide: Slide, tmp_path: Path
    ) -> None:
        part = Grid(0.5, 320, 256, 384, 384)
        paths = [copied(slide, tmp_path / f"{k}.tif", part) for k in range(9)]
        for count, paired, whole in ((9, False, True), (9, True, False), (7, False, False)):
            sides = open_sides(paths[:count], paths[:count], by_order=paired)
            spots = sides.spots(0.5, 64)[0]
            halves, by_slide = sides.halves(spots)
            one, other = ({spots[number].field for number in half} for half in halves)
            assert one.isdisjoint(other) == by_slide == whole
        assert {len(one), len(other)} == {7}

    def test_nor_when_there_are_more_of_one(self, slide: Slide, tmp_path: Path) -> None:
        copied(slide, tmp_path / "one.tif")
        copied(slide, tmp_path / "two.tif")
        sides = open_sides([slide.path], [tmp_path])
        assert (len(sides.real), len(sides.synthetic), sides.pairs) == (1, 2, [])
        assert sides.notes == ["1 real and 2 synthetic: not paired, so nothing is said about control"]

    def test_other_pixel_sizes_are_said(self, slide: Slide, tmp_path: Path) -> None:
        half = write_pyramid(tmp_path / "half.tif", [slide.read(Grid(1.0, 0, 0, 512, 512))], mpp=1.0)
        sides = open_sides([slide.path], [half])
        assert sides.pairs == [Pair(0, 0, 0.0, 0.0)]
        assert sides.notes[1:] == ["pixel sizes from 0.5 to 1 µm: all are read at the same pitches"]

    def test_a_painting_knows_its_place(self, slide: Slide, tmp_path: Path) -> None:
        place = Grid(0.5, 320, 256, 384, 448)
        target = painted(slide, tmp_path / "painted.ome.zarr", place)
        said = painted_after(target)
        assert said is not None
        about = {"synthetic": True, "reference": {"mpp": 0.5, "region": [320, 256, 384, 448]}}
        assert json.loads(json.dumps(said)) == about
        sides = open_sides([slide.path], [target])
        (pair,) = sides.pairs
        assert (pair.down, pair.right) == (160.0, 128.0)
        assert sides.real[0].area == place
        for spot in spots_of(sides.synthetic, 0.5, 128, most=5):
            assert np.array_equal(sides.synthetic[0].slide.read(spot.grid), slide.read(pair.there(spot.grid)))
            assert pair.here(pair.there(spot.grid)) == spot.grid
        # a region that ends with the slide may end a pixel beyond it: its corners are rounded to level 0
        edge = painted(slide, tmp_path / "edge.ome.zarr", Grid(0.5, 513, 641, 512, 384))
        (pair,) = open_sides([slide.path], [edge]).pairs
        assert (pair.down, pair.right) == (256.5, 320.5)
        # beside a slide that it cannot have been painted after
        small = copied(slide, tmp_path / "small.tif", Grid(0.5, 256, 256, 400, 500))
        sides = open_sides([small], [target])
        assert sides.pairs == []
        assert sides.notes == ["painted.ome.zarr: not painted after small.tif, so no pair"]

    def test_a_painting_finds_its_reference_in_any_order(self, slide: Slide, tmp_path: Path) -> None:
        """Two slides of one size, three paintings, and a copy of a reference under another name."""
        other = write_pyramid(tmp_path / "other.tif", [slide.read(slide.grid)[::-1]])
        prints = [slide_fingerprint(path)[:16] for path in (slide.path, other)]
        assert prints[0] != prints[1]
        places = [Grid(0.5, top, 256, 384, 384) for top in (320, 330, 340)]
        follows = (1, 0, 1)
        paintings = [
            painted(slide, tmp_path / f"{k}.ome.zarr", places[k], fingerprint=prints[follows[k]]) for k in range(3)
        ]
        renamed = tmp_path / "renamed.tif"
        renamed.write_bytes(slide.path.read_bytes())
        sides = open_sides([renamed, other], paintings)
        assert [one.name for one in sides.real] == ["renamed.tif", "other.tif", "other.tif"]
        assert [(pair.real, pair.synthetic) for pair in sides.pairs] == [(0, 1), (1, 0), (2, 2)]
        assert [sides.real[pair.real].area for pair in sides.pairs] == [places[pair.synthetic] for pair in sides.pairs]
        assert sides.notes == []
        # one that follows neither is no pair, though it is as large as both
        stranger = painted(slide, tmp_path / "stranger.ome.zarr", places[0], fingerprint="0" * 16)
        sides = open_sides([other, slide.path], [paintings[0], stranger])
        assert [(pair.real, pair.synthetic) for pair in sides.pairs] == [(0, 0)]
        assert [one.area for one in sides.real] == [places[0], slide.grid]
        assert sides.notes == ["stranger.ome.zarr: painted after none of the real slides, so no pair"]
        copied(slide, tmp_path / "plain.tif")
        sides = open_sides([other], [*paintings[:1], tmp_path / "plain.tif"])
        assert len(sides.pairs) == 1
        assert sides.notes == ["plain.tif: in no pair, so left out of control"]
        # older ones, and other images, are taken in their order
        old = painted(slide, tmp_path / "old.ome.zarr", places[1])
        sides = open_sides([slide.path, other], [old, paintings[0]])
        assert [(pair.real, pair.synthetic) for pair in sides.pairs] == [(0, 0), (1, 1)]

    def test_a_painting_after_another_pixel_size_is_said(self, slide: Slide, tmp_path: Path) -> None:
        name = slide_fingerprint(slide.path)[:16]
        target = painted(slide, tmp_path / "p.ome.zarr", Grid(0.5, 320, 256, 384, 384), fingerprint=name, mpp=0.25)
        sides = open_sides([slide.path], [target])
        assert sides.pairs == []
        said = "p.ome.zarr: painted after tissue.tif with pixels of 0.25 µm, which now has 0.5, so no pair"
        assert sides.notes[0] == said
        target = painted(slide, tmp_path / "q.ome.zarr", Grid(0.5, 660, 256, 384, 384), fingerprint=name)
        assert open_sides([slide.path], [target]).notes == [
            "q.ome.zarr: painted after more than tissue.tif holds, so no pair"
        ]

    def test_a_forced_pixel_size_is_for_all_but_paintings(self, slide: Slide, tmp_path: Path) -> None:
        name = slide_fingerprint(slide.path)[:16]
        region = Grid(0.25, 200, 180, 640, 640)
        target = painted(
            open_slide(slide.path, force_mpp=0.25), tmp_path / "p.ome.zarr", region, fingerprint=name, mpp=0.25
        )
        plain = write_ome_zarr(tmp_path / "plain.ome.zarr", [slide.read(slide.grid)], version="0.5")
        ours, theirs = open_all([target, plain], force_mpp=0.125)
        assert (ours.mpp, theirs.mpp, theirs.mpp_source) == (0.25, 0.125, "forced")
        sides = open_sides([slide.path], [target], force_mpp=0.25)
        assert len(sides.pairs) == 1
        assert sides.real[0].area.mpp == 0.25
        assert sides.real[0].slide.mpp_source == "forced"
        assert open_all([ours, theirs], force_mpp=1.0) == [ours, theirs]  # opened already

    def test_what_was_not_painted_by_us_says_nothing(self, slide: Slide, tmp_path: Path) -> None:
        assert painted_after(slide.path) is None
        (tmp_path / "folder").mkdir()
        assert painted_after(tmp_path / "folder") is None
