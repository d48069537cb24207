"""pipelines/bundled: settings against quality, and the sheet for a blind reading, of what was not trained on."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import make_brush, make_maps

from wsi_brush.brush import load_brush
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.sides import open_sides
from wsi_brush.slide import open_slide

PIPELINE = Path(__file__).parents[1] / "pipelines" / "bundled"
WEIGHTS = Path(__file__).parents[1] / "wsi_brush" / "weights" / "brush" / "brush.safetensors"
pytestmark = pytest.mark.skipif(
    not PIPELINE.is_dir() or not WEIGHTS.is_file(), reason="the pipelines or the bundled brush are not in this checkout"
)
RECIPE, TRAINED = '[data]\nslides = [{ path = "tissue.tif" }]\nuntil = 0.4\n', 410  # columns of 1024, rounded up
SIZE = 512


@pytest.fixture(scope="module")
def pipelines() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PIPELINE))  # as Python does for a script; workers are given it too
        yield {name: importlib.import_module(name) for name in ("held_out", "sweeps", "blind_sheet", "between")}


@pytest.fixture(scope="module")
def asked(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    work = tmp_path_factory.mktemp("sweeps")
    (work / "brush.toml").write_text(RECIPE, encoding="utf-8")
    return argparse.Namespace(
        recipe=work / "brush.toml", slides=tissue_slide.parent, work=work / "work", brush="bundled", device="cpu",
        workers=1, only=["steps", "seeds"], size=SIZE, steps=[2], guidance=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(pipelines: dict[str, ModuleType], asked: argparse.Namespace) -> dict[str, Any]:
    """What one run wrote, in numbers."""
    pipelines["sweeps"].main(asked)
    return dict(json.loads((asked.work / "sweeps.json").read_text(encoding="utf-8")))


def tables(work: Path) -> list[list[dict[str, str]]]:
    """The tables of sweeps.md: rows by their heads."""
    found: list[list[dict[str, str]]] = []
    heads: list[str] = []
    for line in (work / "sweeps.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
            found.append([])
        elif not line.startswith("|---"):
            found[-1].append(dict(zip(heads, cells, strict=True)))
    return found


def test_the_held_out_square_has_tissue_and_nothing_that_was_trained_on(
    swept: dict[str, Any], tissue_slide: Path
) -> None:
    (region,) = swept["about"]["regions"].values()
    place, slide = Grid(0.5, *region), open_slide(tissue_slide)
    assert place.shape == (SIZE, SIZE)
    assert place.clip(slide.grid) == place
    assert place.left >= TRAINED
    assert place.left < TRAINED + 64  # the piece ends towards the right: there is more tissue on the left
    assert slide.read(place).mean() < 235


def test_a_painting_of_another_brush_is_not_judged_as_this_ones(
    pipelines: dict[str, ModuleType], swept: dict[str, Any], asked: argparse.Namespace
) -> None:
    (painting,) = asked.work.glob("*/steps20-guidance1-seed0/*.ome.zarr")
    brush = load_brush()
    wanted: dict[str, Any] = {"brush_fingerprint": brush.fingerprint, "guidance": 1.0, "steps": 20}
    assert pipelines["held_out"].otherwise(painting, wanted) == []
    other = replace(brush, ladder=replace(brush.ladder, retained=()))  # of the same weights
    changed = wanted | {"brush_fingerprint": other.fingerprint, "steps": 5}
    assert pipelines["held_out"].otherwise(painting, changed) == ["brush", "steps"]


def test_every_setting_has_its_row(swept: dict[str, Any], asked: argparse.Namespace) -> None:
    steps, seeds, two = tables(asked.work)
    assert [(row["steps"], row["guidance"], row["seed"]) for row in steps] == [("2", "1", "0"), ("20", "1", "0")]
    assert [(row["steps"], row["guidance"], row["seed"]) for row in seeds] == [("20", "1", "0"), ("20", "1", "1")]
    assert [row["guidance"] for row in two] == ["1", "real, a tile apart", "real, elsewhere in the square"]
    for row in steps:
        setting = next(one for one in swept["settings"] if (str(one["steps"]), str(one["seed"])) == (row["steps"], "0"))
        mean = setting["figures"]["control"]["bundled"]["cosine"]["0.5"]["mean"]
        assert float(row["cosine 0.5 µm"]) == pytest.approx(mean, rel=1e-2)
        assert row["FD 0.5 µm"] == row["FD 2 µm"] == "–"  # too few tiles
        assert row["KID 0.5 µm"].endswith(")")  # beside its floor
    assert "SYNTHETIC" in (asked.work / "sweeps.md").read_text(encoding="utf-8")


def test_two_seeds_are_neither_one_painting_nor_strangers(swept: dict[str, Any]) -> None:
    (one,) = swept["seeds"]
    assert 0.01 < one["pixels"] < 0.9
    assert 0 < one["0.5"]["seeds"] < one["0.5"]["elsewhere"]


def test_what_is_painted_and_judged_stays(
    swept: dict[str, Any], pipelines: dict[str, ModuleType], asked: argparse.Namespace
) -> None:
    (work,) = (one for one in asked.work.iterdir() if one.is_dir())
    written = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    lost = work / "steps2-guidance1-seed0.json"
    lost.unlink()
    pipelines["sweeps"].main(asked)
    assert {path: path.stat().st_mtime_ns for path in written if path != lost} == {
        path: time for path, time in written.items() if path != lost
    }
    again = json.loads((asked.work / "sweeps.json").read_text(encoding="utf-8"))
    for one in (*again["settings"], *swept["settings"]):
        del one["figures"]["seconds"]
    assert again == swept


def test_a_sweep_shares_the_default_and_has_two_seeds_a_guidance(pipelines: dict[str, ModuleType]) -> None:
    sweeps = pipelines["sweeps"]
    asked = argparse.Namespace(only=["steps", "guidance"], steps=[50, 5], guidance=[2.0, 3.0])
    found = sweeps.settings(asked)
    assert [one.steps for one in found["steps"]] == [5, 20, 50]
    assert [(one.guidance, one.seed) for one in found["guidance"]] == [(g, s) for g in (1, 2, 3) for s in (0, 1)]
    assert set(found["steps"]) & set(found["guidance"]) == {sweeps.Setting()}


def test_the_key_of_the_sheet_is_true(
    swept: dict[str, Any], pipelines: dict[str, ModuleType], asked: argparse.Namespace, tissue_slide: Path
) -> None:
    from PIL import Image

    blind, side, count = pipelines["blind_sheet"], 64, 8
    (painting,) = asked.work.glob("*/steps20-guidance1-seed0/*.ome.zarr")
    sheet = asked.work / "sheet.png"
    given = argparse.Namespace(
        recipe=asked.recipe, slides=asked.slides, paintings=painting.parent, out=sheet, seed=3, crops=count, side=side,
        codec="none",
    )  # fmt: skip
    blind.main(given)
    key, sides = (
        json.loads(sheet.with_suffix(".json").read_text(encoding="utf-8")),
        open_sides([tissue_slide], [painting]),
    )
    with Image.open(sheet) as picture:
        assert (
            picture.info["Comment"]
            == "Holds SYNTHETIC images: 4 of 8, painted by wsi-brush; not for diagnosis. Seed 3."
        )
        pixels = np.asarray(picture)
    places = set()
    for number in range(count):
        left, top = blind.corner(number, side)
        shown, said = pixels[top : top + side, left : left + side], key["crops"][str(number + 1)]
        place = Grid(key["mpp"], *said["place"], side, side)
        real, painted = sides.real[0].slide.read(place), sides.synthetic[0].slide.read(sides.pairs[0].here(place))
        kinds = {"real": np.array_equal(shown, real), "painted": np.array_equal(shown, painted)}
        assert [kind for kind, same in kinds.items() if same] == [said["is"]]
        assert said["slide"] == tissue_slide.name
        assert place.left >= TRAINED
        places.add((place.top // side, place.left // side))
    assert len(places) == count
    assert sum(one["is"] == "real" for one in key["crops"].values()) == count // 2
    with pytest.raises(RefusedError, match=r"sheet\.png: exists"):
        blind.main(given)
    other = {**vars(given), "out": asked.work / "other.jpg"}
    blind.main(argparse.Namespace(**{**other, "seed": 4}))
    assert json.loads((asked.work / "other.json").read_text(encoding="utf-8"))["crops"] != key["crops"]
    with pytest.raises(UsageError, match="give fewer --crops"):
        blind.main(argparse.Namespace(**{**other, "out": asked.work / "more.png", "crops": 2000}))


def test_a_sheet_of_what_was_trained_on_is_refused(
    swept: dict[str, Any], pipelines: dict[str, ModuleType], asked: argparse.Namespace, tmp_path: Path
) -> None:
    (painting,) = asked.work.glob("*/steps20-guidance1-seed0/*.ome.zarr")
    (tmp_path / "other.toml").write_text(RECIPE.replace("0.4", "0.9"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"tissue\.ome\.zarr: begins at column \d+, and 922 are trained on"):
        pipelines["blind_sheet"].opened(tmp_path / "other.toml", asked.slides, painting.parent)


# between ----------------------------------------------------------------------------------------------


def test_a_passage_begins_at_the_one_and_ends_at_the_other(
    swept: dict[str, Any], pipelines: dict[str, ModuleType], asked: argparse.Namespace, tissue_slide: Path
) -> None:
    """Between the made slide and a painting after its held-out part: two references, one of another size."""
    from PIL import Image

    (painting,) = asked.work.glob("*/steps2-guidance1-seed0/*.ome.zarr")
    target = asked.work / "between.png"
    given = argparse.Namespace(
        slides=[f"{tissue_slide}@0.5", str(painting)], out=target, brush="bundled", device="cpu", size=256, seed=0,
        steps=2,
    )  # fmt: skip
    pipelines["between"].main(given)
    said = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    assert said["synthetic"] is True
    assert len(said["passage"]) == 2
    assert len(said["real"]) == 2
    with Image.open(target) as picture:
        assert picture.info["Comment"] == pipelines["between"].MARK
        assert picture.size == (256, 256 + pipelines["between"].HEAD)
    with pytest.raises(RefusedError, match=r"between\.png: exists"):
        pipelines["between"].main(given)


def test_maps_between_two_are_theirs_at_the_borders(pipelines: dict[str, ModuleType]) -> None:
    canvas, dim = Grid(0.5, 0, 0, 128, 1024), 6
    brush = make_brush(dim=dim, tile=128)
    brush.about["embeddings"]["0.5"] = {"mean": [1.0] * dim, "std": [2.0] * dim}
    one, other = (make_maps(canvas, dim=dim, tile=128, seed=seed) for seed in (1, 2))
    for maps, ends in ((one, 1.0), (other, -3.0)):  # there in both, whatever chance left out
        maps[0.5].values[0, [0, -1]] = ends
        maps[8.0].values[:] = ends + np.arange(dim)
    found = pipelines["between"].between(one, other, canvas, brush)
    assert list(found) == [0.5, 2.0, 8.0]
    row, near, far = (maps[0.5].values[0].astype(float) for maps in (found, one, other))
    present = ~np.isnan(near).any(1) & ~np.isnan(far).any(1)
    apart = [np.linalg.norm(row - side, axis=1) for side in (near, far)]
    share = apart[0] / (apart[0] + apart[1])
    assert share[0] < 0.15
    assert share[-1] > 0.85
    assert present[1:-1].any()
    assert (np.abs(share[1:-1][present[1:-1]] - 0.5) < 0.35).all()
    assert np.array_equal(np.isnan(row).any(1), np.isnan(near).any(1) & np.isnan(far).any(1))
    # one cell of 8 µm is wider than the canvas: what lies under it is as much of the one as of the other
    middle, *sides = (maps[8.0].values[0, 0].astype(float) for maps in (found, one, other))
    both = sides[0] + sides[1]
    assert middle @ both / np.linalg.norm(middle) / np.linalg.norm(both) == pytest.approx(1, abs=1e-4)


def test_a_border_is_the_line_that_stands_out(pipelines: dict[str, ModuleType]) -> None:
    pixels = np.random.default_rng(0).integers(100, 140, (200, 300, 3), np.uint8)
    plain = pipelines["between"].borders(pixels)
    pixels[:, 137:] += 60
    found = pipelines["between"].borders(pixels)
    assert plain["largest"] < 1.2
    assert found["at"] == 137
    assert found["largest"] == found["middle"] > 3
