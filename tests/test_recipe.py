"""Recipes: what is wrong in one is a line before the work begins, with where it is, what it is and what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_brush import train
from wsi_brush.recipe import Data, Model, Optimisation, Rival, SlideSource, read_config

Words = Callable[..., tuple[int, str, str]]

WRONG = [
    # of [optimisation]
    ("optimisation", "rate = -1", "optimisation.rate: -1; expected a number greater than 0"),
    ("optimisation", "rate = inf", "optimisation.rate: inf; expected a finite number"),
    ("optimisation", "rate = nan", "optimisation.rate: nan; expected a finite number"),
    ("optimisation", "steps = 0", "optimisation.steps: 0; expected a number greater than 0"),
    ("optimisation", "minutes = nan", "optimisation.minutes: nan; expected a number greater than 0"),
    ("optimisation", "batch = 0", "optimisation.batch: 0; expected a number greater"),
    ("optimisation", f"batch = {10**30}", "expected"),
    ("optimisation", "decay = -1", "optimisation.decay: -1; expected a number greater than or equal to 0"),
    ("optimisation", "clip = -1", "optimisation.clip: -1; expected a number greater than 0"),
    ("optimisation", "clip = 0", "optimisation.clip: 0; expected a number greater than 0"),
    ("optimisation", "average = 2", "optimisation.average: 2; expected a number less than or equal to 1"),
    ("optimisation", "scattered = -1", "optimisation.scattered: -1; expected a number greater"),
    ("optimisation", "unconditional = 5", "optimisation.unconditional: 5; expected a number less than or equal to 1"),
    ("optimisation", "full_range = -4", "optimisation.full_range: -4; expected a number greater"),
    ("optimisation", "tolerance = inf", "optimisation: tolerance inf; expected a number above 0"),
    ("optimisation", "tolerance = [1, 1, 1, nan]", "expected a number above 0, or 4 of them"),
    ("optimisation", "sigma_min = 100", "optimisation.sigma_min: 100; expected a number less than 80"),
    ("optimisation", "retained = [1.5]", "optimisation.retained.0: 1.5; expected a number less than 1"),
    ("optimisation", "margin = 0", "optimisation.margin: 0; expected a number greater than or equal to 1"),
    ("optimisation", "seed = -1", "optimisation.seed: -1; expected a number greater"),
    ("optimisation", f"seed = {10**20}", "optimisation.seed"),
    ("optimisation", "threads = -3", "optimisation.threads: -3; expected a number greater"),
    ("optimisation", "checkpoint_minutes = -1", "optimisation.checkpoint_minutes: -1; expected a number greater"),
    # of [data]
    ("data", "stains = -1", "data.stains: -1; expected a number greater than or equal to 0"),
    ("data", "stains = 1\ntissue = 'everywhere'", "data: stains 1 of pictures that are no H&E; expected 0"),
    # of [model]
    ("model", "width = 0", "model.width: 0; expected a number greater than or equal to 2"),
    ("model", "width = -2", "model.width: -2; expected"),
    ("model", "depth = [1, -1, 1]", "model.depth.1: -1; expected"),
    ("model", "layout = 0", "model.layout: 0; expected"),
    ("model", "heads = 0", "model.heads: 0; expected"),
    ("model", "tokens = -1", "model.tokens: -1; expected"),
    ("model", "mollifier = -1", "model.mollifier: -1; expected"),
    ("model", "mollifier = inf", "model.mollifier: inf; expected"),
    ("model", "system = ['patches']", "model: system ['patches']; expected one of ours"),
    *(
        ("model", f"system = '{system}'\n{name} = {value}", f"model: {name} {value}; expected a number from 1")
        for system, names in {
            "patches": ("side", "width", "levels", "blocks", "heads", "apart"),
            "fixed": ("size", "width", "levels", "blocks", "heads", "tokens", "sets"),
            "infty-diff": ("width", "kernel", "grid", "node", "heads"),
            "infty-brush": ("heads",),
        }.items()
        for name in names
        for value in (0, -1)
    ),
    ("model", "system = 'infty-diff'\nmollifier = nan", "model: kernel 7, node 8, mollifier nan; expected"),
    ("model", "system = 'fixed'\nsets = 2", "model: sets 2; expected 3"),
    # of [data]
    ("data", "shares = [1, 1, 1, 1, -1]", "data.shares.4: -1; expected"),
    ("data", "shares = [inf, 1, 1, 1, 1]", "data.shares.0: inf; expected a finite number"),
    ("data", "sizes = [256, 256, 256, 256, 0]", "data.sizes.4: 0; expected"),
    ("data", "window = 0", "data.window: 0; expected"),
    ("data", "points = -1", "data.points: -1; expected"),
    ("data", "until = nan", "data.until: nan; expected"),
    ("card", "cells = nan", "card.cells"),
]


@pytest.mark.parametrize(("section", "line", "said"), WRONG, ids=[f"{one}: {line}" for one, line, _ in WRONG])
def test_a_number_that_cannot_be_is_one_line(words: Words, tmp_path: Path, section: str, line: str, said: str) -> None:
    own = f"{line}\n" if section == "data" else f"[{section}]\n{line}\n"
    _refused(words, tmp_path, f"[data]\nslides = [{{ path = 'a.tif' }}]\n{own}", said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 3\n", "model: 3; expected a table"),
        ("model = []\n", "model: []; expected a table"),
        ("optimisation = 3\n", "optimisation: 3; expected"),
    ],
)
def test_a_section_that_is_none_is_one_line(words: Words, tmp_path: Path, text: str, said: str) -> None:
    _refused(words, tmp_path, f"{text}[data]\nslides = [{{ path = 'a.tif' }}]\n", said)


def test_a_slide_has_a_pixel_size_that_can_be(words: Words, tmp_path: Path) -> None:
    _refused(words, tmp_path, "[data]\nslides = [{ path = 'a.tif', assume_mpp = 0 }]\n", "data.slides.0.assume_mpp: 0;")


def _refused(words: Words, folder: Path, text: str, said: str) -> None:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    code, out, err = words("train", folder / "run.toml", "-o", folder / "brush")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"wsi-brush: {folder / 'run.toml'}: ")
    assert said in line


def test_what_can_be_stays(tmp_path: Path) -> None:
    """The ends of what is allowed."""
    path = tmp_path / "run.toml"
    path.write_text(
        "[data]\nslides = [{ path = 'a.tif' }]\nuntil = 1\npoints = 0\n[model]\ndepth = [0, 0, 0]\nmollifier = 0\n"
        "[optimisation]\nminutes = inf\ncheckpoint_minutes = inf\nmargin = 1\naverage = 1\nunconditional = 0\n"
    )
    assert read_config(path).optimisation.margin == 1


# -- what no recipe says of itself -------------------------------------------------------------------------

SMALL = "sizes = [64, 64, 64, 64, 32]\nwindow = 32\npoints = 16\n"


def recipe(folder: Path, *, slide: str = "tissue.tif", data: str = SMALL, rest: str = "") -> Path:
    (folder / "run.toml").write_text(f"[data]\nslides = [{{ path = '{slide}' }}]\n{data}{rest}", encoding="utf-8")
    return folder / "run.toml"


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "wet"])
@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"slide": "gone.svs"}, 3, "gone.svs: no such file"),
        ({"slide": "*.svs"}, 1, "no file fits this pattern"),
        ({"data": f"{SMALL}encoder = 'nonesuch'\n"}, 1, "'nonesuch' is no encoder"),
        ({"data": f"{SMALL}encoder = 'uni'\n"}, 2, "its weights are not in the local cache"),
        ({"rest": "[optimisation]\nstart = 'nobrush'\n"}, 1, "nobrush: no brush here"),
        (
            {"rest": "[model]\nwidth = 16\nheads = 2\n[optimisation]\nstart = 'bundled'\n"},
            1,
            "that brush has other sizes",
        ),
        ({"rest": "[model]\nsystem = 'patches'\n"}, 1, "scenes of 32 pixels at 8 µm are too small"),
        ({"data": ""}, 1, "no slide has 256 x 256 pixels at 2 µm"),  # 1024 of 0.5 µm, of which 0.75 are trained on
        ({"data": "sizes = [768, 384, 192, 96, 64]\nwindow = 64\n"}, 1, "no slide has 64 x 64 pixels at 8 µm"),
        ({"data": "shares = [1, 0, 0, 0, 0]\nsizes = [800, 256, 256, 256, 256]\n"}, 1, "no slide has 800 x 800"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_embedded(
    words: Words, tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str],
    code: int, said: str, dry: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(train, "build_pack", lambda *_, **__: pytest.fail("it was embedded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [recipe(tmp_path, **given), "-o", tmp_path / "brush", "--slides", tissue_slide.parent, *dry]
    found, out, err = words("train", *arguments)
    assert (found, out) == (code, ""), err
    (line,) = err.splitlines()
    assert line.startswith("wsi-brush: ")
    assert said in line


def test_a_dry_run_of_what_can_run_writes_nothing(words: Words, tissue_slide: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, data=f"{SMALL}shares = [1, 0, 0, 0, 0]\n")
    code, out, err = words("train", config, "-o", tmp_path / "brush", "--slides", tissue_slide.parent, "--dry-run")
    assert (code, err) == (0, "")
    assert "files: 1" in out
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_a_dry_run_looks_at_what_is_made(words: Words, tissue_slide: Path, tmp_path: Path) -> None:
    """The pack takes the slides' place; what it has no room for, and another run's checkpoint, are said."""
    rest = "[model]\nwidth = 16\nheads = 2\n[optimisation]\nsteps = 1\nbatch = 1\n"
    config, ends = recipe(tmp_path, rest=rest), ["-o", tmp_path / "brush", "--work", tmp_path / "work"]
    assert words("train", config, *ends, "--slides", tissue_slide.parent)[0] == 0
    again = [*ends, "--overwrite", "--dry-run"]
    assert words("train", config, *again)[0] == 0  # no slides here
    recipe(tmp_path, data=SMALL.replace("[64,", "[800,"), rest=rest)
    code, _, err = words("train", config, *again)
    assert (code, "no slide has 800 x 800" in err) == (1, True)
    recipe(tmp_path, rest=f"{rest}rate = 1\n")
    code, _, err = words("train", config, *again)
    assert (code, "made by another configuration" in err) == (4, True)


def test_the_readme_names_every_key() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    section = readme.read_text(encoding="utf-8").split("## Train a brush\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    for part in (Data, SlideSource, Model, Optimisation, Rival):
        assert set(part.model_fields) <= named, part
