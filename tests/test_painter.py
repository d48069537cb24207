"""The widget "Brush" in a real window, driven by its own controls and by the mouse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zarr
from conftest import make_brush

from wsi_brush.brush import save_brush
from wsi_brush.canvas import Canvas, Stroke
from wsi_brush.encoder import load_encoder
from wsi_brush.grid import Grid
from wsi_brush.ink import load_palette, pick_ink
from wsi_brush.slide import open_slide

pytest.importorskip("napari", reason="napari is not installed")
pytestmark = [pytest.mark.gui, pytest.mark.skipif(not os.environ.get("DISPLAY"), reason="no DISPLAY")]

HEAD = """
import sys, time
from pathlib import Path
import numpy as np
import napari
from napari.utils.notifications import notification_manager
from PIL import Image
from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QFileDialog
from napari_wsi_brush.painter import NAME, WAITING, Painter
from wsi_brush.slide import open_slide

folder = Path(sys.argv[1])
viewer = napari.Viewer(show=True)
viewer.window.resize(1500, 950)
brush = Painter(viewer)
viewer.window.add_dock_widget(brush, name="Brush", area="right")
form = brush.form
form.brush.setText(str(folder / "small.brush"))
form.steps.setValue(5)

def wait(seconds):
    "Not QTest's: vispy puts a loop in its place that never sleeps."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.01)

def until(done, seconds=200):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, (form.said.text(), [n.message for n in notification_manager.records])
        wait(0.02)

def idle():
    return brush.job is None

def press(button):
    assert button.isEnabled(), button.text()
    QTest.mouseClick(button, Qt.MouseButton.LeftButton)

def at(down, across):
    "A point of the canvas widget, of a place in the world."
    native = viewer.window._qt_viewer.canvas.native
    centre, zoom = viewer.scene.camera.center[-2:], viewer.scene.camera.zoom
    return native, QPoint(
        round((across - centre[1]) * zoom + native.width() / 2), round((down - centre[0]) * zoom + native.height() / 2)
    )

def drag(*places):
    native, point = at(*places[0])
    QTest.mouseMove(native, point)
    QTest.mousePress(native, Qt.MouseButton.LeftButton, pos=point)
    for place in places[1:]:
        point = at(*place)[1]
        QTest.mouseMove(native, point)
        wait(0.03)
    QTest.mouseRelease(native, Qt.MouseButton.LeftButton, pos=point)
    wait(0.03)

def new_canvas():
    form.pixels.setValue(512)
    press(form.new)
    until(lambda: idle() and NAME in viewer.layers)
    viewer.scene.camera.center, viewer.scene.camera.zoom = (128, 128), 2.5
    wait(0.05)
    return viewer.layers[NAME]

def errors():
    return [one.message for one in notification_manager.records if str(one.severity).lower().endswith("error")]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tissue_slide: Path) -> Path:
    """A small brush for the bundled encoder, one for another, a slide, a canvas, and a damaged one."""
    found, encoder = tmp_path_factory.mktemp("easel"), load_encoder("bundled")
    small: Any = make_brush(dim=encoder.dim, tile=encoder.tile, encoder="bundled", fingerprint=encoder.fingerprint)
    save_brush(small, found / "small.brush")
    canvas = Canvas.empty(Grid(0.5, 0, 0, 384, 384), encoder=encoder)
    ink = pick_ink(open_slide(tissue_slide), (260.0, 250.0), encoder=encoder)
    canvas.add(Stroke(ink, ((96, 96),), 150))
    canvas.save(found / "good.zarr")
    shutil.copytree(found / "good.zarr", found / "damaged.zarr")
    (found / "damaged.zarr" / "base" / "0.5" / "c" / "0" / "0" / "0").write_bytes(b"rubbish")
    other = Canvas.empty(Grid(0.5, 0, 0, 384, 384), encoder=encoder)
    other.encoder, other.encoder_fingerprint = "uni", "1234"
    other.save(found / "other.zarr")
    save_brush(replace(small, about=small.about | {"fingerprint": "1234"}), found / "other.brush")
    shutil.copy(tissue_slide, found / "slide.tif")
    return found


