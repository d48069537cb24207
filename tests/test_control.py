"""A copy is found to be its own reference everywhere; tiles that are somebody else's are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray

from wsi_brush.control import Descriptor, _ranked, control, retrieval
from wsi_brush.errors import SlideError
from wsi_brush.samples import Codec
from wsi_brush.sides import Sides, open_sides


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """2048 x 2048 pixels in 4 x 4 regions of 512 µm at 1 µm, each of a colour and grain of its own."""
    random = np.random.default_rng(3)
    found = np.zeros((2048, 2048, 3), np.uint8)
    for row in range(4):
        for column in range(4):
            colour = np.array([200, 110, 165]) + random.integers(-25, 25, 3)
            grain = random.normal(0, random.uniform(3, 18), (512, 512, 1))
            found[row * 512 : row * 512 + 512, column * 512 : column * 512 + 512] = (colour + grain).clip(0, 255)
    return found


def sides_of(folder: Path, real: NDArray[np.uint8], other: NDArray[np.uint8]) -> Sides:
    options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}, "mpp": 1.0}
    return open_sides(
        [write_pyramid(folder / "real.tif", [real], **options)],
        [write_pyramid(folder / "other.tif", [other], **options)],
    )


@pytest.mark.parametrize("encoder", [TileStatistics(), Descriptor()], ids=lambda encoder: encoder.name)
def test_a_copy_is_found_and_a_stranger_is_not(
    pixels: NDArray[np.uint8], tmp_path: Path, encoder: TileStatistics | Descriptor
) -> None:
    (tmp_path / "rolled").mkdir()
    copy, rolled = (
        control(sides_of(folder, pixels, other), [encoder], Codec("none"), [1.0], most=64, seed=0)[encoder.name]
        for folder, other in ((tmp_path, pixels), (tmp_path / "rolled", np.roll(pixels, (512, 1024), (0, 1))))
    )
    own = copy["cosine"]["1"]
    assert (own["n"], own["blocks"], own["seed"]) == (64, 16, 0)
    assert own["mean"] > 0.999
    assert own["elsewhere"] == pytest.approx(own["chance"], abs=1e-6)  # the painting is the real tile
    for name in ("elsewhere", "chance"):
        assert -0.5 < own[f"{name}_low"] < own[name] < own[f"{name}_high"] < 0.5
    found = copy["retrieval"]
    assert (found["regions"], found["side"], found["chance"]) == (16, 512.0, 0.0625)
    assert (found["top1"], found["top5"], found["top1_high"]) == (1, 1, 1)
    assert found["top1_low"] == pytest.approx(0.025 ** (1 / 16), abs=1e-5)  # 16 of 16, Clopper and Pearson
    assert found["real"] > 0.9
    assert rolled["cosine"]["1"]["mean"] < 0.5
    assert rolled["cosine"]["1"]["high"] < own["low"]
    assert rolled["retrieval"]["top1"] < 0.3
    worst = rolled["cosine"]["1"]["worst"]
    assert [one["cosine"] for one in worst] == sorted(one["cosine"] for one in worst)
    assert worst[0]["place"] == worst[0]["there"]


def test_what_was_left_blank_is_seen(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    half = pixels.copy()
    half[:, 1024:] = 245
    found = control(sides_of(tmp_path, pixels, half), [TileStatistics()], Codec("none"), [1.0], most=64, seed=0)
    assert found["statistics"]["cosine"]["1"]["n"] == 64
    assert found["statistics"]["cosine"]["1"]["mean"] < 0.8


def test_too_few_is_said(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    sides = sides_of(tmp_path, pixels[:512, :512], pixels[:512, :512])
    found = control(sides, [TileStatistics()], Codec("none"), [1.0, 8.0], most=64, seed=0)["statistics"]
    assert found["cosine"]["8"] == {"n": 0, "missing": "0 tiles of 1024 µm with tissue; 8 are needed"}
    assert found["retrieval"] == {"regions": 1, "missing": "fewer than 4 regions"}


def test_few_tiles_may_overlap(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    """2 x 2 tiles of 8 µm: 3 x 3 that stand half a tile apart; the middle one overlaps with all others."""
    sides = sides_of(tmp_path, pixels, pixels)
    found = control(sides, [TileStatistics()], Codec("none"), [8.0], most=64, seed=0)["statistics"]["cosine"]["8"]
    assert (found["n"], found["mean"]) == (9, 1.0)
    assert found["low"] is found["chance_low"] is None  # 9 tiles, but 4 blocks
    assert found["chance"] < 0.5


def test_encoders_of_one_tile_share_what_is_read(
    pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_brush import samples
    from wsi_brush.samples import read_spots

    read = []

    def counted(fields: Any, spots: Any, *rest: Any, **options: Any) -> Any:
        read.append(len(spots))
        return read_spots(fields, spots, *rest, **options)

    monkeypatch.setattr(samples, "read_spots", counted)
    some = pixels[:1024, :1024]
    sides, both = sides_of(tmp_path, some, some), [TileStatistics(), Descriptor()]
    together = control(sides, both, Codec("none"), [1.0], most=16, seed=0)
    assert read == [16, 16]
    for encoder in both:
        assert together[encoder.name] == control(sides, [encoder], Codec("none"), [1.0], most=16, seed=0)[encoder.name]


def test_paintings_that_follow_one_region_are_found_among_regions_not_among_themselves(
    pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Strangers all: with every painting's reference in the gallery once more, each would find its own."""
    options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}, "mpp": 1.0}
    real = write_pyramid(tmp_path / "real.tif", [pixels], **options)
    strangers = [
        write_pyramid(tmp_path / f"{turn}.tif", [np.roll(pixels, 512 * turn, (0, 1))], **options) for turn in (1, 2, 3)
    ]
    sides = open_sides([real] * 3, strangers)
    (found,) = retrieval(sides, [Descriptor()], Codec("none"), 1.0)
    assert (found["n"], found["regions"], found["chance"]) == (48, 16, 0.0625)
    assert found["top1"] == 0
    (alone,) = retrieval(open_sides([real], strangers[:1]), [Descriptor()], Codec("none"), 1.0)
    assert alone["top1_high"] == found["top1_high"]  # three paintings of a region are no three witnesses


