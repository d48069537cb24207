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

from wsi_brush.grid import Grid
from wsi_brush.slide import open_slide
from wsi_brush.tissue import find_tissue

PIPELINE = Path(__file__).parents[1] / "pipelines" / "paper_tables"
pytestmark = pytest.mark.skipif(not PIPELINE.is_dir(), reason="the pipelines are not beside the tests")

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
optimisation = { start = "bundled", rate = 1e-6 }  # what has learnt nothing paints no tissue, and is not judged

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
        pipeline.main(asked)
    return list((asked.work / "RESULTS.md").read_text(encoding="utf-8").splitlines())


def test_every_system_has_its_row_at_the_sizes_that_it_paints(made: list[str]) -> None:
    heads = [line for line in made if line.startswith("## ")]
    assert [head.split(":")[0] for head in heads] == ["## 256²", "## 128²", "## Training"]
    first = [cells(line)[0] for line in made if line.startswith("| ")]
    tables = [first[start + 1 : stop] for start, stop in pairwise([*_at(first, "system"), len(first)])]
    assert tables == [["ours", "infty-diff"], ["ours"], ["ours", "infty-diff"]]  # by 256², 128² and cost
    assert "no tissue" in next(line for line in made if line.startswith("| infty-diff"))
    assert "2 steps of 1 scenes" in made[0]


def test_the_paintings_are_of_the_squares_and_judged_in_pairs(
    made: list[str], pipeline: ModuleType, asked: argparse.Namespace
) -> None:
    (report,) = asked.work.glob("ours/*/256-2-2-report/report.json")
    assert len(list(report.parents[1].glob("256-2-2/*.ome.zarr"))) == 2
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["control"] is not None  # each painting was found on its slide


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
    made: list[str], pipeline: ModuleType, asked: argparse.Namespace
) -> None:
    (folder,) = asked.work.glob("ours/*")
    weights = folder / "brush" / "brush.safetensors"
    before, painted = weights.stat().st_mtime_ns, (folder / "256-2-2" / "seconds.json").stat().st_mtime_ns
    again = changed(asked, only=["ours"], sizes=[256], no_costs=True)
    pipeline.main(again)
    assert weights.stat().st_mtime_ns == before
    assert (folder / "256-2-2" / "seconds.json").stat().st_mtime_ns == painted
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


def test_the_largest_batch_is_what_fits_beside_the_first_scene(pipeline: ModuleType) -> None:
    one = {"seconds1": 1.0, "seconds2": 1.5, "peak1": 2e9, "peak2": 3e9}
    over = one | {"peak1": 9e9}
    lines = pipeline.costs({"ours": dict(zip(pipeline.COST_SIZES, (one, one, over), strict=True))}, {"ours": 2_500_000})
    assert cells(lines[-1]) == ["ours", "2.50 M", "0.75", "0.75", "0.75", "7", "7", "0"]


def test_a_figure_stands_beside_its_floor(pipeline: ModuleType) -> None:
    assert pipeline.number({"value": 12.345, "floor": 3.21}) == "12.3 (3.21)"
    assert pipeline.number({"value": 0.5}) == "0.5"
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
