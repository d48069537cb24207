"""Slides: one contract for every reader, the pixel size, the resampling, and what bad files say."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import (
    MPP,
    MadeSlide,
    levels_of,
    picture,
    write_aperio,
    write_ome_tiff,
    write_ome_zarr,
    write_pyramid,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush.errors import PixelSizeError, SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.slide import Slide, open_slide
from wsi_brush.slide import resample as resampling
from wsi_brush.slide.pixelsize import PixelSize, choose, from_ome_xml, from_resolution
from wsi_brush.slide.readers import levels_from, on_white
from wsi_brush.slide.resample import find_taps, resample

REAL = Path(__file__).parents[2] / "shared" / "data" / "slides"
NAMES = [
    *("aperio.svs", "generic.tif", "deflate.tif", "big.tif", "thirds.tif", "ragged.tif", "ragged.svs"),
    *("nested.ome.tif", "no-mpp.tif", "old.ome.zarr", "new.ome.zarr", "plain.png"),
]
PITCHES = [0.2, 0.5, 0.6, 1.0, 1.37, 1.5, 2.0, 3.1, 4.5, 8.0]
SMALL = levels_of((256, 256), (1, 2))

real = pytest.mark.real
with_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real slides beside the checkout")


@pytest.fixture(params=NAMES)
def made(request: pytest.FixtureRequest, made_slides: dict[str, MadeSlide]) -> MadeSlide:
    return made_slides[request.param]


@pytest.fixture
def slide(made: MadeSlide) -> Slide:
    return open_slide(made.path, assume_mpp=made.assume_mpp)


def read_elsewhere(slide: Slide, grid: Grid) -> tuple[int, NDArray[np.uint8]]:
    return os.getpid(), slide.read(grid)


class TestEveryReader:
    """What holds for a slide, whatever it is stored in."""

    def test_it_is_described(self, slide: Slide, made: MadeSlide) -> None:
        assert (slide.path, slide.reader, slide.mpp_source) == (made.path, made.reader, made.source)
        assert slide.mpp == pytest.approx(made.mpp, rel=1e-6)
        assert slide.grid == Grid(slide.mpp, 0, 0, *made.shape)
        assert tuple(level.tall for level in slide.levels) == made.factors
        assert tuple(level.broad for level in slide.levels) == made.factors

    @pytest.mark.parametrize("mpp", PITCHES)
    def test_it_shows_the_picture_at_any_pitch(self, slide: Slide, made: MadeSlide, mpp: float) -> None:
        # Inside by a coarse pixel on each side, so that no pixel of the picture is mixed with white.
        inner = Grid(1.0, 16, 16, made.shape[0] // 2 - 34, made.shape[1] // 2 - 34).at(mpp)
        found, expected = slide.read(inner), picture(inner)
        assert found.shape == (*inner.shape, 3)
        assert found.dtype == np.uint8
        difference = found.astype(float) - expected
        assert np.abs(difference).max() <= made.tolerance
        assert np.abs(difference).mean() <= (0.5 if made.tolerance < 3 else 1.4)
        assert abs(difference.mean()) < 0.3

    def test_its_own_pixels_are_not_resampled(self, slide: Slide, made: MadeSlide) -> None:
        if made.tolerance > 2:
            pytest.skip("a lossy file")
        np.testing.assert_array_equal(slide.read(slide.grid), picture(Grid(MPP, 0, 0, *made.shape)))
        for factor in made.factors[1:]:
            coarse = Grid(slide.mpp * factor, 3, 5, 60, 70)
            np.testing.assert_array_equal(slide.read(coarse), picture(coarse))

    def test_it_is_white_where_it_does_not_reach(self, slide: Slide) -> None:
        for mpp in (0.3, slide.mpp, 1.1, 4.0):
            grid = slide.grid.at(mpp).pad(20)
            pixels = slide.read(grid)
            for edge in (pixels[:19], pixels[-19:], pixels[:, :19], pixels[:, -19:]):
                assert (edge == 255).all()
            assert (pixels[24:-24, 24:-24] < 255).all()
        assert (slide.read(Grid(1.0, 10**6, -(10**6), 5, 7)) == 255).all()
        assert slide.read(Grid(1.0, 0, 0, 0, 7)).shape == (0, 7, 3)
        assert slide.read(Grid(1e5, -1, -1, 2, 2)).shape == (2, 2, 3)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_a_window_does_not_change_its_pixels(self, slide: Slide, data: st.DataObject) -> None:
        mpp = data.draw(st.sampled_from([*PITCHES, 0.4999, 40.0]))
        whole = slide.grid.at(mpp).pad(3)
        top = whole.top + data.draw(st.integers(0, whole.height - 1))
        left = whole.left + data.draw(st.integers(0, whole.width - 1))
        height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
        window = Grid(mpp, top, left, height, width)
        inner = Grid(
            mpp,
            top + data.draw(st.integers(0, height - 1)),
            left + data.draw(st.integers(0, width - 1)),
            data.draw(st.integers(1, 90)),
            data.draw(st.integers(1, 90)),
        ).clip(window)
        np.testing.assert_array_equal(slide.read(window)[inner.within(window)], slide.read(inner))

    def test_tiles_make_up_the_slide(self, slide: Slide) -> None:
        for mpp in (slide.mpp, 0.77, 2.3):
            whole = slide.grid.at(mpp)
            painted = np.zeros((*whole.shape, 3), np.uint8)
            for tile in whole.tiles(101):
                painted[tile.within(whole)] = slide.read(tile)
            np.testing.assert_array_equal(painted, slide.read(whole))

    def test_threads_read_the_same(self, slide: Slide) -> None:
        tiles = list(slide.grid.at(0.8).tiles(64))
        alone = [slide.read(tile) for tile in tiles]
        with ThreadPoolExecutor(4) as pool:
            for one, other in zip(alone, pool.map(slide.read, tiles), strict=True):
                np.testing.assert_array_equal(one, other)

    def test_a_fork_opens_its_own_file(self, slide: Slide) -> None:
        """The parent has read, so its handle is open when the child begins."""
        grid = Grid(0.9, 20, 30, 90, 80)
        here = slide.read(grid)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            process, there = pool.submit(read_elsewhere, slide, grid).result(timeout=60)
        assert process != os.getpid()
        np.testing.assert_array_equal(there, here)

    def test_it_is_equal_to_its_copy(self, slide: Slide) -> None:
        slide.read(Grid(1.0, 0, 0, 8, 8))
        assert copy.deepcopy(slide) == slide


def test_slides_go_to_a_new_process(made_slides: dict[str, MadeSlide]) -> None:
    grid = Grid(0.9, 20, 30, 90, 80)
    slides = [open_slide(made.path, assume_mpp=made.assume_mpp) for made in made_slides.values()]
    here = [slide.read(grid) for slide in slides]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for one, (process, other) in zip(here, pool.map(read_elsewhere, slides, [grid] * len(slides)), strict=True):
            assert process != os.getpid()
            np.testing.assert_array_equal(one, other)


def test_every_made_slide_is_under_contract(made_slides: dict[str, MadeSlide]) -> None:
    assert set(NAMES) == set(made_slides)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_a_painting_says_so_in_any_format(tmp_path: Path, name: str) -> None:
    import tifffile
    from PIL import Image, PngImagePlugin

    pixels = np.full((64, 64, 3), 200, np.uint8)
    for text in ("painted by wsi-brush; synthetic=true", "a slide"):
        path = tmp_path / f"{text[:3]}{name}"
        if name.endswith(".tif"):
            tifffile.imwrite(path, pixels, photometric="rgb", tile=(32, 32), description=text, metadata=None)
        elif name.endswith(".png"):
            marks = PngImagePlugin.PngInfo()
            marks.add_text("Comment", text)
            Image.fromarray(pixels).save(path, pnginfo=marks)
        else:
            exif = Image.Exif()
            exif[270] = text
            Image.fromarray(pixels).save(path, exif=exif)
        assert open_slide(path, assume_mpp=0.5).synthetic is ("synthetic" in text), text


@pytest.mark.parametrize(
    "layout", [{"tile": (128, 128)}, {"tile": (128, 128), "compression": "deflate", "predictor": 2}, {}], ids=str
)
def test_a_fourth_band_that_is_no_alpha_is_left_out(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Aerial images: near infrared is no transparency."""
    import tifffile

    bands = np.random.default_rng(0).integers(0, 256, (256, 384, 4), dtype=np.uint8)
    for kind in ("unspecified", "unassalpha"):
        tifffile.imwrite(tmp_path / f"{kind}.tif", bands, photometric="rgb", extrasamples=[kind], **layout)
    slide, clear = (open_slide(tmp_path / f"{kind}.tif", assume_mpp=0.5) for kind in ("unspecified", "unassalpha"))
    np.testing.assert_array_equal(slide.read(slide.grid), bands[..., :3])
    np.testing.assert_allclose(clear.read(clear.grid), on_white(bands), atol=1)


