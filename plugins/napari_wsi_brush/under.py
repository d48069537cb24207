"""What lies under a place of the window: which slide, and where on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from napari.layers import Image, Layer


def slide_of(layer: Layer) -> Path | None:
    """The file of an RGB slide that a layer was opened from."""
    if not isinstance(layer, Image) or not layer.rgb or "store" in layer.metadata.get("wsi_brush", {}):
        return None
    path = layer.metadata.get("path") or layer.source.path
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
