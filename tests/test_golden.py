"""Golden vectors: the bundled encoder is itself; another, a broken and a silent one are told from it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsi_brush.encoder import About, Encoder, load_encoder
from wsi_brush.golden import made_tile, verify


class Constant(nn.Module):
    """Says one number, whatever it sees."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), 368), self.value)


def saying(value: float, name: str = "bundled") -> Encoder:
    return Encoder(Constant(value), About(name, 128, 368, "none", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def test_the_made_tile_is_the_same_everywhere() -> None:
    tile = made_tile(224)
    assert (tile.shape, tile.dtype) == ((224, 224, 3), np.uint8)
    assert hashlib.sha256(tile.tobytes()).hexdigest()[:16] == "bed1766d5f5d46cf"
    np.testing.assert_array_equal(tile[:128, :128], made_tile(128))
    dark = (tile[..., 1] < 110).mean()
    assert 0.1 < dark < 0.6  # nuclei and what is between them


def test_the_bundled_encoder_agrees_with_its_golden_vector() -> None:
    """New bundled weights? Put what `wsi-brush models verify bundled --json` prints into zoo.toml."""
    found = verify(load_encoder())
    assert (found.golden, found.problem) == ("agrees", None)
    assert len(found.head) == 8
    assert found.length > 0


def test_other_weights_under_that_name_differ() -> None:
    found = verify(saying(1.0))
    assert found.golden == "differs"
    assert "bundled: its vector of the made tile differs" in (found.problem or "")
    assert "\n" not in (found.problem or "")


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zeros")]
)
def test_a_broken_encoder_is_found_without_a_golden_vector(value: float, word: str) -> None:
    found = verify(saying(value, "file"))
    assert found.golden == "none known"
    assert word in (found.problem or "")
    json.dumps((*found.head, found.length), allow_nan=False)


def test_an_encoder_without_a_golden_vector_is_only_tried() -> None:
    found = verify(saying(2.0, "file"))
    assert (found.golden, found.problem) == ("none known", None)
