"""pipelines/paper_tables: the one command trains, paints and judges, and goes on where it was."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import write_pyramid

from wsi_brush.brush import load_brush
from wsi_brush.coordinates import TrainingPack
from wsi_brush.encoder import load_encoder
from wsi_brush.errors import UsageError
from wsi_brush.grid import Grid
from wsi_brush.published import CLIP_SHA256, Network, Networks
from wsi_brush.sides import painted_after
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide
from wsi_brush.tissue import find_tissue

PIPELINE = Path(__file__).parents[1] / "pipelines" / "paper_tables"
pytestmark = pytest.mark.skipif(not PIPELINE.is_dir(), reason="the pipelines are not beside the tests")

NONE = Networks(None, None, "no weights here")
TABLES = """
minutes = 60
steps = 2
seed = 3
encoder = "bundled"
held_out = [{ path = "tissue.tif" }]

[[paintings]]
size = 256
each = 2

[[paintings]]
size = 128
each = 1

[data]
slides = [{ path = "tissue.tif" }]
shares = [1, 0, 0, 0, 0]
sizes = [64, 64, 64, 64, 32]
window = 32
points = 8

[optimisation]
steps = 2
batch = 1

[systems.ours]
model = { width = 64, heads = 8 }  # the bundled brush's
optimisation = { start = "bundled", rate = 1e-6 }  # what has learnt nothing paints no tissue

[systems.infty-diff]
sizes = [256]
model = { width = 8, grid = 8 }
"""


@pytest.fixture(scope="module")
def pipeline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", PIPELINE / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def asked(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    work = tmp_path_factory.mktemp("tables")
    (work / "tables.toml").write_text(TABLES, encoding="utf-8")
    return argparse.Namespace(
        tables=work / "tables.toml", slides=tissue_slide.parent, work=work / "work", device="cpu", minutes=None,
        each=None, sizes=None, only=None, no_costs=False,
    )  # fmt: skip


def changed(asked: argparse.Namespace, **values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(asked), **values})


def _at(names: list[str], wanted: str) -> list[int]:
    return [index for index, name in enumerate(names) if name == wanted]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def made(pipeline: ModuleType, asked: argparse.Namespace) -> list[str]:
    """The lines of the results of all of it, with scenes that the made slide has room for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "COST_SIZES", (64, 128))
        patch.setattr(pipeline, "find_networks", lambda: NONE)
        pipeline.main(asked)
    return list((asked.work / "RESULTS.md").read_text(encoding="utf-8").splitlines())


def test_a_system_alone_has_the_pack_that_the_recipe_asks_for(
    pipeline: ModuleType, asked: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "train_brush", lambda *given, **options: None)
    tables = tomllib.loads(TABLES)
    tables["data"] |= {"until": 0.5, "stains": 2}
    del tables["systems"]["ours"]  # as by --only
    brush = pipeline.trained(tables, "infty-diff", asked.slides, tmp_path, "cpu")
    about = TrainingPack(brush.parent / "training" / "pack").about
    assert (about["until"], about["stains"], about["slides"]) == (0.5, 2, 3)


def test_every_system_has_its_row_at_the_sizes_that_it_paints(made: list[str]) -> None:
    heads = [line for line in made if line.startswith("## ")]
    assert [head.split(":")[0] for head in heads] == ["## 256²", "## 128²", "## Training"]
    first = [cells(line)[0] for line in made if line.startswith("| ")]
    tables = [first[start + 1 : stop] for start, stop in pairwise([*_at(first, "system"), len(first)])]
    both = ["ours", "infty-diff"]
    assert tables == [both, both, both, ["ours"], ["ours"], ["ours"], both]  # of 256² three, of 128² three, and cost
    blank = cells(next(line for line in made if line.startswith("| infty-diff")))
    assert blank[7].endswith("of 18")  # it painted no tissue, and is judged all the same
    assert "2 steps of 1 scenes" in made[0]


