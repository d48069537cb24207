"""The widget "Brush": tissue is picked up as ink and painted on a canvas, and what changed is painted anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Layer
from numpy.typing import NDArray
from qtpy.QtWidgets import QFileDialog, QListWidgetItem

from wsi_brush.canvas import Stroke
from wsi_brush.errors import WsiBrushError
from wsi_brush.ink import Ink, load_palette, save_palette

from . import easel as work
from .easel import Easel, Tools, Wanted
from .forms import Form, thumbnail_icon
from .layers import MICROMETRES, marked, say
from .under import place_on, slide_at, slide_of
from .worker import Job, Working, start

if TYPE_CHECKING:
    import napari

NAME = "synthetic: canvas"
WAITING = "strokes to be painted"
_STEP = 0.1  # of the brush's size: how far apart the points of a stroke are


class Painter(Working):
    """One canvas, a palette, and the brush's size, strength and softness.

    One job runs at a time. Strokes may be drawn while one paints; they come next.
    """

    def __init__(self, viewer: napari.viewer.Viewer) -> None:
        super().__init__()
        self.viewer = viewer
        self.easel: Easel | None = None
        self.layer: Image | None = None
        self.tools: Tools | None = None
        self.inks: list[Ink] = []
        self.form = Form(self)
        form = self.form
        form.new.clicked.connect(self.new_canvas)
        form.open_canvas.clicked.connect(lambda: self._ask_open("Open a canvas", self.load_canvas))
        form.save_canvas.clicked.connect(lambda: self._ask_save("canvas.zarr", self.save_canvas))
        form.open_palette.clicked.connect(lambda: self._ask_open("Open a palette", self.load_inks))
        form.save_palette.clicked.connect(lambda: self._ask_save("inks.palette", self.save_inks))
        form.save_slide.clicked.connect(lambda: self._ask_save("synthetic.ome.zarr", self.save_slide))
        form.undo.clicked.connect(self.undo)
        form.redo.clicked.connect(self.redo)
        form.repaint.clicked.connect(lambda: self.paint_changed())
        form.everything.clicked.connect(lambda: self.paint_changed(everything=True))
        form.cancel.clicked.connect(self.cancel)
        for button in (form.pick, form.draw, form.erase):
            button.toggled.connect(self._tool_changed)
        form.size.valueChanged.connect(self._tool_changed)
        form.palette.currentRowChanged.connect(lambda row: self._tool_changed())
        viewer.mouse_drag_callbacks.append(self._clicked)
        viewer.layers.events.removed.connect(self._layer_removed)

    # -- jobs ----------------------------------------------------------------------------------------------

    def _send(
        self, what: str, does: Callable[[Job], Any], returned: Callable[[Any], None],
        shown: Callable[[Any], None] | None = None, ended: Callable[[], None] | None = None,
    ) -> bool:  # fmt: skip
        """Begin a job, unless another is under way; `ended`: it was stopped or refused."""
        if self.job is not None:
            self.say("busy; wait, or cancel")
            return False

        def finish(line: str, *, refused: bool = False) -> None:
            self.job = None
            self.form.busy(False)
            self.say(line)
            if refused:
                say(line)
            if ended is not None:
                ended()

        def done(answer: Any) -> None:
            self.job = None
            self.form.busy(False)
            self.say("")
            returned(answer)

        def guard(slot: Callable[..., None]) -> Callable[..., None]:
            return lambda *words: None if self._gone else slot(*words)

        self.form.busy(True)
        self.say(f"{what} ...")
        job = start(
            f"wsi-brush: {what}", does, told=guard(self.form.progress), returned=guard(done),
            shown=guard(shown or (lambda seen: None)), stopped=guard(lambda: finish("stopped")),
            refused=guard(lambda line: finish(line, refused=True)),
            errored=guard(lambda error: finish(f"failed: {error}")),
        )  # fmt: skip
        self.job = job

        def over() -> None:
            if self.job is job:  # cancelled when its answer was on the way
                finish("stopped")

        job.finished.connect(guard(over))
        return True

    def cancel(self) -> None:
        """End what is being done; the pixels are as they were before it."""
        if self.job is not None:
            self.job.quit()
            self.say("stopping ...")

    def say(self, line: str) -> None:
        """A line under the controls."""
        self.form.said.setText(line)

    def _with_tools(self, does: Callable[[Job, Tools], Any]) -> Callable[[Job], Any]:
        """A job that needs brush and encoder, which are loaded once; its answer comes with them."""
        have, name = self.tools, self.form.brush.text().strip() or "bundled"

        def run(job: Job) -> Any:
            tools = have if have is not None and have.name == name else work.load_tools(name)
            job.tell("at work", 0, 0)
            return tools, does(job, tools)

        return run

    # -- the canvas ----------------------------------------------------------------------------------------

    def new_canvas(self) -> None:
        """An empty canvas, or one of the embeddings of the chosen slide around the middle of what is seen."""
        size, layer = self.form.pixels.value(), self._slide_chosen()
        if layer is None:
            self._send(
                "making a canvas", self._with_tools(lambda job, tools: work.empty_canvas(tools, size)), self._put_up
            )
            return
        path, middle = slide_of(layer), place_on(layer, self.viewer.scene.camera.center[-2:])
        assert path is not None
        self._send(
            f"embedding {size} x {size} pixels of {layer.name}",
            self._with_tools(lambda job, tools: work.canvas_of(tools, path, middle, size)), self._put_up,
        )  # fmt: skip

    def load_canvas(self, path: Path) -> None:
        """A canvas that was saved."""
        self._send("opening", self._with_tools(lambda job, tools: work.load_canvas(tools, path)), self._put_up)

    def save_canvas(self, path: Path) -> None:
        """Save the canvas with its strokes."""
        if self.easel is None:
            self.say("there is no canvas yet")
            return
        canvas = self.easel.canvas.copy()
        self._send("saving", lambda job: canvas.save(path), lambda _: self.say(f"{path.name} is saved"))

    def _put_up(self, answer: Any) -> None:
        self.tools, canvas = answer
        if self.layer is not None and self.layer in self.viewer.layers:
            self.viewer.layers.remove(self.layer)
        self.easel = Easel(canvas, self.tools)
        grid = canvas.grid
        corner = [(edge + 0.5) * grid.mpp for edge in (grid.top, grid.left)]
        self.layer = self.viewer.add_image(
            self.easel.pixels.copy(), name=NAME, rgb=True, scale=(grid.mpp, grid.mpp), translate=corner,
            units=MICROMETRES, metadata=marked(),
        )  # fmt: skip
        self.layer.mouse_drag_callbacks.append(self._drag)
        for key, action in (("Control-Z", self.undo), ("Control-Shift-Z", self.redo)):
            self.layer.bind_key(key, lambda _, action=action: action())
        self.layer.bind_key("[", lambda _: self.form.size.setValue(self.form.size.value() / 1.25))
        self.layer.bind_key("]", lambda _: self.form.size.setValue(self.form.size.value() * 1.25))
        self._tool_changed()
        self._strokes_changed()
        if self.easel.painted is None:
            self.paint_changed()

    def _layer_removed(self, event: Any) -> None:
        if not self._gone and event.value is self.layer:
            self.cancel()
            self.layer = self.easel = None

    # -- inks ----------------------------------------------------------------------------------------------

    def _clicked(self, viewer: Any, event: Any) -> None:
        """A click on a slide while inks are picked."""
        if self._gone or not self.form.pick.isChecked() or event.button != 1:
            return
        layer = slide_at(self.viewer.layers, event.position)
        if layer is None:
            self.say("no slide there; click on an open one")
            return
        path, place = slide_of(layer), place_on(layer, event.position)
        assert path is not None
        self._send("picking", self._with_tools(lambda job, tools: work.pick(tools, path, place)), self._picked)

    def _picked(self, answer: Any) -> None:
        self.tools, ink = answer
        self.add_inks([ink])

    def add_inks(self, inks: list[Ink]) -> None:
        """Add to the palette; the last is the one that is painted with."""
        for ink in inks:
            self.inks.append(ink)
            self.form.palette.addItem(QListWidgetItem(thumbnail_icon(ink.thumbnail), ink.name))
        self.form.palette.setCurrentRow(len(self.inks) - 1)

    def load_inks(self, path: Path) -> None:
        """The inks of a palette that was saved, beside those that are there."""
        self._send("opening", lambda job: load_palette(path), self.add_inks)

    def save_inks(self, path: Path) -> None:
        """Save the palette."""
        inks = list(self.inks)
        self._send("saving", lambda job: save_palette(inks, path), lambda _: self.say(f"{path.name} is saved"))

    # -- strokes -------------------------------------------------------------------------------------------

    def _drag(self, layer: Any, event: Any) -> Iterator[None]:
        """A stroke, from press to release."""
        form, easel = self.form, self.easel
        drawing, erasing = form.draw.isChecked(), form.erase.isChecked()
        if self._gone or easel is None or event.button != 1 or not (drawing or erasing):
            return
        ink = None if erasing else self.ink
        if drawing and ink is None:
            self.say("there is no ink; pick one first")
            return
        size = form.size.value()
        path = [self._micrometres(layer, event.position)]
        self._show_waiting(path, ink, size)
        yield
        while event.type == "mouse_move":
            place = self._micrometres(layer, event.position)
            if np.hypot(*np.subtract(place, path[-1])) >= _STEP * size:
                path.append(place)
                self._show_waiting(path[-1:], ink, size)
            yield
        self.add_stroke(ink, path, size)

    def add_stroke(self, ink: Ink | None, path: list[tuple[float, float]], size: float) -> None:
        """Draw a stroke (None: the eraser) with the strength and softness that are set; what changed is repainted."""
        if self.easel is None:
            return
        form = self.form
        try:
            self.easel.canvas.add(
                Stroke(ink, tuple(path), size, form.strength.value() / 100, form.softness.value() / 100)
            )
        except WsiBrushError as error:
            self._hide_waiting()
            self.say(str(error))
            say(str(error))
            return
        self._strokes_changed()
        if form.automatic.isChecked():
            self.paint_changed()

    @property
    def ink(self) -> Ink | None:
        """The one that is chosen in the palette."""
        row = self.form.palette.currentRow()
        return self.inks[row] if 0 <= row < len(self.inks) else None

    def undo(self) -> None:
        """Take back the last stroke."""
        if self.easel is not None and self.easel.canvas.undo():
            self._moved()

    def redo(self) -> None:
        """Bring back the stroke that was taken back last."""
        if self.easel is not None and self.easel.canvas.redo():
            self._moved()

    def _moved(self) -> None:
        assert self.easel is not None
        self._strokes_changed()
        if self.job is None and (part := self.easel.remembered()) is not None:
            self._show(part, self.easel.pixels[self.easel.here(part)])
        elif self.form.automatic.isChecked():
            self.paint_changed()
        if self.easel.wanted() is None:
            self._hide_waiting()

    def _strokes_changed(self) -> None:
        canvas = self.easel.canvas if self.easel is not None else None
        self.form.undo.setEnabled(canvas is not None and bool(canvas.strokes))
        self.form.redo.setEnabled(canvas is not None and bool(canvas.undone))

    # -- painting ------------------------------------------------------------------------------------------

    def paint_changed(self, *, everything: bool = False) -> None:
        """Paint what changed, or all of it; while something is under way it comes next."""
        easel = self.easel
        if easel is None or self.job is not None:
            return
        wanted = easel.wanted(everything=everything)
        self._hide_waiting()
        if wanted is None:
            return
        seed, steps = self.form.seed.value(), self.form.steps.value()

        def paint(job: Job) -> Any:
            def show(*seen: Any) -> None:
                job.show(seen)

            return easel, wanted, *easel.paint(wanted, seed=seed, steps=steps, tell=job.tell, show=show)

        self._send("painting", paint, self._painted, lambda seen: self._show(*seen), self._restore)

    def _painted(self, answer: tuple[Easel, Wanted, Any, NDArray[np.uint8]]) -> None:
        easel, wanted, part, pixels = answer
        if easel is not self.easel:
            return
        easel.take(wanted, part, pixels)
        self._show(part, pixels)
        if self.form.automatic.isChecked():
            self.paint_changed()  # strokes that were drawn meanwhile

    def _show(self, part: Any, pixels: NDArray[np.uint8]) -> None:
        """Pixels in their place on the layer."""
        if self.easel is not None and self.layer is not None:
            self.layer.data[self.easel.here(part)] = pixels
            self.layer.refresh()

    def _restore(self) -> None:
        """What was half painted goes."""
        if self.easel is not None and self.layer is not None:
            self.layer.data[...] = self.easel.pixels
            self.layer.refresh()

    def save_slide(self, path: Path) -> None:
        """Save what is painted as a pyramid, and open it."""
        easel = self.easel
        if easel is None or easel.painted is None:
            self.say("nothing is painted yet")
            return
        if easel.wanted() is not None:
            self.say("there are strokes that are not painted; repaint first")
            return
        canvas, pixels = easel.canvas.copy(), easel.pixels.copy()
        seed, steps = self.form.seed.value(), self.form.steps.value()
        self._send(
            "saving",
            lambda job: work.save(easel.tools, canvas, pixels, path, seed=seed, steps=steps),
            lambda _: self.say(f"{path.name} is saved"),
        )

    # -- the window ----------------------------------------------------------------------------------------

    def _tool_changed(self, *_: object) -> None:
        """The cursor shows the brush's size while there is something to paint with, and dragging does not pan."""
        if self.layer is None or self._gone:
            return
        painting = self.form.draw.isChecked() or self.form.erase.isChecked()
        self.layer.mouse_pan = not painting
        self.layer.cursor_size = self.form.size.value()
        self.layer.cursor = "circle" if painting else "standard"
        if painting:
            self.viewer.layers.selection.active = self.layer

    def _show_waiting(self, path: list[tuple[float, float]], ink: Ink | None, size: float) -> None:
        """Where the stroke goes, until it is painted."""
        layer = self._waiting()
        colour = np.ones(3) if ink is None else ink.thumbnail.mean((0, 1)) / 255
        if layer is None:
            layer = self.viewer.add_points(
                ndim=2, name=WAITING, units=MICROMETRES, border_width=0, opacity=0.6, size=size
            )
            self.viewer.layers.selection.active = self.layer
        layer.current_size = size
        layer.current_face_color = [*colour, 1.0]
        layer.add(np.asarray(path))
        layer.selected_data = set()

    def _waiting(self) -> Any:
        return next((layer for layer in self.viewer.layers if layer.name == WAITING), None)

    def _hide_waiting(self) -> None:
        layer = self._waiting()
        if layer is not None:
            self.viewer.layers.remove(layer)
            if self.layer is not None and self.layer in self.viewer.layers:
                self.viewer.layers.selection.active = self.layer

    def _micrometres(self, layer: Any, position: Any) -> tuple[float, float]:
        """A place on the canvas's plane; the middle of a pixel is a whole number of the layer's data."""
        assert self.easel is not None
        grid = self.easel.canvas.grid
        down, across = layer.world_to_data(position)[-2:]
        return (grid.top + float(down) + 0.5) * grid.mpp, (grid.left + float(across) + 0.5) * grid.mpp

    def _slide_chosen(self) -> Layer | None:
        """Of the slides that are open the one that is selected, where the form says so."""
        if not self.form.of_slide.isChecked():
            return None
        slides = [layer for layer in self.viewer.layers if slide_of(layer) is not None]
        active = self.viewer.layers.selection.active
        if not slides:
            self.say("there is no slide open; an empty canvas is made")
        return active if active in slides else (slides[-1] if slides else None)

    def _ask_open(self, title: str, then: Callable[[Path], None]) -> None:
        if folder := QFileDialog.getExistingDirectory(self, title):
            then(Path(folder))

    def _ask_save(self, name: str, then: Callable[[Path], None]) -> None:
        path, _ = QFileDialog.getSaveFileName(self, "Save", name)
        if path:
            then(Path(path))
