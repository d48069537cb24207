"""What the widget "Brush" does with wsi_brush: a canvas, what of it is painted, inks and files. Nothing here is of Qt.

torch is imported where it is needed, in the thread that paints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_brush.canvas import Canvas, Stroke
from wsi_brush.errors import UsageError
from wsi_brush.grid import Grid
from wsi_brush.ink import Ink, pick_ink
from wsi_brush.progress import Tell
from wsi_brush.store import EmbeddingMap

from .jobs import at_full_speed, load_both

if TYPE_CHECKING:
    from wsi_brush.brush import Brush
    from wsi_brush.encoder import Encoder

Show = Callable[[Grid, NDArray[np.uint8]], None]
_REMEMBERED = 20  # parts that were painted over, so that to undo brings back the very pixels
_CORNER = 16  # pixels: a canvas of a region begins at a pixel of every pitch


@dataclass(frozen=True)
class Tools:
    """A brush and its encoder; `name` is what it was asked for as."""

    name: str
    brush: Brush
    encoder: Encoder


def load_tools(name: str) -> Tools:
    """The bundled brush, or one in a folder, and the encoder that it names.

    Raises:
        WsiBrushError: if one cannot be had, or they do not belong together, or the brush cannot paint parts.
    """
    brush, encoder = load_both(name)
    if brush.rival is not None:
        raise UsageError(f"{name}: {brush.rival.name} paints whole canvases only; choose another brush")
    return Tools(name, brush, encoder)


def empty_canvas(tools: Tools, size: int) -> Canvas:
    """A canvas of size x size pixels without tissue."""
    grid = Grid(tools.brush.ladder.pitches[0], 0, 0, size, size)
    return Canvas.empty(grid, encoder=tools.encoder, pitches=tools.brush.pitches)


def canvas_of(tools: Tools, path: Path, middle: tuple[float, float], size: int) -> Canvas:
    """A canvas of a slide's embeddings, size x size pixels around a place in µm, moved so that it lies on the slide.

    Raises:
        UsageError: if the slide is smaller.
        SlideError: if it cannot be read.
    """
    from wsi_brush.slide import open_slide

    slide, mpp = open_slide(path), tools.brush.ladder.pitches[0]
    room = [int(side * slide.mpp / mpp + 1e-6) for side in slide.grid.shape]
    if min(room) < size:
        raise UsageError(f"{path.name}: {room[0]} x {room[1]} pixels at {mpp:g} µm; give a size of {min(room)} or less")
    top, left = (
        min(max(round(place / mpp - size / 2), 0), side - size) // _CORNER * _CORNER
        for place, side in zip(middle, room, strict=True)
    )
    return Canvas.of_region(
        slide, Grid(mpp, top, left, size, size), encoder=tools.encoder, pitches=tools.brush.pitches,
        tissue=tools.brush.tissue_of(slide),
    )  # fmt: skip


def load_canvas(tools: Tools, path: Path) -> Canvas:
    """A canvas that was saved.

    Raises:
        RefusedError: if it is none, or damaged.
        UsageError: if the brush follows another encoder.
    """
    canvas = Canvas.load(path)
    tools.brush.ladder.starting_at(canvas.grid.mpp)
    canvas.check_brush(tools.brush.about["encoder"], tools.brush.about["fingerprint"], tools.brush.pitches)
    return canvas


def pick(tools: Tools, path: Path, place: tuple[float, float]) -> Ink:
    """The ink at a place of a slide, µm.

    Raises:
        UsageError: if there is none.
        SlideError: if the slide cannot be read.
    """
    from wsi_brush.slide import open_slide

    return pick_ink(
        open_slide(path), place, encoder=tools.encoder, pitches=tools.brush.pitches, everywhere=tools.brush.everywhere
    )


def save(tools: Tools, canvas: Canvas, pixels: NDArray[np.uint8], target: Path, *, seed: int, steps: int) -> None:
    """Write what is painted of a canvas as a pyramid.

    Raises:
        RefusedError, MachineError: as `commit.staged`.
    """
    from wsi_brush.stages import Painting
    from wsi_brush.synthesize import save_painted

    save_painted(canvas, pixels, target, Painting(seed=seed, steps=steps), brush=tools.brush)


class Wanted(NamedTuple):
    """What is to be painted: a state of the canvas, its maps, and where it differs from what is painted."""

    strokes: tuple[Stroke, ...]
    maps: Mapping[float, EmbeddingMap]
    changed: Grid


class _Over(NamedTuple):
    """What was painted over: the states before and after, where, and the pixels before and after."""

    before: tuple[Stroke, ...]
    after: tuple[Stroke, ...]
    part: Grid
    old: NDArray[np.uint8]
    new: NDArray[np.uint8]


class Easel:
    """A canvas and what of it is painted. All but `paint` is for the thread of the windows."""

    def __init__(self, canvas: Canvas, tools: Tools) -> None:
        self.canvas, self.tools = canvas, tools
        self.pixels = np.full((*canvas.grid.shape, 3), 255, np.uint8)
        # of a canvas that began without tissue, glass is what is painted; of another, nothing yet
        self.painted: tuple[Stroke, ...] | None = () if canvas.blank else None
        self._over: list[_Over] = []

    def here(self, part: Grid) -> tuple[slice, slice]:
        """Where a part of the canvas stands in its pixels."""
        return part.within(self.canvas.grid)

    def wanted(self, *, everything: bool = False) -> Wanted | None:
        """What is to be painted so that the pixels follow the canvas; None if they do."""
        strokes, grid = self.canvas.strokes, self.canvas.grid
        changed = grid if everything or self.painted is None else self.canvas.changed(self.painted)
        return None if changed is None else Wanted(strokes, self.canvas.maps(), changed)

    def remembered(self) -> Grid | None:
        """Bring back pixels that were painted for this very state of the canvas, after undo or redo: where they are."""
        strokes = self.canvas.strokes
        for one in reversed(self._over):
            for start, end, pixels in ((one.after, one.before, one.old), (one.before, one.after, one.new)):
                if start == self.painted and end == strokes:
                    self.pixels[self.here(one.part)] = pixels
                    self.painted = strokes
                    return one.part
        return None

    def paint(self, wanted: Wanted, *, seed: int, steps: int, tell: Tell, show: Show) -> tuple[Grid, NDArray[np.uint8]]:
        """The part that is to be replaced and its pixels; nothing is changed yet.

        Raises:
            WsiBrushError: as `repaint`.
            StoppedError: if `tell` raised it.
        """
        from wsi_brush.repaint import repaint
        from wsi_brush.stages import Painting

        painting = Painting(mpp=self.canvas.grid.mpp, seed=seed, steps=steps)
        with at_full_speed(painting):
            return repaint(
                self.tools.brush, wanted.maps, self.canvas.grid, wanted.changed, self.pixels, painting, show=show,
                tell=tell,
            )  # fmt: skip

    def take(self, wanted: Wanted, part: Grid, pixels: NDArray[np.uint8]) -> None:
        """Put what was painted into the pixels."""
        place = self.here(part)
        if self.painted is None or part == self.canvas.grid:
            self._over.clear()  # another seed, or the first painting: older pixels do not belong to it
        else:
            self._over = [
                *self._over[1 - _REMEMBERED :],
                _Over(self.painted, wanted.strokes, part, self.pixels[place].copy(), pixels),
            ]
        self.pixels[place] = pixels
        self.painted = wanted.strokes
