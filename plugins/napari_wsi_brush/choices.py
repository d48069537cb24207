"""What the widgets that paint have in common: what is to be painted, what that takes, and a run that can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.types import FileDialogMode
from magicgui.widgets import (
    CheckBox,
    ComboBox,
    FileEdit,
    FloatSpinBox,
    Label,
    ProgressBar,
    PushButton,
    SpinBox,
)
from napari.layers import Layer, Shapes
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import QFormLayout

from wsi_brush.errors import UsageError, WsiBrushError

from .forms import row
from .jobs import Picture, Wish, plan, region_of
from .layers import say
from .under import slide_of
from .worker import Job, Working, start

if TYPE_CHECKING:
    import napari

DRAWN = "region to paint"
_PAUSE = 500  # ms without a change before what would be painted is worked out
_MOST = 2**31 - 1  # of a spin box


class Choices(Working):
    """Reference, region, brush and how to paint; a line that says what it takes; Run and Cancel.

    Subclasses put controls of their own between, give `begin`, and `target` where they write a file.
    """

    def __init__(self, viewer: napari.viewer.Viewer, own: list[Any], *, side: int) -> None:
        super().__init__()
        self.viewer = viewer
        self.origin, self.right = (0.0, 0.0), 0.0  # of the reference of a run: its corner and its right edge, in µm
        self.reference = ComboBox(label="reference", choices=self._references, tooltip="The slide that is followed.")
        self.region = ComboBox(
            label="region", choices=self._regions, nullable=True, tooltip="Where: the last shape of a layer of shapes."
        )
        self.draw = PushButton(text="Draw a region", tooltip="A layer to draw a rectangle on.")
        self.brush = FileEdit(
            label="brush",
            mode=FileDialogMode.EXISTING_DIRECTORY,
            value=Path("bundled"),
            tooltip="bundled, or the folder of a brush.",
        )
        self.side = SpinBox(
            label="size", value=side, min=32, max=_MOST, step=128, tooltip="Pixels of a side, where no region is drawn."
        )
        self.mpp = FloatSpinBox(
            label="µm per pixel", value=Wish.mpp, min=0.01, max=64, step=0.5, tooltip="Of the painting."
        )
        self.steps = SpinBox(label="steps", value=Wish.steps, min=5, max=1000, tooltip="More take longer.")
        self.guidance = FloatSpinBox(
            label="guidance",
            value=Wish.guidance,
            min=0,
            max=20,
            step=0.5,
            tooltip="How strongly the reference is followed.",
        )
        self.said = Label(value="")
        self.bar = ProgressBar(value=0, min=0, max=100)
        self.run = PushButton(text="Run")
        self.cancel = PushButton(text="Cancel", enabled=False)
        controls = [
            self.reference, self.region, self.side, self.mpp, self.brush, self.steps, self.guidance, *own,
        ]  # fmt: skip
        self._lay_out(controls)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(_PAUSE)
        self._timer.timeout.connect(self._plan)
        self._planning: Job | None = None
        self.draw.changed.connect(self._draw)
        self.run.changed.connect(lambda: self.begin())
        self.cancel.changed.connect(self.stop)
        for control in controls:
            control.changed.connect(self._changed)
        for event in (viewer.layers.events.inserted, viewer.layers.events.removed):
            event.connect(self._layers_changed)
        self._layers_changed()

    def _lay_out(self, controls: list[Any]) -> None:
        """The controls below one another, then the line, the bar and the buttons."""
        form = QFormLayout(self)
        form.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        for control in controls:
            form.addRow("" if isinstance(control, CheckBox) else control.label, control.native)
            if control is self.region:
                form.addRow("", self.draw.native)
        line = self.said.native
        line.setWordWrap(True)
        line.setAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignTop)
        line.setMinimumHeight(4 * line.fontMetrics().lineSpacing())
        form.addRow(line)
        form.addRow(self.bar.native)
        form.addRow(row(self.run.native, self.cancel.native))

    # -- what is chosen ------------------------------------------------------------------------------------

    def _references(self, _: object) -> list[tuple[str, Layer]]:
        return [(layer.name, layer) for layer in self.viewer.layers if slide_of(layer) is not None]

    def _regions(self, _: object) -> list[tuple[str, Layer]]:
        return [(layer.name, layer) for layer in self.viewer.layers if isinstance(layer, Shapes)]

    def _layers_changed(self, event: Any = None) -> None:
        if self._gone:
            return
        self.reference.reset_choices()
        self.region.reset_choices()
        if isinstance(layer := getattr(event, "value", None), Shapes):
            layer.events.data.disconnect(self._changed)
            layer.events.data.connect(self._changed)
        self._changed()

    def _draw(self) -> None:
        """A layer for a rectangle, at hand to draw on."""
        try:
            self.asked()
        except WsiBrushError as error:
            say(str(error))
            return
        layer = self.region.value
        if layer is None:
            layer = self.viewer.add_shapes(
                name=DRAWN, ndim=2, units=self.reference.value.units, edge_color="#ffd400", face_color="transparent",
                edge_width=3 / self.viewer.scene.camera.zoom,
            )  # fmt: skip
            self.region.value = layer
        self.viewer.layers.selection.active = layer
        layer.mode = "add_rectangle"

    def asked(self, *, seed: int = 0) -> Wish:
        """What is to be painted.

        Raises:
            UsageError: if there is no reference, or nothing of it in the region.
        """
        layer = self.reference.value
        path = None if layer is None else slide_of(layer)
        if path is None:
            raise UsageError("there is no reference; open a slide first")
        return Wish(
            path, str(self.brush.value), self._drawn(layer), self.side.value, self.mpp.value, seed, self.steps.value,
            self.guidance.value,
        )  # fmt: skip

    def _drawn(self, reference: Layer) -> tuple[int, int, int, int] | None:
        shapes = self.region.value
        if shapes is None or not len(shapes.data):
            return None
        corners = [reference.world_to_data(shapes.data_to_world(corner)) for corner in shapes.data[-1]]
        level = reference.data[0] if reference.multiscale else reference.data
        return region_of(np.asarray(corners)[:, -2:], tuple(level.shape[:2]))

    def _changed(self, *_: object) -> None:
        """A choice is another one: soon, what it means is worked out."""
        if not self._gone and self.job is None:
            self._timer.start()

    # -- what it takes -------------------------------------------------------------------------------------

    def target(self) -> Path | None:
        """The file that is to be written, of those that write one."""
        return None

    def times(self) -> int:
        """How often the place is painted."""
        return 1

    def _plan(self) -> None:
        """Say what would be painted; it is worked out elsewhere, for tiles are timed."""
        if self.job is not None:
            return
        if self._planning is not None:  # one at a time; the newest choice comes next
            self._timer.start()
            return
        try:
            wish, target, times = self.asked(), self.target(), self.times()
        except WsiBrushError as error:
            self.say(str(error))
            return
        self._planning = start(
            "wsi-brush works out how long it takes",
            lambda job: plan(wish, target, seeds=times, tell=job.tell, look=job.show),
            shown=self._planned, returned=self._planned, refused=self._planned, finished=self._plan_done,
        )  # fmt: skip

    def _planned(self, line: str) -> None:
        if self.job is None:
            self.say(line)

    def _plan_done(self) -> None:
        self._planning = None

    def say(self, line: str) -> None:
        """Put a line above the bar."""
        if not self._gone:
            self.said.value = line

    # -- a run ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Run was pressed."""
        raise NotImplementedError

    def go(
        self, what: str, work: Callable[[Job], Any], *, shown: Callable[[Any], None], returned: Callable[[Any], None]
    ) -> None:
        """Start a job that the bar shows; what it shows and returns goes to these, unless it was stopped."""
        self._timer.stop()
        if self._planning is not None:  # it would take the processor from what is wanted now
            self._planning.quit()
        self.origin = tuple(self.reference.value.translate[-2:])
        self.right = float(self.reference.value.extent.world[1][-1])
        self.run.enabled, self.cancel.enabled = False, True
        self._show(0, 0)
        self.job = start(
            what, work, told=self._told, shown=shown, returned=returned, stopped=self.stopped, refused=self.refused,
            errored=self._errored, finished=self._finished,
        )  # fmt: skip

    def stop(self) -> None:
        """End the run, as soon as it next tells something."""
        if self.job is not None:
            self.job.quit()
            self.cancel.enabled = False
            self.say("stopping")

    def stopped(self) -> None:
        """The run was ended by the user."""
        self.say("stopped")

    def _told(self, what: str, done: int, total: int) -> None:
        if not self._gone and self.job is not None and not self.job.abort_requested:
            self._show(done, total)
            self.say(f"{what}: {100 * done // total} %" if total else what)

    def _show(self, done: int, total: int) -> None:
        """A share, or where nothing is known of it something that moves."""
        self.bar.max = 100 if total else 0
        self.bar.value = 100 * done // total if total else 0

    def refused(self, line: str) -> None:
        """The user can put it right."""
        self.say(line)
        say(line)

    def _errored(self, error: Exception) -> None:
        self.say(f"failed: {error}")
        raise error

    def _finished(self) -> None:
        self.job = None
        if not self._gone:
            self._show(0, 100)
            self.run.enabled, self.cancel.enabled = True, False

    def _leave(self) -> None:
        """The widget is no more; what it runs ends."""
        super()._leave()
        if self._planning is not None:
            self._planning.quit()

    # -- layers --------------------------------------------------------------------------------------------

    def placed(self, picture: Picture, *, beside: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
        """Where a picture of the run lies in the viewer, moved by so many µm."""
        moved = zip(picture.corner, self.origin, beside, strict=True)
        return {"scale": (picture.mpp, picture.mpp), "translate": tuple(float(sum(parts)) for parts in moved)}

    def layers_named(self, name: str) -> list[Any]:
        """Those that are still there."""
        return [layer for layer in self.viewer.layers if layer.name == name]
