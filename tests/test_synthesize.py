"""A painting: the right place, the same bytes for the same seed, valid, marked, and with nothing of the patient."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaozarrs
import zarr
from conftest import TileStatistics, make_brush, write_aperio
from numpy.typing import NDArray
from PIL import Image

from wsi_brush import commit, estimate, paint
from wsi_brush.brush import Brush
from wsi_brush.diffusion import Solver
from wsi_brush.embed import embed_region, slide_fingerprint
from wsi_brush.encoder import Encoder
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.estimate import encoder_seconds, painting_seconds
from wsi_brush.grid import Grid
from wsi_brush.paint import paint_canvas
from wsi_brush.pair import COMPARED, MARK, compare
from wsi_brush.slide import Slide, open_slide
from wsi_brush.stages import Painting, budget, evaluated_pixels, guidance_at, stages, wants_before
from wsi_brush.synthesize import as_pixels, choose_canvas, synthesize_slide
from wsi_brush.tissue import Tissue, find_tissue

ENCODER = cast(Encoder, TileStatistics())
QUICK = Painting(region=(300, 280, 333, 517), steps=6, guidance=2.0)
CANARY = "Ramona^Testcase"


def quick(**options: Any) -> Painting:
    """A painting of few steps, asked once each."""
    return Painting(**{"steps": 5, "guidance": 1.0, **options})


def little(brush: Brush) -> int:
    """Memory for tiles of 128 pixels and not for a state."""
    memory = 1
    for _ in range(2):
        try:
            _, room = budget(quick(tile=128, memory=memory), brush.denoiser.config)
            return memory - room
        except UsageError as error:
            memory = round(1e9 * float(str(error).split("give ")[1].split("GB")[0]))
    raise AssertionError(memory)


@pytest.fixture(scope="module")
def brush() -> Brush:
    return cast(Brush, make_brush(dim=ENCODER.dim, tile=ENCODER.tile))


@pytest.fixture(scope="module")
def slide(tissue_slide: Path) -> Slide:
    return open_slide(tissue_slide)


@pytest.fixture(scope="module")
def marked_slide(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue slide with a patient's name in its header and in the name of its file."""
    source = open_slide(tissue_slide)
    levels = [source.read(Grid(0.5 * factor, 0, 0, 1024 // factor, 1024 // factor)) for factor in (1, 2, 4)]
    path = write_aperio(tmp_path_factory.mktemp("marked") / f"{CANARY}.svs", levels, mpp=f"0.5|Patient = {CANARY}")
    assert path.read_bytes().count(CANARY.encode()) >= 1
    return path


@pytest.fixture(scope="module")
def painted(marked_slide: Path, brush: Brush, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A painting after the marked slide, 333 x 517 pixels, and its picture beside it."""
    target = tmp_path_factory.mktemp("painted") / "new.ome.zarr"
    png = target.with_name("pair.png")
    report = synthesize_slide(marked_slide, target, QUICK, brush=brush, encoder=ENCODER, png=png)
    assert (report.path, report.region, report.shape) == (target, (300, 280, 333, 517), (333, 517))
    assert report.seconds > 0
    assert set(report.cosine) == {0.5, 2.0, 8.0}
    assert -1 <= report.cosine[0.5] <= 1
    assert math.isnan(report.cosine[8.0])  # a tile is 1024 µm, the painting 166
    return target


def paint_on(brush: Brush, slide: Slide, painting: Painting, canvas: Grid) -> torch.Tensor:
    maps = embed_region(slide, canvas, encoder=ENCODER, pitches=brush.pitches)
    state = torch.from_numpy(np.asarray(paint_canvas(brush, maps, canvas, painting)))
    return state[:, : canvas.height, : canvas.width]


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): commit.sha256_of(path) for path in folder.rglob("*") if path.is_file()}


class TestPlace:
    def blank(self, slide: Slide) -> Tissue:
        grid = slide.grid.at(8.0)
        return Tissue(np.zeros(grid.shape, np.bool_), grid)

    def test_a_region_is_exact_at_the_slides_own_pitch(self, slide: Slide) -> None:
        canvas = choose_canvas(slide, Painting(region=(7, 11, 333, 517)), self.blank(slide))
        assert canvas == Grid(0.5, 7, 11, 333, 517)

    @pytest.mark.parametrize(
        ("mpp", "canvas"), [(1.0, Grid(1.0, 50, 100, 150, 200)), (2.0, Grid(2.0, 25, 50, 75, 100))]
    )
    def test_and_the_same_place_at_others(self, slide: Slide, mpp: float, canvas: Grid) -> None:
        assert choose_canvas(slide, Painting(region=(100, 200, 300, 400), mpp=mpp), self.blank(slide)) == canvas

    @pytest.mark.parametrize(
        "region", [(-1, 0, 10, 10), (0, -1, 10, 10), (0, 0, 1025, 10), (1000, 0, 25, 10), (0, 0, 0, 10), (5, 5, 9, -9)]
    )
    def test_a_region_outside_the_slide_names_both(self, slide: Slide, region: tuple[int, int, int, int]) -> None:
        with pytest.raises(UsageError, match="not inside the slide; level 0 is 1024 x 1024 pixels") as error:
            choose_canvas(slide, Painting(region=region), self.blank(slide))
        assert ",".join(map(str, region)) in str(error.value)

    def test_a_region_of_less_than_a_pixel_is_an_error(self, slide: Slide) -> None:
        with pytest.raises(UsageError, match="smaller than one pixel"):
            choose_canvas(slide, Painting(region=(0, 0, 1, 1), mpp=2.0), self.blank(slide))

    @pytest.mark.parametrize("place", [(0, 0), (40, 64), (17, 90), (90, 3)])
    def test_a_size_takes_the_richest_square(self, slide: Slide, place: tuple[int, int]) -> None:
        """Of 512 pixels, which are 32 cells of tissue; all squares are counted, another way."""
        grid = slide.grid.at(8.0)
        mask = np.random.default_rng(place).random(grid.shape) < 0.2
        mask[place[0] : place[0] + 20, place[1] : place[1] + 20] = True
        canvas = choose_canvas(slide, Painting(size=512), Tissue(mask, grid))
        assert (canvas.top % 16, canvas.left % 16) == (0, 0)
        assert canvas.shape == (512, 512)
        assert canvas.clip(slide.grid) == canvas
        corners = [(top, left) for top in range(grid.height - 31) for left in range(grid.width - 31)]
        counts = [mask[top : top + 32, left : left + 32].sum() for top, left in corners]
        top, left = canvas.top // 16, canvas.left // 16
        assert mask[top : top + 32, left : left + 32].sum() == max(counts)

    def test_of_equals_it_takes_the_middle(self, slide: Slide) -> None:
        grid = slide.grid.at(8.0)
        assert choose_canvas(slide, Painting(size=512), Tissue(np.ones(grid.shape, np.bool_), grid)) == Grid(
            *(0.5, 256, 256, 512, 512)
        )
        assert choose_canvas(slide, Painting(size=512), self.blank(slide)).shape == (512, 512)

    @pytest.mark.parametrize("size", [1, 333, 1000, 1024])
    def test_any_size_that_fits_lies_inside(self, slide: Slide, size: int) -> None:
        canvas = choose_canvas(slide, Painting(size=size), find_tissue(slide))
        assert canvas.shape == (size, size)
        assert canvas.clip(slide.grid) == canvas

    @pytest.mark.parametrize(("size", "mpp", "most"), [(1025, 0.5, 1024), (4096, 0.5, 1024), (600, 1.0, 512)])
    def test_a_size_that_does_not_fit_names_the_largest(self, slide: Slide, size: int, mpp: float, most: int) -> None:
        with pytest.raises(UsageError, match=f"give --size {most} or less"):
            choose_canvas(slide, Painting(size=size, mpp=mpp), self.blank(slide))

    def test_a_size_of_nothing_is_an_error(self, slide: Slide) -> None:
        with pytest.raises(UsageError, match="a size of 0 pixels"):
            choose_canvas(slide, Painting(size=0), self.blank(slide))


class TestPaint:
    def test_the_same_seed_the_same_pixels_another_seed_others(self, brush: Brush, slide: Slide) -> None:
        canvas = Grid(0.5, 304, 304, 96, 128)
        first, again = (paint_on(brush, slide, quick(seed=3), canvas) for _ in range(2))
        other = paint_on(brush, slide, quick(seed=4), canvas)
        assert torch.equal(first, again)
        assert (as_pixels(first) != as_pixels(other)).mean() > 0.5
        assert as_pixels(first).std() > 2  # not one colour

    @pytest.mark.parametrize("solver", ["2m", "heun", "ancestral"])
    def test_the_tile_changes_no_bit(self, brush: Brush, slide: Slide, solver: Solver) -> None:
        canvas = Grid(0.5, 304, 304, 70, 90)
        assert max(len(s.retouches) for s in stages(brush.ladder, Painting(steps=20, solver=solver))) > 1
        painting = Painting(steps=20, solver=solver, guidance=2.0)
        whole, tiled = (paint_on(brush, slide, replace(painting, tile=tile), canvas) for tile in (768, 128))
        assert torch.equal(whole, tiled)

    @pytest.mark.parametrize("mpp", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("progressive", [True, False])
    def test_at_every_pitch_of_the_ladder(self, brush: Brush, slide: Slide, mpp: float, progressive: bool) -> None:
        canvas = Grid(mpp, 33, 17, 45, 61)
        state = paint_on(brush, slide, quick(mpp=mpp, progressive=progressive), canvas)
        assert state.shape == (3, 45, 61)
        assert torch.isfinite(state).all()

    def test_at_no_other(self, brush: Brush, slide: Slide) -> None:
        with pytest.raises(UsageError, match=r"paints at 0\.5, 1, 2, 4, 8 µm per pixel, not at 0\.7"):
            paint_on(brush, slide, Painting(mpp=0.7), Grid(0.7, 0, 0, 32, 32))

    def test_without_any_tissue(self, brush: Brush, slide: Slide) -> None:
        canvas = Grid(0.5, 0, 0, 64, 64)
        maps = embed_region(slide, canvas, encoder=ENCODER, pitches=brush.pitches)
        assert not maps[0.5].present.any()
        assert np.isfinite(np.asarray(paint_canvas(brush, maps, canvas, quick()))).all()

    def test_progress_counts_every_pixel_of_every_step(self, brush: Brush, slide: Slide) -> None:
        canvas, told = Grid(0.5, 304, 304, 40, 40), []
        maps = embed_region(slide, canvas, encoder=ENCODER, pitches=brush.pitches)
        paint_canvas(brush, maps, canvas, Painting(steps=6, guidance=2.0), tell=lambda *what: told.append(what))
        total = evaluated_pixels(brush.ladder, canvas, Painting(steps=6, guidance=2.0))
        assert {(what, count) for what, _, count in told} == {("painting", total)}
        assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
        assert told[-1][1] == total

    def test_guidance_is_for_the_same_noise_whatever_the_pitch(self, brush: Brush) -> None:
        for progressive in (True, False):
            painting = Painting(steps=40, guidance=3.0, progressive=progressive)
            found = {
                stage.sigma * stage.mpp: guidance_at(painting, stage)
                for stage in stages(brush.ladder, painting)
                if stage.move is not None
            }
            assert {value for noise, value in found.items() if noise > 0.61} == {3.0}
            assert {value for noise, value in found.items() if noise < 0.59} == {1.0}

    def test_what_reads_the_evaluation_before(self, brush: Brush) -> None:
        """Every entry to a finer pitch, for its slopes; of the moves those of a multistep solver but first and last."""
        for solver, moves_do in (("2m", True), ("ddim", False)):
            _, *todo = stages(brush.ladder, quick(solver=solver))
            assert all(wants_before(stage) for stage in todo if stage.move is None)
            moves = [move for stage in todo if stage.move is not None for move in (stage.move, *stage.retouches)]
            assert [move.old != 0 for move in moves] == [False, *[moves_do] * (len(moves) - 2), False]
            assert [wants_before(stage) for stage in todo if stage.move] == [
                stage.move.old != 0 for stage in todo if stage.move
            ]

    def test_moves_at_next_to_no_noise_are_retouches(self, brush: Brush) -> None:
        """Of the stage before them, in their order, three at most; never while the embeddings are followed harder."""
        for progressive, mpp in ((True, 0.5), (False, 0.5), (True, 8.0)):
            painting = Painting(steps=60, guidance=2.0, progressive=progressive, mpp=mpp)
            todo, plain = stages(brush.ladder.starting_at(mpp), painting), replace(painting, guidance=1.0)
            low = [(stage, move.sigma) for stage in todo for move in stage.retouches]
            assert low
            for stage, sigma in low:
                assert stage.move is not None
                assert sigma < min(stage.sigma, 0.1)
                assert guidance_at(painting, stage._replace(sigma=sigma)) == 1
            assert max(len(stage.retouches) for stage in todo) == 3
            every = [m for stage in todo if stage.move for m in (stage.move, *stage.retouches)]
            assert every == [
                m for stage in stages(brush.ladder.starting_at(mpp), plain) if stage.move
                for m in (stage.move, *stage.retouches)
            ]  # fmt: skip

    def test_a_wider_canvas_is_estimated_longer(self, brush: Brush) -> None:
        small = painting_seconds(brush, Grid(0.5, 0, 0, 512, 512), quick())
        assert small > 0
        assert painting_seconds(brush, Grid(0.5, 0, 0, 4096, 4096), quick()) > 8 * small

    def test_an_encoder_takes_as_long_as_its_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]

        class Slow(TileStatistics):
            def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
                now[0] += 0.5 * len(tiles)
                return super().__call__(tiles)

        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        assert encoder_seconds(Slow(), 1000.0, batch=8) == 500.0

    def test_a_comparison_takes_as_long_as_the_tiles_that_it_is_of(
        self, brush: Brush, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(estimate, "encoder_seconds", lambda encoder, tiles: tiles)
        side = round(brush.about["tile"] * max(brush.pitches))  # pixels of 1 µm: a tile of the coarsest pitch
        every = [(16 * max(brush.pitches) / mpp) ** 2 for mpp in brush.pitches]
        small, large = (
            estimate.embedding_seconds(ENCODER, brush, Grid(1.0, 0, 0, side * k, side * k)) for k in (1, 16)
        )
        assert large == sum(every) + 2 * COMPARED * len(every)
        assert small < 3 * sum(every) / 256 + 1e-6


class TestSlide:
    def test_it_is_a_slide_again(self, painted: Path) -> None:
        slide = open_slide(painted)
        assert (slide.reader, slide.mpp, slide.grid) == ("ome-zarr", 0.5, Grid(0.5, 0, 0, 333, 517))
        pixels = slide.read(slide.grid)
        assert pixels.std() > 2
        assert np.array_equal(np.moveaxis(np.asarray(zarr.open_group(painted, mode="r")["0"]), 0, -1), pixels)

    def test_others_find_it_valid_and_where_its_reference_lies(self, painted: Path) -> None:
        yaozarrs.validate_zarr_store(painted)
        (scales,) = cast(Any, zarr.open_group(painted, mode="r").attrs["ome"])["multiscales"]
        scale, shift = scales["datasets"][0]["coordinateTransformations"]
        assert scale["scale"] == [1.0, 0.5, 0.5]
        assert shift["translation"] == [0.0, 150.0, 140.0]

    def test_it_is_whole(self, painted: Path) -> None:
        assert commit.verify(painted) == []
        assert not [path for path in painted.parent.iterdir() if path.name.startswith(commit.STAGE)]

    def test_every_level_says_what_made_it(self, painted: Path, marked_slide: Path, brush: Brush) -> None:
        root = zarr.open_group(painted, mode="r")
        levels = [root[str(number)] for number in range(3)]  # 517, 259 and 130 pixels wide
        assert not (painted / "3").exists()
        for node in (root, *levels):
            about = cast(dict[str, Any], node.attrs["wsi_brush"])
            assert about["synthetic"] is True
            asked = tuple(about[name] for name in ("seed", "steps", "guidance", "mpp"))
            assert asked == (QUICK.seed, QUICK.steps, QUICK.guidance, QUICK.mpp)
            assert about["brush_sha256"] == brush.sha256
            assert about["brush_fingerprint"] == brush.fingerprint
            assert (about["encoder"], about["encoder_fingerprint"]) == (ENCODER.name, ENCODER.fingerprint)
            assert {"wsi-brush", "torch", "numpy"} <= set(about["versions"])
            reference = {"mpp": 0.5, "mpp_source": "openslide.mpp-x", "region": [300, 280, 333, 517]}
            assert about["reference"] == reference | {"fingerprint": slide_fingerprint(marked_slide)[:16]}

    def test_nothing_of_the_patient_is_in_it(self, painted: Path, marked_slide: Path) -> None:
        """Neither from the header nor from the file's name, in any file nor in any file's name."""
        words = [CANARY, *CANARY.split("^"), str(marked_slide.parent)]
        files = [path for path in painted.parent.rglob("*") if path.is_file()]
        assert len(files) > 8
        for path in files:
            data = path.read_bytes().lower()
            for word in words:
                assert word.lower() not in str(path.relative_to(painted.parent)).lower()
                for form in (word.encode(), word.encode("utf-16-le")):
                    assert form.lower() not in data, f"{word} in {path}"

    def test_the_pair_shows_both_and_says_which(self, painted: Path, marked_slide: Path) -> None:
        canvas = Grid(0.5, 300, 280, 333, 517)
        with Image.open(painted.with_name("pair.png")) as picture:
            assert picture.info["Comment"] == MARK
            pixels = np.asarray(picture)
        reference, painting = open_slide(marked_slide).read(canvas), open_slide(painted)
        assert np.array_equal(pixels[32 : 32 + 333, :517], reference)
        assert np.array_equal(pixels[32 : 32 + 333, 533 : 533 + 517], painting.read(painting.grid))
        words = pixels[:24].astype(int)
        assert ((words[..., 0] - words[..., 1]) > 100).any()  # the mark is red

    @pytest.mark.parametrize("mpp", [1.0, 2.0])
    def test_at_a_coarser_pitch(self, tissue_slide: Path, brush: Brush, tmp_path: Path, mpp: float) -> None:
        target = tmp_path / "coarse.ome.zarr"
        report = synthesize_slide(tissue_slide, target, quick(size=256, mpp=mpp), brush=brush, encoder=ENCODER)
        assert (open_slide(target).mpp, report.shape) == (mpp, (256, 256))
        assert report.region[2:] == (int(512 * mpp), int(512 * mpp))
        assert math.isnan(report.cosine[0.5])  # it has no such detail to show
        yaozarrs.validate_zarr_store(target)


class TestBytes:
    def test_the_same_seed_the_same_bytes_for_any_tile_and_threads(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path
    ) -> None:
        made = []
        before = torch.get_num_threads()
        for number, (threads, tile) in enumerate([(1, 768), (2, 128)]):
            torch.set_num_threads(threads)
            target = tmp_path / f"{number}.ome.zarr"
            painting = Painting(region=(400, 400, 100, 200), steps=5, guidance=2.0, seed=9, tile=tile)
            synthesize_slide(tissue_slide, target, painting, brush=brush, encoder=ENCODER)
            made.append(hashes(target))
        torch.set_num_threads(before)
        assert made[0] == made[1]
        assert len(made[0]) == 4  # manifest, root, one level's metadata and shard


class TestCompare:
    def test_a_slide_is_like_itself(self, slide: Slide, brush: Brush) -> None:
        canvas = Grid(0.5, 0, 0, 1024, 1024)
        found = compare(slide, slide, canvas, brush=brush, encoder=ENCODER)
        assert found[0.5] == pytest.approx(1, abs=1e-5)
        assert found[2.0] == pytest.approx(1, abs=1e-5)
        assert math.isnan(found[8.0])

    def test_the_reference_is_read_where_the_painting_lies(self, slide: Slide, brush: Brush, tmp_path: Path) -> None:
        """A copy of a part is like the part, and less like the part beside it."""
        canvas = Grid(0.5, 400, 300, 256, 384)
        Image.fromarray(slide.read(canvas)).save(tmp_path / "copy.png")
        copy = open_slide(tmp_path / "copy.png", assume_mpp=0.5)
        found = compare(slide, copy, canvas, brush=brush, encoder=ENCODER)
        beside = compare(slide, copy, Grid(0.5, 144, 300, 256, 384), brush=brush, encoder=ENCODER)
        assert found[0.5] == pytest.approx(1, abs=1e-5)
        assert beside[0.5] < found[0.5] - 1e-3

    def test_what_counts_is_the_tissue_of_the_reference(self, slide: Slide, brush: Brush, tmp_path: Path) -> None:
        """A blank painting of tissue is unlike it; of a blank reference nothing can be said."""
        canvas = Grid(0.5, 400, 400, 256, 256)
        for name, colour in (("blank", 250), ("black", 0)):
            Image.fromarray(np.full((256, 256, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
        blank, black = (open_slide(tmp_path / f"{name}.png", assume_mpp=0.5) for name in ("blank", "black"))
        assert compare(slide, black, canvas, brush=brush, encoder=ENCODER)[0.5] < 0.5
        assert compare(slide, blank, canvas, brush=brush, encoder=ENCODER)[0.5] < 0.995
        nothing = compare(blank, slide, Grid(0.5, 0, 0, 256, 256), brush=brush, encoder=ENCODER)
        assert all(math.isnan(value) for value in nothing.values())


class TestRefused:
    def make(self, reference: Path, target: Path, brush: Brush, **options: Any) -> None:
        painting = options.pop("painting", quick(size=32))
        synthesize_slide(reference, target, painting, brush=brush, encoder=options.pop("encoder", ENCODER), **options)

    def test_another_encoder_than_the_brushs(self, tissue_slide: Path, brush: Brush, tmp_path: Path) -> None:
        other = TileStatistics()
        other.fingerprint = "other"
        with pytest.raises(UsageError, match="use the encoder it was trained with"):
            self.make(tissue_slide, tmp_path / "x", brush, encoder=other)
        assert list(tmp_path.iterdir()) == []

    def test_the_reference_as_output(self, brush: Brush, painted: Path) -> None:
        before = hashes(painted)
        with pytest.raises(UsageError, match="the reference itself"):
            self.make(painted, painted, brush, overwrite=True)
        assert hashes(painted) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_picture_that_is_not_ours(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path, overwrite: bool
    ) -> None:
        for name, save in (("photo.png", self.save_photo), ("notes.png", self.save_notes)):
            save(tmp_path / name)
            before = (tmp_path / name).read_bytes()
            with pytest.raises(RefusedError, match=f"{name}: exists and is no picture of wsi-brush"):
                self.make(tissue_slide, tmp_path / "x", brush, png=tmp_path / name, overwrite=overwrite)
            assert (tmp_path / name).read_bytes() == before
        assert not (tmp_path / "x").exists()

    def save_photo(self, path: Path) -> None:
        Image.new("RGB", (8, 8)).save(path)

    def save_notes(self, path: Path) -> None:
        path.write_text("notes")

    def test_a_picture_of_ours_is_replaced_when_asked(self, tissue_slide: Path, brush: Brush, tmp_path: Path) -> None:
        png, target = tmp_path / "pair.png", tmp_path / "x"
        self.make(tissue_slide, target, brush, png=png)
        first = png.read_bytes()
        with pytest.raises(RefusedError, match="--overwrite"):
            self.make(tissue_slide, tmp_path / "y", brush, png=png)
        self.make(tissue_slide, target, brush, png=png, overwrite=True, painting=quick(size=32, seed=1))
        assert png.read_bytes() != first
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.png", "x"]

    def test_a_picture_where_nothing_can_be_written(self, tissue_slide: Path, brush: Brush, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for place in (tmp_path / "file" / "pair.png", tmp_path / "absent" / "pair.png"):
            with pytest.raises(MachineError, match="cannot be written to"):
                self.make(tissue_slide, tmp_path / "x", brush, png=place)
        assert not (tmp_path / "x").exists()


def test_ctrl_c_in_the_middle_leaves_what_was_there(tissue_slide: Path, brush: Brush, tmp_path: Path) -> None:
    """At every stage that is told of; beside it only what the same command goes on from."""
    target = tmp_path / "x"
    synthesize_slide(tissue_slide, target, quick(size=32), brush=brush, encoder=ENCODER)
    before = hashes(target)
    for stage, left in (("embedding the reference", ["x"]), ("painting", [".wsi-brush-work-x", "x"])):

        def interrupt(what: str, done: int, total: int, stage: str = stage) -> None:
            if what == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            synthesize_slide(
                tissue_slide, target, quick(size=32, seed=1), brush=brush, encoder=ENCODER,
                overwrite=True, tell=interrupt,
            )  # fmt: skip
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        assert hashes(target) == before


@pytest.mark.usefixtures("one_thread")  # a fork does not take the threads of OpenMP with it
class TestGoingOn:
    """A killed run, and the same command again."""

    PAINTING = quick(region=(300, 280, 70, 90), seed=5, tile=128)

    def make(self, slide: Path, target: Path, brush: Brush, **options: Any) -> None:
        painting = options.pop("painting", self.PAINTING)
        synthesize_slide(slide, target, painting, brush=brush, encoder=ENCODER, **options)

    def interrupted(self, slide: Path, target: Path, brush: Brush, calls: int, **options: Any) -> None:
        heard = 0

        def interrupt(what: str, done: int, total: int) -> None:
            nonlocal heard
            heard += what == "painting"
            if heard == calls:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.make(slide, target, brush, tell=interrupt, **options)

    @pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
    @pytest.mark.parametrize("solver", ["2m", "heun", "ancestral"])
    def test_it_ends_with_the_same_bytes(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path, on_disk: bool, solver: Any
    ) -> None:
        self.make(tissue_slide, tmp_path / "once", brush, painting=replace(self.PAINTING, solver=solver))
        painting = replace(self.PAINTING, solver=solver, memory=little(brush) if on_disk else 4 * 10**9)
        for calls in (1, 1, 3, 2):
            self.interrupted(tissue_slide, tmp_path / "again", brush, calls, painting=painting)
        self.make(tissue_slide, tmp_path / "again", brush, painting=painting)
        assert hashes(tmp_path / "again") == hashes(tmp_path / "once")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "once"]

    @pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
    def test_killed_at_twenty_moments(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
    ) -> None:
        monkeypatch.setattr(paint, "SAVE_EVERY", 0.0)
        painting = replace(self.PAINTING, memory=little(brush) if on_disk else 4 * 10**9)
        start = time.monotonic()
        self.make(tissue_slide, tmp_path / "once", brush, painting=painting)
        longest = time.monotonic() - start
        random, kills, ended = np.random.default_rng(on_disk), 0, False
        for _ in range(200):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    self.make(tissue_slide, tmp_path / "again", brush, painting=painting)
                    os._exit(0)
                os._exit(1)
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += os.WIFSIGNALED(status)
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
            if (tmp_path / "again").exists():
                ended = True
                assert hashes(tmp_path / "again") == hashes(tmp_path / "once")
                if kills >= 20:
                    break
                shutil.rmtree(tmp_path / "again")
        assert ended
        assert kills >= 20

    def test_other_parameters_are_refused_with_the_difference(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path
    ) -> None:
        self.interrupted(tissue_slide, tmp_path / "x", brush, 3)
        other = replace(self.PAINTING, seed=6, steps=7)
        with pytest.raises(RefusedError, match=r"seed 5 -> 6, steps 5 -> 7.*--overwrite") as found:
            self.make(tissue_slide, tmp_path / "x", brush, painting=other)
        assert "\n" not in str(found.value)
        self.interrupted(tissue_slide, tmp_path / "x", brush, 4, painting=other, overwrite=True)
        told: list[int] = []
        self.make(
            tissue_slide, tmp_path / "x", brush, painting=other, overwrite=True,
            tell=lambda what, done, total: told.append(done) if what == "painting" else None,
        )  # fmt: skip
        self.make(tissue_slide, tmp_path / "y", brush, painting=other)
        assert hashes(tmp_path / "x") == hashes(tmp_path / "y")
        assert told[0] > told[1] - told[0]  # the same command went on, though it may overwrite

    @pytest.mark.parametrize("how", ["changed", "cut", "gone"])
    def test_a_damaged_state_is_refused_in_one_line(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path, how: str
    ) -> None:
        painting = replace(self.PAINTING, memory=little(brush))
        self.interrupted(tissue_slide, tmp_path / "x", brush, 3, painting=painting)
        chunks = (tmp_path / ".wsi-brush-work-x").glob("state-*/x/c/**/*")
        chunk = next(path for path in chunks if path.is_file() and ".partial" not in str(path))
        data = bytearray(chunk.read_bytes())
        data[100] ^= 1
        if how == "gone":
            chunk.unlink()
        else:
            chunk.write_bytes(data[:-50] if how == "cut" else data)
        with pytest.raises(RefusedError, match=r"damaged .*remove .* to begin anew") as found:
            self.make(tissue_slide, tmp_path / "x", brush, painting=painting)
        assert "\n" not in str(found.value)
        assert not (tmp_path / "x").exists()

    def test_two_at_once_are_one_too_many(self, tissue_slide: Path, brush: Brush, tmp_path: Path) -> None:
        target = tmp_path / "x"

        def second(what: str, done: int, total: int) -> None:
            if what == "painting":
                with pytest.raises(RefusedError, match="another process is making it"):
                    self.make(tissue_slide, target, brush)

        self.make(tissue_slide, target, brush, tell=second)
        assert target.exists()

    def test_too_little_memory_says_how_much_it_takes(self, tissue_slide: Path, brush: Brush, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"--max-memory 0\.5GB is too small for one tile; give \d\.\d+GB or more"):
            self.make(tissue_slide, tmp_path / "x", brush, painting=replace(self.PAINTING, memory=5 * 10**8))
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_without_room_is_said_before_the_start(
        self, tissue_slide: Path, brush: Brush, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(MachineError, match=r"0\.0 GB free, the state needs .* GB"):
            self.make(tissue_slide, tmp_path / "x", brush, painting=replace(self.PAINTING, memory=little(brush)))
        assert list(tmp_path.iterdir()) == []


def test_pixels_round_and_clip() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 1 / 127.5 - 1]).reshape(1, 1, 6).expand(3, 1, 6)
    found: NDArray[np.uint8] = as_pixels(image)
    assert found.shape == (1, 6, 3)
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255, 1]


def test_the_manifest_holds_no_clock_and_no_place(painted: Path) -> None:
    manifest = json.loads((painted / commit.MANIFEST).read_text("utf-8"))
    assert set(manifest) == {"kind", "format", "seal", "files"}
