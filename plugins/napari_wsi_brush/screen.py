"""What lies on the canvas of a window: a line that is dragged, what it cuts, and a mark where the cursor would be."""

from __future__ import annotations

from typing import Any

from qtpy import QtCore
from qtpy.QtCore import QEvent, QObject, Qt
from qtpy.QtGui import QColor, QMouseEvent, QPainter, QPaintEvent, QPen
from qtpy.QtWidgets import QWidget

from .pair import GAP, Pair

_GRIP, _CROSS = 15, 25  # pixels: how wide the line can be taken hold of, and a side of the mark


def canvas_of(viewer: Any) -> Any:
    """The canvas of a viewer's window: napari has no public name for it yet."""
    return viewer.window._qt_viewer.canvas


class SwipeLine(QWidget):
    """A vertical line over the canvas, at a share of its width, that is dragged with the mouse."""

    moved = QtCore.Signal(float)  # type: ignore[attr-defined]  # a name that qtpy gives

    def __init__(self, canvas: QWidget) -> None:
        super().__init__(canvas)
        self.share = 0.5
        self.setObjectName("swipe line")
        self.setCursor(Qt.CursorShape.SplitHCursor)
        self.setToolTip("Drag: left of the line is one picture, right of it the other")
        self.hide()
        canvas.installEventFilter(self)

    def place(self, share: float) -> None:
        """Put the line at a share of the width."""
        self.share = min(max(share, 0.0), 1.0)
        canvas = self.parentWidget()
        if canvas is not None:
            left = round(self.share * canvas.width()) - _GRIP // 2
            self.setGeometry(left, 0, _GRIP, canvas.height())
        self.moved.emit(self.share)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802 - Qt's name
        """Stay at the same share when the canvas is resized."""
        if event.type() == QEvent.Type.Resize and self.isVisible():
            self.place(self.share)
        return False

    def mouseMoveEvent(self, event: QMouseEvent) -> None:  # noqa: N802 - Qt's name
        """Follow the mouse."""
        canvas = self.parentWidget()
        if canvas is not None and event.buttons() & Qt.MouseButton.LeftButton:
            self.place(self.mapToParent(event.position().toPoint()).x() / max(canvas.width(), 1))

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802 - Qt's name
        """A white line with dark edges, and a knob in its middle."""
        painter, middle = QPainter(self), self.width() // 2
        painter.fillRect(middle - 2, 0, 5, self.height(), QColor(0, 0, 0, 140))
        painter.fillRect(middle - 1, 0, 3, self.height(), QColor(255, 255, 255))
        painter.setBrush(QColor(255, 255, 255))
        painter.setPen(QPen(QColor(0, 0, 0, 160), 1))
        painter.drawEllipse(1, self.height() // 2 - middle, self.width() - 3, self.width() - 3)
        painter.end()


class Cut:
    """Shows a layer right of a share of the canvas only: the graphics card leaves out the rest."""

    def __init__(self, viewer: Any) -> None:
        self._viewer, self._node, self._clipper = viewer, None, None

    def at(self, layer: Any, share: float) -> None:
        """Cut `layer`, and no other."""
        from vispy.visuals.filters import Clipper

        canvas = canvas_of(self._viewer)
        node = canvas.layer_to_visual[layer].node
        if node is not self._node:
            self.off()
            self._node, self._clipper = node, Clipper()
            node.attach(self._clipper)
        width, height = (
            side * canvas.native.devicePixelRatioF() for side in (canvas.native.width(), canvas.native.height())
        )
        assert self._clipper is not None
        self._clipper.bounds = (share * width, 0, (1 - share) * width, height)
        node.update()

    def off(self) -> None:
        """Show all of it again."""
        if self._node is not None:
            self._node.detach(self._clipper)
            self._node.update()
        self._node = self._clipper = None


class OtherCursor(QWidget):
    """A cross in the cell where the mouse is not, at the same place of the tissue."""

    def __init__(self, viewer: Any, canvas: QWidget) -> None:
        super().__init__(canvas)
        self._canvas = canvas
        self.setObjectName("other cursor")
        self.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self.resize(_CROSS, _CROSS)
        self.hide()
        viewer.mouse_move_callbacks.append(self.follow)
        canvas.installEventFilter(self)

    def follow(self, viewer: Any, event: Any) -> None:
        """Called by napari when the mouse moves."""
        if not viewer.canvas.grid.enabled or event.viewbox is None:
            self.hide()
            return
        step = (self._canvas.width() - GAP) / 2 + GAP
        left = event.pos[0] + (step if event.viewbox[1] == 0 else -step)
        self.move(round(left) - _CROSS // 2, round(event.pos[1]) - _CROSS // 2)
        self.show()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:  # noqa: N802 - Qt's name
        """Gone with the mouse."""
        if event.type() == QEvent.Type.Leave:
            self.hide()
        return False

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802 - Qt's name
        """White on black, to be seen on any stain."""
        painter, middle = QPainter(self), _CROSS // 2
        for width, colour in ((5, QColor(0, 0, 0, 170)), (1, QColor(255, 255, 255))):
            painter.setPen(QPen(colour, width))
            painter.drawLine(0, middle, _CROSS, middle)
            painter.drawLine(middle, 0, middle, _CROSS)
        painter.end()


def forget(viewer: Any, cursor: OtherCursor, pair: Pair | None) -> None:
    """Take the marks off a canvas, and show its layers as before."""
    if cursor.follow in viewer.mouse_move_callbacks:
        viewer.mouse_move_callbacks.remove(cursor.follow)
    if pair is not None:
        pair.end()