def test_the_paintings_are_of_the_squares_and_judged_in_pairs(
    made: list[str], pipeline: ModuleType, asked: argparse.Namespace
) -> None:
    (report,) = asked.work.glob("ours/*/256-2-2-report/report.json")
    paintings = [painted_after(path) or {} for path in sorted(report.parents[1].glob("256-2-2/*.ome.zarr"))]
    assert [one["seed"] for one in paintings] == [3, 4]  # one noise for two squares of a slide would be one witness
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["control"] is not None  # each painting was found on its slide
    assert [one["name"] for one in figures["encoders"]] == ["bundled", "judge"]


def test_the_judge_comes_first_and_what_is_left_out_is_said(made: list[str]) -> None:
    words = [line for line in made if line.startswith(("In ", "Left out"))][:4]
    assert [word.split(",")[0] for word in words[:2]] == ["In `judge`", "In `bundled`"]
    assert words[2:] == ["In neither:", "Left out: no weights here."]
    assert not any("FID" in line for line in made)
    heads = [line for line in made if line.startswith("## ")][:2]
    assert heads == [f"## {one} after held-out slides, the same of every system"
                     for one in ("256²: 2 paintings", "128²: 1 painting")]  # fmt: skip


def test_the_cost_is_measured(made: list[str]) -> None:
    at = next(index for index, line in enumerate(made) if line.startswith("## Training"))
    for row in made[at + 4 : at + 6]:
        system, parameters, *seconds_and_batches = cells(row)
        assert system in ("ours", "infty-diff")
        assert re.fullmatch(r"\d\.\d\d M", parameters)
        seconds, batches = seconds_and_batches[:2], seconds_and_batches[2:]
        assert all(float(one) > 0 for one in seconds)
        assert all(int(one) > 1 for one in batches)


def test_what_is_done_stays_and_what_is_asked_otherwise_is_made_anew(
    made: list[str], pipeline: ModuleType, asked: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = asked.work.glob("ours/*")
    report = folder / "256-2-2-report" / "report.json"
    judged = report.stat().st_mtime_ns
    monkeypatch.setattr(pipeline, "find_networks", lambda: NONE)
    weights = folder / "brush" / "brush.safetensors"
    before, painted = weights.stat().st_mtime_ns, (folder / "256-2-2" / "seconds.json").stat().st_mtime_ns
    again = changed(asked, only=["ours"], sizes=[256], no_costs=True)
    pipeline.main(again)
    assert weights.stat().st_mtime_ns == before
    assert (folder / "256-2-2" / "seconds.json").stat().st_mtime_ns == painted
    assert report.stat().st_mtime_ns == judged
    old = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps(old | {"encoders": old["encoders"][:1]}), encoding="utf-8")  # of before the judge
    pipeline.main(again)
    assert [one["name"] for one in json.loads(report.read_text("utf-8"))["encoders"]] == ["bundled", "judge"]
    pipeline.main(changed(again, each=1))  # other paintings of the same brush
    assert sorted(one.name for one in folder.glob("256*")) == ["256-1-2", "256-1-2-report", "256-2-2", "256-2-2-report"]
    assert weights.stat().st_mtime_ns == before
    asked_for = tomllib.loads(TABLES)
    assert pipeline.folder_of(asked_for, "ours", asked.work) == folder
    assert pipeline.folder_of(asked_for | {"minutes": 30}, "ours", asked.work) != folder
    assert pipeline.folder_of(asked_for | {"held_out": [{"path": "other.tif"}]}, "ours", asked.work) != folder


