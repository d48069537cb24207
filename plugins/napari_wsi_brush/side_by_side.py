"""The widget "Real | Synthetic": a picture beside another, over it or in turn, and a map of how alike they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QEvent, QObject, QTimer
from qtpy.QtWidgets import (
    QButtonGroup,
    QCheckBox,
    QComboBox,
    QFormLayout,
    QLabel,
    QProgressBar,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
)

from wsi_brush.errors import WsiBrushError

from . import heat
from .forms import button, row
from .layers import say
from .pair import FLICKER, MODES, SIDE, SWIPE, Pair, pictures
from .screen import Cut, OtherCursor, SwipeLine, canvas_of, forget
from .under import is_synthetic
from .worker import Job, Working, start

if TYPE_CHECKING:
    import napari.viewer

    from wsi_brush.similarity import SimilarityMap

PITCHES = (0.5, 2.0, 8.0)
_TIPS = {
    SIDE: "Two cells, one camera: what moves in one moves in the other",
    SWIPE: "One picture over the other; drag the line",
    FLICKER: "One picture in the place of the other, in turn",
}


class SideBySide(Working):
    """Chooses two layers of a viewer and how they are compared. `pair` is None where there are not two."""

    def __init__(self, viewer: napari.viewer.Viewer) -> None:
        super().__init__()
        self._viewer: Any = getattr(
            viewer, "__wrapped__", viewer
        )  # a proxy warns of the canvas, which has no public name
        self.pair: Pair | None = None
        self.found: Any = None
        self._rank, self._busy = -1, False
        canvas = canvas_of(self._viewer).native
        self.line, self.cursor_mark, self._cut = SwipeLine(canvas), OtherCursor(self._viewer, canvas), Cut(self._viewer)
        self.line.moved.connect(self._cut_there)
        self._timer = QTimer(self)
        self._timer.timeout.connect(self.turn)
        self._build()
        layers = self._viewer.layers.events
        layers.inserted.connect(self._layers_changed)
        layers.removed.connect(self._layers_changed)
        for key, does in (("F", self.turn), ("S", self.swap), ("W", self.next_worst)):
            self._viewer.bind_key(key, lambda _, does=does: does(), overwrite=True)
        canvas.window().installEventFilter(self)
        self._layers_changed()

    # -- what is on it --------------------------------------------------------------------------------

    def _build(self) -> None:
        self.real, self.synthetic = QComboBox(), QComboBox()
        self.real.setToolTip("The layer that stands left, or below")
        self.synthetic.setToolTip("The layer that stands right, or above")
        for box in (self.real, self.synthetic):
            box.activated.connect(self._chosen)
        self.modes = QButtonGroup(self)
        self.buttons: dict[str, QPushButton] = {}
        for mode in MODES:
            self.buttons[mode] = _button(mode.capitalize(), _TIPS[mode], partial(self.show_as, mode))
            self.buttons[mode].setCheckable(True)
            self.modes.addButton(self.buttons[mode])
        self.swap_button = _button("Swap (S)", "Left becomes right, above becomes below", self.swap)
        self.turn_button = _button("The other (F)", "Show the other picture in the same place", self.turn)
        self.by_itself = QCheckBox("by itself, every")
        self.by_itself.setToolTip("Turn to the other picture again and again")
        self.interval = QSpinBox()
        self.interval.setRange(100, 5000)
        self.interval.setSingleStep(100)
        self.interval.setValue(700)
        self.interval.setSuffix(" ms")
        self.by_itself.toggled.connect(self._by_itself)
        self.interval.valueChanged.connect(self._timer.setInterval)
        self.facts = QLabel()
        self.facts.setWordWrap(True)
        self.pitch = QComboBox()
        for mpp in PITCHES:
            self.pitch.addItem(f"{mpp:g} µm/px", mpp)
        self.pitch.setCurrentIndex(1)
        self.pitch.setToolTip("How finely tiles are seen: nuclei at 0.5, glands at 2, layout at 8 µm/px")
        self.compare_button = _button(
            "Compare tiles", "Cosine of the embeddings of each tile and the one it follows", self._compare_clicked
        )
        self.cancel_button = _button("Cancel", "Stop comparing", self.cancel)
        self.bar = QProgressBar()
        self.legend = QLabel()
        self.legend.setWordWrap(True)
        self.worst_button = _button(
            "Worst tile (W)", "Go to the tile that is least alike; again: to the next", self.next_worst
        )
        self.place = QLabel()
        self.place.setWordWrap(True)
        form = QFormLayout()
        form.addRow("Real", self.real)
        form.addRow("Synthetic", self.synthetic)
        form.addRow(row(*self.buttons.values()))
        form.addRow(row(self.swap_button, self.turn_button))
        form.addRow(row(self.by_itself, self.interval))
        form.addRow(self.facts)
        form.addRow("Tiles at", self.pitch)
        form.addRow(row(self.compare_button, self.cancel_button))
        form.addRow(self.bar)
        form.addRow(self.legend)
        form.addRow(self.worst_button)
        form.addRow(self.place)
        outer = QVBoxLayout(self)
        outer.addLayout(form)
        outer.addStretch(1)
        self._set_running(False)
        self.worst_button.setEnabled(False)

    # -- which two, and how they are shown -----------------------------------------------------------

    def choose(self, real: Any, synthetic: Any) -> None:
        """Take two layers, side by side."""
        old = self.pair
        if old is not None and {old.real, old.synthetic} == {real, synthetic} and old.real is real:
            return
        self._forget_maps()
        if old is not None:
            self._cut.off()
            old.end()
        self.pair = Pair(self._viewer, real, synthetic)
        self.show_as(SIDE)
        self._fit()
        QTimer.singleShot(0, self._fit)  # in a window that is not shown yet the canvas has no size

    def _fit(self) -> None:
        if self.pair is not None:
            self.pair.fit()

    def show_as(self, mode: str | None = None, *, swapped: bool | None = None, over: bool | None = None) -> None:
        """Arrange what is shown; what is not said stays."""
        if self.pair is None:
            return
        self._busy = True
        self.pair.show(mode, swapped=swapped, over=over)
        self._busy = False
        mode = self.pair.mode
        self.buttons[mode].setChecked(True)
        swipe = mode == SWIPE
        self.line.setVisible(swipe)
        if swipe:
            self.line.place(self.line.share)
            self.line.raise_()
        else:
            self._cut.off()
        if mode != FLICKER:
            self.by_itself.setChecked(False)
        if mode != SIDE:
            self.cursor_mark.hide()
        self.facts.setText(self.pair.caption())

    def swap(self) -> None:
        """Left becomes right, above becomes below."""
        if self.pair is not None:
            self.show_as(swapped=not self.pair.swapped)

    def turn(self) -> None:
        """Show the other picture in the same place."""
        if self.pair is not None:
            self.show_as(FLICKER, over=not self.pair.over)

    def _by_itself(self, on: bool) -> None:
        if on and self.pair is not None:
            self.show_as(FLICKER)
            self._timer.start(self.interval.value())
        else:
            self._timer.stop()

    def _cut_there(self, share: float) -> None:
        if self.pair is not None and self.pair.mode == SWIPE:
            self._cut.at(self.pair.sides[1], share)

    def _chosen(self) -> None:
        real, synthetic = self.real.currentData(), self.synthetic.currentData()
        if real is not None and synthetic is not None and real is not synthetic:
            self.choose(real, synthetic)

    def _layers_changed(self, event: Any = None) -> None:
        """Fill the lists; a new painting is taken at once, a second picture makes a pair."""
        if self._busy:
            return
        known = pictures(self._viewer)
        pair = self.pair
        if pair is not None and not {pair.real, pair.synthetic} <= set(known):
            self._cut.off()
            self.line.hide()
            self._forget_maps()
            pair.end()
            self.pair = pair = None
        if self.pair is not None and not set(self.pair.maps or ()) <= set(self._viewer.layers):
            self._forget_maps()
        new = getattr(event, "value", None) if getattr(event, "type", "") == "inserted" else None
        painted = [layer for layer in known if is_synthetic(layer)]
        plain = [layer for layer in known if not is_synthetic(layer)]
        real = pair.real if pair else next(iter(plain), None) or next(iter(known), None)
        synthetic = (
            pair.synthetic if pair else next((layer for layer in reversed(painted or known) if layer is not real), None)
        )
        if pair and new in painted:
            synthetic = new
        for box, current in ((self.real, real), (self.synthetic, synthetic)):
            box.clear()
            for layer in known:
                box.addItem(layer.name, layer)
            box.setCurrentIndex(known.index(current) if current in known else -1)
        if real is not None and synthetic is not None:
            if pair and new not in painted:
                self.show_as()
            else:
                self.choose(real, synthetic)
        self._set_running(self.job is not None)

    # -- how alike they are --------------------------------------------------------------------------

    def compare(self, mpp: float) -> None:
        """Compare the tiles of the pair at a pitch, in a thread."""
        if self.pair is None or self.job is not None:
            return
        pair = self.pair
        try:
            paths = heat.paths_of(pair.real, pair.synthetic)
        except WsiBrushError as error:
            say(str(error))
            return
        stores = heat.stores_among(self._viewer.layers, *paths, mpp)
        pixels, shift = (float(pair.real.scale[-1]), float(pair.synthetic.scale[-1])), pair.shift

        def run(job: Job) -> Any:
            return heat.compare(
                paths, pixels, mpp, shift, stores, lambda done, total: job.tell("tiles are seen", done, total)
            )

        self._set_running(True)
        self.job = start(
            "wsi-brush compares tiles", run, told=self._told, returned=self._compared, refused=self._refused,
            errored=self._failed, finished=self._finished,
        )  # fmt: skip

    def cancel(self) -> None:
        """Stop comparing: what is being embedded is finished, nothing more."""
        if self.job is not None:
            self.job.quit()
            self.legend.setText("cancelled")

    def next_worst(self) -> None:
        """Go to the tile that is least alike, and at each repeat to the next."""
        if self.found is None or self.pair is None:
            return
        worst = self.found.worst
        self._rank = (self._rank + 1) % len(worst)
        cell = worst[self._rank]
        down, right = self.found.centre(cell)
        self.pair.look_at(down, right, self.found.lattice.mpp)
        cosine = float(self.found.values[cell])
        self.place.setText(
            f"{self._rank + 1} of {len(worst)} from the worst: {cosine:.2f}, at {down:.0f}, {right:.0f} µm"
        )

    def _compare_clicked(self) -> None:
        self.compare(float(self.pitch.currentData()))

    def _told(self, what: str, done: int, total: int) -> None:
        if self.job is not None and not self.job.abort_requested:
            self.bar.setRange(0, total)
            self.bar.setValue(done)
            self.legend.setText(f"{what}: {done} of {total}" if total else what)

    def _compared(self, found: SimilarityMap) -> None:
        if self.pair is not None:
            self._forget_maps()
            self._busy = True
            self.pair.maps = heat.add_maps(self._viewer, found, self.pair.synthetic)
            self._busy = False
            self.found, self._rank = found, -1
            self.legend.setText(f"{heat.words(found)}; orange is least alike, blue most")
            self.place.setText("")
            self.show_as()
            self.worst_button.setEnabled(True)

    def _refused(self, line: str) -> None:
        self.legend.setText(line)
        say(line)

    def _failed(self, error: Exception) -> None:
        self._refused(f"tiles were not compared: {type(error).__name__}: {error}")

    def _finished(self) -> None:
        self.job = None
        self._set_running(False)

    def _set_running(self, running: bool) -> None:
        self.compare_button.setEnabled(not running and self.pair is not None)
        self.cancel_button.setEnabled(running)
        self.bar.setVisible(running)
        if not running:
            self.bar.setRange(0, 0)

    def _forget_maps(self) -> None:
        """Take the maps away: they belong to two pictures."""
        self.cancel()
        maps = self.pair.maps if self.pair is not None else None
        self.found, self._rank = None, -1
        self.worst_button.setEnabled(False)
        self.place.setText("")
        self.legend.setText("")
        if self.pair is not None:
            self.pair.maps = None
        busy, self._busy = self._busy, True
        for layer in maps or ():
            if layer in self._viewer.layers:
                self._viewer.layers.remove(layer)
        self._busy = busy

    # -- the end -------------------------------------------------------------------------------------

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802 - Qt's name
        """When the window is closed, whatever is being computed stops."""
        if event.type() == QEvent.Type.Close:
            self._timer.stop()
            self.cancel()
        return False

    def closeEvent(self, event: Any) -> None:  # noqa: N802 - Qt's name
        """When the widget is closed, the viewer is as it was."""
        self._timer.stop()
        self.cancel()
        self._cut.off()
        self.line.hide()
        forget(self._viewer, self.cursor_mark, self.pair)
        super().closeEvent(event)


def _button(words: str, tip: str, does: Callable[[], None]) -> QPushButton:
    made = button(words, tip)
    made.clicked.connect(lambda: does())
    return made
