"""Verb: real and synthetic slides -> figures: how near the one comes to the other, and to what it was painted after.

Both sides go through one codec first; what each figure has beside it, README says ("Evaluate").
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from . import __version__
from .control import Descriptor, control
from .embed import TileEncoder
from .errors import UsageError
from .likeness import borders, distribution, see, texture
from .progress import Tell
from .published import Networks, published
from .samples import Codec, Field, Sides, open_sides, shows

SCALES = (0.5, 2.0, 8.0)
"""µm per pixel: detail, tissue, layout."""


class Opened(Protocol):
    """Called with the figures when they are all there."""

    def __call__(self, sides: Sides, figures: dict[str, Any]) -> None: ...


def evaluate_slides(
    real: Iterable[Path | str], synthetic: Iterable[Path | str], *, encoder: TileEncoder, codec: str = "jpeg:90",
    assume_mpp: float | None = None, most: int = 1536, seed: int = 0, networks: Networks | None = None,
    tell: Tell | None = None, then: Opened | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of two sides, ready for JSON; see README, "Evaluate", for what each means.

    `most`: tiles of a side and scale that are looked at; `networks`: those of the figures that papers print, if these
    are wanted (`published.find_networks`); `then` has them and the slides at the end (`report`).

    Raises:
        SlideError, PixelSizeError: if a slide cannot be read, or holds no tissue.
        UsageError: if a folder is empty, the codec unknown, or a side has no scale in common with the other.
    """
    start, one_codec = time.monotonic(), Codec(codec)
    sides = open_sides(real, synthetic, assume_mpp=assume_mpp, tell=tell)
    scales = [mpp for mpp in SCALES if all(shows(one, mpp) for one in (*sides.real, *sides.synthetic))]
    if not scales:
        raise UsageError(f"no slide has pixels of {SCALES[-1]:g} µm or less on both sides; nothing can be compared")
    left_out = [mpp for mpp in SCALES if mpp not in scales]
    if left_out:
        sides.notes.append(f"not at {', '.join(f'{mpp:g}' for mpp in left_out)} µm, which not every slide shows")
    if any(made.get("encoder_fingerprint") == encoder.fingerprint for made in sides.brushes):
        sides.notes.append(
            f"encoder {encoder.name} is the one that the brush was conditioned on: distances in its space flatter the "
            "brush; give another --encoder beside it"
        )
    finest = max(SCALES[0], *(one.slide.mpp for one in (*sides.real, *sides.synthetic)))
    figures: dict[str, Any] = {
        "format": 1, "wsi_brush": __version__, "seed": seed, "codec": one_codec.word, "most": most,
        "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim,
                    "tile": encoder.tile},
        "real": [_said(one) for one in sides.real], "synthetic": [_said(one) for one in sides.synthetic],
        "scales": {},
    }  # fmt: skip
    for mpp in scales:
        seen = see(sides, mpp, encoder, one_codec, most=most, seed=seed, tell=tell)
        figures["scales"][f"{mpp:g}"] = distribution(sides, seen, seed=seed)
    figures["texture"] = texture(sides, one_codec, mpp=finest, seed=seed, tell=tell)
    figures["seams"] = borders(sides, one_codec)
    figures["control"] = (
        control(sides, [encoder, Descriptor()], one_codec, scales, most=min(most, 256), seed=seed, tell=tell)
        if sides.pairs else None
    )  # fmt: skip
    figures["published"] = None
    if networks is not None:
        sides.notes.extend([networks.missing] if networks.missing else [])
        figures["published"] = published(sides, networks, one_codec, mpp=finest, most=most, seed=seed, tell=tell)
    figures["notes"], figures["seconds"] = sides.notes, round(time.monotonic() - start, 1)
    if then is not None:
        then(sides, figures)
    return figures


def _said(one: Field) -> dict[str, Any]:
    return {
        "name": one.name, "mpp": round(one.slide.mpp, 5), "mpp_source": one.slide.mpp_source,
        "synthetic": one.slide.synthetic, "area": [one.area.top, one.area.left, *one.area.shape],
        "tissue": round(float(one.tissue.mean()), 4),
    }  # fmt: skip