def ran(script: str, folder: Path, *, seconds: float = 500) -> str:
    """What a script prints in an interpreter of its own; a traceback on the way counts as an error."""
    command = [sys.executable, "-c", textwrap.dedent(HEAD) + textwrap.dedent(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_ink_is_picked_and_painted_and_saved(folder: Path) -> None:
    script = """
        slide = open_slide(folder / "slide.tif")
        about = {"path": str(folder / "slide.tif")}
        real = viewer.add_image(
            slide.read(slide.grid), rgb=True, scale=(0.5, 0.5), units=("um", "um"), name="slide", metadata=about
        )
        viewer.scene.camera.center, viewer.scene.camera.zoom = (256, 256), 1.2
        wait(0.05)
        press(form.pick)
        drag((8, 8))
        until(idle)
        assert "no tissue" in form.said.text() and not brush.inks, form.said.text()
        drag((260, 250))
        until(idle)
        (ink,) = brush.inks
        assert form.palette.count() == 1 and np.hypot(*np.subtract(ink.place, (260, 250))) < 2, ink.place
        real.visible = False

        layer = new_canvas()
        assert (layer.data == 255).all() and layer.metadata["synthetic"] is True
        press(form.draw)
        assert not form.pick.isChecked() and not layer.mouse_pan
        form.size.setValue(100)
        assert (viewer.cursor.style, viewer.cursor.size) == ("circle", 100)
        form.softness.setValue(20)
        seen = []
        layer.events.set_data.connect(lambda event: seen.append(np.asarray(layer.data).copy()))
        drag((60, 50), (60, 70), (60, 90))
        assert len(brush.easel.canvas.strokes) == 1
        assert WAITING in viewer.layers or not idle() or (layer.data != 255).any()
        until(lambda: idle() and (layer.data != 255).any())
        assert len(seen) > 3
        stroke = brush.easel.canvas.strokes[0]
        assert np.abs(np.subtract(stroke.path[0], (60, 50))).max() < 1 and len(stroke.path) >= 2, stroke.path
        assert (stroke.size, stroke.softness, stroke.ink) == (100, 0.2, ink)
        painted = np.asarray(layer.data).copy()
        rows, columns = np.nonzero((painted != 255).any(-1))
        assert rows.min() <= 80 and (painted[100:140, 100:180] != 255).mean() > 0.9
        assert rows.max() < 320 + 96  # beyond the margin it is as it was
        np.testing.assert_array_equal(painted, brush.easel.pixels)

        press(form.undo)
        assert (layer.data == 255).all() and idle()
        native, point = at(60, 60)
        QTest.mouseMove(native, point)
        viewer.layers.selection.active = layer
        native.setFocus()
        QTest.keyClick(native, Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier | Qt.KeyboardModifier.ShiftModifier)
        until(lambda: (layer.data == painted).all())
        QTest.keyClick(native, Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier)
        until(lambda: (layer.data == 255).all())
        press(form.redo)
        np.testing.assert_array_equal(layer.data, painted)

        press(form.erase)
        drag((60, 90), (75, 95))
        until(idle)
        assert brush.easel.canvas.strokes[-1].ink is None and form.undo.isEnabled()
        for button, name in (
            (form.save_slide, "new.ome.zarr"), (form.save_canvas, "new.zarr"), (form.save_palette, "new.palette")
        ):
            QFileDialog.getSaveFileName = lambda *_, name=name: (str(folder / name), "")
            press(button)
            until(idle)
            assert "is saved" in form.said.text(), form.said.text()
        new = open_slide(folder / "new.ome.zarr")
        assert new.synthetic
        np.testing.assert_array_equal(new.read(new.grid), layer.data)

        QFileDialog.getExistingDirectory = lambda *_: str(folder / "new.palette")
        press(form.open_palette)
        until(lambda: form.palette.count() == 2)
        QFileDialog.getExistingDirectory = lambda *_: str(folder / "new.zarr")
        press(form.open_canvas)
        until(lambda: idle() and viewer.layers[NAME] is not layer)
        again = brush.easel.canvas
        assert [one.path for one in again.strokes] == [stroke.path, again.strokes[1].path]
        press(form.repaint)
        until(lambda: idle() and (viewer.layers[NAME].data != 255).any())
        Image.fromarray(viewer.screenshot(canvas_only=False, flash=False)[..., :3]).save(folder / "window.png")
        assert len(errors()) == 1 and "no tissue" in errors()[0], errors()
        viewer.close()
        print("painted")
    """
    assert ran(script, folder).endswith("painted\n")
    about: Any = zarr.open_group(folder / "new.ome.zarr", mode="r").attrs.asdict()["wsi_brush"]
    assert (about["synthetic"], about["repainted"], about["canvas"]["strokes"]) == (True, True, 2)
    assert Canvas.load(folder / "new.zarr").fingerprint == about["canvas"]["fingerprint"]
    assert len(load_palette(folder / "new.palette")) == 1


def test_what_goes_wrong_is_one_line_and_nothing_is_stuck(folder: Path) -> None:
    script = """
        def opened(name):
            before = len(errors())
            QFileDialog.getExistingDirectory = lambda *_: str(folder / name)
            press(form.open_canvas)
            until(lambda: idle())
            return errors()[before:]

        wrong = {"damaged.zarr": "damaged", "other.zarr": "has those of uni", "small.brush": "is no canvas"}
        for name, line in wrong.items():
            (said,) = opened(name)
            assert line in said and "\\n" not in said, said
            assert brush.easel is None and NAME not in viewer.layers
        form.brush.setText(str(folder / "other.brush"))
        (said,) = opened("good.zarr")
        assert "another encoder" in said, said
        form.brush.setText(str(folder / "nowhere"))
        (said,) = opened("good.zarr")
        assert "no brush here" in said, said
        form.brush.setText(str(folder / "small.brush"))
        assert opened("good.zarr") == []
        layer = viewer.layers[NAME]
        press(form.everything)
        until(lambda: form.bar.value() > 10)
        press(form.cancel)
        until(idle)
        assert form.said.text() == "stopped" and (layer.data == 255).all()
        press(form.repaint)
        until(lambda: idle() and (layer.data != 255).any())
        viewer.layers.remove(layer)
        assert brush.easel is None
        assert opened("good.zarr") == []
        press(form.repaint)
        until(lambda: form.bar.value() > 10)
        start = time.monotonic()
        print("closing", flush=True)
        viewer.close()
        QApplication.instance().closeAllWindows()
        QApplication.processEvents()
        from superqt.utils import WorkerBase
        WorkerBase.await_workers(20000)
        assert time.monotonic() - start < 20
        print("left")
    """
    out = ran(script, folder)
    assert out.endswith("left\n"), out
    assert "closing" in out
