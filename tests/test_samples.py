"""What is compared stands where there is tissue, shares no pixel where it must not, and goes through the same codec."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pyramid
from hypothesis import given
from hypothesis import strategies as st

from wsi_brush.errors import SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.samples import (
    Codec,
    Field,
    Pair,
    blocks,
    field_of,
    halves,
    open_sides,
    painted_after,
    read_spots,
    shows,
    spots_of,
)
from wsi_brush.slide import Slide, open_slide


@pytest.fixture(scope="module")
def slide(tissue_slide: Path) -> Slide:
    return open_slide(tissue_slide)


def copied(slide: Slide, path: Path, area: Grid | None = None) -> Path:
    return write_pyramid(path, [slide.read(area or slide.grid)], compression="zlib", compressionargs={})


class TestSpots:
    @pytest.mark.parametrize(("mpp", "stride"), [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5)])
    def test_they_lie_in_the_field_where_there_is_tissue(self, slide: Slide, mpp: float, stride: float) -> None:
        field = field_of(slide, Grid(0.5, 100, 60, 700, 612))
        found = spots_of([field], mpp, 128, stride=stride)
        area = field.area.at(mpp)
        places = {(spot.grid.top - area.top, spot.grid.left - area.left) for spot in found}
        assert len(places) == len(found) > 4
        assert all(spot.grid.clip(area) == spot.grid for spot in found)
        assert {place % round(128 * stride) for pair in places for place in pair} == {0}
        # every place that is not among them is white
        for row in range(0, area.height - 127, 128):
            for column in range(0, area.width - 127, 128):
                seen = slide.read(Grid(mpp, area.top + row, area.left + column, 128, 128))
                assert ((row, column) in places) == ((seen < 235).any(-1).mean() > 0.05), (row, column)

    def test_some_are_drawn_where_there_are_many(self, slide: Slide) -> None:
        field = field_of(slide)
        every, some, again, others = (
            spots_of([field], 0.5, 64, most=most, seed=seed) for most, seed in ((9999, 0), (50, 0), (50, 0), (50, 1))
        )
        assert len(some) == 50
        assert some == again != others
        assert set(some) < set(every)

    def test_no_tissue_is_said(self, tmp_path: Path) -> None:
        blank = write_pyramid(tmp_path / "blank.tif", [np.full((256, 256, 3), 250, np.uint8)])
        with pytest.raises(SlideError, match=r"blank\.tif: no tissue to be looked at"):
            field_of(open_slide(blank))

    def test_a_coarse_slide_shows_no_detail(self, slide: Slide) -> None:
        field = field_of(slide)
        assert [shows(field, mpp) for mpp in (0.25, 0.49, 0.5, 2.0)] == [False, True, True, True]


@given(
    height=st.integers(256, 1024), width=st.integers(256, 1024), top=st.integers(0, 40), side=st.sampled_from([32, 64])
)
def test_halves_share_no_pixel_and_both_see_everything(height: int, width: int, top: int, side: int) -> None:
    field = Field("made", _Blank(), Grid(0.5, top, 3, height, width), np.ones((height // 16, width // 16), np.bool_))  # type: ignore[arg-type]
    spots = spots_of([field, field], 0.5, side)
    seen = np.zeros((2, 2, height + top, width + 3), np.int8)
    parts = halves([field, field], spots)
    for half, part in enumerate(parts):
        for number in part:
            index, grid = spots[number]
            seen[half, index, grid.top : grid.bottom, grid.left : grid.right] = 1
    assert not (seen[0] & seen[1]).any()
    assert min(map(len, parts)) > 0
    assert 0.3 < seen[0].sum() / seen[1].sum() < 3


def test_fields_of_one_spot_are_divided_whole_and_those_that_overlap_stay_together() -> None:
    slides = [_Blank("one"), _Blank("one"), _Blank("one"), _Blank("other"), _Blank("third")]
    places = [(0, 0), (0, 96), (0, 240), (0, 0), (0, 0)]
    fields = [
        Field("made", slide, Grid(0.5, *place, 128, 128), np.ones((8, 8), np.bool_))  # type: ignore[arg-type]
        for slide, place in zip(slides, places, strict=True)
    ]
    spots = spots_of(fields, 0.5, 128)
    assert [spot.field for spot in spots] == [0, 1, 2, 3, 4]
    assert halves(fields, spots) == ([0, 1, 3], [2, 4])
    assert halves(fields[:2], spots[:2])[1] == []  # all share pixels, so nothing is disjoint


class _Blank:
    """Of a slide, only what finding spots needs."""

    def __init__(self, name: str = "made") -> None:
        self.path = Path(name)

    mpp = 0.5


def test_neighbours_are_of_one_block(slide: Slide) -> None:
    field = field_of(slide)
    spots = spots_of([field, field], 0.5, 64)
    numbers = blocks([field, field], spots)
    assert len(numbers) == len(spots)
    for one, number in list(zip(spots, numbers, strict=True))[::37]:
        for other, its in zip(spots, numbers, strict=True):
            same = all(getattr(one.grid, edge) // 256 == getattr(other.grid, edge) // 256 for edge in ("top", "left"))
            assert same == (number == its)


class TestCodec:
    def test_none_changes_nothing_and_jpeg_a_little(self, slide: Slide) -> None:
        spots = spots_of([field_of(slide)], 0.5, 128, most=9)
        plain, fine, coarse = (
            np.concatenate(list(read_spots([field_of(slide)], spots, Codec(word), batch=4))).astype(int)
            for word in ("none", "jpeg:95", "jpeg:30")
        )
        assert plain.shape == (9, 128, 128, 3)
        assert np.array_equal(plain[4], slide.read(spots[4].grid))
        assert 0 < np.abs(fine - plain).mean() < 0.6 * np.abs(coarse - plain).mean()

    @pytest.mark.parametrize("word", ["png", "jpeg", "jpeg:0", "jpeg:101", "jpeg:x", "jpeg:²", ""])
    def test_what_is_none(self, word: str) -> None:
        with pytest.raises(UsageError, match=f"--codec {word}: expected none, or jpeg:Q"):
            Codec(word)


class TestSides:
    def test_of_the_same_size_they_are_pairs(self, slide: Slide, tmp_path: Path) -> None:
        copy = copied(slide, tmp_path / "copy.tif")
        sides = open_sides([slide.path], [copy])
        assert sides.pairs == [Pair(0, 0, 0.0, 0.0)]
        assert sides.notes == []

    def test_of_another_size_they_are_none(self, slide: Slide, tmp_path: Path) -> None:
        part = copied(slide, tmp_path / "part.tif", Grid(0.5, 256, 256, 512, 512))
        sides = open_sides([slide.path], [part])
        assert sides.pairs == []
        assert sides.notes == ["part.tif: of another size than tissue.tif, so no pair"]

    def test_two_may_follow_one(self, slide: Slide, tmp_path: Path) -> None:
        copies = [copied(slide, tmp_path / name) for name in ("one.tif", "two.tif")]
        sides = open_sides([slide.path, slide.path], copies)
        assert sides.pairs == [Pair(0, 0, 0.0, 0.0), Pair(1, 1, 0.0, 0.0)]
        spots = spots_of(sides.real, 0.5, 64)
        seen = np.zeros((2, 1024, 1024), np.bool_)
        for half, part in enumerate(halves(sides.real, spots)):
            for number in part:
                grid = spots[number].grid
                seen[half, grid.top : grid.bottom, grid.left : grid.right] = True
        assert not (seen[0] & seen[1]).any()  # one slide named twice is one slide

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
        assert sides.notes == ["pixel sizes from 0.5 to 1 µm: all are read at the same pitches"]

    def test_a_painting_knows_its_place(self, slide: Slide, tmp_path: Path) -> None:
        from wsi_brush.commit import staged
        from wsi_brush.pyramid import Pyramid

        place = Grid(0.5, 320, 256, 384, 448)
        target = tmp_path / "painted.ome.zarr"
        about = {"synthetic": True, "reference": {"mpp": 0.5, "region": [320, 256, 384, 448]}}
        with staged(target, kind="pyramid", about={"format": 1}) as stage:
            pyramid = Pyramid(stage, place, about=about)
            for part in place.tiles(1024):
                pyramid.write(part, slide.read(part))
            pyramid.finish()
        said = painted_after(target)
        assert said is not None
        assert json.loads(json.dumps(said)) == about
        sides = open_sides([slide.path], [target])
        (pair,) = sides.pairs
        assert (pair.down, pair.right) == (160.0, 128.0)
        assert sides.real[0].area == place
        for spot in spots_of(sides.synthetic, 0.5, 128, most=5):
            assert np.array_equal(sides.synthetic[0].slide.read(spot.grid), slide.read(pair.there(spot.grid)))
            assert pair.here(pair.there(spot.grid)) == spot.grid
        # beside a slide that it cannot have been painted after
        small = copied(slide, tmp_path / "small.tif", Grid(0.5, 256, 256, 400, 500))
        sides = open_sides([small], [target])
        assert sides.pairs == []
        assert sides.notes == ["painted.ome.zarr: not painted after small.tif, so no pair"]

    def test_what_was_not_painted_by_us_says_nothing(self, slide: Slide, tmp_path: Path) -> None:
        assert painted_after(slide.path) is None
        (tmp_path / "folder").mkdir()
        assert painted_after(tmp_path / "folder") is None
