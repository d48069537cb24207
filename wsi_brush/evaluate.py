"""Verb: real and synthetic slides -> figures: how near the one comes to the other, and to what it was painted after.

Both sides go through one codec first; what each figure has beside it, README says ("Evaluate").
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__
from .borders import crops, gradients
from .control import Descriptor, control
from .copying import copying
from .embed import TileEncoder, slide_fingerprint
from .errors import UsageError
from .likeness import distribution, see, texture, through_thumbnails
from .progress import Tell
from .published import Networks, published
from .samples import Codec, Field, common_pitch, shows
from .sides import Sides, painted_after
from .slide import Slide

SCALES = (0.5, 2.0, 8.0)
"""µm per pixel: detail, tissue, layout."""
_PAINTED = (
    "brush_sha256", "brush_fingerprint", "seed", "steps", "guidance", "solver", "system", "reference", "label",
    "versions",
)  # fmt: skip


def check_encoders(encoders: Sequence[TileEncoder]) -> None:
    """Raises:
    UsageError: if two have one name, under which each has its figures.
    """
    for name, times in Counter(one.name for one in (*encoders, Descriptor())).items():
        if times > 1:
            raise UsageError(f"--encoder {name}: a second one of that name; give each once, under a name of its own")


def evaluate_slides(
    sides: Sides, *, encoders: Sequence[TileEncoder], codec: str = "jpeg:90", most: int = 1536, seed: int = 0,
    networks: Networks | None = None, training: Sequence[Slide] = (), trained_until: float = 1.0,
    tell: Tell | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of two sides (`samples.open_sides`), ready for JSON; see README, "Evaluate", for what each means.

    `most`: tiles of a side and scale that are looked at; `networks`: those of the figures that papers print, if these
    are wanted (`published.find_networks`); `training`: the slides that the brush was trained on, the left
    `trained_until` of their width, which are searched for copies.

    Raises:
        SlideError: if a slide cannot be read.
        UsageError: if the codec is unknown, two encoders have one name, or the sides have no scale in common.
    """
    start, one_codec = time.monotonic(), Codec(codec)
    check_encoders(encoders)
    both, notes = (*sides.real, *sides.synthetic), list(sides.notes)
    scales = [mpp for mpp in SCALES if all(shows(one, mpp) for one in both)]
    if not scales:
        raise UsageError(f"no slide has pixels of {SCALES[-1]:g} µm or less on both sides; nothing can be compared")
    left_out = [mpp for mpp in SCALES if mpp not in scales]
    if left_out:
        notes.append(f"not at {', '.join(f'{mpp:g}' for mpp in left_out)} µm, which not every slide shows")
    notes += _warnings(sides, encoders)
    finest = common_pitch([one.slide for one in sides.real], [one.slide for one in sides.synthetic], SCALES[0])
    prints = {path: slide_fingerprint(path)[:16] for path in {one.slide.path for one in both}}  # once a file
    figures: dict[str, Any] = {
        "format": 3, "wsi_brush": __version__, "seed": seed, "codec": one_codec.word, "most": most,
        "encoders": [{"name": one.name, "fingerprint": one.fingerprint, "dim": one.dim, "tile": one.tile}
                     for one in encoders],
        "versions": {"torch": torch.__version__, "numpy": np.__version__}, "date": str(date.today()),
        "real": [_said(one, prints) for one in sides.real],
        "synthetic": [_said(one, prints) for one in sides.synthetic],
        "pairs": [{"real": one.real, "synthetic": one.synthetic} for one in sides.pairs],
        "scales": {one.name: {} for one in encoders},
    }  # fmt: skip
    for mpp in scales:
        every = see(sides, mpp, encoders, one_codec, most=most, seed=seed, tell=tell)
        for encoder, seen in zip(encoders, every, strict=True):
            shrunk = through_thumbnails(sides, seen, encoder, one_codec, tell=tell)
            figures["scales"][encoder.name][f"{mpp:g}"] = distribution(sides, seen, seed=seed, thumbnail=shrunk)
    figures["texture"] = texture(sides, one_codec, mpp=finest, most=most, seed=seed, tell=tell)
    figures["seams"] = gradients(sides, seed=seed)
    figures["borders"] = crops(sides, encoders, one_codec, most=most, seed=seed, tell=tell)
    figures["control"] = (
        control(sides, [*encoders, Descriptor()], one_codec, scales, most=min(most, 256), seed=seed, tell=tell)
        if sides.pairs else None
    )  # fmt: skip
    figures["published"], figures["copying"] = None, None
    if networks is not None:
        notes.extend([networks.missing] if networks.missing else [])
        figures["published"] = published(sides, networks, one_codec, mpp=finest, most=most, seed=seed, tell=tell)
    if training:
        searched = replace(sides, notes=notes)
        figures["copying"] = copying(
            searched, training, one_codec, until=trained_until, most=most, seed=seed, tell=tell
        )
        sides.training = searched.training
    return figures | {"notes": notes, "seconds": round(time.monotonic() - start, 1)}


def without_figures(figures: dict[str, Any]) -> str | None:
    """Why nothing could be said of how like two sides are, where tiles are too few at every scale, and windows too."""
    scales = [one for scales in figures["scales"].values() for one in scales.values()]
    return figures["texture"].get("missing") if all("missing" in one for one in scales) else None


def _warnings(sides: Sides, encoders: Sequence[TileEncoder]) -> list[str]:
    """What must be known of the encoders, and of sides that are not paired, before figures are believed."""
    found = [
        f"{one.name}: on the real side, and says that it is synthetic; all that is called real is of it too"
        for one in sides.real
        if one.slide.synthetic
    ]
    both = {one.slide.path.resolve() for one in sides.real} & {one.slide.path.resolve() for one in sides.synthetic}
    found += [f"{path.name}: on both sides, so it is compared with itself" for path in sorted(both)]
    trained_with = {made.get("encoder_fingerprint"): made.get("encoder") for made in sides.brushes}
    for encoder in encoders:
        if encoder.fingerprint in trained_with:
            found.append(
                f"encoder {encoder.name} is the one that the brush was conditioned on: distances in its space flatter "
                f"the brush; {'give' if len(encoders) == 1 else 'look at'} another --encoder beside it"
            )
    absent = set(trained_with) - {encoder.fingerprint for encoder in encoders} - {None}
    if absent and sides.pairs:
        names = ", ".join(sorted(str(trained_with[one]) for one in absent))
        found.append(
            f"the brush was conditioned on {names}, which is not among the encoders: control is of others only"
        )
    if not sides.paired:
        shares = [
            100 * sum(int(one.tissue.sum()) for one in side) / sum(one.tissue.size for one in side)
            for side in (sides.real, sides.synthetic)
        ]
        found.append(
            f"not all are paired, so tiles are where each side has tissue ({shares[0]:.0f} % of the real one, "
            f"{shares[1]:.0f} % of the other); where the floor is of the same slides, others, real too, lie above it"
        )
    return found


def _said(one: Field, prints: Mapping[Path, str]) -> dict[str, Any]:
    """What a report says of a field: by its fingerprint its file is known again, wherever it is."""
    found: dict[str, Any] = {
        "name": one.name, "fingerprint": prints[one.slide.path], "mpp": round(one.slide.mpp, 5),
        "mpp_source": one.slide.mpp_source, "synthetic": one.slide.synthetic,
        "area": [one.area.top, one.area.left, *one.area.shape], "tissue": round(float(one.tissue.mean()), 4),
    }  # fmt: skip
    made = painted_after(one.slide.path) or {}
    return found | ({"painted": {name: made[name] for name in _PAINTED if name in made}} if made else {})
