"""A side that is the same is as near as the floor; what is blurred, stained otherwise or tiled is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray

from wsi_brush.control import Descriptor
from wsi_brush.distances import Vectors, frechet, overlap
from wsi_brush.errors import SlideError
from wsi_brush.likeness import borders, distribution, measured, see, texture
from wsi_brush.samples import Codec, Sides, open_sides
from wsi_brush.slide import open_slide

PLAIN = Codec("none")


@pytest.fixture(scope="module")
def pixels(tissue_slide: Path) -> NDArray[np.uint8]:
    slide = open_slide(tissue_slide)
    return slide.read(slide.grid)


@pytest.fixture(scope="module")
def full(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """1024 x 1024 pixels of tissue: the middle of the slide, and it turned over."""
    middle = pixels[256:768, 256:768]
    return np.concatenate([np.concatenate([middle, middle[:, ::-1]], 1)] * 2)


def sides_of(tmp_path: Path, real: NDArray[np.uint8], other: NDArray[np.uint8]) -> Sides:
    options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}}
    return open_sides(
        [write_pyramid(tmp_path / "real.tif", [real], **options)],
        [write_pyramid(tmp_path / "other.tif", [other], **options)],
    )


def blurred(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width, _ = pixels.shape
    return pixels.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1).astype(np.uint8)


def figures(sides: Sides) -> dict[str, Any]:
    return distribution(sides, see(sides, 0.5, Descriptor(), PLAIN, most=1024, seed=0), seed=0)


class TestDistribution:
    def test_the_same_is_as_near_as_the_floor_and_the_blurred_is_not(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        (tmp_path / "blurred").mkdir()
        same, soft = (
            figures(sides_of(tmp_path, pixels, pixels)),
            figures(sides_of(tmp_path / "blurred", pixels, blurred(pixels))),
        )
        for one in (same, soft):
            assert one["real"] == one["synthetic"] > 100
            assert one["n"] >= 30
            for name in ("frechet", "kernel", "precision", "recall", "density", "coverage"):
                assert one[name]["low"] is one[name]["floor_high"] is None, name  # fewer than 8 squares a half
        assert same["frechet"]["value"] < 1.5 * same["frechet"]["floor"]
        assert same["precision"]["value"] > 0.8
        assert soft["frechet"]["value"] > 3 * soft["frechet"]["floor"]
        assert soft["kernel"]["value"] > 3 * abs(soft["kernel"]["floor"])
        assert soft["precision"]["value"] < 0.5
        assert soft["frechet"]["floor"] == same["frechet"]["floor"]

    def test_intervals_hold_the_figure_and_keep_to_its_range(self) -> None:
        random = np.random.default_rng(0)
        first, second, other = (random.normal(shift, 1, size=(120, 4)) for shift in (0, 0, 0.4))
        groups = (np.arange(120) // 10,) * 3
        names = ["precision", "recall", "density", "coverage"]

        def parts(one: Vectors, two: Vectors) -> Vectors:
            return np.array(overlap(one, two))

        found = measured(names, parts, first, second, other, groups=groups, seed=0)
        found |= measured(["frechet"], frechet, first, second, other, groups=groups, seed=0)
        for name, one in found.items():
            for start, value in (("", one["value"]), ("floor_", one["floor"])):
                low, high = one[f"{start}low"], one[f"{start}high"]
                assert low is not None, name
                assert high is not None
                assert value is not None
                assert 0 <= low <= value <= high
                assert high <= 1 or name in ("density", "frechet")
        assert cast(float, found["frechet"]["low"]) > cast(float, found["frechet"]["floor"])

    def test_too_few_for_a_covariance_is_said_and_the_kernel_distance_given(
        self, full: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        sides = sides_of(tmp_path, full[:512], full[:512])
        found = distribution(sides, see(sides, 0.5, TileStatistics(), PLAIN, most=60, seed=0), seed=0)
        assert 8 <= found["n"] < 30
        assert found["frechet"] == {
            "missing": f"{found['n']} tiles of 24 numbers have no covariance; see the kernel distance"
        }
        assert "value" in found["kernel"]

    def test_hardly_any_is_said(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        sides = sides_of(tmp_path, full[:256, :256], full[:256, :256])
        found = distribution(sides, see(sides, 0.5, TileStatistics(), PLAIN, most=60, seed=0), seed=0)
        assert found["missing"] == f"{found['n']} tiles a half; at least 8 are needed"

    def test_an_encoder_that_fails_is_named(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        class Broken(TileStatistics):
            def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
                found = super().__call__(tiles)
                found[0, 0] = np.nan
                return found

        with pytest.raises(
            SlideError, match=r"real\.tif: encoder statistics gives numbers that are not finite at 0\.5"
        ):
            see(sides_of(tmp_path, pixels, pixels), 0.5, Broken(), PLAIN, most=20, seed=0)


class TestTexture:
    def test_of_the_same_nothing_differs(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        found = texture(sides_of(tmp_path, full, full), PLAIN, mpp=0.5, seed=0)
        assert found["real"] == found["synthetic"] == 4
        assert found["octaves"]["ratio"] == [1.0] * 6
        assert found["octaves"]["wavelength"] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
        assert max(found["stain"]["distance"]) < 0.01
        sides = [{**found["nuclei"][side], "low": 0, "high": 0} for side in ("real", "synthetic")]
        assert sides[0] == sides[1]
        assert found["nuclei"]["real"]["count"] > 100
        assert found["nuclei"]["area_distance"] == 0

    def test_blur_and_stain_are_found_out(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        pale = 255 - (255 - blurred(full).astype(float)) * 0.6
        found = texture(sides_of(tmp_path, full, pale.astype(np.uint8)), PLAIN, mpp=0.5, seed=0)
        assert found["octaves"]["ratio"][0] == 0
        assert 0.2 < found["octaves"]["ratio"][3] < 0.5  # 0.36 of the variance
        assert min(found["stain"]["distance"]) > 0.02
        assert found["stain"]["mean"][1] < found["stain"]["mean"][0]

    def test_what_has_nothing_of_an_octave_is_none_and_no_infinity(
        self, full: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        cells = full[:512, :512].repeat(2, 0).repeat(2, 1)
        sides = sides_of(tmp_path, cells, full)
        found = texture(sides, PLAIN, mpp=0.5, seed=0)
        assert found["octaves"]["ratio"][0] is None
        assert found["octaves"]["ratio"][1] > 0
        assert borders(sides, PLAIN)[0]["floor"] is None
        json.dumps([found, borders(sides, PLAIN)], allow_nan=False)

    def test_nuclei_are_not_looked_for_where_they_are_a_pixel(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        found = texture(sides_of(tmp_path, full, full), PLAIN, mpp=2.0, seed=0)
        assert "missing" in found
        large = np.concatenate([np.concatenate([full] * 4, 1)] * 4)
        found = texture(sides_of(tmp_path, large, large), PLAIN, mpp=2.0, seed=0)
        assert found["nuclei"] == {"missing": "not to be seen at 2 µm"}

    def test_too_small_is_said(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        found = texture(sides_of(tmp_path, full[:512], full[:512]), PLAIN, mpp=0.5, seed=0)
        assert found == {"missing": "fewer than 4 windows of 512 pixels with tissue at 0.5 µm"}


def test_tiles_are_seen(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    """Tiles of 256 pixels of which every second is a little darker."""
    (tmp_path / "tiled").mkdir()
    rows, columns = np.mgrid[:1024, :1024] // 256
    darker = pixels - (12 * ((rows + columns) % 2)).astype(np.uint8)[..., None]
    plain, tiled = (
        {one["period"]: one for one in borders(sides_of(folder, pixels, other), PLAIN)}
        for folder, other in ((tmp_path, pixels), (tmp_path / "tiled", darker))
    )
    assert set(plain) == {2, 8, 256}
    assert all(one["ratio"] == one["floor"] for one in plain.values())
    assert tiled[256]["rank"] == 1
    assert tiled[256]["ratio"] > 1.2 * tiled[256]["floor"]
    assert tiled[2]["ratio"] == pytest.approx(plain[2]["ratio"], abs=0.05)
