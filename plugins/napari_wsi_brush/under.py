"""What a layer shows, and what lies under a place of the window: which slide, and where on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from napari.layers import Image, Layer


def about_of(layer: Any) -> dict[str, Any]:
    """What its file says of itself; nothing of files that others wrote."""
    about = layer.metadata.get("wsi_brush")
    return about if isinstance(about, dict) else {}


def is_synthetic(layer: Any) -> bool:
    """Whether what it shows says of itself that it was painted."""
    return layer.metadata.get("synthetic") is True or about_of(layer).get("synthetic") is True


def is_picture(layer: Any) -> bool:
    """Whether it shows tissue: in colour, and no map of embeddings or of similarity."""
    about = about_of(layer)
    return isinstance(layer, Image) and layer.rgb and "store" not in about and "similarity" not in about


def slide_of(layer: Any) -> Path | None:
    """The file of a slide that a layer was opened from."""
    path = (layer.metadata.get("path") or layer.source.path) if is_picture(layer) else None
    return Path(path) if path else None


def place_on(layer: Any, position: Any) -> tuple[float, float]:
    """A place in the world on a slide's plane, µm from its corner; a pixel's middle is a whole number of its data."""
    down, across = layer.world_to_data(position)[-2:]
    return (float(down) + 0.5) * float(layer.scale[-2]), (float(across) + 0.5) * float(layer.scale[-1])


def slide_at(layers: Sequence[Any], position: Any) -> Layer | None:
    """The topmost slide that is seen at a place in the world."""
    for layer in reversed(layers):
        if layer.visible and slide_of(layer) is not None:
            place = np.asarray(layer.world_to_data(position)[-2:]) + 0.5
            level = layer.data[0] if layer.multiscale else layer.data
            if (place >= 0).all() and (place < level.shape[:2]).all():
                found: Layer = layer
                return found
    return None
