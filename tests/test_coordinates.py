"""Training packs and draws from them: exact pitches, places that stay places, sums without bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wsi_brush.commit import read_manifest, verify
from wsi_brush.condition import ConditionMap
from wsi_brush.coordinates import (
    LADDER,
    LIMIT,
    TRAIN_UNTIL,
    CoordinateSampler,
    Packed,
    TrainingPack,
    build_pack,
)
from wsi_brush.embed import PITCHES
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.scenes import Images, Scenes
from wsi_brush.slide import open_slide
from wsi_brush.splat import interpolate
from wsi_brush.tissue import find_tissue

TILE = 32
SIDE = 1024  # of a slide, pixels at 0.5 µm


class Colours:
    """An encoder: mean and spread of a tile's colours."""

    name, dim, tile, fingerprint = "colours", 6, TILE, "c0ffee"

    def __call__(self, tiles: NDArray[np.uint8], /) -> NDArray[np.float32]:
        plain = tiles.astype(np.float32) / 255
        return np.concatenate([plain.mean((1, 2)), plain.std((1, 2))], 1)


@pytest.fixture(scope="module")
def built(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of one slide."""
    target = tmp_path_factory.mktemp("pack") / "pack"
    build_pack([open_slide(tissue_slide)], target, encoder=Colours())
    return target


# -- packs -------------------------------------------------------------------------------------------------


def blocks(image: NDArray[Any]) -> NDArray[np.float64]:
    """The four pixels of each block side by side: (h / 2, w / 2, 4, c)."""
    wide = image.astype(np.float64)
    return np.stack([wide[0::2, 0::2], wide[0::2, 1::2], wide[1::2, 0::2], wide[1::2, 1::2]], 2)


def test_pitches_are_block_means_of_each_other(built: Path, tissue_slide: Path) -> None:
    images = {pitch: found.parts[0] for pitch, found in TrainingPack(built).images.items()}
    assert tuple(images) == LADDER
    np.testing.assert_array_equal(images[0.5][...], open_slide(tissue_slide).read(Grid(0.5, 0, 0, SIDE, SIDE)))
    for fine, coarse in pairwise(LADDER):
        np.testing.assert_array_equal(images[coarse][...], np.rint(blocks(images[fine][...]).mean(2)))
        assert images[coarse].dtype == np.uint8


def test_details_are_what_block_means_lose_where_it_is_trained(built: Path) -> None:
    pack = TrainingPack(built)
    for level, found in enumerate(pack.about["details"]):
        image = pack.images[LADDER[level]].parts[0][...]
        edge = int(TRAIN_UNTIL * image.shape[1]) // 2 * 2
        parts = blocks(image[:, :edge] / 127.5 - 1)
        assert found == pytest.approx((parts - parts.mean(2, keepdims=True)).std(), rel=1e-4, abs=1e-5)
    assert len(pack.about["details"]) == len(LADDER) - 1


def trained(values: NDArray[Any]) -> NDArray[Any]:
    """The embeddings of the left three quarters, which are trained on."""
    return values[:, : math.ceil(0.75 * values.shape[1])].astype(np.float64)


def test_moments_are_those_of_the_embeddings(built: Path) -> None:
    """Of what is trained on: nothing of the rest is known."""
    pack = TrainingPack(built)
    assert set(pack.about["embeddings"]) == {f"{pitch:g}" for pitch in PITCHES}
    for pitch in PITCHES:
        values = trained(pack.slides[0].embeddings[pitch])
        present = values[np.isfinite(values[..., 0])]
        assert len(present)
        moments = pack.about["embeddings"][f"{pitch:g}"]
        np.testing.assert_allclose(moments["mean"], present.mean(0), atol=1e-5)
        np.testing.assert_allclose(moments["std"], np.maximum(present.std(0), 1e-4), atol=2e-5)
        assert moments["limit"] == LIMIT


def test_embeddings_are_those_of_the_tiles(built: Path) -> None:
    pack = TrainingPack(built)
    for pitch in PITCHES:
        values = pack.slides[0].embeddings[pitch]
        image = pack.images[pitch].parts[0][...]
        row, column = np.argwhere(np.isfinite(values[..., 0]))[0]
        tile = image[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        expected = Colours()(np.asarray(tile, np.uint8)[None])[0]
        np.testing.assert_allclose(values[row, column], expected, atol=4e-3)


def test_a_pack_is_whole_and_says_what_it_is(built: Path, tissue_slide: Path) -> None:
    assert verify(built) == []
    about = read_manifest(built)
    assert about is not None
    assert (about["kind"], about["encoder"], about["fingerprint"]) == ("training pack", "colours", "c0ffee")
    assert (about["dim"], about["tile"], about["slides"], about["until"]) == (6, TILE, 1, TRAIN_UNTIL)
    slide = open_slide(tissue_slide)
    cover = find_tissue(slide).cover(Grid(8.0, 0, 0, 64, 64))
    np.testing.assert_array_equal(TrainingPack(built).slides[0].tissue, cover > 0.5)


def test_a_slide_is_followed_by_itself_in_other_stains(tissue_slide: Path, built: Path, tmp_path: Path) -> None:
    build_pack([open_slide(tissue_slide)] * 2, tmp_path / "pack", encoder=Colours(), stains=2)
    pack, plain = TrainingPack(tmp_path / "pack"), TrainingPack(built)
    assert (pack.about["slides"], pack.about["stains"]) == (6, 2)
    assert "stains" not in plain.about
    images = [np.asarray(part[...]) for part in pack.images[1.0].parts]
    for number in (0, 3):
        np.testing.assert_array_equal(images[number], plain.images[1.0].parts[0][...])
    different = [np.abs(images[0].astype(int) - image).mean() for image in images[1:]]
    assert min(different[:2] + different[3:]) > 2, "another stain, and not the same for two slides"
    assert len({image.tobytes() for image in images}) == 5
    for pitch in PITCHES:
        every = np.concatenate([trained(one.embeddings[pitch]).reshape(-1, 6) for one in pack.slides])
        known, moments = every[np.isfinite(every[:, 0])], pack.about["embeddings"][f"{pitch:g}"]
        np.testing.assert_allclose(moments["mean"], known.mean(0), atol=2e-5)
        np.testing.assert_allclose(moments["std"], np.maximum(known.std(0), 1e-4), atol=2e-5)
    for number in range(6):
        np.testing.assert_array_equal(pack.slides[number].tissue, plain.slides[0].tissue)
        values = pack.slides[number].embeddings[0.5]
        np.testing.assert_array_equal(np.isfinite(values), np.isfinite(plain.slides[0].embeddings[0.5]))
        row, column = np.argwhere(np.isfinite(values[..., 0]))[0]
        tile = np.asarray(pack.images[0.5].parts[number][...])[row * TILE :, column * TILE :][:TILE, :TILE]
        np.testing.assert_allclose(values[row, column], Colours()(tile[None])[0], atol=4e-3)


def test_a_pack_reads_the_same_from_memory_and_from_disk(built: Path) -> None:
    here, there = TrainingPack(built, in_memory=True), TrainingPack(built)
    options: dict[str, Any] = {"shares": (1, 1, 1, 1, 0), "sizes": (128, 128, 128, 64, 32), "window": 32, "points": 20}
    one, two = (CoordinateSampler(pack, **options).draw(3, 2) for pack in (here, there))
    assert here.images[0.5].table is not None
    assert there.images[0.5].table is None
    assert_equal(one, two)


def test_no_pack_is_refused(tmp_path: Path, built: Path) -> None:
    with pytest.raises(RefusedError, match="no finished training pack"):
        TrainingPack(tmp_path)
    with pytest.raises(RefusedError, match="exists"):
        build_pack([], built, encoder=Colours())


# -- draws -------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """As much of a pack as is drawn from."""

    about: dict[str, Any]
    images: dict[float, Images]
    slides: list[Packed]


def made_pack(tissue: NDArray[np.uint8] | None = None, *, slides: int = 2) -> TrainingPack:
    """Slides that say where they lie: pixels are (row, column, slide), embeddings are µm (down, across)."""
    images, found = {}, []
    for pitch in LADDER:
        side = round(SIDE * 0.5 / pitch)
        table = torch.cartesian_prod(torch.arange(slides), torch.arange(side), torch.arange(side)).float()[:, [1, 2, 0]]
        images[pitch] = Images(list(table.view(slides, side, side, 3)), table)
    for _ in range(slides):
        embeddings = {}
        for pitch in PITCHES:
            cell = TILE * pitch
            at = (np.arange(-(-SIDE * 0.5 // cell)) + 0.5) * cell
            embeddings[pitch] = np.stack(np.meshgrid(at, at, indexing="ij"), -1).astype(np.float32)
        mask = np.ones((64, 64), np.uint8) if tissue is None else tissue
        found.append(Packed(cast("dict[float, NDArray[np.float16]]", embeddings), mask))
    return cast(TrainingPack, Made({"pitches": list(LADDER), "tile": TILE, "until": TRAIN_UNTIL}, images, found))


SIZES = (128, 128, 128, 64, 32)


def sampler_of(pack: TrainingPack | None = None, **changed: Any) -> CoordinateSampler:
    options: dict[str, Any] = {"shares": (1, 1, 1, 1, 1), "sizes": SIZES, "window": 32, "points": 30}
    return CoordinateSampler(pack or made_pack(), **(options | changed))


def assert_equal(one: Scenes, two: Scenes) -> None:
    assert (one.mpp, one.window) == (two.mpp, two.window)
    for name in ("lines", "windows", "points"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(one.whole(), two.whole())
    assert one.maps.keys() == two.maps.keys()
    for pitch in one.maps:
        for first, second in zip(one.maps[pitch], two.maps[pitch], strict=True):
            np.testing.assert_array_equal(first, second)


def places(scenes: Scenes) -> NDArray[np.int64]:
    """(row, column, slide) of every pixel of every scene, read out of its colours: (n, 3, size, size)."""
    return np.asarray(np.rint((scenes.whole().numpy() + 1) * 127.5), np.int64)


def map_of(scenes: Scenes, pitch: float) -> ConditionMap:
    return ConditionMap(*scenes.maps[pitch])


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    one, two = sampler_of(seed=5), sampler_of(seed=5)
    ahead = [one.draw(step, 2) for step in range(6)]
    for step in (5, 0, 3):
        assert_equal(two.draw(step, 2), ahead[step])
    assert len({scenes.whole().numpy().tobytes() for scenes in ahead}) == 6
    assert not torch.equal(one.draw(0, 2, mpp=1.0).whole(), sampler_of(seed=6).draw(0, 2, mpp=1.0).whole())


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_stay_in_their_part_of_the_slide(held_out: bool) -> None:
    sampler = sampler_of(held_out=held_out, shares=(1, 1, 1, 1, 0), sizes=(128, 128, 64, 32, 32))
    reach: list[int] = []
    for step in range(60):
        scenes = sampler.draw(step, 2)
        where, width = places(scenes), round(SIDE * 0.5 / scenes.mpp)
        edge = int(width * TRAIN_UNTIL)
        assert where[:, :2].min() >= 0
        assert where[:, :2].max() < width
        if held_out:
            assert where[:, 1].min() >= edge
        else:
            assert where[:, 1].max() < edge
        reach += (where[:, 1].max((1, 2)) * scenes.mpp * 2).tolist()
        assert set(where[:, 2].ravel()) <= {0, 1}
    assert max(reach) > (0.95 * SIDE if held_out else 0.7 * SIDE)


def test_scenes_are_contiguous_pixels_in_one_of_eight_symmetries() -> None:
    sampler = sampler_of(shares=(0, 1, 0, 0, 0))
    turns = set()
    for step in range(80):
        for where in places(sampler.draw(step, 1)):
            down, across = (tuple(where[:2, i, j] - where[:2, 0, 0]) for i, j in ((1, 0), (0, 1)))
            turns.add((down, across))
            expected = (
                where[:2, :1, :1]
                + np.arange(128)[None, :, None] * np.array(down)[:, None, None]
                + np.arange(128)[None, None, :] * np.array(across)[:, None, None]
            )
            np.testing.assert_array_equal(where[:2], expected)
    unit = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    assert turns == {(a, b) for a in unit for b in unit if a[0] * b[0] + a[1] * b[1] == 0}


@pytest.mark.parametrize("mpp", LADDER)
def test_a_map_says_the_same_place_as_the_image_in_all_symmetries(mpp: float) -> None:
    """Embeddings that are their own place, read bilinearly at a pixel of a turned scene, give the pixel's place."""
    sampler = sampler_of()
    size = SIZES[LADDER.index(mpp)]
    at = torch.arange(size) + 0.5
    turns, read = set(), dict.fromkeys(PITCHES, 0)
    for step in range(60):
        scenes = sampler.draw(step, 1, mpp=mpp)
        (where,) = (places(scenes)[:, :2] + 0.5) * mpp
        turns.add(tuple(np.sign(where[:, 1, 0] - where[:, 0, 0])) + tuple(np.sign(where[:, 0, 1] - where[:, 0, 0])))
        for pitch in PITCHES:
            lattice = map_of(scenes, pitch)
            assert lattice.cell == TILE * pitch / mpp
            rows, columns = lattice.in_cells(at[None], at[None])
            there = interpolate(lattice.present[..., None], rows, columns)[0, ..., 0].numpy() > 1 - 1e-6
            found = interpolate(lattice.values, rows, columns)[0].numpy()
            np.testing.assert_allclose(found[there], where.transpose(1, 2, 0)[there], atol=0.02)
            read[pitch] += int(there.sum())
    assert len(turns) == 8
    assert min(read.values()) > 0


def test_maps_reach_as_far_as_a_scene_is_read() -> None:
    """From its outer edge to its outer edge, where the layout's nodes stand, without running into the lattice's end."""
    sampler = sampler_of()
    for step in range(60):
        scenes = sampler.draw(step, 1)
        ends = torch.tensor([0.0, float(scenes.size)])
        for pitch in PITCHES:
            lattice = map_of(scenes, pitch)
            for along, position in enumerate(lattice.in_cells(ends[None], ends[None])):
                assert position.min() >= -1e-4
                assert position.max() <= lattice.values.shape[1 + along] - 1 + 1e-4


def test_cells_without_tissue_are_absent_and_zero() -> None:
    pack = made_pack(slides=1)
    pack.slides[0].embeddings[0.5][10:20] = np.nan
    sampler = sampler_of(pack, shares=(1, 0, 0, 0, 0))
    gone = 0
    for step in range(20):
        values, present = (u.numpy() for u in sampler.draw(step, 2).maps[0.5][:2])
        assert np.isfinite(values).all()
        assert set(np.unique(present)) <= {0, 1}
        assert not values[present == 0].any()
        gone += int((present == 0).sum())
    assert gone


def test_windows_stand_on_the_nodes_and_everywhere() -> None:
    sampler = sampler_of(shares=(1, 0, 0, 0, 0))
    seen = {tuple(corner) for step in range(40) for corner in sampler.draw(step, 4).windows.tolist()}
    assert seen == {(row, column) for row in range(0, 128, 32) for column in range(0, 128, 32)}


@pytest.mark.parametrize(("window", "points"), [(32, 30), (64, 500), (96, 7168)])
def test_points_are_distinct_and_outside_the_window(window: int, points: int) -> None:
    """The last case asks for every point there is."""
    scenes = sampler_of(shares=(1, 0, 0, 0, 0), window=window, points=points).draw(1, 3)
    assert scenes.points.shape == (3, points, 2)
    for corner, found in zip(scenes.windows.numpy(), scenes.points.numpy(), strict=True):
        assert len(np.unique(found, axis=0)) == points
        assert found.min() >= 0
        assert found.max() < 128
        assert not ((found >= corner) & (found < corner + window)).all(1).any()


def test_sums_over_points_are_sums_over_the_scene_without_bias() -> None:
    """Horvitz and Thompson: the window as it is, and scattered points by the inverse of their density."""
    size, window, draws = 64, 32, 1500
    rows, columns = np.mgrid[:size, :size]
    scene = 1 + 0.02 * rows + np.cos(columns / 9) + 4 * (np.hypot(rows - 40, columns - 20) < 6)
    sampler, weight = sampler_of(shares=(0, 0, 0, 1, 0), points=24, window=window), (size**2 - window**2) / 24
    found = []
    for step in range(draws // 4):
        scenes = sampler.draw(step, 4)
        for (top, left), points in zip(scenes.windows.numpy(), scenes.points.numpy(), strict=True):
            inside = scene[top : top + window, left : left + window].sum()
            found.append(inside + weight * scene[points[:, 0], points[:, 1]].sum())
    error = np.std(found) / np.sqrt(draws)
    assert error < 0.01 * scene.sum()
    assert abs(np.mean(found) - scene.sum()) < 4 * error


def test_a_scene_that_is_its_window_has_no_scattered_points() -> None:
    scenes = sampler_of(shares=(0, 0, 0, 0, 1), window=32).draw(0, 2)
    assert scenes.points.shape == (2, 0, 2)
    assert not scenes.windows.any()


def test_a_scene_holds_the_tissue_it_was_drawn_for() -> None:
    tissue = np.zeros((64, 64), np.uint8)
    tissue[40, 7] = 1
    sampler = sampler_of(made_pack(tissue), shares=(1, 1, 1, 1, 0))
    for step in range(40):
        scenes = sampler.draw(step, 2)
        cell = (places(scenes)[:, :2] + 0.5) * scenes.mpp / 8 // 1
        assert ((cell[:, 0] == 40) & (cell[:, 1] == 7)).any((1, 2)).all()


def test_pitches_are_drawn_by_their_shares() -> None:
    sampler = sampler_of(shares=(0, 2, 0, 1, 1), sizes=(32,) * 5, points=0)
    drawn = [sampler.draw(step, 1).mpp for step in range(400)]
    assert set(drawn) == {1.0, 4.0, 8.0}
    assert drawn.count(1.0) == pytest.approx(200, abs=45)


def test_no_room_is_said_before_training() -> None:
    with pytest.raises(UsageError, match="no slide has 64 x 64 pixels at 8 µm"):
        sampler_of(sizes=(128, 128, 128, 64, 64))
    with pytest.raises(UsageError, match="no slide has 32 x 32 pixels at 8 µm"):
        sampler_of(held_out=True, sizes=(32,) * 5)
    with pytest.raises(UsageError, match=r"at 0\.5 µm"):
        sampler_of(made_pack(np.zeros((64, 64), np.uint8)))
    sampler_of(sizes=(128, 128, 128, 64, 64), shares=(1, 1, 1, 1, 0))
