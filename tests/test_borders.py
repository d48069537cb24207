"""Lattices that are drawn into a picture are found, at their period; where there are none, nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from wsi_brush.borders import crops, gradients
from wsi_brush.likeness import Rows, measured
from wsi_brush.samples import Codec
from wsi_brush.sides import Sides, open_sides

PLAIN = Codec("none")


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """2048 x 2048 pixels that are tissue by their colour: waves and grain."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:2048, :2048].astype(np.float32)
    waves = np.sin(rows / 17 + 3 * np.sin(columns / 90)) + random.normal(0, 1, (2048, 2048)).astype(np.float32)
    return (np.array([200, 110, 165]) + np.array([6, 14, 9]) * waves[..., None]).clip(0, 255).astype(np.uint8)


def drawn(pixels: NDArray[np.uint8], period: int) -> NDArray[np.uint8]:
    """The picture, in blocks of which every second is a little darker."""
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]] // period
    return pixels - (12 * ((rows + columns) % 2)).astype(np.uint8)[..., None]


def ruled(pixels: NDArray[np.uint8], period: int) -> NDArray[np.uint8]:
    """The picture, with lines of 8 pixels on the borders of its blocks."""
    lines = (np.arange(len(pixels)) + 4) % period < 8
    return pixels - (50 * (lines[:, None] | lines[: pixels.shape[1]])).astype(np.uint8)[..., None]


def sides_of(tmp_path: Path, real: NDArray[np.uint8], other: NDArray[np.uint8]) -> Sides:
    options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}}
    return open_sides(
        [write_pyramid(tmp_path / "real.tif", [real], **options)],
        [write_pyramid(tmp_path / "other.tif", [other], **options)],
    )


