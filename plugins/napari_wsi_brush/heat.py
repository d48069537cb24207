"""The map of similarity of a real and a synthetic layer: computed in a thread, shown as two linked layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_brush.errors import UsageError

from .layers import MICROMETRES
from .under import about_of, slide_of

if TYPE_CHECKING:
    from wsi_brush.similarity import SimilarityMap

Told = Callable[[int, int], None]
UNLIKE, LIKE = (0.90, 0.38, 0.0, 1.0), (0.13, 0.40, 0.67, 1.0)  # orange to blue: told apart by almost every eye


def paths_of(real: Any, synthetic: Any) -> tuple[Path, Path]:
    """The files of two layers.

    Raises:
        UsageError: if one was not opened by this plugin, or has no pixel size.
    """
    found = []
    for layer in (real, synthetic):
        path = slide_of(layer)
        if path is None:
            raise UsageError(f"{layer.name}: not opened by wsi-brush, so its file is unknown; open its file again")
        if any(str(unit) != "micrometer" for unit in layer.units):
            raise UsageError(f"{layer.name}: no pixel size in µm; open it with `wsi-brush view --assume-mpp`")
        found.append(path)
    return found[0], found[1]


def stores_among(layers: Any, real: Path, synthetic: Path, mpp: float) -> tuple[Path, Path] | None:
    """The stores of both slides, where both are open in the viewer too."""
    known = {}
    for layer in layers:
        about = about_of(layer)
        if "store" in about and about.get("mpp") == mpp:
            known[about.get("slide")] = Path(about["store"])
    stores = known.get(real.name), known.get(synthetic.name)
    return None if stores[0] is None or stores[1] is None else (stores[0], stores[1])


def compare(
    paths: tuple[Path, Path],
    pixels: tuple[float, float],
    mpp: float,
    shift: tuple[float, float],
    stores: tuple[Path, Path] | None,
    told: Told,
) -> SimilarityMap:
    """The map. `pixels`: of both layers, µm, where a header has none.

    Raises:
        WsiBrushError: if a file cannot be read, or there is nothing to compare.
    """
    from wsi_brush.brush import load_brush
    from wsi_brush.encoder import load_encoder
    from wsi_brush.similarity import compare_slides, compare_stores
    from wsi_brush.slide import open_slide

    down, right = shift
    brush = load_brush()
    found = None
    if stores is not None:
        found = compare_stores(*stores, mpp, brush=brush, down=down, right=right)
    if found is None:
        real, synthetic = (open_slide(path, assume_mpp=pixel) for path, pixel in zip(paths, pixels, strict=True))
        encoder = load_encoder(brush.about["encoder"])
        found = compare_slides(
            real, synthetic, mpp, brush=brush, encoder=encoder, down=down, right=right, progress=told
        )
    if not found.worst:
        raise UsageError(f"{paths[0].name}: no tissue under the painting, so nothing to compare at {mpp:g} µm")
    return found


def words(found: SimilarityMap) -> str:
    """Its figures in a line."""
    values = found.values[np.isfinite(found.values)]
    return f"cosine of {len(values)} tiles: mean {values.mean():.2f}, from {values.min():.2f} to {values.max():.2f}"


def add_maps(viewer: Any, found: SimilarityMap, synthetic: Any) -> tuple[Any, Any]:
    """Two linked layers, one for the cell of each side; the second has the legend."""
    from napari.experimental import link_layers
    from napari.utils import Colormap

    values, side = found.values, found.lattice.mpp
    lowest = float(np.nanmin(values))
    corner = synthetic.translate[-2:] - synthetic.scale[-2:] / 2
    colours = Colormap([UNLIKE, (0.97, 0.97, 0.97, 1.0), LIKE], name="unlike to like")
    layers = []
    for name in ("where the reference is", "similarity"):
        layer = viewer.add_image(
            values,
            name=f"{name}: cosine at {found.mpp:g} µm" if name == "similarity" else f"similarity, {name}",
            colormap=colours,
            contrast_limits=(min(0.8, math.floor(10 * lowest) / 10), 1.0),
            scale=(side, side),
            translate=tuple(corner + (np.array([found.lattice.top, found.lattice.left]) + 0.5) * side),
            units=MICROMETRES,
            opacity=0.5,
            blending="translucent",
            interpolation2d="nearest",
            metadata={"wsi_brush": {"similarity": found.mpp}},
        )
        layers.append(layer)
    layers[1].colorbar.visible = True
    link_layers(layers, ("opacity", "colormap", "contrast_limits", "gamma"))
    return layers[0], layers[1]
