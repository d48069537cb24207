"""The widget in a real window: driven by its own controls, judged by layers and by what is on the screen.

A window takes seconds, so each answers many questions, in an interpreter of its own: a crash of the graphics costs one
test, not the run. With WSI_BRUSH_SCREENSHOTS=FOLDER what was looked at is kept there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import make_maps, write_pyramid

from wsi_brush.grid import Grid
from wsi_brush.pyramid import SHARD, Pyramid
from wsi_brush.slide import open_slide
from wsi_brush.store import write_store
from wsi_brush.tissue import Tissue

pytest.importorskip("napari", reason="napari is not installed")
layers = pytest.importorskip("napari_wsi_brush.layers", reason="the plugin is not installed")
pytestmark = [
    pytest.mark.gui,
    pytest.mark.skipif(not os.environ.get("DISPLAY"), reason="no DISPLAY to open a window on"),
]

# What every script begins with: a window of a known size, its widget, and what is seen in it.
HEAD = """
import os, sys, time
from pathlib import Path
import numpy as np
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication
from wsi_brush.view import open_viewer
PINK, BLUE = (230, 150, 190), (60, 40, 160)
paths = [Path(word) for word in sys.argv[1:]]

def window(paths):
    viewer = open_viewer(paths)
    viewer.window.resize(1400, 900)
    settle()
    viewer.fit_to_view(layers=[viewer.layers[-1]])
    return viewer

def settle(seconds=0.0, until=lambda: False):
    end = time.monotonic() + seconds
    for _ in range(5):
        QApplication.processEvents()
    while time.monotonic() < end and not until():
        QApplication.processEvents()
        time.sleep(0.01)

def seen(name=None):
    settle()
    shot = viewer.screenshot(canvas_only=True, flash=False)[..., :3]
    folder = os.environ.get("WSI_BRUSH_SCREENSHOTS")
    if name and folder:
        from PIL import Image
        whole = viewer.screenshot(canvas_only=False, flash=False)[..., :3]
        Image.fromarray(whole).save(Path(folder) / f"{name}.png")
    return shot.astype(int)

def share(shot, colour, tolerance=12):
    return (abs(shot - colour) <= tolerance).all(-1).mean()

def halves(shot):
    middle = shot.shape[1] // 2
    return shot[:, : middle - 5], shot[:, middle + 5 :]

def lines(severity):
    return [str(one.message) for one in notification_manager.records if str(one.severity) == severity]