def test_smaller_regions_are_more(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    sides = sides_of(tmp_path, pixels, pixels)
    (large,), (small,) = (retrieval(sides, [Descriptor()], Codec("none"), 1.0, place=place) for place in (512, 384))
    assert (large["regions"], large["side"]) == (16, 512)
    assert (small["regions"], small["side"]) == (25, 384)
    assert small["top1"] == 1


def test_regions_of_many_tiles_are_the_mean_of_sixteen(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    seen: list[int] = []

    class Counted(Descriptor):
        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            seen.append(len(tiles))
            return super().__call__(tiles)

    for place in (1024, 768):
        retrieval(sides_of(tmp_path, pixels, pixels), [Counted()], Codec("none"), 1.0, place=place)
    assert seen == [16] * 16


def test_a_region_of_which_an_encoder_says_no_numbers_is_no_hit(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    class Odd(Descriptor):
        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            found = super().__call__(tiles)
            found[-1, 0] = np.nan
            return found

    with pytest.raises(SlideError, match=r"other\.tif: encoder descriptor gives numbers that are not finite"):
        retrieval(sides_of(tmp_path, pixels, pixels), [Odd()], Codec("none"), 1.0)


def test_numbers_in_which_tissue_hardly_differs_are_not_all_that_is_heard(
    pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    """One number is the same for all of a slide, but for its noise, and another for all of its painting."""

    class Dead(Descriptor):
        dim = Descriptor.dim + 1

        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            found, green = super().__call__(tiles), tiles[..., 1].astype(float).mean((1, 2))
            here = 5 + 1e-6 * green + np.where(tiles[:, 0, 0, 0] == 0, 1.0, 0.0)
            return np.concatenate([found, here[:, None]], 1).astype(np.float32)

    sides, marked = sides_of(tmp_path, pixels, pixels), pixels.copy()
    marked[::128, ::128, 0] = 0  # the corner of every tile
    (tmp_path / "marked").mkdir()
    painted = sides_of(tmp_path / "marked", pixels, marked)
    options: dict[str, Any] = {"most": 256, "seed": 0}
    plain, dead = (
        control(one, [encoder], Codec("none"), [1.0], **options)["descriptor"]["cosine"]["1"]["mean"]
        for one, encoder in ((sides, Descriptor()), (painted, Dead()))
    )
    assert plain > 0.999
    assert dead > 0.95


def test_the_regions_are_drawn_by_the_seed(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    """100 of 128 µm, of which 64 are asked."""
    sides = sides_of(tmp_path, pixels[:1280, :1280], np.roll(pixels[:1280, :1280], 40, (0, 1)))
    options: dict[str, Any] = {"place": 128}
    found = [retrieval(sides, [Descriptor()], Codec("none"), 1.0, seed=seed, **options)[0] for seed in (0, 1, 1)]
    assert [(one["n"], one["seed"]) for one in found] == [(64, 0), (64, 1), (64, 1)]
    assert found[1] == found[2]
    assert found[0] | {"seed": 1} != found[1]


def test_the_sixteen_are_spread_over_the_region(tmp_path: Path) -> None:
    """16 x 16 tiles whose red tells the column and whose blue the row."""
    rows, columns = np.mgrid[:2048, :2048] // 128
    numbered = np.stack([200 + columns, np.full_like(rows, 110), 160 + rows], -1).astype(np.uint8)
    seen: list[list[tuple[int, int]]] = []

    class Noted(TileStatistics):
        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            seen.append([(int(tile[0, 0, 2]) - 160, int(tile[0, 0, 0]) - 200) for tile in tiles])
            return super().__call__(tiles)

    retrieval(sides_of(tmp_path, numbered, numbered), [Noted()], Codec("none"), 1.0, place=1024)
    assert seen[:2] == seen[4:6] == [
        [(row, first + column) for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)] for first in (0, 8)
    ]  # fmt: skip


def test_a_half_of_a_real_region_looks_for_its_other_half(tmp_path: Path) -> None:
    """16 regions of 2 x 2 tiles on whose white squares stands what the next one has on its black ones."""
    colours = np.array([200, 110, 165]) + np.random.default_rng(0).integers(-25, 25, (16, 3))
    region = np.arange(16).reshape(4, 4).repeat(2, 0).repeat(2, 1)
    white = np.indices((8, 8)).sum(0) % 2
    board = colours[(region + white) % 16].astype(np.uint8).repeat(128, 0).repeat(128, 1)
    (found,) = retrieval(sides_of(tmp_path, board, board), [TileStatistics()], Codec("none"), 1.0, place=256)
    assert (found["regions"], found["top1"], found["real"]) == (16, 1, 0)


@pytest.mark.parametrize(("between", "share"), [(2.4, 1), (2.6, 0)])
def test_of_the_five_nearest_the_sixth_is_none(between: float, share: float) -> None:
    """Twelve regions on a circle; what asks stands so many steps beside its own, which is the fifth or the sixth."""

    def tiles(steps: float) -> NDArray[np.float64]:
        turns = 2 * np.pi * (np.arange(12) + steps) / 12
        return np.stack([np.cos(turns), np.sin(turns)], -1)[:, None]

    found = _ranked(tiles(between), tiles(0), range(12))
    assert (found["top1"], found["top5"]) == (0, share)


def test_of_two_regions_that_are_alike_neither_is_found(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    twice = np.concatenate([pixels[:512], pixels[:512]])
    (found,) = retrieval(sides_of(tmp_path, twice, twice), [Descriptor()], Codec("none"), 1.0)
    assert (found["regions"], found["top1"]) == (8, 0)
    assert found["top5"] == 1


def test_what_is_not_whole_in_a_painting_is_not_asked(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    """Of a painting that is a pixel shorter: white would lie there."""
    sides = sides_of(tmp_path, pixels, pixels[:-1])
    found = control(sides, [Descriptor()], Codec("none"), [1.0], most=256, seed=0)["descriptor"]
    assert (found["cosine"]["1"]["n"], found["retrieval"]["regions"]) == (16 * 15, 4 * 3)
