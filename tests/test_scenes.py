"""Scenes: the pixels that a turned cut of the slide would have, from memory and from disk, and no others read."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from wsi_brush import field
from wsi_brush.baselines import System, build
from wsi_brush.coordinates import LADDER, CoordinateSampler, Packed, TrainingPack, turned
from wsi_brush.denoiser import Denoiser, DenoiserConfig
from wsi_brush.diffusion import Ladder
from wsi_brush.embed import PITCHES
from wsi_brush.recipe import Optimisation
from wsi_brush.scenes import Images, Scenes, square
from wsi_brush.train import _losses

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((40, 56), (64, 33), (32, 50))
DIM = 4


class Drawn:
    """A slide that is there only where it is read: a pixel is the hash of its place. Counts what is asked of it."""

    def __init__(self, shape: tuple[int, int], number: int = 0, chunk: tuple[int, int] = (512, 512)) -> None:
        self.shape, self.number, self.chunks, self.asked = (*shape, 3), number, (*chunk, 3), list[tuple[int, ...]]()

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.uint8]:
        rows, columns = (
            np.arange(*part.indices(side), dtype=np.uint64) for part, side in zip(key, self.shape, strict=False)
        )
        self.asked.append((int(rows[0]), int(columns[0]), len(rows) * len(columns)))
        mixed = (rows[:, None] * np.uint64(2654435761) ^ columns * np.uint64(40503)) + np.uint64(self.number * 97)
        return np.stack([mixed >> np.uint64(shift) for shift in (3, 9, 14)], -1).astype(np.uint8)


class Made:
    """As much of a pack as is drawn from: slides that are all tissue, with few embeddings."""

    def __init__(self, images: Images, tile: int) -> None:
        moments = {f"{pitch:g}": {"mean": [0.0] * DIM, "std": [1.0] * DIM} for pitch in PITCHES}
        self.about = {"pitches": list(LADDER), "tile": tile, "until": 1.0, "embeddings": moments}
        self.images = dict.fromkeys(LADDER, images)
        self.slides = []
        for shape in images.shapes:
            sides = {pitch: [max(1, int(side * 0.5 // (tile * pitch))) for side in shape] for pitch in PITCHES}
            found = {pitch: np.ones((*side, DIM), np.float16) for pitch, side in sides.items()}
            self.slides.append(Packed(found, np.ones([-(-int(side) // 16) for side in shape], np.uint8)))


def sampler_of(images: Images, size: int, *, tile: int = 64, **changed: Any) -> CoordinateSampler:
    options: dict[str, Any] = {"shares": (1, 0, 0, 0, 0), "sizes": (size,) * 5, "window": 32, "points": 20} | changed
    return CoordinateSampler(cast(TrainingPack, Made(images, tile)), **options)


def on_disk(folder: Path, chunk: tuple[int, int]) -> list[Any]:
    """Slides of noise as a pack keeps them."""
    root, generator = zarr.open_group(folder, mode="w-", zarr_format=3), np.random.default_rng(0)
    found = []
    for number, shape in enumerate(SHAPES):
        array = root.create_array(str(number), shape=(*shape, 3), dtype=np.uint8, chunks=(*chunk, 3))
        array[...] = generator.integers(0, 256, (*shape, 3), np.uint8)
        found.append(array)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Images]:
    """The same slides from memory and from disk."""
    arrays = on_disk(tmp_path_factory.mktemp("scenes") / "slides", (11, 16))
    return [Images.of(arrays, where) for where in (torch.device("cpu"), None)]


def every_turn(images: Images, size: int) -> tuple[Scenes, Tensor]:
    """Scenes of all slides in all symmetries, and what they show by cutting and turning."""
    sampler = sampler_of(images, size, window=16)
    slides = np.repeat(np.arange(len(SHAPES)), 8)
    turns, corners = np.tile(np.arange(8), len(SHAPES)), np.array([(0, 1), (7, 0), (8, 9)])[slides]
    drawn = sampler.draw(0, len(turns))
    lines = torch.from_numpy(sampler._lines(0.5, slides, corners, turns))
    expected = [
        turned(np.asarray(images.parts[slide][...])[top : top + size, left : left + size], int(turn))
        for slide, (top, left), turn in zip(slides, corners, turns, strict=True)
    ]
    return replace(drawn, lines=lines), torch.from_numpy(np.stack(expected)).float() / 127.5 - 1


@pytest.mark.parametrize("where", [0, 1], ids=["memory", "disk"])
def test_a_scene_is_a_cut_of_the_slide_turned(both: list[Images], where: int) -> None:
    scenes, expected = every_turn(both[where], 24)
    assert torch.equal(scenes.whole(), expected.permute(0, 3, 1, 2))


@settings(deadline=None, max_examples=20)
@given(where=st.integers(0, 1), side=st.integers(1, 30), seed=st.integers(0, 999))
def test_any_places_are_those_of_the_whole(both: list[Images], where: int, side: int, seed: int) -> None:
    """Squares that overlap and reach beyond the scene, where its edge goes on."""
    scenes, expected = every_turn(both[where], 24)
    corners = torch.randint(-8, 30, (len(expected), 3, 2), generator=torch.Generator().manual_seed(seed))
    rows, columns = square(corners, side)
    scene = torch.arange(len(expected))[:, None, None, None]
    assert torch.equal(scenes.read_at(rows, columns), expected[scene, rows.clamp(0, 23), columns.clamp(0, 23)])


def test_a_square_is_its_rows_and_its_columns() -> None:
    rows, columns = square(torch.tensor([[3, 5], [-1, 0]]), 2)
    assert rows.tolist() == [[[3], [4]], [[-1], [0]]]
    assert columns.tolist() == [[[5, 6]], [[0, 1]]]


@pytest.mark.parametrize("where", [0, 1], ids=["memory", "disk"])
def test_windows_and_points_are_seen_at_once_and_once(
    both: list[Images], where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes, whole = every_turn(both[where], 24)
    scenes = replace(scenes, windows=scenes.windows + 4)
    window, around = scenes.seen(2)
    assert torch.equal(window, whole[:, 4:20, 4:20])
    assert torch.equal(around, scenes.read_at(*square(scenes.points - 2, 5)))
    assert around.shape == (24, 20, 5, 5, 3)
    monkeypatch.setattr(Images, "read", None)
    assert scenes.seen(2)[1] is around


def test_without_points_the_window_is_seen(both: list[Images]) -> None:
    scenes = sampler_of(both[0], 32, points=0).draw(0, 3)
    window, around = scenes.seen(2)
    assert torch.equal(window, scenes.whole().permute(0, 2, 3, 1))
    assert around.shape == (3, 0, 5, 5, 3)


def test_a_draw_reads_ahead_if_it_is_told_the_reach(both: list[Images], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ahead = (sampler_of(both[1], 32, points=0, reach=reach).draw(4, 2) for reach in (None, 1))
    expected = plain.seen(1)
    monkeypatch.setattr(Images, "read", None)
    assert torch.equal(ahead.seen(1)[0], expected[0])
    with pytest.raises(TypeError):
        ahead.seen(2)


# -- what is not read --------------------------------------------------------------------------------------


def test_a_chunk_on_disk_is_read_once_for_all_that_is_seen_in_it() -> None:
    slide = Drawn((1250, 1000), chunk=(128, 96))
    scenes = sampler_of(Images([slide]), 768, tile=256, window=64, points=400).draw(1, 1)
    window, around = scenes.seen(3)
    asked = slide.asked.copy()
    assert 49 <= len(asked) == len({chunk[:2] for chunk in asked}) <= 7 * 9
    assert max(chunk[2] for chunk in asked) == 128 * 96  # whatever the scene
    whole = scenes.whole()[0].permute(1, 2, 0)
    (top, left), points = scenes.windows[0].tolist(), scenes.points[0]
    assert torch.equal(window[0], whole[top : top + 64, left : left + 64])
    assert torch.equal(around[0, :, 3, 3], whole[points[:, 0], points[:, 1]])


def test_a_draw_does_nothing_that_grows_with_the_scene() -> None:
    """Of 8192 x 8192 pixels on disk, with what is seen of them; a permutation of them would take half a gigabyte."""
    sampler = sampler_of(Images([Drawn((8192, 8192), chunk=(64, 64))]), 8192, tile=4096, points=64, reach=2)
    tracemalloc.start()
    sampler.draw(0, 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6


def network_of(name: str) -> Denoiser | System:
    """A tiny one."""
    torch.manual_seed(0)
    if name == "ours":
        return Denoiser(DenoiserConfig(dim=DIM, width=4, depth=(1, 1, 2), layout=1, heads=2, tokens=2, mollifier=0.5))
    sizes: dict[str, Any] = {"side": 16, "width": 8, "levels": 2, "blocks": 1, "heads": 2}
    if name != "patches":
        sizes = {"width": 4, "kernel": 3, "grid": 4, "node": 32, "heads": 2}
    return build(name, {"dim": DIM, **sizes})


@pytest.mark.parametrize("name", ["ours", "infty-diff", "infty-brush", "patches"])
def test_a_large_scene_costs_as_many_pixels_and_as_much_noise_as_a_small_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no permutation of its pixels is drawn; a slide on disk gives no more than a chunk at once."""
    counted = list[tuple[str, int]]()

    def counting(where: Any, what: str) -> None:
        work = getattr(where, what)

        def counts(*given: Any, **named: Any) -> Any:
            found = work(*given, **named)
            counted.append((what, found.numel()))
            return found

        monkeypatch.setattr(where, what, counts)

    for where, what in ((Images, "read"), (field, "_normal"), (torch, "randn"), (torch, "rand"), (torch, "randperm")):
        counting(where, what)
    images, network, found = Images([Drawn((4096, 4096))]), network_of(name), []
    ladder, told = Ladder(LADDER, (0.1,) * 4), Made(images, 1024).about
    for size in (256, 2048):
        scenes = sampler_of(images, size, tile=1024, points=30).draw(0, 2)
        counted.clear()
        with torch.no_grad():
            loss, _ = _losses(network, ladder, scenes, told, Optimisation(), torch.Generator().manual_seed(0))
        assert math.isfinite(loss.item())
        found.append(counted.copy())
    assert found[0] == found[1]
    assert {"read", "randn" if name == "patches" else "_normal"} <= {what for what, _ in counted}
    assert max(asked[2] for asked in images.parts[0].asked) == 512**2