def test_labels_are_never_read(made_slides: dict[str, MadeSlide], monkeypatch: pytest.MonkeyPatch) -> None:
    import openslide
    import tiffslide

    def alarm(self: object) -> None:
        raise AssertionError("a label or macro image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(alarm))
    monkeypatch.setattr(tiffslide.TiffSlide, "associated_images", property(alarm))
    for name in ("aperio.svs", "ragged.svs"):
        slide = open_slide(made_slides[name].path)
        assert slide.read(slide.grid.at(8.0)).min() > 50  # label and macro are black


class TestResampling:
    """The arithmetic, against the definition written out."""

    @staticmethod
    def source(pixels: NDArray[np.uint8]) -> Callable[[int, int, int, int], NDArray[np.uint8]]:
        def read(top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
            assert min(top, left) >= 0
            assert top + height <= pixels.shape[0]
            assert left + width <= pixels.shape[1]
            return pixels[top : top + height, left : left + width]

        return read

    @staticmethod
    def weights(first: int, count: int, size: int, ratio: float) -> NDArray[np.float64]:
        """(count, size): the share of each source pixel in each output pixel."""
        table = np.zeros((count, size))
        breadth = max(1.0, ratio)
        for i in range(count):
            begin = (first + i + 0.5) * ratio - breadth / 2
            for k in range(size):
                table[i, k] = max(0.0, min(begin + breadth, k + 1) - max(begin, k)) / breadth
        return table

    @given(
        st.tuples(st.integers(1, 30), st.integers(1, 30)),
        st.tuples(*[st.one_of(st.sampled_from([1.0, 2.0, 3.0, 0.5, 7.0]), st.floats(0.1, 50))] * 2),
        st.tuples(st.integers(-5, 20), st.integers(-5, 20)),
        st.tuples(st.integers(0, 25), st.integers(0, 25)),
        st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=150, deadline=None)
    def test_it_is_the_mean_over_a_box(
        self,
        shape: tuple[int, int],
        ratios: tuple[float, float],
        corner: tuple[int, int],
        size: tuple[int, int],
        seed: int,
    ) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
        found = resample(self.source(pixels), shape, ratios, Grid(1.0, *corner, *size))
        down, across = (self.weights(corner[a], size[a], shape[a], ratios[a]) for a in range(2))
        ink = np.einsum("ik,jl,klc->ijc", down, across, 255.0 - pixels)
        assert np.abs(found - (255 - ink)).max(initial=0) < 0.502

    def test_whole_blocks_are_means_and_the_same_pitch_is_a_copy(self) -> None:
        pixels = np.random.default_rng(1).integers(0, 256, (12, 18, 3), dtype=np.uint8)
        mean = 255 - np.rint((255.0 - pixels).reshape(4, 3, 6, 3, 3).mean((1, 3)))
        np.testing.assert_array_equal(resample(self.source(pixels), (12, 18), (3.0, 3.0), Grid(1, 0, 0, 4, 6)), mean)
        np.testing.assert_array_equal(
            resample(self.source(pixels), (12, 18), (1.0, 1.0), Grid(1, 0, 0, 12, 18)), pixels
        )

    @pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
    @pytest.mark.parametrize("ratio", [0.3, 1.01, 3.3, 17.77])
    def test_a_flat_colour_stays(self, value: int, ratio: float) -> None:
        flat = np.full((200, 200, 3), value, np.uint8)
        edge, length = math.ceil(1 / ratio) + 1, int(198 / ratio) - math.ceil(1 / ratio) - 2
        inner = Grid(1.0, edge, edge, length, length)
        assert (resample(self.source(flat), (200, 200), (ratio, ratio), inner) == value).all()

    def test_the_weights_of_a_pixel_inside_add_up(self) -> None:
        for ratio in (0.37, 1.0, 1.9010105772228574, 3.955, 128.0):
            inside = find_taps(int(100 / ratio), 50, 10**6, ratio)
            np.testing.assert_allclose(inside.weights.astype(float).sum(1), 1, atol=1e-6)

    @given(st.floats(0.2, 9.0), st.integers(1, 400), st.integers(1, 60), st.integers(1, 60))
    @settings(max_examples=60, deadline=None)
    def test_strips_leave_no_trace(self, ratio: float, strip: int, height: int, width: int) -> None:
        pixels = np.random.default_rng(2).integers(0, 256, (90, 80, 3), dtype=np.uint8)
        args = (self.source(pixels), (90, 80), (ratio, ratio * 1.03), Grid(1.0, -2, -1, height, width))
        whole = resample(*args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resampling, "STRIP", strip)
            patch.setattr(resampling, "CACHED", strip)
            patch.setattr(resampling, "BAND", strip % 7 + 1)
            np.testing.assert_array_equal(resample(*args), whole)

    def test_a_huge_slide_is_read_in_bounded_pieces(self) -> None:
        asked: list[int] = []

        def source(top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
            asked.append(height * width)
            return np.broadcast_to(np.array([10, 20, 30], np.uint8), (height, width, 3))

        found = resample(source, (100_000, 100_000), (128.5, 128.5), Grid(1.0, 300, 300, 50, 60))
        assert (found == [10, 20, 30]).all()
        assert max(asked) < 1.1 * resampling.STRIP
        assert sum(asked) < 1.1 * 50 * 60 * 128.5**2

    def test_see_through_pixels_lie_on_white(self) -> None:
        pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 255, 128]]], np.uint8)
        np.testing.assert_array_equal(on_white(pixels), [[[10, 20, 30], [255, 255, 255], [127, 177, 255]]])
        opaque = np.full((2, 2, 4), 255, np.uint8)
        assert on_white(opaque).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("shapes", "factors"),
    [
        ([(16091, 17883), (4022, 4470), (1005, 1117)], [1, 4, 16]),  # the last lines dropped
        ([(1001, 1001), (501, 501), (251, 251)], [1, 2, 4]),  # the last lines repeated
        ([(3567, 4443), (1783, 2221)], [1, 2]),
        ([(900, 900), (300, 300), (100, 100)], [1, 3, 9]),
        ([(6144, 6144), (24, 24), (6, 6), (3, 3)], [1, 256, 1024, 2048]),
        ([(1000, 1000), (400, 400)], [1, 2.5]),
    ],
)
def test_factors_are_what_the_writer_meant(shapes: list[tuple[int, int]], factors: list[float]) -> None:
    assert [level.tall for level in levels_from(shapes)] == factors
    assert [level.broad for level in levels_from(shapes)] == factors


