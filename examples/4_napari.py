"""The pictures of the four widgets: a real window, driven by its own controls. Needs a display (xvfb-run).

python examples/4_napari.py FOLDER [SLIDE TOP,LEFT INK]   # µm: a region's corner, a place for ink; else the sample's
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import napari
import numpy as np
from PIL import Image, ImageDraw
from qtpy.QtWidgets import QApplication

from napari_wsi_brush import easel, samples

SIDE = 256  # µm, of what is painted
SHOWN = 300  # pixels of a side of the animation
BYTES = 195_000  # of a picture: a page is to be read quickly
FRAMES = 18


def until(what: Callable[[], object]) -> None:
    """The window goes on until something is so."""
    while not what():
        QApplication.instance().processEvents()
        time.sleep(0.01)


def calm(seconds: float = 1.0) -> None:
    """The window has time to draw."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end)


def shoot(viewer: Any, path: Path) -> None:
    """The whole window."""
    calm()
    picture = Image.fromarray(viewer.screenshot(canvas_only=False, flash=False)[..., :3])
    for quality in range(80, 30, -5):
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=quality, optimize=True)
        if file.tell() < BYTES:
            break
    path.write_bytes(file.getvalue())


def animated(frames: list[Any], path: Path) -> None:
    """A painting that sharpens, marked as what it is: frames of about the same change from one to the next."""
    changes = [float(np.abs(after.astype(int) - before).mean()) for before, after in pairwise(frames)]
    way = np.cumsum([0.0, *changes])
    chosen = [frames[i] for i in sorted({*np.searchsorted(way, np.linspace(0, way[-1], FRAMES)).tolist()})]
    pictures = []
    for pixels in chosen:
        picture = Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, SHOWN - 18, 206, SHOWN), fill="white")
        draw.text((6, SHOWN - 15), "SYNTHETIC, painted by wsi-brush", fill=(120, 0, 0))
        pictures.append(picture.quantize(64, dither=Image.Dither.NONE))
    times = [250] * (len(pictures) - 1) + [2500]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)


def look_at(viewer: Any, corner: tuple[float, float], share: float = 0.8) -> None:
    """The square that is painted fills so much of the canvas, once docks have their places."""
    calm()
    viewer.scene.camera.center = tuple(edge + SIDE / 2 for edge in corner)
    viewer.scene.camera.zoom = share * min(viewer.canvas.size) / SIDE


def opened(slide: Path | None) -> tuple[Any, Any]:
    """A window with the slide, or with the sample."""
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1280, 860)
    (layer,) = viewer.open(slide, plugin="wsi-brush") if slide else viewer.open_sample("wsi-brush", "reference")
    return viewer, layer


def paint_after(folder: Path, work: Path, slide: Path | None, corner: tuple[float, float]) -> None:
    """Synthesize while it paints, what came of it beside its reference, and three seeds."""
    viewer, layer = opened(slide)
    _, choices = viewer.window.add_plugin_dock_widget("wsi-brush", "Synthesize")
    look_at(viewer, corner, 0.7)
    choices.draw.native.click()
    square = np.array([(0, 0), (0, SIDE), (SIDE, SIDE), (SIDE, 0)])
    choices.region.value.add_rectangles(square + corner - layer.scale[-1] / 2)
    viewer.layers.selection.active = layer
    choices.file.value, choices.steps.value = work / "synthetic.ome.zarr", 12
    until(lambda: "at row" in choices.said.value)
    choices.run.native.click()
    shot: list[float] = []

    def watched() -> bool:
        for painted in choices.layers_named("synthetic: being painted"):
            if painted.scale[0] <= 2 and not shot:
                shot.append(painted.scale[0])
                shoot(viewer, folder / "viewer_synthesize.jpg")
        return choices.job is None

    until(watched)
    print(choices.said.value)
    _, seeds = viewer.window.add_plugin_dock_widget("wsi-brush", "Seeds", tabify=True)
    seeds.region.value, seeds.many.value, seeds.steps.value = choices.region.value, 2, 12
    seeds.run.native.click()
    until(lambda: seeds.job is None)
    shoot(viewer, folder / "viewer_seeds.jpg")
    viewer.close()


def side_by_side(folder: Path, real: Path, painted: Path, pitch: float) -> None:
    """A painting beside its reference, with the map of their likeness, the tiles seen at `pitch` µm a pixel."""
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1560, 860)
    viewer.open([real], plugin="wsi-brush")
    viewer.open([painted], plugin="wsi-brush")
    _, pair = viewer.window.add_plugin_dock_widget("wsi-brush", "Real | Synthetic")
    pair.pitch.setCurrentIndex(pair.pitch.findData(pitch))
    pair.compare_button.click()
    until(lambda: pair.job is None)
    viewer.layers[-1].opacity = 0.35
    calm()
    pair.pair.fit()
    shoot(viewer, folder / "viewer_side_by_side.jpg")
    print(pair.legend.text())
    viewer.close()


def paint_by_hand(folder: Path, slide: Path | None, corner: tuple[float, float], place: tuple[float, float]) -> None:
    """A canvas of the slide's embeddings is painted, then a stroke of other tissue over it; all of it is animated."""
    viewer, layer = opened(slide)
    _, brush = viewer.window.add_plugin_dock_widget("wsi-brush", "Brush")
    look_at(viewer, corner)
    form, frames = brush.form, []
    form.pixels.setValue(384)
    form.steps.setValue(8)
    form.of_slide.click()
    form.automatic.click()
    form.new.click()
    until(lambda: brush.layer is not None and brush.job is None)
    grid = brush.easel.canvas.grid
    brush.layer.events.set_data.connect(lambda event: frames.append(np.asarray(brush.layer.data).copy()))
    form.automatic.click()
    path = slide or Path(layer.metadata["path"])
    brush.add_inks([easel.pick(brush.tools, path, at) for at in (tuple(edge + 40 for edge in corner), place)])
    until(lambda: brush.easel.painted is not None and brush.job is None)
    form.draw.click()
    form.size.setValue(70)
    down, across = grid.extent[:2]
    curve = tuple((down + 96 + 45 * np.sin(x / 30), across + x) for x in np.linspace(20, 172, 30))
    begun = len(frames)
    brush.add_stroke(brush.ink, curve, 70)
    until(lambda: len(frames) > begun + 2)
    until(lambda: brush.job is None)
    form.undo.setFocus()
    viewer.layers[0].visible = False
    viewer.fit_to_view(layers=[brush.layer])
    shoot(viewer, folder / "viewer_brush.jpg")
    animated(frames, folder / "viewer_painting.gif")
    viewer.close()


def main() -> None:
    """All of them, in turn."""
    folder, slide = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
    corner, place = (tuple(float(part) for part in word.split(",")) for word in (sys.argv[3:5] or ("96,96", "420,420")))
    folder.mkdir(exist_ok=True)
    paint_by_hand(folder, slide, corner, place)
    with tempfile.TemporaryDirectory() as name:
        paint_after(folder, Path(name), slide, corner)
        sample = samples.SAMPLES / "reference.tif"
        side_by_side(folder, slide or sample, Path(name) / "synthetic.ome.zarr", 0.5)


if __name__ == "__main__":
    main()
