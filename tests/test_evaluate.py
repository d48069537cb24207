"""Two sides to figures and a report: the same for the same seed, self-contained, and synthetic wherever it is."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray
from PIL import Image

from wsi_brush import commit
from wsi_brush.control import Descriptor
from wsi_brush.coordinates import turned
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.evaluate import evaluate_slides, without_figures
from wsi_brush.grid import Grid
from wsi_brush.report import write_report
from wsi_brush.sides import open_sides
from wsi_brush.slide import open_slide


class Turned(TileStatistics):
    """A second encoder, which sees larger tiles."""

    name, tile, fingerprint = "<i>turned", 160, "turned"

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return super().__call__(np.ascontiguousarray(tiles[:, 16:144, 16:144].swapaxes(1, 2)))


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
    target, sides = tmp_path_factory.mktemp("reports") / "report", open_sides(slides[:1], slides[1:])
    figures = evaluate_slides(sides, encoders=[TileStatistics(), Turned()])
    write_report(target, sides, figures)
    assert json.loads((target / "report.json").read_text("utf-8")) == json.loads(json.dumps(figures))
    return target


def test_the_figures_are_there_and_say_what_they_are_of(report: Path) -> None:
    figures = json.loads((report / "report.json").read_text("utf-8"), parse_constant=lambda word: pytest.fail(word))
    assert [one["name"] for one in figures["encoders"]] == list(figures["scales"]) == ["statistics", "<i>turned"]
    assert figures["codec"] == "jpeg:90"
    for scales in figures["scales"].values():
        assert list(scales) == ["0.5", "2", "8"]
        assert {"value", "low", "high", "floor", "n", "seed"} <= set(scales["0.5"]["kernel"])
        assert "needed" in scales["8"]["missing"]
        assert scales["0.5"]["kernel"]["thumbnail"] != scales["0.5"]["kernel"]["floor"]
    assert figures["scales"]["statistics"]["0.5"]["n"] > figures["scales"]["<i>turned"]["0.5"]["n"] > 8
    assert set(figures["borders"]) == {"statistics", "<i>turned"}
    assert figures["borders"]["statistics"]["256"]["kernel"]["floor"] is not None
    ratio = figures["texture"]["octaves"]["ratio"]
    assert ratio[0] < ratio[1] < ratio[2] < 1.01
    assert ratio[0] < 0.8
    assert set(figures["control"]) == {"statistics", "<i>turned", "descriptor"}
    assert figures["control"]["statistics"]["cosine"]["0.5"]["mean"] > 0.5
    both = figures["real"] + figures["synthetic"]
    assert [one["synthetic"] for one in both] == [False, False]
    assert [len(one["fingerprint"]) for one in both] == [16, 16]
    assert both[0]["fingerprint"] != both[1]["fingerprint"]
    assert figures["pairs"] == [{"real": 0, "synthetic": 0}]
    assert figures["versions"]["torch"] == torch.__version__


def test_the_page_needs_nothing_else_and_runs_nothing(report: Path) -> None:
    page = (report / "report.html").read_text("utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/jpeg;base64,)", page)
    assert "<script" not in page
    assert "<b>soft" not in page
    assert "<i>turned" not in page
    assert page.count("&lt;i&gt;turned") >= 5  # above, in its table, on borders, and twice in control
    assert "&lt;b&gt;soft &amp; new.tif" in page
    assert page.count("SYNTHETIC") >= page.count("<img") / 2 > 4
    assert page.count("<svg") == page.count("</svg>")
    assert "not for diagnosis" in page
    assert commit.verify(report) == []


def captions(page: str) -> list[tuple[str, tuple[float, float], float]]:
    """What stands under the pictures of slides: the words, height and width (µm) and pitch; they are those shown."""
    found = []
    for data, words in re.findall(r'base64,([^"]+)"><figcaption>([^<]+ µm[^<]*)</figcaption>', page):
        shown = re.fullmatch(r"(.*?)(\d+) × (\d+) µm at ([\d.]+) µm per pixel", words)
        assert shown is not None, words
        size, mpp = (float(shown[2]), float(shown[3])), float(shown[4])
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert size == pytest.approx([length * mpp for length in image.size[::-1]], rel=5e-3)
        found.append((shown[1].rstrip(", "), size, mpp))
    return found


def test_captions_say_what_is_shown(report: Path, slides: tuple[Path, Path], tmp_path: Path) -> None:
    """Slides of 512 µm, as sharp as 0.5 µm; coarse ones; and sides of two pitches, which are shown at one."""
    page = (report / "report.html").read_text("utf-8")
    assert captions(page) == [
        (f"{side}{what}", (size, size), mpp)
        for what, size, mpp in ((", the whole", 512, 0.801), ("", 512, 1), ("", 128, 0.5))
        for side in ("real", "SYNTHETIC")
    ]
    pixels, figures = (
        open_slide(slides[0]).read(open_slide(slides[0]).grid),
        json.loads((report / "report.json").read_text("utf-8")),
    )
    coarse = write_pyramid(tmp_path / "coarse.tif", [pixels], mpp=2.0)
    figures["seams"][0] = {"slide": "none", "period": 2, "squares": 0, "missing": "no tissue on its lines"}
    for number, (pair, expected) in enumerate((((coarse, coarse), (1280, 512)), ((coarse, slides[1]), (512, 512)))):
        write_report(tmp_path / f"{number}", open_sides(pair[:1], pair[1:]), figures | {"control": None})
        page = (tmp_path / f"{number}" / "report.html").read_text("utf-8")
        assert '<td colspan="4"><small>no tissue on its lines</small>' in page
        assert [(size, mpp) for _, size, mpp in captions(page)[2:]] == [
            ((size, size), 2) for size in expected for _ in pair
        ]


def test_the_nearest_training_tile_is_turned_as_the_painting_is(
    report: Path, slides: tuple[Path, Path], tmp_path: Path
) -> None:
    sides, slide = open_sides(slides[:1], slides[1:]), open_slide(slides[0])
    sides.training = [slide]
    worst = [
        {"correlation": 0.9, "synthetic": 0, "place": [200, 180], "training": 0, "there": [150, 170], "side": 64,
         "turn": turn} for turn in range(8)
    ]  # fmt: skip
    figures = json.loads((report / "report.json").read_text("utf-8"))
    figures["copying"] = {"training": [slide.path.name], "until": 1.0, "missing": "few tiles", "worst": worst}
    write_report(tmp_path / "copies", sides, figures)
    page = (tmp_path / "copies" / "report.html").read_text("utf-8")
    shown = re.findall(r'base64,([^"]+)"><figcaption>nearest in training', page)
    plain = slide.read(Grid(0.5, 300, 340, 128, 128)).astype(float)
    for turn, data in enumerate(shown):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            apart = [np.abs(np.asarray(image) - turned(plain, other)).mean() for other in range(8)]
        assert np.argmin(apart) == turn, apart
    assert len(shown) == 8


def test_the_same_seed_the_same_figures(slides: tuple[Path, Path]) -> None:
    def figures(seed: int) -> dict[str, Any]:
        found = evaluate_slides(open_sides(slides[:1], slides[1:]), encoders=[TileStatistics()], most=64, seed=seed)
        found.pop("seconds")
        return found

    first = figures(1)
    assert first == figures(1)
    assert first["scales"]["statistics"]["0.5"] != figures(2)["scales"]["statistics"]["0.5"]


def test_control_is_of_256_tiles_at_most(slides: tuple[Path, Path]) -> None:
    class Small(TileStatistics):
        name, dim, tile = "small", 6, 32

        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            plain = tiles.astype(np.float32) / 255
            return np.concatenate([plain.mean((1, 2)), plain.std((1, 2))], 1)

    figures = evaluate_slides(open_sides(slides[:1], slides[1:]), encoders=[Small()], most=260)
    assert figures["scales"]["small"]["0.5"]["real"] == 260
    assert figures["control"]["small"]["cosine"]["0.5"]["n"] == 256


def test_the_codec_draws_no_lattice(slides: tuple[Path, Path]) -> None:
    """Its own blocks of 8 pixels would be taken for that of the painting."""
    plain, coded = (
        evaluate_slides(open_sides(slides[:1], slides[1:]), encoders=[TileStatistics()], most=16, codec=codec)["seams"]
        for codec in ("none", "jpeg:50")
    )
    assert plain == coded


def test_progress_comes_to_its_end(slides: tuple[Path, Path]) -> None:
    told: dict[str, tuple[int, int]] = {}

    def tell(what: str, done: int, total: int) -> None:
        told.update({what: (done, total)})

    evaluate_slides(open_sides(slides[:1], slides[1:], tell=tell), encoders=[TileStatistics()], most=64, tell=tell)
    assert {"looking for tissue", "embedding at 0.5 µm", "looking at borders", "comparing at 0.5 µm"} <= set(told)
    assert all(done == total for done, total in told.values())


def test_the_brushs_own_encoder_is_said(slides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_brush import sides as opened

    about = {"synthetic": True, "encoder_fingerprint": TileStatistics.fingerprint}
    monkeypatch.setattr(opened, "painted_after", lambda path: about)
    sides = open_sides(slides[:1], slides[1:])
    alone, both = (
        [note for note in evaluate_slides(sides, encoders=some, most=32)["notes"] if "flatter the brush" in note]
        for some in ([TileStatistics()], [Turned(), TileStatistics()])
    )
    assert alone[0].endswith("give another --encoder beside it")
    assert both[0].startswith("encoder statistics is the one")
    assert len(alone) == len(both) == len(sides.notes) == 1  # the sides' own note is of the pair


def test_an_encoder_that_is_missing_is_said_where_there_is_control(slides: tuple[Path, Path]) -> None:
    sides = open_sides(slides[:1], slides[1:])
    sides.brushes.append({"encoder": "theirs", "encoder_fingerprint": "other"})
    line = "the brush was conditioned on theirs, which is not among the encoders: control is of others only"
    for pairs in (sides.pairs, []):
        notes = evaluate_slides(replace(sides, pairs=pairs), encoders=[TileStatistics()], most=32)["notes"]
        assert (line in notes) == bool(pairs)
        assert any("tiles are where each side has tissue" in note for note in notes) != bool(pairs)


def test_texture_is_read_where_both_sides_lose_alike(slides: tuple[Path, Path]) -> None:
    sides = open_sides([open_slide(slides[0], force_mpp=0.5044)], slides[1:])
    figures = evaluate_slides(sides, encoders=[TileStatistics()], most=32)
    assert figures["texture"]["mpp"] == pytest.approx(2**0.5 * 0.5044)


def test_a_side_that_is_not_what_it_is_called_is_said(slides: tuple[Path, Path], tmp_path: Path) -> None:
    sides = open_sides([slides[0]], [slides[0]])
    notes = evaluate_slides(sides, encoders=[TileStatistics()], most=64)["notes"]
    assert f"{slides[0].name}: on both sides, so it is compared with itself" in notes
    real = replace(sides.real[0], slide=replace(sides.real[0].slide, synthetic=True))
    notes = evaluate_slides(replace(sides, real=[real]), encoders=[TileStatistics()], most=64)["notes"]
    said = "on the real side, and says that it is synthetic; all that is called real is of it too"
    assert f"{slides[0].name}: {said}" in notes


def test_a_picture_of_a_pixel_is_no_reason_to_lose_all(slides: tuple[Path, Path], tmp_path: Path) -> None:
    dot = write_pyramid(tmp_path / "dot.tif", [np.full((1, 1, 3), 120, np.uint8)], compression="zlib")
    sides = open_sides([slides[0]], [dot])
    figures = evaluate_slides(sides, encoders=[TileStatistics()], most=64)
    write_report(tmp_path / "report", sides, figures)
    assert commit.verify(tmp_path / "report") == []
    assert "fewer than 4 windows" in str(without_figures(figures))


def test_what_only_one_side_shows_is_left_out(slides: tuple[Path, Path], tmp_path: Path) -> None:
    slide = open_slide(slides[0])
    from wsi_brush.grid import Grid

    coarse = write_pyramid(tmp_path / "coarse.tif", [slide.read(Grid(2.0, 0, 0, 256, 256))], mpp=2.0)
    figures = evaluate_slides(open_sides([coarse], slides[1:]), encoders=[TileStatistics()], most=32)
    assert list(figures["scales"]["statistics"]) == ["2", "8"]
    assert "not at 0.5 µm, which not every slide shows" in figures["notes"]
    far = write_pyramid(tmp_path / "far.tif", [np.full((64, 64, 3), (200, 120, 170), np.uint8)], mpp=20.0)
    with pytest.raises(UsageError, match="nothing can be compared"):
        evaluate_slides(open_sides([far], slides[1:]), encoders=[TileStatistics()])


def test_encoders_of_one_name_are_told(slides: tuple[Path, Path]) -> None:
    sides = open_sides(slides[:1], slides[1:])
    for pair, name in (([TileStatistics()] * 2, "statistics"), ([Descriptor()], "descriptor")):
        with pytest.raises(UsageError, match=f"--encoder {name}: a second one of that name"):
            evaluate_slides(sides, encoders=pair)


def test_what_is_there_is_not_lost(report: Path, slides: tuple[Path, Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    sides, figures = open_sides(slides[:1], slides[1:]), json.loads((report / "report.json").read_text("utf-8"))
    for target, overwrite in ((report, False), (notes, True)):
        with pytest.raises(RefusedError):
            write_report(target, sides, figures, overwrite=overwrite)
    assert (notes / "mine.txt").read_text() == "mine"
