"""Pyramids: valid for others, exact, whole, placed in µm, and marked as synthetic on every level."""

from __future__ import annotations

import itertools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush.commit import staged, verify
from wsi_brush.grid import Grid
from wsi_brush.pyramid import CHUNK, SHARD, SMALLEST, Pyramid

ABOUT = {"brush": {"name": "tiny", "sha256": "0" * 64}, "encoder": "timm:tiny", "seed": 3, "steps": 20, "guidance": 2.0}


def noise(shape: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def paint(folder: Path, grid: Grid, pixels: NDArray[np.uint8]) -> zarr.Group:
    pyramid = Pyramid(folder, grid, about=ABOUT)
    for part in grid.tiles(SHARD):
        pyramid.write(part, pixels[part.within(grid)])
    pyramid.finish()
    return zarr.open_group(folder, mode="r")


def levels_of(root: zarr.Group) -> list[NDArray[np.uint8]]:
    """The levels that the metadata names, (h, w, 3), finest first."""
    datasets: Any = root.attrs["ome"]["multiscales"][0]["datasets"]
    return [np.moveaxis(np.asarray(root[dataset["path"]][:]), 0, -1) for dataset in datasets]


def mean_of(fine: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 2 x 2 mean in float64, over the pixels that are there: another way than the writer's."""
    height, width, _ = fine.shape
    total = np.zeros(((height + 1) // 2, (width + 1) // 2, 3))
    count = np.zeros((*total.shape[:2], 1))
    for row in (0, 1):
        for column in (0, 1):
            quarter = fine[row::2, column::2]
            total[: quarter.shape[0], : quarter.shape[1]] += quarter
            count[: quarter.shape[0], : quarter.shape[1]] += 1
    return np.rint(total / count).astype(np.uint8)


class TestPixels:
    @settings(max_examples=25, deadline=None)
    @given(height=st.integers(1, 1100), width=st.integers(1, 1100), seed=st.integers(0, 9))
    def test_every_level_is_the_mean_of_the_one_below(
        self, tmp_path_factory: pytest.TempPathFactory, height: int, width: int, seed: int
    ) -> None:
        pixels = noise((height, width), seed)
        levels = levels_of(paint(tmp_path_factory.mktemp("slide") / "x", Grid(0.5, 0, 0, height, width), pixels))
        np.testing.assert_array_equal(levels[0], pixels)
        for fine, coarse in itertools.pairwise(levels):
            np.testing.assert_array_equal(coarse, mean_of(fine))
        assert max(levels[-1].shape) <= SMALLEST
        assert all(max(level.shape) > SMALLEST for level in levels[:-1])

    @pytest.mark.parametrize("shape", [(1, 1), (1, 257), (5001, 1), (2049, 2047), (4099, 300)])
    def test_odd_shapes_over_several_shards(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        pixels = noise(shape)
        levels = levels_of(paint(tmp_path / "x", Grid(0.5, 7, 9, *shape), pixels))
        np.testing.assert_array_equal(levels[0], pixels)
        for fine, coarse in itertools.pairwise(levels):
            np.testing.assert_array_equal(coarse, mean_of(fine))

    def test_halves_round_to_even_so_that_no_level_is_darker(self, tmp_path: Path) -> None:
        levels = levels_of(paint(tmp_path / "x", Grid(0.5, 0, 0, 1024, 1024), noise((1024, 1024))))
        means = [level.astype(float).mean() for level in levels]
        assert np.abs(np.subtract(means, means[0])).max() < 0.01

    def test_bytes_do_not_depend_on_order_or_writer(self, tmp_path: Path) -> None:
        grid, pixels = Grid(0.5, 0, 0, 2500, 4500), noise((2500, 4500))
        paint(tmp_path / "one", grid, pixels)
        pyramid = Pyramid(tmp_path / "two", grid, about=ABOUT)
        writers = [pickle.loads(pickle.dumps(pyramid)) for _ in range(4)]  # noqa: S301
        parts = list(reversed(list(grid.tiles(SHARD))))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: writers[n % 4].write(parts[n], pixels[parts[n].within(grid)]), range(len(parts))))
        pyramid.finish()
        one, two = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (tmp_path / "one", tmp_path / "two")
        )
        assert one == two


class TestRefusals:
    @pytest.mark.parametrize(
        "part",
        [
            Grid(0.5, 10, 20, 2048, 512),
            Grid(0.5, 10, 20, 512, 2048),
            Grid(0.5, 522, 20, 2048, 2048),
            Grid(0.5, 0, 0, 2048, 2048),
            Grid(0.5, 2058, 2068, 2048, 2048),
            Grid(0.25, 10, 20, 2048, 2048),
        ],
        ids=["narrow", "low", "shifted", "outside", "over the edge", "other pitch"],
    )
    def test_parts_that_are_not_whole_shards(self, tmp_path: Path, part: Grid) -> None:
        pyramid = Pyramid(tmp_path / "x", Grid(0.5, 10, 20, 3000, 3000), about=ABOUT)
        with pytest.raises(ValueError, match=r"cuts a shard|not inside|different pitch"):
            pyramid.write(part, np.zeros((*part.shape, 3), np.uint8))

    def test_parts_that_end_at_the_edge_and_several_shards_at_once(self, tmp_path: Path) -> None:
        grid = Grid(0.5, 10, 20, 3000, 3000)
        pyramid = Pyramid(tmp_path / "x", grid, about=ABOUT)
        for part in (Grid(0.5, 2058, 2068, 952, 952), Grid(0.5, 10, 20, 2048, 3000), Grid(0.5, 2058, 20, 952, 2048)):
            pyramid.write(part, np.full((*part.shape, 3), 7, np.uint8))
        pyramid.finish()
        assert all((level == 7).all() for level in levels_of(zarr.open_group(tmp_path / "x", mode="r")))

    def test_pixels_that_do_not_fit(self, tmp_path: Path) -> None:
        grid = Grid(0.5, 0, 0, 30, 40)
        pyramid = Pyramid(tmp_path / "x", grid, about=ABOUT)
        for pixels in (np.zeros((40, 30, 3), np.uint8), np.zeros((30, 40, 4), np.uint8), np.zeros((30, 40, 3), float)):
            with pytest.raises(ValueError, match="expected uint8"):
                pyramid.write(grid, pixels)

    def test_an_empty_grid(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one pixel"):
            Pyramid(tmp_path / "x", Grid(0.5, 0, 0, 0, 40), about=ABOUT)

    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        Pyramid(tmp_path / "x", Grid(0.5, 0, 0, 40, 40), about=ABOUT)
        with pytest.raises(zarr.errors.ContainsGroupError):
            Pyramid(tmp_path / "x", Grid(0.5, 0, 0, 40, 40), about=ABOUT)

    def test_a_part_that_was_never_written_is_found(self, tmp_path: Path) -> None:
        grid = Grid(0.5, 0, 0, 2100, 2100)
        pyramid = Pyramid(tmp_path / "x", grid, about=ABOUT)
        for part in list(grid.tiles(SHARD))[:-1]:
            pyramid.write(part, np.full((*part.shape, 3), 255, np.uint8))
        with pytest.raises(ValueError, match=r"1 shards were never written.*top=2048"):
            pyramid.finish()
        assert "ome" not in zarr.open_group(tmp_path / "x", mode="r").attrs


class TestMetadata:
    @pytest.mark.parametrize("shape", [(1, 1), (300, 700), (2100, 700)])
    def test_a_validator_that_is_not_ours_accepts_it(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        paint(tmp_path / "x", Grid(0.5, 3, 4, *shape), noise(shape))
        yaozarrs.validate_zarr_store(str(tmp_path / "x"))

    def test_what_validators_do_not_look_at(self, tmp_path: Path) -> None:
        root = paint(tmp_path / "x", Grid(0.5, 0, 0, 300, 300), noise((300, 300)))
        ome: Any = root.attrs["ome"]
        assert [(axis["name"], axis.get("unit")) for axis in ome["multiscales"][0]["axes"]] == [
            ("c", None),
            ("y", "micrometer"),
            ("x", "micrometer"),
        ]
        channels = ome["omero"]["channels"]
        assert [channel["label"] for channel in channels] == ["Red", "Green", "Blue"]
        assert [channel["color"] for channel in channels] == ["FF0000", "00FF00", "0000FF"]
        assert all(channel["active"] and channel["window"]["end"] == 255 for channel in channels)
        text = "".join(path.read_text("utf-8") for path in (tmp_path / "x").rglob("zarr.json"))
        assert "#" not in text
        assert str(tmp_path) not in text

    def test_levels_lie_where_the_region_lies_in_its_slide(self, tmp_path: Path) -> None:
        """The centre of a coarse pixel is the mean of the centres of the four that it covers."""
        root = paint(tmp_path / "x", Grid(0.25, 400, 100, 1100, 600), noise((1100, 600)))
        ome: Any = root.attrs["ome"]
        for number, dataset in enumerate(ome["multiscales"][0]["datasets"]):
            scale, translation = dataset["coordinateTransformations"]
            assert (scale["type"], scale["scale"]) == ("scale", [1.0, 0.25 * 2**number, 0.25 * 2**number])
            centres = (np.arange(2**number) * 0.25).mean()
            assert translation["type"] == "translation"
            assert translation["translation"] == pytest.approx([0.0, 100.0 + centres, 25.0 + centres])

    def test_every_level_says_that_it_is_synthetic(self, tmp_path: Path) -> None:
        root = paint(tmp_path / "x", Grid(0.5, 0, 0, 1100, 600), noise((1100, 600)))
        for node in (root, *(array for _, array in root.arrays())):
            assert node.attrs["wsi_brush"] == {**ABOUT, "synthetic": True}
        assert len(list(root.arrays())) == len(levels_of(root))

    def test_no_word_of_the_caller_makes_it_real(self, tmp_path: Path) -> None:
        about = {**ABOUT, "synthetic": False}
        pyramid = Pyramid(tmp_path / "x", Grid(0.5, 0, 0, 4, 4), about=about)
        assert pyramid.about["synthetic"] is True
        assert about["synthetic"] is False

    def test_chunks_shards_codecs(self, tmp_path: Path) -> None:
        """Read off the files: whole chunks in shards, a checksum in each, white that is written."""
        Pyramid(tmp_path / "x", Grid(0.5, 0, 0, 5000, 1000), about=ABOUT)
        for number, (chunk, shard) in enumerate([((512, 512), (2048, 1024)), ((512, 500), (2048, 500))]):
            level = json.loads((tmp_path / "x" / str(number) / "zarr.json").read_text("utf-8"))
            (sharding,) = level["codecs"]
            assert level["chunk_grid"]["configuration"]["chunk_shape"] == [3, *shard]
            assert sharding["configuration"]["chunk_shape"] == [3, *chunk]
            codec = sharding["configuration"]["codecs"][-1]
            assert codec["name"] == "zstd"
            assert codec["configuration"]["checksum"] is True
            assert (level["fill_value"], level["dimension_names"]) == (255, ["c", "y", "x"])
        assert SHARD % CHUNK == 0

    def test_white_is_written_and_a_flipped_bit_is_an_error(self, tmp_path: Path) -> None:
        grid = Grid(0.5, 0, 0, 300, 300)
        root = paint(tmp_path / "x", grid, np.full((300, 300, 3), 255, np.uint8))
        shard = tmp_path / "x" / "0" / "c" / "0" / "0" / "0"
        whole = bytearray(shard.read_bytes())
        whole[len(whole) // 3] ^= 1
        shard.write_bytes(whole)
        with pytest.raises(Exception, match=r"(?i)checksum|corrupt|decompress|zstd"):
            root["0"][:]


class TestThroughTheProtocol:
    def test_staged_sealed_and_read_again_as_a_slide(self, tmp_path: Path) -> None:
        slides = pytest.importorskip("wsi_brush.slide", reason="wsi_brush.slide is not there yet")
        target, grid, pixels = tmp_path / "x.ome.zarr", Grid(0.5, 0, 0, 900, 700), noise((900, 700))
        with staged(target, kind="pyramid", about={"seed": 3}) as stage:
            paint(stage, grid, pixels)
            yaozarrs.validate_zarr_store(str(stage))
        assert verify(target) == []
        yaozarrs.validate_zarr_store(str(target))
        slide = slides.open_slide(target)
        np.testing.assert_array_equal(slide.read(grid), pixels)
        assert slide.mpp == 0.5

    def test_a_lost_shard_is_named(self, tmp_path: Path) -> None:
        target, grid = tmp_path / "x.ome.zarr", Grid(0.5, 0, 0, 90, 70)
        with staged(target, kind="pyramid", about={}) as stage:
            paint(stage, grid, np.full((90, 70, 3), 255, np.uint8))
        (target / "0" / "c" / "0" / "0" / "0").unlink()
        assert verify(target) == ["0/c/0/0/0: missing"]