def test_squares_hold_the_most_tissue_and_share_no_pixel(pipeline: ModuleType, tissue_slide: Path) -> None:
    slide = open_slide(tissue_slide)
    found = [Grid(slide.mpp, *square) for square in pipeline.squares(slide, 256, 5)]
    assert all(one.shape == (256, 256) and one.clip(slide.grid) == one for one in found)
    seen = np.zeros(slide.grid.shape, int)
    for one in found:
        seen[one.top : one.bottom, one.left : one.right] += 1
    assert seen.max() == 1
    cover = find_tissue(slide).cover(slide.grid.at(256 * slide.mpp))
    theirs = [cover[one.top // 256, one.left // 256] for one in found]
    assert theirs == sorted(cover.ravel().tolist(), reverse=True)[:5]


def test_no_square_is_of_glass(pipeline: ModuleType, tissue_slide: Path, tmp_path: Path) -> None:
    slide = open_slide(tissue_slide)
    pixels = slide.read(slide.grid)
    some = np.full_like(pixels, 250)
    some[256:512, 256:512] = pixels[256:512, 256:512]
    lone = open_slide(write_pyramid(tmp_path / "lone.tif", [some]))
    assert pipeline.squares(lone, 256, 4) == [(256, 256, 256, 256)]
    blank = open_slide(write_pyramid(tmp_path / "blank.tif", [np.full_like(pixels, 250)]))
    with pytest.raises(UsageError, match="no square of 256 pixels holds tissue"):
        pipeline.squares(blank, 256, 4)


def test_references_have_the_pixel_size_that_the_tables_say(
    pipeline: ModuleType, tissue_slide: Path, tmp_path: Path
) -> None:
    """A slide without a pixel size, whose own is not that of the paintings."""
    slide = open_slide(tissue_slide)
    source = write_pyramid(tmp_path / "bare.tif", [slide.read(slide.grid)], mpp=None)
    tables = tomllib.loads(TABLES) | {"held_out": [{"path": "bare.tif", "assume_mpp": 0.25}]}
    folder = tmp_path / "256-1-2"
    painting = Painting(region=(200, 200, 512, 512), mpp=0.5, steps=5)
    synthesize_slide(
        source, folder / "bare-0.ome.zarr", painting, brush=load_brush(), encoder=load_encoder("bundled"),
        assume_mpp=0.25,
    )  # fmt: skip
    figures = pipeline.judged(tables, tmp_path, folder, ["bare-0.ome.zarr"], NONE)
    assert figures["control"] is not None
    assert not any("no pair" in note for note in figures["notes"])


def test_the_largest_batch_is_what_fits_beside_the_first_scene(pipeline: ModuleType) -> None:
    one = {"seconds1": 1.0, "seconds2": 1.5, "peak1": 2e9, "peak2": 3e9}
    over = one | {"peak1": 9e9}
    lines = pipeline.costs({"ours": dict(zip(pipeline.COST_SIZES, (one, one, over), strict=True))}, {"ours": 2_500_000})
    assert cells(lines[-1]) == ["ours", "2.50 M", "0.75", "0.75", "0.75", "7", "7", "0"]


def test_a_figure_stands_beside_its_floor(pipeline: ModuleType) -> None:
    assert pipeline.number({"value": 12.345, "floor": 3.21}) == "12.3 (3.21)"
    assert pipeline.number({"value": 0.5}) == "0.5"
    assert pipeline.number({"value": 305.2, "low": 280.1, "high": 330, "floor": 3.09, "thumbnail": 9}) == (
        "305 [280, 330] (3.09, 9)"
    )
    assert pipeline.number({"value": 2, "low": None, "high": None, "floor": None}) == "2"
    assert pipeline.number({"value": None}) == pipeline.number(None) == "–"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "foo"], "--only foo: not in {file}; it has ours, infty-diff"),
        (["--sizes", "77"], "--sizes 77: not in {file}; it has 256, 128"),
        (["--minutes", "0"], "--minutes: 0; expected a number above 0"),
        (["--minutes", "nan"], "--minutes: nan; expected a number above 0"),
        (["--each", "0"], "--each: 0; expected a whole number above 0"),
        (["--each", "1.5"], "--each: 1.5; expected a whole number"),
    ],
)
def test_words_that_do_not_make_sense_are_one_line(
    asked: argparse.Namespace, tmp_path: Path, given: list[str], said: str
) -> None:
    line = refused(asked.tables, tmp_path, *given)
    assert said.format(file=asked.tables) in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory; expected a TOML file"),
        ("[data", "not TOML"),
        ("steps = 2", "lacks minutes, seed"),
        (TABLES.replace("batch = 1", "batch = 0"), "the recipe of ours: optimisation.batch: 0; expected"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "tables.toml").write_text(text, encoding="utf-8")
    assert said in refused(tmp_path / "tables.toml", tmp_path)


