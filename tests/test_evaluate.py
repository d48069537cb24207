"""Two sides to figures and a report: the same for the same seed, self-contained, and synthetic wherever it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid

from wsi_brush import commit
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.evaluate import evaluate_slides
from wsi_brush.report import write_report
from wsi_brush.slide import open_slide


@pytest.fixture(scope="module")
def slides(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real slide, and one beside it that is a little softer, whose name is no markup."""
    slide = open_slide(tissue_slide)
    pixels = slide.read(slide.grid).astype(float)
    soft = (pixels + np.roll(pixels, 1, 0) + np.roll(pixels, 1, 1) + np.roll(pixels, (1, 1), (0, 1))) / 4
    folder = tmp_path_factory.mktemp("sides")
    return tissue_slide, write_pyramid(folder / "<b>soft & new.tif", [soft.astype(np.uint8)])


@pytest.fixture(scope="module")
def report(slides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("reports") / "report"
    figures = evaluate_slides(
        slides[:1], slides[1:], encoder=TileStatistics(), then=lambda s, f: write_report(target, s, f)
    )
    assert json.loads((target / "report.json").read_text("utf-8")) == json.loads(json.dumps(figures))
    return target


def test_the_figures_are_there_and_say_what_they_are_of(report: Path) -> None:
    figures = json.loads((report / "report.json").read_text("utf-8"), parse_constant=lambda word: pytest.fail(word))
    assert list(figures["scales"]) == ["0.5", "2", "8"]
    assert figures["codec"] == "jpeg:90"
    assert {"value", "low", "high", "floor"} <= set(figures["scales"]["0.5"]["kernel"])
    assert "missing" in figures["scales"]["8"]
    ratio = figures["texture"]["octaves"]["ratio"]
    assert ratio[0] < ratio[1] < ratio[2] < 1.01
    assert ratio[0] < 0.8
    assert set(figures["control"]) == {"statistics", "descriptor"}
    assert figures["control"]["statistics"]["cosine"]["0.5"]["mean"] > 0.5
    assert [one["synthetic"] for one in figures["real"] + figures["synthetic"]] == [False, False]


def test_the_page_needs_nothing_else_and_runs_nothing(report: Path) -> None:
    page = (report / "report.html").read_text("utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/jpeg;base64,)", page)
    assert "<script" not in page
    assert "<b>soft" not in page
    assert "&lt;b&gt;soft &amp; new.tif" in page
    assert page.count("SYNTHETIC") >= page.count("<img") / 2 > 4
    assert page.count("<svg") == page.count("</svg>")
    assert "not for diagnosis" in page
    assert commit.verify(report) == []


def test_the_same_seed_the_same_figures(slides: tuple[Path, Path]) -> None:
    def figures(seed: int) -> dict[str, Any]:
        found = evaluate_slides(slides[:1], slides[1:], encoder=TileStatistics(), most=64, seed=seed)
        found.pop("seconds")
        return found

    first = figures(1)
    assert first == figures(1)
    assert first["scales"]["0.5"] != figures(2)["scales"]["0.5"]


def test_progress_comes_to_its_end(slides: tuple[Path, Path]) -> None:
    told: dict[str, tuple[int, int]] = {}
    evaluate_slides(
        slides[:1], slides[1:], encoder=TileStatistics(), most=64,
        tell=lambda what, done, total: told.update({what: (done, total)}),
    )  # fmt: skip
    assert {"looking for tissue", "embedding at 0.5 µm", "comparing at 0.5 µm"} <= set(told)
    assert all(done == total for done, total in told.values())


def test_the_brushs_own_encoder_is_said(slides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_brush import samples

    about = {"synthetic": True, "encoder_fingerprint": TileStatistics.fingerprint}
    monkeypatch.setattr(samples, "painted_after", lambda path: about)
    figures = evaluate_slides(slides[:1], slides[1:], encoder=TileStatistics(), most=32)
    assert any("flatter the brush" in note for note in figures["notes"])


def test_what_only_one_side_shows_is_left_out(slides: tuple[Path, Path], tmp_path: Path) -> None:
    slide = open_slide(slides[0])
    from wsi_brush.grid import Grid

    coarse = write_pyramid(tmp_path / "coarse.tif", [slide.read(Grid(2.0, 0, 0, 256, 256))], mpp=2.0)
    figures = evaluate_slides([coarse], slides[1:], encoder=TileStatistics(), most=32)
    assert list(figures["scales"]) == ["2", "8"]
    assert "not at 0.5 µm, which not every slide shows" in figures["notes"]
    far = write_pyramid(tmp_path / "far.tif", [np.full((64, 64, 3), (200, 120, 170), np.uint8)], mpp=20.0)
    with pytest.raises(UsageError, match="nothing can be compared"):
        evaluate_slides([far], slides[1:], encoder=TileStatistics())


def test_what_is_there_is_not_lost(report: Path, slides: tuple[Path, Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    for target, overwrite in ((report, False), (notes, True)):
        with pytest.raises(RefusedError):
            evaluate_slides(
                slides[:1], slides[1:], encoder=TileStatistics(), most=32,
                then=lambda s, f, t=target, o=overwrite: write_report(t, s, f, overwrite=o),
            )  # fmt: skip
    assert (notes / "mine.txt").read_text() == "mine"
