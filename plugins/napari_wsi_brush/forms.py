"""The controls of the widget "Brush", and nothing that they do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QSize, Qt
from qtpy.QtGui import QIcon, QImage, QPixmap
from qtpy.QtWidgets import (
    QAbstractButton,
    QButtonGroup,
    QCheckBox,
    QDoubleSpinBox,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QListView,
    QListWidget,
    QProgressBar,
    QPushButton,
    QSlider,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

_ICON = 64


class Form:
    """Laid out in `parent`, from the canvas at the top to what is being done at the bottom."""

    def __init__(self, parent: QWidget) -> None:
        self.brush = QLineEdit("bundled")
        self.brush.setToolTip("bundled, or the folder of a brush")
        self.seed = _whole(0, 0, 2**31 - 1, "Another seed, another painting; Repaint all")
        self.steps = _whole(20, 5, 1000, "More take longer")
        self.pixels = _whole(1024, 128, 16384, "Side of a new canvas, pixels")
        self.of_slide = QCheckBox("of the selected slide")
        self.of_slide.setToolTip("Begin with the embeddings of the slide around the middle of what is seen")
        self.new = button("New canvas")
        self.open_canvas, self.save_canvas = button("Open canvas"), button("Save canvas")
        self.palette = QListWidget()
        self.palette.setViewMode(QListView.ViewMode.IconMode)
        self.palette.setIconSize(QSize(_ICON, _ICON))
        self.palette.setResizeMode(QListView.ResizeMode.Adjust)
        self.palette.setMinimumHeight(110)
        self.open_palette, self.save_palette = button("Open palette"), button("Save palette")
        self.pick, self.draw, self.erase = button("Pick ink"), button("Paint"), button("Erase")
        self._tools = QButtonGroup(parent)
        self._tools.setExclusive(False)
        for tool in (self.pick, self.draw, self.erase):
            tool.setCheckable(True)
            self._tools.addButton(tool)
        self._tools.buttonClicked.connect(self._one_tool)
        self.pick.setToolTip("Click on tissue of any open slide")
        self.draw.setToolTip("Drag on the canvas")
        self.erase.setToolTip("Drag on the canvas; nothing is left there")
        self.size = QDoubleSpinBox()
        self.size.setRange(16, 4000)
        self.size.setValue(200)
        self.size.setSuffix(" µm")
        self.size.setToolTip("Diameter; [ and ] change it")
        self.strength, self.softness = _slider(100), _slider(50)
        self.undo, self.redo = button("Undo", "Ctrl+Z"), button("Redo", "Ctrl+Shift+Z")
        self.undo.setEnabled(False)
        self.redo.setEnabled(False)
        self.automatic = QCheckBox("repaint after each stroke")
        self.automatic.setChecked(True)
        self.repaint, self.everything = button("Repaint"), button("Repaint all")
        self.cancel = button("Cancel")
        self.cancel.setEnabled(False)
        self.save_slide = button("Save as a slide")
        self.bar, self.said = QProgressBar(), QLabel("")
        self.bar.setRange(0, 100)
        self.said.setWordWrap(True)
        self._lay_out(parent)

    def busy(self, busy: bool) -> None:
        """What cannot be done while something is under way cannot be pressed."""
        for control in (
            self.new, self.open_canvas, self.save_canvas, self.open_palette, self.save_palette, self.repaint,
            self.everything, self.save_slide,
        ):  # fmt: skip
            control.setEnabled(not busy)
        self.cancel.setEnabled(busy)
        self.bar.setRange(0, 100)
        self.bar.setValue(0)

    def progress(self, what: str, done: int, total: int) -> None:
        """A `progress.Tell`; without a total the bar only moves."""
        self.bar.setRange(0, 100 if total else 0)
        self.bar.setValue(100 * done // total if total else 0)
        self.said.setText(what)

    def _one_tool(self, pressed: QAbstractButton) -> None:
        for tool in (self.pick, self.draw, self.erase):
            if tool is not pressed:
                tool.setChecked(False)

    def _lay_out(self, parent: QWidget) -> None:
        rows, form = QVBoxLayout(parent), QFormLayout()
        form.addRow("brush", self.brush)
        form.addRow("seed", self.seed)
        form.addRow("steps", self.steps)
        form.addRow("size", self.pixels)
        form.addRow("", self.of_slide)
        rows.addLayout(form)
        rows.addLayout(row(self.new, self.open_canvas, self.save_canvas))
        rows.addWidget(QLabel("inks"))
        rows.addWidget(self.palette)
        rows.addLayout(row(self.open_palette, self.save_palette))
        rows.addLayout(row(self.pick, self.draw, self.erase))
        how = QFormLayout()
        how.addRow("diameter", self.size)
        how.addRow("strength", self.strength)
        how.addRow("softness", self.softness)
        rows.addLayout(how)
        rows.addLayout(row(self.undo, self.redo))
        rows.addWidget(self.automatic)
        rows.addLayout(row(self.repaint, self.everything, self.cancel))
        rows.addWidget(self.save_slide)
        rows.addWidget(self.bar)
        rows.addWidget(self.said)
        rows.addStretch()


def thumbnail_icon(pixels: NDArray[np.uint8]) -> QIcon:
    """An icon of pixels (height, width, 3)."""
    height, width, _ = pixels.shape
    image = QImage(np.ascontiguousarray(pixels).tobytes(), width, height, 3 * width, QImage.Format.Format_RGB888)
    return QIcon(QPixmap.fromImage(image.copy()))


def button(text: str, tip: str = "") -> QPushButton:
    """A button with words, and what it does where the mouse rests on it."""
    made = QPushButton(text)
    made.setToolTip(tip)
    return made


def row(*widgets: QWidget) -> QHBoxLayout:
    """Widgets beside one another."""
    made = QHBoxLayout()
    for widget in widgets:
        made.addWidget(widget)
    return made


def _slider(value: int) -> QSlider:
    slider = QSlider(Qt.Orientation.Horizontal)
    slider.setRange(0, 100)
    slider.setValue(value)
    slider.setToolTip("percent")
    return slider


def _whole(value: int, least: int, most: int, tip: str) -> QSpinBox:
    box = QSpinBox()
    box.setRange(least, most)
    box.setValue(value)
    box.setToolTip(tip)
    return box
