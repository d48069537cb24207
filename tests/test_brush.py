"""Brush: what is written is read back, and what is damaged or does not fit is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from wsi_brush.brush import KIND, Brush, load_brush, save_brush
from wsi_brush.commit import MANIFEST, staged, verify
from wsi_brush.denoiser import Denoiser, DenoiserConfig
from wsi_brush.diffusion import Ladder
from wsi_brush.errors import RefusedError, UsageError, WsiBrushError
from wsi_brush.grid import Grid
from wsi_brush.store import EmbeddingMap

CONFIG = DenoiserConfig(dim=4, width=8, depth=(1, 1, 2), layout=2, heads=2, tokens=3, mollifier=0.6)
PITCHES = (0.5, 2.0, 8.0)


def made_brush() -> Brush:
    torch.manual_seed(0)
    denoiser = Denoiser(CONFIG)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moments = {"mean": [0.0, 1.0, -2.0, 0.5], "std": [1.0, 2.0, 0.5, 0.1]}
    about = {
        "encoder": "colours",
        "fingerprint": "c0ffee",
        "tile": 32,
        "embeddings": {f"{pitch:g}": moments for pitch in (8.0, 0.5, 2.0)},
        "objective": "v",
        "training": {"steps": 7, "licence": "MIT"},
    }
    return Brush(denoiser, Ladder((0.5, 1.0, 2.0), (0.1, 0.08), tolerance=0.05), about)


def test_embeddings_go_no_further_than_the_limit_the_brush_was_trained_with() -> None:
    brush = made_brush()
    values = np.array([[3.0, 1.0, -7.0, 0.5], [-1.0, 21.0, -2.0, 90.0]], np.float32)
    expected = np.array([[3.0, 0.0, -10.0, 0.0], [-1.0, 10.0, 0.0, 895.0]])
    np.testing.assert_allclose(brush.standardised(2.0, values), expected, rtol=1e-5)  # of before 0.7.0: none
    brush.about["embeddings"]["2"]["limit"] = 4.0
    np.testing.assert_allclose(brush.standardised(2.0, values), expected.clip(-4, 4), rtol=1e-5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_brush(made_brush(), tmp_path / "brush")
    return tmp_path / "brush"


def one_line(found: pytest.ExceptionInfo[WsiBrushError], *words: str) -> None:
    message = str(found.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_brush_comes_back_as_it_was(saved: Path) -> None:
    made, found = made_brush(), load_brush(saved)
    assert found.denoiser.config == CONFIG
    assert found.ladder == made.ladder
    assert found.about == made.about
    assert found.pitches == PITCHES
    assert len(found.sha256) == 64
    state = found.denoiser.state_dict()
    assert list(state) == list(made.denoiser.state_dict())
    for name, value in made.denoiser.state_dict().items():
        assert torch.equal(state[name], value), name
    assert not found.denoiser.training
    assert not any(parameter.requires_grad for parameter in found.denoiser.parameters())


def test_a_brush_that_was_read_is_written_the_same(saved: Path, tmp_path: Path) -> None:
    save_brush(load_brush(saved), tmp_path / "again")
    for name in ("brush.safetensors", "brush.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert load_brush(tmp_path / "again").sha256 == load_brush(saved).sha256


def test_a_brush_is_safetensors_and_json(saved: Path) -> None:
    assert verify(saved) == []
    assert {path.name for path in saved.iterdir()} == {"brush.safetensors", "brush.json", MANIFEST}
    with safe_open(saved / "brush.safetensors", "pt") as file:
        assert set(file.keys()) == set(made_brush().denoiser.state_dict())
    assert json.loads((saved / "brush.json").read_text("utf-8"))["denoiser"]["depth"] == [1, 1, 2]


def test_a_brush_is_not_written_over_another(saved: Path) -> None:
    before = (saved / "brush.safetensors").read_bytes()
    with pytest.raises(RefusedError, match="exists"):
        save_brush(made_brush(), saved)
    assert (saved / "brush.safetensors").read_bytes() == before
    save_brush(made_brush(), saved, overwrite=True)
    assert verify(saved) == []


@pytest.mark.parametrize("name", ["brush.safetensors", "brush.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_file_is_refused_in_one_line(saved: Path, name: str, how: str) -> None:
    path = saved / name
    whole = path.read_bytes()
    if how == "changed":
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    elif how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    with pytest.raises(RefusedError) as found:
        load_brush(saved)
    one_line(found, name, "SHA-256", "copy the brush again")


def test_no_brush_is_a_wrong_word(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with staged(tmp_path / "other", kind="embedding store", about={}) as stage:
        (stage / "brush.json").write_text("{}")
    for name in ("missing", "empty", "file", "other"):
        with pytest.raises(UsageError) as found:
            load_brush(tmp_path / name)
        one_line(found, name, "no brush here", "brush.safetensors")


def forged(target: Path, weights: bytes, about: dict[str, Any]) -> Path:
    """A folder whose sums are right and whose contents are not."""
    with staged(target, kind=KIND, about={"format": 1}) as stage:
        (stage / "brush.safetensors").write_bytes(weights)
        (stage / "brush.json").write_text(json.dumps(about))
    return target


class Planted:
    """What an unpickler would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    about = json.loads((saved / "brush.json").read_text("utf-8"))
    folder = forged(tmp_path / "forged", pickle.dumps(Planted(tmp_path / "run")), about)
    with pytest.raises(RefusedError) as found:
        load_brush(folder)
    one_line(found, "another version")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"denoiser": {"dim": 4, "depth": [1, 1, 2], "unheard": 1}},
        {"denoiser": {"dim": 4, "depth": [1, 1, 2], "width": 16, "heads": 2}},
        {"ladder": {"pitches": [0.5]}},
        {"ladder": None},
    ],
    ids=["key", "sizes", "ladder", "none"],
)
def test_a_brush_of_another_version_is_refused_in_one_line(saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    about = json.loads((saved / "brush.json").read_text("utf-8"))
    folder = forged(tmp_path / "forged", (saved / "brush.safetensors").read_bytes(), about | change)
    with pytest.raises(RefusedError) as found:
        load_brush(folder)
    one_line(found, "forged", "another version", "train or fetch it again")


# -- what it is conditioned on -----------------------------------------------------------------------------


def made_maps(dim: int = 4, *, top: int = 2, left: int = 5) -> dict[float, EmbeddingMap]:
    random = np.random.default_rng(0)
    maps = {}
    for pitch in PITCHES:
        values = random.normal(size=(3, 4, dim)).astype(np.float16)
        values[1, 2] = np.nan
        maps[pitch] = EmbeddingMap(pitch, Grid(32 * pitch, top, left, 3, 4), values)
    return maps


def test_a_condition_lies_where_the_reference_lies() -> None:
    canvas, pitch = Grid(0.5, 100, 300, 256, 128), 2.0
    maps = made_maps()
    for mpp, lattice in zip(PITCHES, made_brush().condition(maps, canvas, pitch), strict=True):
        rows, columns = lattice.centres()
        expected = maps[mpp].lattice.centres()
        np.testing.assert_allclose(rows[0].numpy() * pitch + 50, expected[0], atol=1e-3)
        np.testing.assert_allclose(columns[0].numpy() * pitch + 150, expected[1], atol=1e-3)
        assert lattice.cell == 32 * mpp / pitch


def test_a_condition_is_standardised_and_absent_where_there_is_no_tissue() -> None:
    maps = made_maps()
    for mpp, lattice in zip(PITCHES, made_brush().condition(maps, Grid(0.5, 0, 0, 64, 64), 0.5), strict=True):
        values = lattice.values[0].numpy()
        plain = maps[mpp].values.astype(np.float32)
        np.testing.assert_allclose(values[0, 0], (plain[0, 0] - [0, 1, -2, 0.5]) / [1, 2, 0.5, 0.1], rtol=1e-5)
        assert not values[1, 2].any()
        assert lattice.present[0].sum() == 11
        assert lattice.present[0, 1, 2] == 0


def test_embeddings_of_another_encoder_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError) as found:
        made_brush().condition(made_maps(dim=5), Grid(0.5, 0, 0, 64, 64), 0.5)
    one_line(found, "colours", "4 numbers", "has 5", "embed it again")


def test_a_pitch_that_is_missing_is_named() -> None:
    maps = made_maps()
    del maps[2.0]
    with pytest.raises(UsageError) as found:
        made_brush().condition(maps, Grid(0.5, 0, 0, 64, 64), 0.5)
    one_line(found, "embeddings at 2 µm", "[0.5, 8.0]")
