"""What is compared stands where there is tissue, shares no pixel where it must not, and goes through the same codec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid
from hypothesis import given
from hypothesis import strategies as st

from wsi_brush.control import Descriptor
from wsi_brush.errors import SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.progress import Told
from wsi_brush.samples import (
    Codec,
    Field,
    blocks,
    by_tile,
    common_pitch,
    elsewhere,
    embed_spots,
    field_of,
    halves,
    read_spots,
    shows,
    slide_halves,
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

    @pytest.mark.parametrize("mpp", [0.4952, 0.5, 0.5044])
    def test_a_region_that_is_rounded_to_pixels_has_all_its_squares(
        self, slide: Slide, tmp_path: Path, mpp: float
    ) -> None:
        """A canvas of 512 pixels of 0.5 µm, on slides whose pixels are not of that size."""
        other = open_slide(copied(slide, tmp_path / "other.tif"), force_mpp=mpp)
        side = round(512 * 0.5 / mpp)
        field = field_of(other, Grid(mpp, 300, 280, side, side))
        assert len(spots_of([field], 0.5, 128, stride=1.0)) == 16

    def test_no_square_reaches_beyond_its_slide(self, slide: Slide, tmp_path: Path) -> None:
        field = field_of(open_slide(copied(slide, tmp_path / "short.tif", Grid(0.5, 256, 256, 511, 512))))
        assert len(spots_of([field], 0.5, 128, stride=1.0)) == 3 * 4

    def test_all_are_read_at_a_pitch_at_which_they_lose_alike(self, slide: Slide, tmp_path: Path) -> None:
        path = copied(slide, tmp_path / "other.tif")

        def at(*mpps: float, synthetic: bool = False) -> list[Slide]:
            return [replace(open_slide(path, force_mpp=mpp), synthetic=synthetic) for mpp in mpps]

        for real, other, expected in (
            (at(0.5), at(0.5), 0.5),
            (at(0.25, 0.2528, 0.263), at(0.5), 0.5),
            (at(0.25), at(0.25), 0.5),
            (at(0.45), at(0.45), 0.5),
            (at(1.0), at(0.5), 1.0),
            (at(0.5), at(0.5002), 0.5002),
            (at(0.5044), at(0.5044), 0.5044),
            (at(0.5044), at(0.5), 2**0.5 * 0.5044),
            (at(0.5044, 0.25), at(0.5, synthetic=True), 0.5),  # paintings show what is read at theirs
            (at(2.0), at(0.5, synthetic=True), 2.0),
            (at(0.25), at(1.0, synthetic=True), 1.0),
        ):
            assert common_pitch(real, other, 0.5) == pytest.approx(expected), (real, other)

    def test_halves_of_whole_slides_are_of_many(self) -> None:
        even = [square_field(f"{k}", 0, 0, 256) for k in range(9)]
        parts = slide_halves(even, spots_of(even, 0.5, 128))
        assert parts is not None
        assert sorted(map(len, parts)) == [36, 45]
        assert slide_halves(even[:7], spots_of(even[:7], 0.5, 128)) is None
        large = [square_field("large", 0, 0, 2048), *even[:7]]
        assert slide_halves(large, spots_of(large, 0.5, 128)) is None  # it would be a half alone

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

    mpp, grid = 0.5, Grid(0.5, 0, 0, 2**20, 2**20)


def square_field(path: str, top: int, left: int, side: int) -> Field:
    """Tissue everywhere in a square of a made slide."""
    mask = np.ones((-(-side // 16), -(-side // 16)), np.bool_)
    return Field(path, _Blank(path), Grid(0.5, top, left, side, side), mask)  # type: ignore[arg-type]


def test_halves_of_fields_that_overlap_share_no_pixel() -> None:
    fields = [square_field("one", 0, 0, 512), square_field("one", 200, 130, 512), square_field("two", 200, 130, 512)]
    spots = spots_of(fields, 0.5, 64)
    seen = np.zeros((2, 2, 1024, 1024), np.bool_)
    for half, part in enumerate(halves(fields, spots)):
        assert {spots[number].field for number in part} == {0, 1, 2}
        for number in part:
            index, grid = spots[number]
            seen[half, index // 2, grid.top : grid.bottom, grid.left : grid.right] = True
    assert not (seen[0] & seen[1]).any()


@pytest.mark.parametrize("paths", [["one"] * 6, list("abcdef")])
def test_fields_of_one_spot_go_to_both_halves(paths: list[str]) -> None:
    fields = [square_field(path, 100 * k, 0, 100) for k, path in enumerate(paths)]
    spots = spots_of(fields, 0.5, 64, stride=1.0)
    assert halves(fields, spots) == ([0, 2, 4], [1, 3, 5])
    # the same field again is in the same half
    assert halves([fields[0]] * 3, [spots[0]._replace(field=k) for k in range(3)]) == ([0, 1, 2], [])


def test_fields_that_overlap_stay_together() -> None:
    """Also through a third one."""
    fields = [square_field("one", 0, left, 128) for left in (0, 240, 96)] + [square_field("two", 0, 0, 128)]
    spots = spots_of(fields, 0.5, 128)
    assert [spot.field for spot in spots] == [0, 1, 2, 3]
    assert halves(fields, spots) == ([0, 2, 3], [1])
    fields.insert(3, square_field("one", 0, 200, 128))
    assert halves(fields, spots_of(fields, 0.5, 128)) == ([0, 1, 2, 3], [4])


def test_elsewhere_is_another_place_of_the_same_slide() -> None:
    fields = [square_field("one", 0, 0, 256), square_field("two", 0, 0, 64), square_field("one", 128, 0, 256)]
    spots = spots_of(fields, 0.5, 64)
    others = elsewhere(fields, spots, seed=0)
    for spot, number in zip(spots, others, strict=True):
        other = spots[number]
        same = fields[spot.field].slide.path == fields[other.field].slide.path
        assert same == (spot.field != 1)
        apart = max(abs(spot.grid.top - other.grid.top), abs(spot.grid.left - other.grid.left)) >= 64
        assert apart or not same
    assert others == elsewhere(fields, spots, seed=0) != elsewhere(fields, spots, seed=1)
    assert elsewhere(fields[1:2], spots_of(fields[1:2], 0.5, 64), seed=0) == [-1]


def test_a_spot_is_read_once_for_all_encoders(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    class Larger(TileStatistics):
        name, tile = "larger", 256

    encoders = [TileStatistics(), Larger(), Descriptor()]
    assert [[one.name for one in alike] for alike in by_tile(encoders)] == [["statistics", "descriptor"], ["larger"]]
    fields, read, told = [field_of(slide)], [], []
    spots = spots_of(fields, 0.5, 128, most=70)
    tiles = np.concatenate(list(read_spots(fields, spots, Codec("jpeg:80"))))
    monkeypatch.setattr(Slide, "read", lambda one, grid, read_=Slide.read: read.append(grid) or read_(one, grid))
    count = Told(lambda *said: told.append(said), "embedding", len(spots))
    found = embed_spots(fields, spots, [encoders[0], encoders[2]], Codec("jpeg:80"), count)
    assert read == [spot.grid for spot in spots]
    assert told == [("embedding", 64, len(spots)), ("embedding", len(spots), len(spots))]
    for vectors, encoder in zip(found, (encoders[0], encoders[2]), strict=True):
        assert np.array_equal(vectors, encoder(tiles).astype(np.float64))


def test_neighbours_are_of_one_block(slide: Slide) -> None:
    field = field_of(slide)
    spots = spots_of([field, field], 0.5, 64)
    numbers = blocks([field, field], spots)
    assert len(numbers) == len(spots)
    for one, number in list(zip(spots, numbers, strict=True))[::37]:
        for other, its in zip(spots, numbers, strict=True):
            same = all(getattr(one.grid, edge) // 256 == getattr(other.grid, edge) // 256 for edge in ("top", "left"))
            assert same == (number == its)


def test_one_place_of_two_slides_is_two_blocks() -> None:
    fields = [square_field(path, 0, 0, 512) for path in ("one", "two", "one")]
    spots = spots_of(fields, 0.5, 64)
    one, two, again = np.split(blocks(fields, spots, wide=4), 3)
    assert len(set(one)) == len(set(two)) == 4
    assert set(one).isdisjoint(two)
    assert np.array_equal(one, again)


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
