"""Repaint: a part of a painting painted anew, and blended into the old one.

Of every pitch a window is painted: what changed and a margin of as many pixels *of that pitch*, so a cone over the
changed part, whose cost does not grow with the canvas. Noise is read by place, so where the maps say what they said
before the same is painted again, as far as the windows' edges let it.

What is exact: outside the part that is returned nothing is touched; in its ring, from the core outwards, the old pixels
fade in and are alone at its edge; noise, places in µm, and the embeddings of the whole canvas (also as sets of
tokens) are those of a painting of the whole canvas. What is not: the operator meets the window's edge where it met
tissue before, and the grid level's self-attention and global tokens see the window, not the canvas. So the core is not,
to the byte, what a painting of the whole canvas would have there; how near it is, `tests/benchmarks/repainting.py`
measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .brush import Brush
from .denoiser import NODE
from .errors import UsageError
from .grid import Grid
from .machine import check_precision, find_device
from .paint import Run
from .progress import Tell, Told
from .stages import Painting, Stage, budget, pixels_of, stages, wants_before, whole
from .store import EmbeddingMap
from .stream import on_host, read_plane

MARGIN = 128
"""Pixels of every pitch that are painted around what changed. With nothing changed, a square of 640 pixels in the
middle of 2048² then differs by 1.6 of 255 (root mean square) from what it was; with 64 by 2.0, with 256 by 0.8 at 1.7
times the pixels."""
EDGE = NODE
"""Pixels along a window's edge that are not used: there the difference is 4.5 to 5, whatever the margin."""

Preview = Callable[[Grid, NDArray[np.uint8]], None]
"""Called with a part of the canvas and how it looks so far, (height, width, 3); first coarse, last what was painted."""


class Pixels(Protocol):
    """A painting's pixels (height, width, 3), uint8: an array, or what is read by windows from disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, window: Any, /) -> Any: ...


def repaint(
    brush: Brush, maps: Mapping[float, EmbeddingMap], canvas: Grid, changed: Grid, painted: Pixels, painting: Painting,
    *, margin: int = MARGIN, show: Preview | None = None, tell: Tell | None = None,
) -> tuple[Grid, NDArray[np.uint8]]:  # fmt: skip
    """Paint what `changed` (a grid of any pitch) anew after `maps`: the part of the canvas to be replaced, and its
    pixels (height, width, 3).

    `painted`: the whole canvas as it is, which stays untouched. `painting`: how it was painted; seed and steps are its,
    size and region are not read. A `tell` that raises `StoppedError` ends it, and nothing is changed.

    Raises:
        UsageError: if nothing of `changed` lies in the canvas, `painted` is of another size, the brush does not paint
            at that pitch or paints whole canvases only (one of `baselines`), or the memory is too little.
        MachineError: if the device is not there.
    """
    device = find_device(painting.device)
    check_precision(painting.precision, device)
    if brush.rival is not None:
        raise UsageError(f"{brush.rival.name} paints whole canvases only; synthesize the canvas instead")
    if painted.shape != (*canvas.shape, 3):
        raise UsageError(
            f"the painting is {painted.shape}, the canvas {canvas.shape} pixels; synthesize the canvas first"
        )
    core = changed.at(canvas.mpp).clip(canvas)
    if not pixels_of(core):
        raise UsageError(f"{changed.extent} µm: nothing of it lies in the canvas, {canvas.extent} µm")
    ladder = brush.ladder.starting_at(canvas.mpp)
    todo = stages(ladder, painting)
    painting = replace(painting, tile=budget(painting, brush.denoiser.config)[0])
    area = whole(canvas, ladder)
    windows = cone(area, core, len(ladder.pitches), margin)
    blend = _Blend(canvas, core, windows[0], painted, margin)
    run = Run(brush, maps, area, painting, None, windows=windows)
    moves = [stage for stage in todo if stage.move is not None]
    run.count = Told(tell, "repainting", sum(pixels_of(windows[stage.level]) for stage in moves)).add
    planes: dict[str, Any] = {}
    for number, stage in enumerate(todo, 1):
        planes = run.after(stage, planes, None, keep=number < len(todo) and wants_before(todo[number]))
        if show is not None and stage.move is not None and "image" in planes and number < len(todo):
            show(blend.part, blend(planes["image"], windows[stage.level], stage))
    found = blend(planes["x"], windows[0], todo[-1])
    if show is not None:
        show(blend.part, found)
    return blend.part, found


def cone(area: Grid, core: Grid, levels: int, margin: int) -> list[Grid]:
    """The windows of each pitch, finest first, counted from the corner of `area` (whole blocks, finest pitch).

    Raises:
        ValueError: if the margin has no room for a block at either side: a window must lie in the next coarser one.
    """
    if margin < NODE:
        raise ValueError(f"a margin of {margin} pixels; it must be {NODE} or more")
    here = replace(core, top=core.top - area.top, left=core.left - area.left)
    found = []
    for level in range(levels):
        pitch = area.level(level)
        found.append(here.coarsened(2**level).pad(margin).aligned(NODE).clip(Grid(pitch.mpp, 0, 0, *pitch.shape)))
    return found


class _Blend:
    """What was painted in the windows, as pixels of the part of the canvas that is to be replaced."""

    def __init__(self, canvas: Grid, core: Grid, window: Grid, painted: Pixels, margin: int) -> None:
        ring = max(1, margin - EDGE)
        self.part = core.pad(ring).clip(canvas)
        self._here = replace(self.part, top=self.part.top - canvas.top, left=self.part.left - canvas.left)
        assert self._here.clip(window) == self._here
        rows, columns = self._here.within(replace(canvas, top=0, left=0))
        self._old = np.asarray(painted[rows, columns], np.float32)
        down, across = (
            _smoothstep(1 - _beyond(places, first, last) / ring)
            for places, first, last in (
                (self.part.centres()[0] / canvas.mpp, core.top, core.bottom),
                (self.part.centres()[1] / canvas.mpp, core.left, core.right),
            )
        )
        self._weight = (down[:, None] * across)[..., None].astype(np.float32)

    def __call__(self, plane: Any, window: Grid, stage: Stage) -> NDArray[np.uint8]:
        """The part with `plane`, painted in `window` of the stage's pitch, blended in."""
        near = self._here.coarsened(2**stage.level).pad(1).clip(window)
        local = replace(near, top=near.top - window.top, left=near.left - window.left)
        image = read_plane(plane, local)
        factor = 2**stage.level
        if factor > 1:
            image = functional.interpolate(image[None], scale_factor=factor, mode="bilinear", align_corners=False)[0]
        top, left = self._here.top - near.top * factor, self._here.left - near.left * factor
        image = image[:, top : top + self.part.height, left : left + self.part.width]
        new = np.moveaxis(on_host(torch.clamp((image + 1) * 127.5, 0, 255)), 0, -1)
        return np.rint(self._old * (1 - self._weight) + new * self._weight).astype(np.uint8)


def _beyond(places: NDArray[np.float64], first: int, last: int) -> NDArray[np.float64]:
    """How far places lie outside [first, last]; 0 inside."""
    return np.maximum(np.maximum(first - places, places - last), 0)


def _smoothstep(share: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = share.clip(0, 1)
    return np.asarray(inside * inside * (3 - 2 * inside))
