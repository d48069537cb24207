"""The pictures of the plugin: a real window, driven by its own controls. Needs a display (xvfb-run), and some minutes.

python examples/4_napari.py FOLDER
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import napari
import numpy as np
from PIL import Image
from qtpy.QtWidgets import QApplication

REGION = np.array([(96.0, 96.0), (96.0, 352.0), (352.0, 352.0), (352.0, 96.0)]) - 0.25  # µm
FRAMES = 320  # pixels of a side of the animation


def until(what: Callable[[], object]) -> None:
    """The window goes on until something is so."""
    while not what():
        QApplication.instance().processEvents()
        time.sleep(0.01)


def shoot(viewer: Any, path: Path) -> None:
    """The whole window, in few colours: a page is to be read quickly."""
    until_calm = time.monotonic() + 1
    until(lambda: time.monotonic() > until_calm)
    shot = viewer.screenshot(canvas_only=False, flash=False)[..., :3]
    Image.fromarray(shot).save(path, quality=85)


def animated(frames: list[Any], path: Path) -> None:
    """A painting that sharpens, marked as what it is."""
    from PIL import ImageDraw

    pictures = []
    for pixels in frames:
        picture = Image.fromarray(pixels).resize((FRAMES, FRAMES), Image.Resampling.BICUBIC)
        ImageDraw.Draw(picture).text((6, FRAMES - 16), "SYNTHETIC, painted by wsi-brush", fill=(120, 0, 0))
        pictures.append(picture)
    times = [160] * (len(pictures) - 1) + [2500]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, quality=75)


def main(folder: Path, work: Path) -> None:
    """Synthesize in the middle and at the end, Seeds, and the animation."""
    folder.mkdir(exist_ok=True)
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1400, 860)
    (layer,) = viewer.open_sample("wsi-brush", "reference")
    _, choices = viewer.window.add_plugin_dock_widget("wsi-brush", "Synthesize")
    choices.draw.native.click()
    choices.region.value.add_rectangles(REGION)
    viewer.layers.selection.active = layer
    choices.file.value = work / "synthetic.ome.zarr"
    frames: list[Any] = []

    def watched() -> bool:
        for painted in choices.layers_named("synthetic: being painted"):
            if not frames or frames[-1] is not painted.data:
                frames.append(painted.data)
                if painted.scale[0] == 1 and not (folder / "napari_middle.jpg").exists():
                    shoot(viewer, folder / "napari_middle.jpg")
        return choices.job is None

    (folder / "napari_middle.jpg").unlink(missing_ok=True)
    until(lambda: "at row" in choices.said.value)
    choices.run.native.click()
    until(watched)
    shoot(viewer, folder / "napari_end.jpg")
    (painted,) = choices.layers_named("synthetic: synthetic")
    frames.append(np.asarray(painted.data[0] if painted.multiscale else painted.data))
    animated(frames, folder / "napari_sharpening.webp")
    _, seeds = viewer.window.add_plugin_dock_widget("wsi-brush", "Seeds", tabify=True)
    seeds.region.value = choices.region.value
    seeds.run.native.click()
    until(lambda: seeds.job is None)
    shoot(viewer, folder / "napari_seeds.jpg")
    viewer.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(sys.argv[1]), Path(name))
