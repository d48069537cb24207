"""A side that is the same is as near as the floor; what is blurred, stained otherwise or tiled is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray

from wsi_brush import likeness
from wsi_brush.control import Descriptor
from wsi_brush.distances import frechet, overlap
from wsi_brush.errors import SlideError
from wsi_brush.likeness import Rows, distribution, measured, see, texture, through_thumbnails, thumbnail
from wsi_brush.samples import Codec, common_pitch
from wsi_brush.sides import Sides, open_sides
from wsi_brush.slide import open_slide
from wsi_brush.texture import find_nuclei, nuclear_threshold

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
    return distribution(sides, see(sides, 0.5, [Descriptor()], PLAIN, most=1024, seed=0)[0], seed=0)


class TestDistribution:
    def test_more_paintings_of_one_reference_are_no_more_of_the_reference(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        one = sides_of(tmp_path, pixels, blurred(pixels))
        paths = [field.slide.path for field in (*one.real, *one.synthetic)]
        more = figures(open_sides([paths[0]] * 3, [paths[1]] * 3))
        alone = figures(one)
        assert (more["real"], more["n"]) == (alone["real"], alone["n"])
        for name in ("kernel", "recall", "coverage"):
            assert more[name]["floor"] == alone[name]["floor"]

    def test_more_paintings_of_one_place_are_one_witness(
        self, full: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = sides_of(tmp_path, full, full)
        real, painting = (field.slide.path for field in (*one.real, *one.synthetic))
        paintings = [painting, *(shutil.copy(painting, tmp_path / name) for name in ("second.tif", "third.tif"))]
        monkeypatch.setattr(likeness, "_WINDOWS", (128,))
        seen: list[set[int]] = []

        def noted(names: Any, figure: Any, samples: Any, **more: Any) -> dict[Any, dict[str, Any]]:
            seen.append(set(samples["value"][1].groups))
            return measured(names, figure, samples, **more)

        monkeypatch.setattr(likeness, "measured", noted)
        for sides in (one, open_sides([real] * 3, paintings)):
            seen.clear()
            figures(sides)
            assert [len(groups) for groups in seen] == [8] * 3  # distances, kernels, neighbourhoods
            seen.clear()
            found = texture(sides, PLAIN, mpp=0.5, most=9999, seed=0)
            assert found["synthetic"] == 64 * len(sides.synthetic)
            assert max(len(groups) for groups in seen) == 64
        assert texture(one, PLAIN, mpp=0.5, most=320, seed=0)["real"] == 10

    def test_a_thumbnail_that_shows_all_of_a_slide_is_the_slide(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        sides = sides_of(tmp_path, pixels, pixels)
        (whole,) = see(sides, 2.0, [Descriptor()], PLAIN, most=1024, seed=0)
        whole.parts[1].extend(range(8))
        assert through_thumbnails(sides, whole, Descriptor(), PLAIN) is None
        (seen,) = see(sides, 0.5, [Descriptor()], PLAIN, most=1024, seed=0)
        shrunk = through_thumbnails(sides, seen, Descriptor(), PLAIN)
        assert shrunk is not None
        assert not np.array_equal(shrunk[seen.parts[1]], seen.vectors[0][seen.parts[1]])

    def test_thumbnails_go_through_the_codec_as_tiles_do(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        sides, coarse = sides_of(tmp_path, pixels, pixels), Codec("jpeg:20")
        (seen,) = see(sides, 0.5, [TileStatistics()], coarse, most=64, seed=0)
        shrunk = through_thumbnails(sides, seen, TileStatistics(), coarse, 2)
        assert shrunk is not None
        spots = [seen.spots[0][number] for number in seen.parts[1]]
        plain = [thumbnail(sides.real[spot.field].slide, spot.grid, 2) for spot in spots]
        assert np.array_equal(shrunk[seen.parts[1]], TileStatistics()(np.stack([coarse(tile) for tile in plain])))

    def test_a_slide_as_small_as_its_thumbnail_hides_no_other(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        """Of a large slide and a small one, which comes last and is shown whole."""
        options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}}
        paths = [
            write_pyramid(tmp_path / f"{name}.tif", [pixels[300 : 300 + side, 300 : 300 + side]], **options)
            for name, side in (("large", 640), ("small", 320))
        ]
        sides = open_sides(paths, paths)
        (seen,) = see(sides, 0.5, [TileStatistics()], PLAIN, most=1024, seed=0)
        fields = np.array([seen.spots[0][number].field for number in seen.parts[1]])
        assert fields[0] == 0 < fields[-1]
        shrunk = through_thumbnails(sides, seen, TileStatistics(), PLAIN)
        assert shrunk is not None
        same = np.isclose(shrunk, seen.vectors[0])[seen.parts[1]].all(1)
        assert np.array_equal(same, fields == 1)

    def test_the_seed_decides_which_tiles_are_compared(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        sides = sides_of(tmp_path, pixels, blurred(pixels))
        (seen,) = see(sides, 0.5, [TileStatistics()], PLAIN, most=64, seed=0)
        assert len(seen.parts[0]) != len(seen.parts[1])  # else all of both are compared
        first, again, other = (distribution(sides, seen, seed=seed)["kernel"] for seed in (0, 0, 1))
        assert first == again
        assert (first["value"], first["floor"]) != (other["value"], other["floor"])

    def test_what_was_left_blank_is_looked_at(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        torn = pixels.copy()
        torn[: len(torn) * 2 // 3] = 250
        found = figures(sides_of(tmp_path, pixels, torn))
        assert found["synthetic"] == found["real"]
        assert found["kernel"]["value"] > 5 * abs(found["kernel"]["floor"])
        assert found["precision"]["value"] < found["precision"]["floor"]

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
        groups = np.arange(120) // 10
        first, second, other = (Rows(random.normal(shift, 1, size=(120, 4)), groups) for shift in (0, 0, 0.4))
        names = ["precision", "recall", "density", "coverage"]
        samples = {"value": (first, other), "floor": (first, second)}
        found = measured(names, overlap, samples, seed=3)
        found |= measured(["frechet"], frechet, samples, seed=3)
        for name, one in found.items():
            assert (one["n"], one["seed"]) == ([120, 120], 3)
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
        found = distribution(sides, see(sides, 0.5, [TileStatistics()], PLAIN, most=60, seed=0)[0], seed=0)
        assert 8 <= found["n"] < 30
        assert found["frechet"] == {
            "missing": f"{found['n']} tiles; of 24 numbers 30 are needed for a covariance; see the kernel distance"
        }
        assert "value" in found["kernel"]
        few = {"missing": f"{found['n']} tiles have no neighbourhoods; 20 are needed"}
        assert all((found[name] == few) == (found["n"] < 20) for name in ("precision", "recall", "density", "coverage"))

    def test_hardly_any_is_said(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        sides = sides_of(tmp_path, full[:256, :256], full[:256, :256])
        found = distribution(sides, see(sides, 0.5, [TileStatistics()], PLAIN, most=60, seed=0)[0], seed=0)
        said = "2 tiles of 64 µm in a half; 8 are needed: give larger regions, or more pairs"
        squares = "squares of the same slides"
        assert found == {"real": 9, "synthetic": 9, "n": 2, "halves": squares, "missing": said}

    def test_of_many_slides_that_are_not_paired_the_floor_is_of_other_slides(
        self, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        paths = [
            write_pyramid(tmp_path / f"{k}.tif", [pixels[200 + 40 * k : 584 + 40 * k, 300:684]], compression="zlib")
            for k in range(8)
        ]
        sides = open_sides(paths, paths, by_order=False)
        found = figures(sides)
        assert (found["halves"], found["n"]) == ("other slides", 100)
        assert found["kernel"]["low"] is None  # of four slides in a half
        assert texture(sides, PLAIN, mpp=0.5, seed=0)["n"] == 4

    def test_small_fields_speak_together(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        """Four fields of 3 x 3 tiles: none has two halves of 8 tiles, all of them have."""
        options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}}
        paths: list[list[Path]] = [[], []]
        for number, top in enumerate((180, 260, 340, 420)):
            for side, name in enumerate(("real", "other")):
                part = pixels[top : top + 384, 300:684]
                paths[side].append(write_pyramid(tmp_path / f"{name}{number}.tif", [part], **options))
        sides = open_sides(*paths)
        found = distribution(sides, see(sides, 0.5, [TileStatistics()], PLAIN, most=500, seed=0)[0], seed=0)
        assert found["n"] == 18  # 5 + 4 + 5 + 4
        for edge in ("low", "high", "floor_low", "floor_high"):
            assert found["kernel"][edge] is not None

    def test_an_encoder_that_fails_is_named(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        class Broken(TileStatistics):
            def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
                found = super().__call__(tiles)
                found[0, 0] = np.nan
                return found

        with pytest.raises(
            SlideError, match=r"real\.tif: encoder statistics gives numbers that are not finite at 0\.5"
        ):
            see(sides_of(tmp_path, pixels, pixels), 0.5, [Broken()], PLAIN, most=20, seed=0)


class TestTexture:
    def test_of_the_same_nothing_differs(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        found = texture(sides_of(tmp_path, full, full), PLAIN, mpp=0.5, seed=0)
        assert found["real"] == found["synthetic"] == 4
        assert found["n"] == 2
        assert found["octaves"]["ratio"] == [1.0] * 6
        assert found["octaves"]["n"] == [4, 4]
        assert found["octaves"]["wavelength"] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
        assert found["stain"]["distance"] == found["stain"]["floor"]  # what lies beside the second half is it
        assert max(found["stain"]["distance"]) < 0.02
        assert found["nuclei"]["real"] == found["nuclei"]["synthetic"]
        assert found["nuclei"]["real"]["count"] > 100
        ratio, area = found["nuclei"]["density_ratio"], found["nuclei"]["area_distance"]
        assert ratio["value"] == 1
        assert area["value"] == area["floor"] == 0  # a half is the other, turned over
        assert (ratio["n"], area["n"]) == ([4, 4], [2, 2])
        assert ratio["low"] is area["low"] is found["stain"]["low"][0] is found["octaves"]["low"][0] is None

    def test_every_figure_has_its_interval_and_its_floor(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        """16 windows of a slide, each of a shade of its own, and the same a little darker."""
        random, rows = np.random.default_rng(0), []
        for _ in range(4):
            shades = [255 - (255 - full[:512, :512].astype(float)) * random.uniform(0.97, 1.03, 3) for _ in range(4)]
            rows.append(np.concatenate(shades, 1))
        real = np.concatenate(rows).clip(0, 255).astype(np.uint8)
        sides = sides_of(tmp_path, real, (0.9 * real).astype(np.uint8))
        found = texture(sides, PLAIN, mpp=0.5, seed=5)
        assert (found["real"], found["n"]) == (16, 8)
        for one in (found["octaves"], found["stain"]):
            values = one["ratio" if "ratio" in one else "distance"]
            assert one["seed"] == 5
            for k, (value, floor) in enumerate(zip(values, one["floor"], strict=True)):
                assert one["low"][k] <= value <= one["high"][k]
                assert one["floor_low"][k] <= floor <= one["floor_high"][k]
        assert max(found["stain"]["floor_high"]) < min(found["stain"]["low"])
        # what differs from window to window differs in both: every window has about 0.81 of its detail
        assert found["octaves"]["high"][0] - found["octaves"]["low"][0] < 0.02
        assert found["octaves"]["floor_high"][0] - found["octaves"]["floor_low"][0] > 0.02
        for name in ("density_ratio", "area_distance", "eccentricity_distance"):
            one = found["nuclei"][name]
            assert 0 <= one["low"] <= one["value"] <= one["high"]
            assert 0 <= one["floor_low"] <= one["floor"] <= one["floor_high"]
        json.dumps(found, allow_nan=False)

    def test_blur_and_stain_are_found_out(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        pale = 255 - (255 - blurred(full).astype(float)) * 0.6
        found = texture(sides_of(tmp_path, full, pale.astype(np.uint8)), PLAIN, mpp=0.5, seed=0)
        assert found["octaves"]["ratio"][0] == 0
        assert 0.2 < found["octaves"]["ratio"][3] < 0.5  # 0.36 of the variance
        assert min(found["stain"]["distance"]) > 0.02
        assert found["stain"]["mean"][1] < found["stain"]["mean"][0]

    def test_nuclei_of_both_sides_are_those_above_the_real_sides_threshold(
        self, full: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        """A side that is paler all over has fewer; by a threshold of its own it would have as many."""
        real = full[:512, :512]
        pale = (255 - (255 - real.astype(float)) * 0.6).astype(np.uint8)
        found = texture(sides_of(tmp_path, real, pale), PLAIN, mpp=0.5, seed=0)
        assert found["window"] == 256
        sides = [
            [side[row : row + 256, column : column + 256] for row in (0, 256) for column in (0, 256)]
            for side in (real, pale)
        ]
        threshold = nuclear_threshold(sides[0], 0.5)
        counts = [sum(find_nuclei(window, 0.5, threshold).count for window in side) for side in sides]
        assert [found["nuclei"][name]["count"] for name in ("real", "synthetic")] == counts
        assert counts[1] < 0.7 * counts[0]

    def test_what_has_nothing_of_an_octave_is_none_and_no_infinity(
        self, full: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        cells = full[:512, :512].repeat(2, 0).repeat(2, 1)
        sides = sides_of(tmp_path, cells, full)
        found = texture(sides, PLAIN, mpp=0.5, seed=0)
        assert found["octaves"]["ratio"][0] is None
        assert found["octaves"]["ratio"][1] > 0
        nuclei = found["nuclei"]
        wider = nuclei["real"]["median_area"] - nuclei["synthetic"]["median_area"]  # of four times the area
        assert nuclei["area_distance"]["value"] == pytest.approx(wider, rel=0.2)
        assert nuclei["area_distance"]["value"] > 4 * nuclei["area_distance"]["floor"]
        json.dumps(found, allow_nan=False)

    def test_nuclei_are_not_looked_for_where_they_are_a_pixel(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        large = np.concatenate([np.concatenate([full] * 4, 1)] * 4)
        found = texture(sides_of(tmp_path, large, large), PLAIN, mpp=2.0, seed=0)
        assert found["nuclei"] == {"missing": "not to be seen at 2 µm"}

    def test_too_small_is_said(self, full: NDArray[np.uint8], tmp_path: Path) -> None:
        (tmp_path / "small").mkdir()
        found = texture(sides_of(tmp_path, full[:512], full[:512]), PLAIN, mpp=0.5, seed=0)
        assert (found["window"], found["real"]) == (256, 8)
        found = texture(sides_of(tmp_path / "small", full[:128], full[:128]), PLAIN, mpp=1.0, seed=0)
        assert found == {"missing": "fewer than 4 windows of 128 pixels with tissue at 1 µm"}

    def test_slides_whose_pixels_are_nearly_of_one_size_are_read_alike(
        self, full: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        """The same pixels on both sides: that one is resampled takes no detail from it alone."""
        paths = [
            write_pyramid(tmp_path / f"{mpp}.tif", [full], mpp=mpp, compression="zlib", compressionargs={})
            for mpp in (0.5, 0.5044)
        ]
        for real, other in (paths, paths[::-1]):
            sides = open_sides([real], [other])
            mpp = common_pitch(*([one.slide for one in side] for side in (sides.real, sides.synthetic)), least=0.5)
            ratio = texture(sides, PLAIN, mpp=mpp, seed=0)["octaves"]["ratio"]
            assert np.abs(np.array(ratio[:4]) - 1).max() < 0.05, ratio