"""


def ran(script: str, *arguments: Path, seconds: int = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-c", HEAD + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    return done


def plain(path: Path, grid: Grid, colour: tuple[int, int, int]) -> Path:
    """A painting of one colour."""
    pyramid = Pyramid(path, grid, about={"seed": 7, "guidance": 2.0, "steps": 20})
    for part in grid.tiles(SHARD):
        pyramid.write(part, np.full((*part.shape, 3), colour, np.uint8))
    pyramid.finish()
    return path


def test_two_pictures_side_by_side_over_each_other_and_in_turn(tmp_path: Path) -> None:
    pink = [np.full((side, side, 3), (230, 150, 190), np.uint8) for side in (1024, 512, 256)]
    real = write_pyramid(tmp_path / "real.tif", pink)
    painted = plain(tmp_path / "new.ome.zarr", Grid(0.5, 0, 0, 1024, 1024), (60, 40, 160))
    script = """
        viewer = window(paths)
        (widget,) = viewer.window.dock_widgets.values()
        layers = viewer.layers
        assert [layer.name for layer in layers] == ["real.tif", "synthetic: new"], layers
        assert (widget.real.currentText(), widget.synthetic.currentText()) == ("real.tif", "synthetic: new")
        text = viewer.canvas.overlays.text
        assert text.visible and text.text == "SYNTHETIC, not for diagnosis\\nseed 7, guidance 2, steps 20", text.text
        assert viewer.canvas.overlays.scale_bar.visible and str(layers[0].units[0]) == "micrometer"

        # two cells, one camera
        left, right = halves(seen("side by side"))
        assert share(left, PINK) > 0.3 and share(left, BLUE) == 0
        assert share(right, BLUE) > 0.3 and share(right, PINK) == 0
        viewer.scene.camera.center = (0.0, 256.0)
        left, right = halves(seen())
        for half, colour in ((left, PINK), (right, BLUE)):
            rows = np.nonzero((abs(half - colour) <= 12).all(-1).any(1))[0]
            assert abs(rows.min() - half.shape[0] / 2) < 8, rows.min()
        viewer.fit_to_view(layers=[layers[1]])

        # the cursor of the other cell
        canvas = viewer.window._qt_viewer.canvas.native
        QTest.mouseMove(canvas, QPoint(canvas.width() // 4, canvas.height() // 3))
        settle(2, lambda: widget.cursor_mark.isVisible())
        assert widget.cursor_mark.isVisible()
        place = widget.cursor_mark.geometry().center()
        assert abs(place.x() - (3 * canvas.width() // 4 + 2)) <= 4 and abs(place.y() - canvas.height() // 3) <= 2, place

        # swapped
        widget.swap_button.click()
        left, right = halves(seen("swapped"))
        assert share(left, BLUE) > 0.3 and share(right, PINK) > 0.3 and share(right, BLUE) == 0
        widget.swap_button.click()

        # a line that is dragged
        widget.buttons["swipe"].click()
        assert not viewer.canvas.grid.enabled and widget.line.isVisible() and not widget.cursor_mark.isVisible()
        left, right = halves(seen("swipe"))
        assert share(left, PINK) > 0.15 and share(left, BLUE) == 0
        assert share(right, BLUE) > 0.15 and share(right, PINK) == 0
        grip = QPoint(widget.line.width() // 2, 100)
        QTest.mousePress(widget.line, Qt.MouseButton.LeftButton, pos=grip)
        QTest.mouseMove(widget.line, grip - QPoint(canvas.width() // 8, 0))
        QTest.mouseRelease(widget.line, Qt.MouseButton.LeftButton, pos=grip)
        assert abs(widget.line.share - 0.375) < 0.02, widget.line.share
        shot = seen()
        edge = np.nonzero((abs(shot - BLUE) <= 12).all(-1).any(0))[0].min() / shot.shape[1]
        assert abs(edge - 0.375) < 0.02, edge
        viewer.window.resize(1250, 900)
        shot = seen()
        edge = np.nonzero((abs(shot - BLUE) <= 12).all(-1).any(0))[0].min() / shot.shape[1]
        assert abs(edge - 0.375) < 0.02, edge

        # in turn: by button, by key, by itself; the cut is gone
        widget.buttons["flicker"].click()
        assert not widget.line.isVisible()
        shot = seen("flicker")
        assert share(shot, BLUE) > 0.15 and share(shot, PINK) == 0 and text.text.startswith("shown: synthetic: new")
        widget.turn_button.click()
        shot = seen()
        assert share(shot, PINK) > 0.15 and share(shot, BLUE) == 0 and text.text.startswith("shown: real.tif")
        QTest.keyClick(canvas, Qt.Key.Key_F)
        assert share(seen(), BLUE) > 0.15
        widget.interval.setValue(100)
        widget.by_itself.click()
        turned = []
        layers[1].events.opacity.connect(lambda: turned.append(layers[1].opacity))
        settle(5, lambda: len(turned) >= 3)
        assert turned[:3] == [0.0, 1.0, 0.0], turned
        widget.by_itself.click()

        # as it was
        widget.buttons["side by side"].click()
        assert [layer.opacity for layer in layers] == [1.0, 1.0] and viewer.canvas.grid.enabled
        dock = widget.parent()
        widget.close()
        assert not viewer.canvas.grid.enabled and not viewer.canvas.overlays.text.visible
        assert not lines("error") and not lines("warning"), (lines("error"), lines("warning"))
        viewer.close()
        print("done")
    """
    done = ran(script, real, painted)
    assert "Traceback" not in done.stderr


def test_panning_reads_windows_and_never_a_level(tmp_path: Path) -> None:
    """At 4096 pixels a side the chunks that are read are counted, with their sizes, while the camera moves."""
    painted = plain(tmp_path / "new.ome.zarr", Grid(0.5, 0, 0, 4096, 4096), (60, 40, 160))
    other = shutil.copytree(painted, tmp_path / "old.ome.zarr", copy_function=os.link)
    script = """
        from napari_wsi_brush.layers import ZarrLevel
        asked, plain_read = [], ZarrLevel.read
        def counted(self, rows, columns):
            asked.append((self._array.path, (rows.stop - rows.start) * (columns.stop - columns.start)))
            return plain_read(self, rows, columns)
        ZarrLevel.read = counted
        viewer = window(paths)
        assert {path for path, _ in asked} <= {"2", "3", "4"}, asked  # all of it on the screen needs no fine level
        viewer.scene.camera.zoom = 2.0  # a pixel of level 0 a pixel of the screen
        viewer.scene.camera.center = (500.0, 500.0)
        seen()
        asked.clear()
        for step in range(60):
            viewer.scene.camera.center = (500.0 + 10 * step, 500.0 + 10 * step)
            settle()
        assert share(seen(), BLUE) > 0.8
        fine = [size for path, size in asked if path == "0"]
        whole = 4096 * 4096
        assert asked and len(fine) == len(asked), asked  # not even the thumbnail is made anew
        assert 2 <= len(fine) <= 24, len(fine)  # of 120: chunks that are there already are not asked for again
        assert max(fine) <= 2048 * 2048 and max(fine) < whole / 3, fine
        assert not lines("error"), lines("error")
        viewer.close()
        print("done")
    """
    ran(script, painted, Path(other))


def test_tiles_are_compared_and_the_worst_is_found(tissue_slide: Path, tmp_path: Path) -> None:
    """By the bundled brush and its encoder; then cancelled; then the window is closed in the middle."""
    grid = Grid(0.5, 256, 256, 512, 512)
    pixels = open_slide(tissue_slide).read(grid)
    pixels[128:256, 256:384] = 255 - pixels[128:256, 256:384]
    pyramid = Pyramid(tmp_path / "new.ome.zarr", grid, about={"seed": 1})
    pyramid.write(grid, pixels)
    pyramid.finish()
    script = """
        viewer = window(paths)
        (widget,) = viewer.window.dock_widgets.values()
        def compare(pitch):
            widget.pitch.setCurrentIndex(widget.pitch.findText(pitch))
            widget.compare_button.click()
        def running():
            return widget.cancel_button.isEnabled()
        compare("0.5 µm/px")
        assert running() and not widget.compare_button.isEnabled()
        settle(200, lambda: not running())
        assert widget.legend.text().startswith("cosine of 16 tiles: mean "), widget.legend.text()
        names = [layer.name for layer in viewer.layers]
        maps = ["similarity, where the reference is", "similarity: cosine at 0.5 µm"]
        assert names == [paths[0].name, maps[0], "synthetic: new", maps[1]], names
        heat = viewer.layers[-1]
        assert heat.data.shape == (4, 4) and tuple(heat.scale) == (64.0, 64.0) and heat.colorbar.visible
        assert heat.contrast_limits[1] == 1.0 and heat.contrast_limits[0] <= heat.data.min()
        assert np.argmin(heat.data) == 1 * 4 + 2, heat.data
        viewer.layers[1].opacity = 0.9
        assert heat.opacity == 0.9  # one pair of layers
        seen("similarity")
        heat.opacity = 1.0  # of both: then the map alone is seen, and the same in both cells
        shot = seen()
        cell = (shot.shape[1] - 4) // 2
        left, right = shot[:, :cell], shot[:, -cell:]
        inside = right.sum(-1) > 100
        assert inside.mean() > 0.3
        assert (abs(left - right) <= 8).all(-1)[inside].mean() > 0.9
        heat.opacity = 0.5

        # the worst, and the next one
        widget.worst_button.click()
        center = viewer.scene.camera.center
        assert np.allclose(center[-2:], (128 + 1.5 * 64, 128 + 2.5 * 64), atol=0.5), center
        assert widget.place.text().startswith("1 of 16 from the worst: "), widget.place.text()
        widget.worst_button.click()
        assert widget.place.text().startswith("2 of 16") and viewer.scene.camera.center != center
        widget.buttons["swipe"].click()
        assert not viewer.layers["similarity, where the reference is"].visible
        widget.buttons["side by side"].click()

        # too coarse for so small a painting: one line, no traceback
        compare("8 µm/px")
        settle(60, lambda: not running())
        assert "smaller than a tile of 1024 µm" in widget.legend.text()
        assert [line for line in lines("error") if "smaller than a tile" in line] == lines("error")
        assert len(viewer.layers) == 4

        # cancelled
        compare("0.5 µm/px")
        widget.cancel_button.click()
        settle(60, lambda: not running())
        assert not running() and widget.legend.text() == "cancelled" and len(viewer.layers) == 4

        # closed in the middle
        compare("0.5 µm/px")
        assert running()
        viewer.close()
        from qtpy.QtCore import QThreadPool
        assert QThreadPool.globalInstance().waitForDone(60_000)
        settle(0.2)
        print("done")
    """
    done = ran(script, tissue_slide, tmp_path / "new.ome.zarr", seconds=400)
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_what_is_damaged_or_alone_is_said_in_a_line(tmp_path: Path) -> None:
    painted = plain(tmp_path / "new.ome.zarr", Grid(0.5, 0, 0, 3000, 3000), (60, 40, 160))
    (painted / "0" / "c" / "0" / "0" / "0").write_bytes(b"rubbish")
    maps = make_maps(Grid(0.5, 0, 0, 1024, 1024), dim=6, tile=128)
    about = {"slide": {"name": "lung.svs", "mpp": 0.5}}
    store = write_store(
        tmp_path / "lung.zarr", maps, tissue=Tissue.everywhere(Grid(8.0, 0, 0, 64, 64)), about=about
    ).path
    broken = Path(shutil.copytree(store, tmp_path / "broken.zarr"))
    next(broken.rglob("embeddings/0.5/c/0/0/0")).unlink()
    (tmp_path / "folder").mkdir()
    script = """
        painted, store, broken, folder = paths
        viewer = window([painted])
        assert not lines("error"), lines("error")
        viewer.scene.camera.zoom = 2.0
        for step in range(8):
            viewer.scene.camera.center = (300.0 + 40 * step, 300.0)
            shot = seen("damaged" if step == 0 else None)
        assert share(shot, (150, 150, 150)) + share(shot, (200, 200, 200)) > 0.5
        (line,) = lines("error")
        assert line.startswith("synthetic: new: damaged, rows "), line
        assert line.endswith("; grey stripes stand for what is lost"), line
        viewer.scene.camera.center = (1300.0, 1300.0)  # another shard, which is whole
        assert share(seen(), BLUE) > 0.5

        viewer.open(str(store), plugin="wsi-brush")
        assert [layer.visible for layer in list(viewer.layers)[1:]] == [True, False, False]
        (line,) = lines("info")
        assert line.startswith("lung.zarr: embeddings of lung.svs, which is not open; open it too"), line
        viewer.open(str(broken), plugin="wsi-brush")
        assert len(viewer.layers) == 4 and "missing or cut short" in lines("error")[-1], lines("error")
        try:
            viewer.open(str(folder), plugin="wsi-brush")
        except Exception as error:  # napari's own: no reader of ours wants it
            assert "\\n" not in str(error).strip(), error
        else:
            raise AssertionError("a plain folder was read")
        assert len(viewer.layers) == 4
        viewer.close()
        print("done")
    """
    done = ran(script, painted, store, broken, tmp_path / "folder")
    assert "Traceback" not in done.stderr