def test_a_level_squeezed_one_way_has_two_factors() -> None:
    level = levels_from([(800, 800), (400, 200)])[1]
    assert (level.tall, level.broad) == (2.0, 4.0)


class TestPixelSize:
    """Found where it stands, refused where it makes no sense, never guessed."""

    @pytest.mark.parametrize(
        ("x", "unit", "expected"),
        [
            (20000.0, "centimeter", 0.5),
            (50800.0, "inch", 0.5),
            (98859.0, "CENTIMETER", 0.10115),
            (96.0, "inch", None),
            (300.0, "inch", None),  # 84.7 µm: dots of a printer
            (72.0, "centimeter", 138.889),  # found, but implausible
            (1.0, "none", None),
            (0.0, "centimeter", None),
            ("nan", "centimeter", None),
            ("1,5", "centimeter", None),
            (None, "centimeter", None),
            (20000.0, "", None),
        ],
    )
    def test_of_a_resolution(self, x: Any, unit: str, expected: float | None) -> None:
        found = from_resolution({"tiff.XResolution": x, "tiff.YResolution": x, "tiff.ResolutionUnit": unit})
        assert [size.width for size in found] == ([] if expected is None else [pytest.approx(expected, rel=1e-4)])

    @pytest.mark.parametrize(
        ("attributes", "expected"),
        [
            ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
            ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" PhysicalSizeYUnit="nm"', 0.25),
            ('PhysicalSizeX="0.00025" PhysicalSizeXUnit="mm"', 0.25),
            ('PhysicalSizeX="0.25" PhysicalSizeXUnit="pixel" PhysicalSizeY="0.25" PhysicalSizeYUnit="pixel"', None),
            ('SizeX="20"', None),
            ('PhysicalSizeX="wide"', None),
        ],
    )
    def test_of_ome_xml(self, attributes: str, expected: float | None) -> None:
        space = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
        text = f'<OME xmlns="{space}"><Image><Pixels {attributes}/></Image></OME>'
        assert [size.width for size in from_ome_xml(text)] == ([] if expected is None else [pytest.approx(expected)])
        assert from_ome_xml(text[:-9]) == []
        assert from_ome_xml("no xml") == []

    def test_the_first_plausible_one_counts(self) -> None:
        wrong, right, other = PixelSize("a", 264.58, 264.58), PixelSize("b", 0.5, 0.5), PixelSize("c", 0.4, 0.4)
        assert choose(Path("x"), [wrong, right, other]) == right
        assert choose(Path("x"), [wrong, right], assume_mpp=0.3) == right
        assert choose(Path("x"), [wrong], assume_mpp=0.3) == PixelSize("assumed", 0.3, 0.3)
        assert choose(Path("x"), [right], assume_mpp=0.2, force_mpp=0.3) == PixelSize("forced", 0.3, 0.3)

    @pytest.mark.parametrize("mpp", [0.049, 100.1, 264.58])
    def test_the_implausible_is_refused(self, mpp: float) -> None:
        with pytest.raises(PixelSizeError, match=r"^x.svs: implausible pixel size.*--assume-mpp"):
            choose(Path("x.svs"), [PixelSize("tiff resolution", mpp, mpp)])

    @pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), 1000.0])
    def test_an_implausible_assumption_is_refused(self, mpp: float) -> None:
        with pytest.raises(UsageError, match="--assume-mpp"):
            choose(Path("x"), [], assume_mpp=mpp)
        with pytest.raises(UsageError, match="--force-mpp"):
            choose(Path("x"), [PixelSize("a", 0.5, 0.5)], force_mpp=mpp)

    def test_missing_says_what_to_do(self, made_slides: dict[str, MadeSlide]) -> None:
        for name in ("no-mpp.tif", "plain.png"):
            with pytest.raises(PixelSizeError, match=r"no pixel size .*--assume-mpp") as caught:
                open_slide(made_slides[name].path)
            assert "\n" not in str(caught.value)

    def test_assuming_does_not_override_but_forcing_does(self, made_slides: dict[str, MadeSlide]) -> None:
        path = made_slides["generic.tif"].path
        assert open_slide(path, assume_mpp=0.3).mpp == 0.5
        forced = open_slide(path, force_mpp=0.3)
        assert (forced.mpp, forced.mpp_source) == (0.3, "forced")
        np.testing.assert_array_equal(forced.read(forced.grid), open_slide(path).read(Grid(0.5, 0, 0, 512, 768)))

    @pytest.mark.parametrize("mpp", [0.2528, 0.1012, 0.499, 3.2, 10.0])
    def test_it_goes_through_a_file(self, tmp_path: Path, mpp: float) -> None:
        for slide in (
            open_slide(write_pyramid(tmp_path / "a.tif", SMALL, mpp=mpp)),
            open_slide(write_aperio(tmp_path / "a.svs", SMALL, mpp=f"{mpp}")),
            open_slide(write_ome_tiff(tmp_path / "a.ome.tif", SMALL, mpp=mpp * 1000, unit="nm")),
            open_slide(write_ome_zarr(tmp_path / "a.zarr", SMALL, version="0.5", mpp=mpp / 1000, unit="millimeter")),
        ):
            assert slide.mpp == pytest.approx(mpp, rel=1e-6)

    @pytest.mark.parametrize("text", ["0", "-0.5", "abc", "1000", None])
    def test_nonsense_in_an_aperio_header(self, tmp_path: Path, text: str | None) -> None:
        path = write_aperio(tmp_path / "a.svs", SMALL, mpp=text)
        with pytest.raises(PixelSizeError, match="--assume-mpp"):
            open_slide(path)
        assert open_slide(path, assume_mpp=0.5).mpp_source == "assumed"

    def test_dots_per_inch_are_not_a_pixel_size(self, tmp_path: Path) -> None:
        for dpi in (72, 96, 300):
            path = write_pyramid(tmp_path / f"{dpi}.tif", SMALL, mpp=25400 / dpi, unit="INCH")
            with pytest.raises(PixelSizeError):
                open_slide(path)

    def test_a_zarr_without_unit_has_no_pixel_size(self, tmp_path: Path) -> None:
        path = write_ome_zarr(tmp_path / "a.zarr", SMALL, version="0.4", unit=None)
        with pytest.raises(PixelSizeError, match="--assume-mpp"):
            open_slide(path)

    def test_oblong_pixels_become_square(self, tmp_path: Path) -> None:
        """Taller by 5 %: each axis keeps its own scale."""
        tall, broad = 0.525, 0.5
        rows, columns = np.arange(400) * tall, np.arange(500) * broad
        pixels = np.zeros((400, 500, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = rows[:, None], columns
        resolution: dict[str, Any] = {"resolution": (1e4 / broad, 1e4 / tall), "resolutionunit": "CENTIMETER"}
        lossless: dict[str, Any] = {"compression": "deflate", "compressionargs": None, "subsampling": None}
        slide = open_slide(write_pyramid(tmp_path / "a.tif", [pixels], mpp=None, **resolution, **lossless))
        assert slide.mpp == pytest.approx(np.sqrt(tall * broad))
        assert slide.grid.shape == (410, 488)
        found = slide.read(Grid(1.0, 20, 20, 150, 150)).astype(float)
        assert np.abs(found[..., 0] - np.arange(20, 170)[:, None]).max() <= 1
        assert np.abs(found[..., 1] - np.arange(20, 170)).max() <= 1

    def test_rounding_in_the_header_does_not_blur(self, tmp_path: Path) -> None:
        resolution: dict[str, Any] = {"resolution": (44034, 44033), "resolutionunit": "CENTIMETER"}
        slide = open_slide(write_pyramid(tmp_path / "a.tif", SMALL[:1], mpp=None, **resolution))
        assert slide.pixel[0] == slide.pixel[1] == slide.mpp

    def test_pixels_far_from_square_are_refused(self, tmp_path: Path) -> None:
        resolution: dict[str, Any] = {"resolution": (20000, 17000), "resolutionunit": "CENTIMETER"}
        path = write_pyramid(tmp_path / "a.tif", SMALL, mpp=None, **resolution)
        with pytest.raises(PixelSizeError, match=r"not square.*--force-mpp"):
            open_slide(path, assume_mpp=0.5)
        assert open_slide(path, force_mpp=0.5).mpp == 0.5


def refusal(path: Path, **words: Any) -> str:
    """What `open_slide`, or reading the whole slide, says about a bad file: one line that names it."""
    with pytest.raises(SlideError) as caught:
        slide = open_slide(path, **({"assume_mpp": 0.5} | words))
        for level in slide.levels:
            slide.read(slide.grid.at(slide.mpp * level.tall))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


class TestBadInput:
    """One clear line each."""

    def test_missing(self, tmp_path: Path) -> None:
        assert "no such file" in refusal(tmp_path / "nothing.svs")

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.svs")
        assert "neither a file nor a folder" in refusal(tmp_path / "a.svs")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "a folder" in refusal(tmp_path)

    def test_a_text_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.svs").write_text("I am a slide, believe me.\n")
        assert "not a slide" in refusal(tmp_path / "a.svs")

    @pytest.mark.parametrize(
        "head", [b"", b"II", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
    )
    def test_a_few_bytes(self, tmp_path: Path, head: bytes) -> None:
        (tmp_path / "a.tif").write_bytes(head)
        refusal(tmp_path / "a.tif")

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "a.svs").symlink_to(tmp_path / "a.svs")
        assert "cannot be read" in refusal(tmp_path / "a.svs")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_no_rights(self, tmp_path: Path) -> None:
        path = write_pyramid(tmp_path / "a.tif", SMALL)
        path.chmod(0)
        try:
            assert "Permission denied" in refusal(path)
        finally:
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)

    @pytest.mark.parametrize("name", ["aperio.svs", "deflate.tif", "big.tif", "ragged.tif", "nested.ome.tif"])
    def test_truncated_at_any_place(self, made_slides: dict[str, MadeSlide], tmp_path: Path, name: str) -> None:
        """Never a slide with fewer levels or with holes."""
        whole = made_slides[name].path.read_bytes()
        path = tmp_path / name
        for cut in {*range(1, len(whole), len(whole) // 40), len(whole) - 1, len(whole) - 60}:
            path.write_bytes(whole[:cut])
            assert "truncated" in refusal(path) or cut < 16

    @pytest.mark.parametrize("name", ["plain.png", "plain.jpg"])
    def test_a_truncated_image(self, made_slides: dict[str, MadeSlide], tmp_path: Path, name: str) -> None:
        from PIL import Image

        Image.open(made_slides["plain.png"].path).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        refusal(tmp_path / name)

    def test_directories_in_a_circle(self, tmp_path: Path) -> None:
        path = write_pyramid(tmp_path / "a.tif", SMALL[:1])
        import tifffile

        with tifffile.TiffFile(path) as file:
            place, first = file.pages.next_page_offset, file.pages.first.offset
        data = bytearray(path.read_bytes())
        assert place is not None
        data[place : place + 4] = int(first).to_bytes(4, "little")
        path.write_bytes(data)
        assert "circle" in refusal(path)

    @pytest.mark.parametrize("tile", [{}, {"tile": (128, 128)}], ids=["strips", "tiles"])
    @pytest.mark.parametrize(
        ("dtype", "channels"), [("uint16", 3), ("uint16", 1), ("float32", 1), ("uint8", 5), ("uint8", 2), ("int8", 3)]
    )
    def test_other_pixels(self, tmp_path: Path, dtype: str, channels: int, tile: dict[str, Any]) -> None:
        import tifffile

        pixels = np.zeros((256, 256, channels), dtype)
        options = {"photometric": "rgb" if channels == 3 else "minisblack", "metadata": None, **tile}
        if channels == 1:
            pixels = pixels[..., 0]
        else:
            options["planarconfig"] = "contig"
        tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
        assert "expected RGB of 8 bits" in refusal(tmp_path / "a.tif")

    def test_grey_is_a_picture_but_no_slide(self, tmp_path: Path) -> None:
        import tifffile
        from PIL import Image

        grey = SMALL[0][..., 0]
        tifffile.imwrite(tmp_path / "tiled.tif", grey, tile=(128, 128), photometric="minisblack", metadata=None)
        assert "expected RGB of 8 bits" in refusal(tmp_path / "tiled.tif")
        tifffile.imwrite(tmp_path / "plain.tif", grey, photometric="minisblack", metadata=None)
        Image.fromarray(grey).save(tmp_path / "plain.png")
        for name in ("plain.tif", "plain.png"):
            slide = open_slide(tmp_path / name, assume_mpp=0.5)
            assert slide.reader == "image"
            np.testing.assert_array_equal(slide.read(slide.grid), np.repeat(grey[..., None], 3, -1))

    def test_other_images(self, tmp_path: Path) -> None:
        from PIL import Image

        Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep.png")
        Image.new("CMYK", (32, 32)).save(tmp_path / "print.jpg")
        for name in ("deep.png", "print.jpg"):
            assert "expected RGB or grey of 8 bits" in refusal(tmp_path / name)

    def test_an_untiled_tiff_and_a_see_through_png(self, tmp_path: Path) -> None:
        import tifffile
        from PIL import Image

        tifffile.imwrite(tmp_path / "a.tif", SMALL[0], photometric="rgb", metadata=None)
        slide = open_slide(tmp_path / "a.tif", assume_mpp=0.5)
        np.testing.assert_array_equal(slide.read(slide.grid), SMALL[0])
        holes = np.dstack([SMALL[0], np.full((256, 256), 255, np.uint8)])
        holes[:50, :60, 3] = 0
        Image.fromarray(holes).save(tmp_path / "a.png")
        slide = open_slide(tmp_path / "a.png", assume_mpp=0.5)
        pixels = slide.read(slide.grid)
        assert (pixels[:50, :60] == 255).all()
        np.testing.assert_array_equal(pixels[50:], SMALL[0][50:])

    def test_the_content_counts_not_the_name(self, made_slides: dict[str, MadeSlide], tmp_path: Path) -> None:
        for name, other in (("aperio.svs", "a.png"), ("plain.png", "a.svs"), ("nested.ome.tif", "a b é.jpg")):
            path = Path(shutil.copy(made_slides[name].path, tmp_path / other))
            assert open_slide(path, assume_mpp=0.5).reader == made_slides[name].reader

    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_zarrs(self, tmp_path: Path, version: str) -> None:
        import zarr

        zarr.create_group(tmp_path / "bare.zarr", zarr_format=2 if version == "0.4" else 3)
        assert "no OME-Zarr image" in refusal(tmp_path / "bare.zarr")
        write_ome_zarr(tmp_path / "one.zarr", SMALL, version=version, channels=1)
        assert "expected c=3" in refusal(tmp_path / "one.zarr")
        path = write_ome_zarr(tmp_path / "lost.zarr", SMALL, version=version)
        shutil.rmtree(path / "1")
        assert "no OME-Zarr image" in refusal(path)

    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_a_damaged_chunk(self, tmp_path: Path, version: str) -> None:
        path = write_ome_zarr(tmp_path / "a.zarr", SMALL, version=version)
        chunk = path / "0" / ("c/0/0/0" if version == "0.5" else "0/0/0")
        chunk.write_bytes(chunk.read_bytes()[:100])
        assert "cannot be read" in refusal(path)

    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_a_chunk_that_is_not_there_is_background(self, tmp_path: Path, version: str) -> None:
        levels = [level.copy() for level in SMALL]
        levels[0][:128, 128:] = 255
        path = write_ome_zarr(tmp_path / "a.zarr", levels, version=version)
        assert not (path / "0" / ("c/0/0/1" if version == "0.5" else "0/0/1")).exists()
        slide = open_slide(path)
        np.testing.assert_array_equal(slide.read(slide.grid), levels[0])

    def test_a_missing_tile_is_background(self, tmp_path: Path) -> None:
        import tifffile

        lossless: dict[str, Any] = {"compression": "deflate", "compressionargs": None, "subsampling": None}
        path = write_pyramid(tmp_path / "a.tif", SMALL, **lossless)
        with tifffile.TiffFile(path, mode="r+") as file:
            counts = file.pages.first.tags["TileByteCounts"]
            counts.overwrite((0, *counts.value[1:]))
        slide = open_slide(path)
        assert slide.reader == "openslide"
        pixels = slide.read(slide.grid)
        assert (pixels[:128, :128] == 255).all()
        np.testing.assert_array_equal(pixels[128:], SMALL[0][128:])

    def test_a_damaged_tile_costs_one_tile(self, made_slides: dict[str, MadeSlide], tmp_path: Path) -> None:
        """OpenSlide's errors latch: without a fresh handle nothing could be read afterwards."""
        import tifffile

        for name in ("aperio.svs", "ragged.svs"):
            path = Path(shutil.copy(made_slides[name].path, tmp_path / name))
            with tifffile.TiffFile(path) as file:
                start, length = file.pages.first.dataoffsets[7], file.pages.first.databytecounts[7]
            data = bytearray(path.read_bytes())
            data[start : start + length] = bytes(length)
            path.write_bytes(data)
            slide, good = open_slide(path), open_slide(made_slides[name].path)
            tiles = list(slide.grid.tiles(128))
            for number, tile in enumerate(tiles):
                if number == 7:
                    with pytest.raises(SlideError, match=r"rows 128-256, columns 128-256 of level 0 cannot be read"):
                        slide.read(tile)
                else:
                    np.testing.assert_array_equal(slide.read(tile), good.read(tile))

    def test_a_slide_that_goes_away(self, tmp_path: Path) -> None:
        path = write_pyramid(tmp_path / "a.tif", SMALL)
        slide = open_slide(path)
        path.unlink()
        with pytest.raises(SlideError, match="cannot be read"):
            slide.read(slide.grid)


@real
@with_real
class TestRealSlides:
    """Files as scanners wrote them."""

    def test_two_readers_see_the_same_pixels(self) -> None:
        import tiffslide

        slide = open_slide(REAL / "CMU-1-Small-Region.svs")
        assert (slide.reader, slide.mpp_source, slide.grid.shape) == ("openslide", "openslide.mpp-x", (2967, 2220))
        assert slide.mpp == 0.499
        with tiffslide.TiffSlide(slide.path) as other:
            expected = other.read_region((0, 0), 0, (2220, 2967), as_array=True)
        np.testing.assert_array_equal(slide.read(slide.grid), expected)

    def test_what_openslide_refuses(self) -> None:
        slide = open_slide(REAL / "OS-1-detail.ome.tif")
        assert (slide.reader, slide.grid.shape) == ("tiffslide", (1101, 1101))
        assert slide.mpp == pytest.approx(0.2271, rel=1e-3)
        assert 100 < slide.read(slide.grid.at(2.0)).mean() < 200

    def test_levels_that_are_no_whole_multiples(self) -> None:
        """Level 1 of the lung is its level 0 at four times the pitch, to the far edge."""
        slide = open_slide(REAL / "lung_scc_HE3_whole.tif")
        assert [level.tall for level in slide.levels] == [1, 4, 16]
        far = Grid(slide.mpp, 10112, 12544, 1024, 1024)
        fine = slide.read(far).reshape(256, 4, 256, 4, 3).mean((1, 3))
        coarse = slide.read(far.coarsened(4)).astype(float)
        moved = np.abs(np.roll(coarse, 1, 0) - fine).mean(), np.abs(np.roll(coarse, 1, 1) - fine).mean()
        assert np.abs(coarse - fine).mean() < 0.6 * min(moved)

    def test_no_pixel_size(self) -> None:
        path = REAL / "tcga-cr-7395-01a-01-ts1.svs"
        with pytest.raises(PixelSizeError, match="--assume-mpp"):
            open_slide(path)
        slide = open_slide(path, assume_mpp=0.5)
        assert slide.grid.shape == (3567, 4443)
        assert slide.read(Grid(1.0, 500, 500, 64, 64)).std() > 5

    def test_a_truncated_svs(self, tmp_path: Path) -> None:
        data = (REAL / "CMU-1-Small-Region.svs").read_bytes()
        for part in (0.01, 0.3, 0.7, 0.95, 0.999):
            (tmp_path / "a.svs").write_bytes(data[: int(len(data) * part)])
            assert "truncated" in refusal(tmp_path / "a.svs")
