"""Copies are told from tissue of the same kind, wherever they lie and however turned they are."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tissue, write_lossless
from numpy.typing import NDArray
from PIL import Image

from wsi_brush import copying
from wsi_brush.brush import Brush
from wsi_brush.coordinates import CoordinateSampler, TrainingPack, build_pack, turned
from wsi_brush.copying import limit
from wsi_brush.errors import SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.nearest import PITCH, SIDE
from wsi_brush.recipe import TrainConfig
from wsi_brush.samples import Codec
from wsi_brush.scenes import Scenes
from wsi_brush.sides import Sides, open_sides
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide
from wsi_brush.train import Training

pytestmark = pytest.mark.usefixtures("one_thread")

Pixels = NDArray[np.uint8]
JPEG = Codec("jpeg:90")


def coded(pixels: Pixels, quality: int) -> Pixels:
    """As another program would save it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def audit(real: Path, synthetic: Path, training: Path | list[Path], **options: Any) -> tuple[dict[str, Any], Sides]:
    sides = open_sides([real], [synthetic])
    paths = training if isinstance(training, list) else [training]
    return copying.copying(sides, paths, JPEG, **{"most": 1000, "seed": 0} | options), sides


# -- the controls ------------------------------------------------------------------------------------------


def test_tissue_of_the_same_kind_is_no_copy(kin: Path) -> None:
    """The negative control."""
    found, sides = audit(kin / "held.tif", kin / "other.tif", kin / "training.tif")
    assert (found["held_out"], found["synthetic"]) == (400, 400)
    assert found["share"]["value"] <= 0.01
    assert found["share"]["floor"] <= 0.01
    assert found["share"]["high"] <= 0.02
    near = found["correlation"]
    assert near["value"] == pytest.approx(near["floor"], abs=0.02)
    assert near["low"] <= near["value"] <= near["high"]
    assert sum(found["counts"]["synthetic"]) == 400
    assert sides.notes == ["paired by their order: held.tif with other.tif"]
    scores = [one["correlation"] for one in found["worst"]]
    assert scores == sorted(scores, reverse=True)


