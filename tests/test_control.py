"""A copy is found to be its own reference everywhere; tiles that are somebody else's are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray

from wsi_brush.control import Descriptor, control
from wsi_brush.samples import Codec, Sides, open_sides


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """2048 x 2048 pixels in 4 x 4 regions of 512 µm at 1 µm, each of a colour and grain of its own."""
    random = np.random.default_rng(3)
    found = np.zeros((2048, 2048, 3), np.uint8)
    for row in range(4):
        for column in range(4):
            colour = np.array([200, 110, 165]) + random.integers(-25, 25, 3)
            grain = random.normal(0, random.uniform(3, 18), (512, 512, 1))
            found[row * 512 : row * 512 + 512, column * 512 : column * 512 + 512] = (colour + grain).clip(0, 255)
    return found


def sides_of(folder: Path, real: NDArray[np.uint8], other: NDArray[np.uint8]) -> Sides:
    options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}, "mpp": 1.0}
    return open_sides(
        [write_pyramid(folder / "real.tif", [real], **options)],
        [write_pyramid(folder / "other.tif", [other], **options)],
    )


@pytest.mark.parametrize("encoder", [TileStatistics(), Descriptor()], ids=lambda encoder: encoder.name)
def test_a_copy_is_found_and_a_stranger_is_not(
    pixels: NDArray[np.uint8], tmp_path: Path, encoder: TileStatistics | Descriptor
) -> None:
    (tmp_path / "rolled").mkdir()
    copy, rolled = (
        control(sides_of(folder, pixels, other), [encoder], Codec("none"), [1.0], most=64, seed=0)[encoder.name]
        for folder, other in ((tmp_path, pixels), (tmp_path / "rolled", np.roll(pixels, (512, 1024), (0, 1))))
    )
    assert copy["cosine"]["1"]["n"] == 64
    assert copy["cosine"]["1"]["mean"] > 0.999
    assert abs(copy["cosine"]["1"]["elsewhere"]) < 0.5
    assert copy["retrieval"] == {"regions": 16, "side": 512.0, "top1": 1.0, "top5": 1.0, "chance": 0.0625}
    assert rolled["cosine"]["1"]["mean"] < 0.5
    assert rolled["retrieval"]["top1"] < 0.3
    worst = rolled["cosine"]["1"]["worst"]
    assert [one["cosine"] for one in worst] == sorted(one["cosine"] for one in worst)
    assert worst[0]["place"] == worst[0]["there"]


def test_what_was_left_blank_is_seen(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    half = pixels.copy()
    half[:, 1024:] = 245
    found = control(sides_of(tmp_path, pixels, half), [TileStatistics()], Codec("none"), [1.0], most=64, seed=0)
    assert found["statistics"]["cosine"]["1"]["n"] == 64
    assert found["statistics"]["cosine"]["1"]["mean"] < 0.8


def test_too_few_is_said(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    sides = sides_of(tmp_path, pixels[:512, :512], pixels[:512, :512])
    found = control(sides, [TileStatistics()], Codec("none"), [1.0, 8.0], most=64, seed=0)["statistics"]
    assert found["cosine"]["8"] == {"n": 0, "missing": "fewer than 2 tiles with tissue"}
    assert found["retrieval"] == {"regions": 1, "missing": "fewer than 4 regions"}