def refused(tables: Path, work: Path, *given: str) -> str:
    """The last line of a command that does not begin."""
    folders = ["--slides", str(work), "--work", str(work / "w")]
    command = [sys.executable, str(PIPELINE / "tables.py"), str(tables), *folders, *given]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode in (1, 2)
    assert "Traceback" not in ran.stderr
    assert not (work / "w").exists()
    return ran.stderr.splitlines()[-1]


FIGURE = {"value": 305.0, "low": 280.0, "high": 330.0, "floor": 3.0}


def figures_of(**changed: Any) -> dict[str, Any]:
    """What an evaluation leaves, as far as the tables read it."""
    scale = {"n": 120, "frechet": FIGURE, "kernel": FIGURE}
    control = {
        "cosine": {"0.5": {"n": 90, "mean": 0.4, "low": 0.3, "high": 0.5}},
        "retrieval": {"regions": 6, "top1": 0.5, "top1_low": 0.12, "top1_high": 0.88},
    }
    octaves = {"ratio": [0.86, None], "low": [0.8, None], "high": [0.9, None]}
    clip = {"network": "CLIP", "side": 512, "n": 16, "frechet": {"missing": "few"}, "kernel": FIGURE | {"thumbnail": 9}}
    return {
        "scales": {"judge": {"0.5": scale, "2": {"n": 3, "missing": "few"}}}, "control": {"judge": control},
        "texture": {"synthetic": 24, "octaves": octaves}, "published": {"clip": clip},
    } | changed  # fmt: skip


def test_a_row_has_its_numbers_and_its_intervals(pipeline: ModuleType) -> None:
    found = {"ours": figures_of(), "patches": figures_of(control=None)}
    heads, _, ours, patches = (cells(line) for line in pipeline.quality(found, "judge"))
    assert dict(zip(heads, ours, strict=True)) == {
        "system": "ours", "tiles a half at 0.5, 2, 8 µm": "120, 3, –", "FD 0.5 µm": "305 [280, 330] (3)",
        "KID 0.5 µm": "305 [280, 330] (3)", "KID 2 µm": "–", "FD 8 µm": "–", "KID 8 µm": "–",
        "cosine 0.5 µm": "0.400 [0.300, 0.500] of 90", "cosine 2 µm": "–", "top 1": "50 % [12, 88] of 6",
    }  # fmt: skip
    assert patches[-3:] == ["–"] * 3


def test_what_papers_print_is_there_where_its_weights_are(pipeline: ModuleType) -> None:
    network = Network("CLIP", 4, CLIP_SHA256, lambda tiles: tiles)  # type: ignore[arg-type, return-value]
    heads, _, ours = (cells(line) for line in pipeline.plain({"ours": figures_of()}, Networks(network, None, "")))
    assert dict(zip(heads, ours, strict=True)) == {
        "system": "ours", "windows": "24", "finest octave": "0.86 [0.80, 0.90]", "the next": "–",
        "clip squares": "16 of 512²", "clip FID": "–", "clip KID": "305 [280, 330] (3, 9)",
    }  # fmt: skip
    (head, *_) = pipeline.plain({"ours": figures_of()}, NONE)
    assert cells(head) == ["system", "windows", "finest octave", "the next"]


def test_systems_are_judged_by_the_paintings_that_all_have(pipeline: ModuleType, tmp_path: Path) -> None:
    for folder, numbers in (("one", (0, 1)), ("other", (1, 2))):
        for number in numbers:
            (tmp_path / folder / f"slide-{number}.ome.zarr").mkdir(parents=True)
    assert pipeline.in_common([tmp_path / "one", tmp_path / "other"]) == ["slide-1.ome.zarr"]