def test_the_same_seed_the_same_figures(kin: Path) -> None:
    first, again, other = (
        audit(kin / "held.tif", kin / "other.tif", kin / "training.tif", most=40, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("turn", [0, 3, 6])
def test_a_part_of_a_training_slide_is_a_copy(kin: Path, tmp_path: Path, turn: int) -> None:
    """Cut where no lattice is, turned, darker, and saved badly."""
    part = open_slide(kin / "training.tif").read(Grid(PITCH, 37, 51, 192, 224))
    part = coded(np.ascontiguousarray(turned((part * 0.9).astype(np.uint8), turn)), 60)
    found, _ = audit(kin / "held.tif", write_lossless(tmp_path / "copy.tif", part), kin / "training.tif")
    assert found["share"]["value"] >= 0.95
    assert found["share"]["low"] >= 0.9
    assert found["share"]["floor"] <= 0.01
    assert found["correlation"]["value"] > 0.85 > 0.5 > found["threshold"] > found["correlation"]["floor"]


# -- an overfitted brush -----------------------------------------------------------------------------------


class Colours:
    """An encoder that sees no more than mean and spread of the colours of 16 µm."""

    name, dim, tile, fingerprint = "colours", 6, 32, "c0ffee"

    def __call__(self, tiles: Pixels, /) -> NDArray[np.float32]:
        plain = tiles.astype(np.float32) / 255
        return np.concatenate([plain.mean((1, 2)), plain.std((1, 2))], 1)


class Same:
    """A sampler that draws one scene of each slide for ever: its first tile, upright."""

    def __init__(self, sampler: CoordinateSampler, pack: TrainingPack) -> None:
        drawn, picks = sampler.draw(0, 2048, mpp=PITCH), []
        for image in pack.images[PITCH].parts:
            tile = image[:SIDE, :SIDE].permute(2, 0, 1)
            picks.append(int(((drawn.whole() + 1) * 127.5).round().eq(tile).flatten(1).all(1).nonzero()[0]))
        maps = {pitch: (*(one[picks] for one in parts), cell) for pitch, (*parts, cell) in drawn.maps.items()}
        self._scenes = replace(
            drawn, lines=drawn.lines[picks], maps=maps, windows=drawn.windows[picks], points=drawn.points[picks]
        )

    def draw(self, step: int, batch: int) -> Scenes:
        return self._scenes


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Slides of a tile of tissue each; the right quarter, which training holds out, is glass."""
    found = []
    for number in range(8):
        pixels = np.full((128, 176, 3), 245, np.uint8)
        pixels[:, :128] = tissue(32, 32, 20 + number).repeat(4, 0).repeat(4, 1)
        found.append(write_lossless(tmp_path_factory.mktemp("eight") / f"{number}.tif", pixels, mpp=0.5))
    return found


def overfitted(slides: list[Path], work: Path) -> Brush:
    build_pack([open_slide(slide) for slide in slides], work / "pack", encoder=Colours())
    pack = TrainingPack(work / "pack", in_memory=True)
    config = TrainConfig.model_validate(
        {
            "data": {"slides": [{"path": "made"}], "shares": (0, 0, 1, 0, 0), "sizes": (SIDE,) * 5, "window": SIDE,
                     "points": 0},
            "model": {"width": 32, "depth": (1, 1, 1), "layout": 1, "heads": 2, "tokens": 2},
            "optimisation": {"steps": 120, "warmup": 20, "rate": 1.2e-2, "full_range": 1.0, "unconditional": 0.0,
                             "scattered": 0.0, "average": 0.99, "sigma_min": 0.06},
        }
    )  # fmt: skip
    training = Training(config, pack, work)
    training.sampler = Same(training.sampler, pack)  # type: ignore[assignment]
    while not training.over:
        training.step()
    return training.brush()


def test_an_overfitted_brush_is_found_out(kin: Path, eight: list[Path], tmp_path: Path) -> None:
    """The positive control: trained on eight tiles and nothing else, it paints them; none is near to other tissue."""
    brush, paintings = overfitted(eight, tmp_path), []
    for number, slide in enumerate(eight * 2):
        how = Painting(region=(0, 0, 128, 128), mpp=PITCH, seed=number, guidance=1.0, progressive=False)
        paintings.append(tmp_path / f"{number}.ome.zarr")
        synthesize_slide(slide, paintings[-1], how, brush=brush, encoder=Colours())  # type: ignore[arg-type]
    own, other = (
        copying.copying(open_sides([kin / "held.tif"], paintings), among, JPEG, most=300, seed=0)
        for among in ([kin / "training.tif", *eight], [kin / "training.tif"])
    )
    assert own["synthetic"] == other["synthetic"] == 16
    assert own["share"]["value"] >= 0.95
    assert own["share"]["floor"] <= 0.01
    assert all(one["training"] == 1 + one["synthetic"] % 8 and one["turn"] == 0 for one in own["worst"])
    assert other["share"]["value"] <= 0.01


# -- what is held out --------------------------------------------------------------------------------------


def test_at_most_one_in_a_hundred_is_above_the_limit() -> None:
    """Of held-out tiles, 95 % sure, whatever their distribution is; one in a thousand where its tail is exponential."""
    random = np.random.default_rng(0)
    for count in (299, 600, 3000):
        flat = np.array([1 - limit(random.random(count)) for _ in range(500)])
        heavy = np.array([1 - 2 / np.pi * np.arctan(limit(abs(random.standard_cauchy(count)))) for _ in range(500)])
        exponential = np.array([np.exp(-limit(random.exponential(size=count))) for _ in range(500)])
        for beyond in (flat, heavy, exponential):
            assert (beyond > 0.01).mean() < 0.07
        assert 0.0005 < exponential.mean() < 0.002


def test_no_held_out_tile_is_judged_by_itself_or_its_neighbours() -> None:
    """One block of eight is nearer to the training slides than all others: by its own tiles, none of it would be."""
    scores, groups = np.random.default_rng(0).uniform(0.2, 0.4, 96), np.arange(96) // 12
    scores[groups == 5] += 0.4
    found = copying._compared(list(scores), [0.3] * 20, (groups, np.arange(20)), [], 0)
    assert found["threshold"] > scores.max() - 1e-4
    assert found["share"]["value"] == 0
    assert found["share"]["floor"] == 12 / 96


@pytest.mark.parametrize("how", ["named", "copied", "saved anew"])
def test_a_training_slide_is_not_held_out(kin: Path, tmp_path: Path, how: str) -> None:
    real = kin / "training.tif"
    if how == "copied":
        real = Path(shutil.copy(real, tmp_path / "renamed.tif"))
    elif how == "saved anew":
        slide = open_slide(real)
        real = tmp_path / "anew.png"
        Image.fromarray(coded(slide.read(slide.grid), 80)[3:, 5:]).save(real)
    options = {"assume_mpp": PITCH} if how == "saved anew" else {}
    sides = open_sides([real, kin / "held.tif"], [kin / "other.tif"], assume_mpp=options.get("assume_mpp"))
    found = copying.copying(sides, [kin / "training.tif"], JPEG, most=1000, seed=0, **options)
    assert found["held_out"] >= 0.7 * 400  # of the 400 that are drawn, those of the other slide
    assert found["threshold"] < 0.5
    assert any(real.name in note and "held out" in note and "held.tif" not in note for note in sides.notes)
    alone = open_sides([real], [kin / "other.tif"], assume_mpp=options.get("assume_mpp"))
    found = copying.copying(alone, [kin / "training.tif"], JPEG, most=64, seed=0, **options)
    assert found["missing"].startswith("0 held-out")
    assert len(found["worst"]) == 12


def test_what_lies_beyond_what_was_trained_on_is_held_out(kin: Path) -> None:
    found, sides = audit(kin / "held.tif", kin / "training.tif", kin / "held.tif", until=0.5)
    assert found["held_out"] == 200
    assert found["until"] == 0.5
    assert found["share"]["value"] <= 0.02
    assert all(one["there"][1] + one["side"] <= 640 for one in found["worst"])
    assert any("held.tif" in note for note in sides.notes)
    assert any("200 held-out tiles: fewer than the 299" in note for note in sides.notes)


def test_each_place_counts_once(kin: Path) -> None:
    """Two paintings may follow one reference."""
    sides = open_sides([kin / "held.tif"] * 2, [kin / "training.tif"] * 2)
    found = copying.copying(sides, [kin / "other.tif"], JPEG, most=1000, seed=0)
    assert (found["held_out"], found["synthetic"]) == (400, 160)


# -- what cannot be done is said ---------------------------------------------------------------------------


def test_what_cannot_be_searched_is_said(kin: Path, tmp_path: Path) -> None:
    coarse = write_lossless(tmp_path / "coarse.tif", tissue(64, 64, 0), mpp=4.0)
    blank = write_lossless(tmp_path / "blank.tif", np.full((256, 256, 3), 245, np.uint8))
    small = kin / "training.tif"
    found, sides = audit(kin / "held.tif", small, coarse)
    assert "copies are looked for at 2 µm" in found["missing"]
    assert any("coarse.tif: pixels of 4 µm, too coarse" in note for note in sides.notes)
    assert "no place" in audit(kin / "held.tif", small, blank, most=32)[0]["missing"]
    found, _ = audit(kin / "held.tif", small, [blank, kin / "other.tif"], most=40)
    assert found["training"] == ["blank.tif", "other.tif"]
    assert {one["training"] for one in found["worst"]} == {1}
    assert "missing" in audit(kin / "held.tif", small, kin / "other.tif", most=20)[0]
    (tmp_path / "empty").mkdir()
    for path, error in ((tmp_path / "empty", UsageError), (tmp_path / "none.tif", SlideError)):
        with pytest.raises(error):
            audit(kin / "held.tif", small, path)


def test_progress_comes_to_its_end(kin: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    audit(
        kin / "held.tif", kin / "training.tif", [kin / "other.tif"] * 2, most=32,
        tell=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )  # fmt: skip
    assert {what: steps[-1] for what, steps in told.items()} == {
        "looking for copies": (18, 18), "looking at the nearest places": (64, 64),
    }  # fmt: skip
