"""Recipes: what is wrong in one is a line before the work begins, with where it is, what it is and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_brush.recipe import read_config

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