class TestGradients:
    def test_tiles_are_seen(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        (tmp_path / "tiled").mkdir()
        plain, tiled = (
            {one["period"]: one for one in gradients(sides_of(folder, pixels, other), seed=4)}
            for folder, other in ((tmp_path, pixels), (tmp_path / "tiled", drawn(pixels, 256)))
        )
        assert set(plain) == set(tiled) == {2, 8, 256, 1024}
        for one in (*plain.values(), *tiled.values()):
            on = {256: 63, 1024: 15}.get(one["period"], 64)  # squares that begin with a line
            assert (one["ratio"]["seed"], one["ratio"]["n"], one["squares"]) == (4, [on, on], 64)
            for figure in (one["ratio"], one["rank"]):
                if figure["low"] is not None or figure["value"] not in (0, 1):  # which every draw may be
                    assert figure["low"] <= figure["value"] <= figure["high"]
        assert all(one["ratio"]["value"] == one["ratio"]["floor"] for one in plain.values())
        assert tiled[256]["rank"]["value"] == 1
        assert tiled[256]["ratio"]["low"] > 1.05 * tiled[256]["ratio"]["floor_high"]
        assert tiled[256]["ratio"]["floor_low"] < 1 < tiled[256]["ratio"]["floor_high"]
        assert tiled[2]["ratio"]["value"] == pytest.approx(plain[2]["ratio"]["value"], abs=0.05)

    def test_all_of_a_painting_is_searched_where_there_is_tissue(
        self, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A white picture of 4700 x 4700 pixels with 1200 x 1200 of tissue in its last corner, in blocks or not."""
        (tmp_path / "tiled").mkdir()
        found = []
        for folder, tissue in ((tmp_path, pixels), (tmp_path / "tiled", drawn(pixels, 256))):
            picture = np.full((4700, 4700, 3), 245, np.uint8)
            picture[3500:, 3500:] = tissue[172:1372, 172:1372]
            found.append({one["period"]: one for one in gradients(sides_of(folder, picture, picture), seed=0)})
        plain, tiled = found
        assert set(plain) == {2, 8, 256, 1024, 2048}
        assert [(one["squares"], *one["ratio"]["n"]) for one in plain.values()] == [
            (36, 36, 36), (36, 36, 36), (36, 36, 36), (36, 11, 11), (36, 11, 11)
        ]  # fmt: skip
        assert tiled[256]["ratio"]["low"] > 1.05 > plain[256]["ratio"]["value"]
        assert plain[2048]["ratio"]["value"] == pytest.approx(1, abs=0.1)
        assert tiled[256]["rank"]["value"] == 1 > plain[256]["rank"]["value"]
        monkeypatch.setattr("wsi_brush.borders._PARTS", 16)
        sides = sides_of(tmp_path, pixels, pixels)
        some = [gradients(sides, seed=seed)[1] for seed in (0, 0, 1)]
        assert some[0] == some[1] != some[2]
        assert some[0]["ratio"]["value"] != some[2]["ratio"]["value"]  # the seed decides which squares are drawn
        assert [(one["squares"], *one["ratio"]["n"]) for one in some] == [(64, 16, 16)] * 3

    def test_a_seam_of_one_grey_level_is_seen_beside_a_slide_without_it(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        smooth = gaussian_filter(pixels[:1024, :1024], (2, 2, 0))
        lattice = np.add.outer(*[np.arange(1024) // 8] * 2) % 2
        other = (smooth - lattice[..., None]).astype(np.uint8)
        two, eight, *_ = gradients(sides_of(tmp_path, smooth, other), seed=0)
        assert (two["period"], eight["period"], eight["rank"]["value"]) == (2, 8, 1)
        over = eight["over_real"]
        assert 1 < over["low"] < over["value"] < over["high"]
        assert over["value"] == pytest.approx(eight["ratio"]["value"] / max(eight["ratio"]["floor"], 1), rel=1e-5)

    def test_a_real_slides_own_blocks_beside_the_lines_make_no_lattice(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        some = pixels[:1024, :1024]
        blocks = np.roll(drawn(some, 8), (3, 5), (0, 1))
        for one in gradients(sides_of(tmp_path, blocks, some), seed=0)[:2]:
            assert one["ratio"]["floor"] < 0.99
            assert one["over_real"]["value"] == one["ratio"]["value"] == pytest.approx(1, abs=0.01)

    def test_of_what_is_blank_nothing_is_said(
        self, pixels: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flat = np.full((1024, 1024, 3), (200, 110, 165), np.uint8)
        sides = sides_of(tmp_path, pixels[:1024, :1024], flat)
        for one in gradients(sides, seed=0):
            for name in ("ratio", "rank", "over_real"):
                assert (one[name]["value"], one[name]["low"]) == (None, None)
            assert one["rank"]["floor"] is not None
        monkeypatch.setattr("wsi_brush.borders.COVER", 1.1)
        assert gradients(sides, seed=0)[0] == {
            "slide": "other.tif", "period": 2, "squares": 0, "missing": "no tissue on its lines"
        }  # fmt: skip

    def test_an_interval_stays_within_a_share(self) -> None:
        rows = Rows(np.arange(10), np.arange(10))  # drawn again, fewer of them are distinct
        rank = measured(["rank"], lambda one, _: len(set(one)) / 10, {"value": (rows, rows)}, seed=0)["rank"]
        assert rank["low"] < rank["value"] == rank["high"] == 1

    def test_what_has_no_gradient_is_none_and_no_infinity(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        cells = pixels[:512, :512].repeat(2, 0).repeat(2, 1)
        found = gradients(sides_of(tmp_path, cells, pixels[:1024, :1024]), seed=0)
        assert found[0]["ratio"]["floor"] is None  # all of it on the lines of 2 pixels
        assert found[0]["rank"]["floor"] == 1
        json.dumps(found, allow_nan=False)

    def test_without_a_pair_another_real_slide_is_the_floor(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        sides = sides_of(tmp_path, pixels[:1024, :1024], pixels[:1024, :1280])
        assert sides.pairs == []
        found = gradients(sides, seed=0)
        assert [one["period"] for one in found] == [2, 8, 256]
        assert all(one["ratio"]["floor"] == pytest.approx(1, abs=0.05) for one in found)


class TestCrops:
    def test_tiles_on_borders_are_unlike_others_where_borders_are_seen(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        (tmp_path / "tiled").mkdir()
        some = pixels[:1536, :1536]
        plain, tiled = (
            crops(sides_of(folder, some, other), [TileStatistics()], PLAIN, most=1000, seed=4)["statistics"]
            for folder, other in ((tmp_path, some), (tmp_path / "tiled", ruled(some, 256)))
        )
        assert [(period, one["on"], one["beside"]) for period, one in plain.items()] == [
            ("256", 121 - 36, 36), ("1024", 121 - 100, 100), ("2048", 0, 121)
        ]  # fmt: skip
        for name in ("kernel", "frechet"):
            seen, unseen = tiled["256"][name], plain["256"][name]
            assert (seen["n"], seen["seed"]) == ([36, 85], 4)
            assert unseen["value"] == unseen["floor"] == seen["floor"]
            assert seen["low"] > seen["floor_high"]
        assert "covariance" in plain["1024"]["frechet"]["missing"]
        assert tiled["1024"]["kernel"]["value"] is not None
        assert "on its lines" in plain["2048"]["missing"]

    def test_a_larger_tile_stands_further_apart(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        class Larger(TileStatistics):
            name, tile = "larger", 200

            def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
                assert tiles.shape[1:] == (200, 200, 3)
                return super().__call__(np.ascontiguousarray(tiles[:, 36:164, 36:164]))

        (found,) = crops(sides_of(tmp_path, pixels, drawn(pixels, 512)), [Larger()], PLAIN, most=1000, seed=0).values()
        assert set(found) == {"1024", "2048"}  # 512 apart would be two to a period of 256
        assert found["1024"]["on"] + found["1024"]["beside"] == 7 * 7

    def test_too_few_is_said(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        sides = sides_of(tmp_path, pixels[:512, :512], pixels[:512, :512])
        (found,) = crops(sides, [TileStatistics()], PLAIN, most=1000, seed=0).values()
        assert found["256"] == {
            "on": 5, "beside": 4, "missing": "fewer than 8 tiles on its lines, or beside them"
        }  # fmt: skip

    def test_where_the_real_side_is_smaller_there_is_no_floor(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        sides = sides_of(tmp_path, pixels[:512, :512], pixels[:1536, :1536])
        (found,) = crops(sides, [TileStatistics()], PLAIN, most=1000, seed=0).values()
        assert found["256"]["kernel"]["value"] is not None
        assert found["256"]["kernel"]["floor"] is None
