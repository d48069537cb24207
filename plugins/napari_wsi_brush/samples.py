"""Sample data that needs no network: a reference of 1024 x 1024 pixels of 0.5 µm, and a painting after it.

Both are synthetic: the reference is a square of `examples/reference.tif`, which wsi-brush painted itself. How the files
were made is `examples/make_samples.py`.
"""

from __future__ import annotations

from pathlib import Path

from .layers import MICROMETRES, LayerData, marked

SAMPLES = Path(__file__).parent / "samples"


def reference() -> list[LayerData]:
    """A reference to paint after."""
    return [_layer("reference", right=0)]


def pair() -> list[LayerData]:
    """The same, and to its right a painting after it."""
    return [_layer("reference", right=0), _layer("painting", right=1)]


def _layer(name: str, *, right: int) -> LayerData:
    """A sample, moved to the right by so many of its widths and a gap; a few megabytes, so all of it is read."""
    from wsi_brush.slide import open_slide

    slide = open_slide(SAMPLES / f"{name}.tif")
    shown = {
        "name": f"synthetic: {name}",
        "rgb": True,
        "scale": (slide.mpp, slide.mpp),
        "translate": (0.0, right * 1.03 * slide.grid.width * slide.mpp),
        "units": MICROMETRES,
        "metadata": {**marked(), "path": str(slide.path)},
    }
    return slide.read(slide.grid), shown, "image"
