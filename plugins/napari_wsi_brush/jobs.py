"""What the widgets ask of wsi_brush: a plan, a painting that is watched, a strip of seeds. Nothing here is of Qt.

torch is imported where it is needed, in the thread that paints: opening a widget takes no second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_brush.errors import UsageError, WsiBrushError
from wsi_brush.grid import Grid
from wsi_brush.progress import Tell

if TYPE_CHECKING:
    from wsi_brush.brush import Brush
    from wsi_brush.encoder import Encoder
    from wsi_brush.paint import Show
    from wsi_brush.scratch import Plane
    from wsi_brush.slide import Slide
    from wsi_brush.stages import Painting
    from wsi_brush.synthesize import Painted

LARGEST = 4096
"""Pixels of a side of a preview at most; of a larger canvas every second, third ... pixel is shown."""
_OFTEN = 0.2  # seconds between two previews at least, and four times what one took to make
_seconds: dict[tuple[Any, ...], tuple[float, float]] = {}


@dataclass(frozen=True)
class Wish:
    """What is to be painted: after which slide, with which brush ("bundled" or a folder), where and how.

    `region`: (top, left, height, width) in level-0 pixels of the reference; else the `size` x `size` pixels at `mpp`
    with the most tissue.
    """

    reference: Path
    brush: str = "bundled"
    region: tuple[int, int, int, int] | None = None
    size: int = 1024
    mpp: float = 0.5
    seed: int = 0
    steps: int = 20
    guidance: float = 1.0

    @property
    def painting(self) -> Painting:
        """The same as wsi_brush has it."""
        from wsi_brush.stages import Painting

        return Painting(self.size, self.region, self.mpp, self.seed, self.steps, self.guidance)


class Picture(NamedTuple):
    """Pixels (h, w, 3) of 8 bits, their pitch, and the middle of the first one, in µm from that of the slide."""

    pixels: NDArray[np.uint8]
    mpp: float
    corner: tuple[float, float]


class Seeded(NamedTuple):
    """One of a strip: its seed (None: the reference itself), what it looks like, and whether it is finished."""

    number: int
    seed: int | None
    picture: Picture
    finished: bool


def region_of(corners: NDArray[np.float64], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The level-0 pixels (top, left, height, width) that a drawn shape covers, of a slide of `shape`.

    `corners` (n, 2): rows and columns as napari has them, where a pixel's middle is a whole number.

    Raises:
        UsageError: if it lies beside the slide.
    """
    low = np.maximum(np.rint(corners.min(0) + 0.5), 0).astype(int)
    high = np.minimum(np.rint(corners.max(0) + 0.5), shape).astype(int)
    if (high <= low).any():
        raise UsageError("the region lies beside the slide; draw it on the slide")
    (top, left), (height, width) = low.tolist(), (high - low).tolist()
    return top, left, height, width


def free_name(folder: Path) -> Path:
    """Where the next painting may go: no name of the reference in it, for names may be those of patients."""
    names = (folder / f"synthetic{number}.ome.zarr" for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(path for path in names if not path.exists())


# -- what would be done --------------------------------------------------------------------------------


def plan(
    wish: Wish, target: Path | None = None, *, seeds: int = 1, tell: Tell | None = None,
    look: Callable[[str], None] | None = None,
) -> str:  # fmt: skip
    """What would be painted and how long it takes here, in a line: time from a few tiles, once for each size.

    `look` is given the line without the time as soon as it is known.

    Raises:
        WsiBrushError: what painting would raise.
        StoppedError: if `tell` raised it.
    """
    from wsi_brush.scratch import work_folder

    brush, encoder, slide, canvas = opened(wish)
    height, width = (side * canvas.mpp for side in canvas.shape)
    top, left = (round(edge / slide.mpp) for edge in canvas.extent[:2])
    place = f"{canvas.height} x {canvas.width} pixels, {height:.0f} x {width:.0f} µm at row {top}, column {left}"
    if seeds > 1:
        place = f"{seeds} times {place}"
    there = ""
    if target is not None and target.exists():
        there = f"; {target.name} is there already"
    elif target is not None and work_folder(target).exists():
        there = "; begun already, goes on from there"
    if look is not None:
        look(place + there)
    if brush.rival is not None:
        return place + there
    once, each = _time(wish, brush, encoder, canvas, tell)
    return f"{place}; about {_spoken(once + seeds * each)}{there}"


def _time(wish: Wish, brush: Brush, encoder: Encoder, canvas: Grid, tell: Tell | None) -> tuple[float, float]:
    """Seconds of the encoder, and of one painting; measured once for each size."""
    from wsi_brush.estimate import embedding_seconds, painting_seconds

    known = (brush.fingerprint, canvas.shape, canvas.mpp, wish.steps, wish.guidance)
    if known not in _seconds:
        with at_full_speed(wish.painting):
            _seconds[known] = (
                embedding_seconds(encoder, brush, canvas),
                painting_seconds(brush, canvas, wish.painting, tell=tell),
            )
    return _seconds[known]


def _spoken(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def load_both(name: str) -> tuple[Brush, Encoder]:
    """A brush ("bundled" or a folder) and the encoder that it follows.

    Raises:
        WsiBrushError: if one cannot be had, they do not belong together, or the brush follows labels.
    """
    from wsi_brush.brush import load_brush
    from wsi_brush.encoder import load_encoder

    brush = load_brush(name)
    if brush.labels is not None:
        raise UsageError(f"{name}: this brush follows labels, and the viewer has embeddings; choose another brush")
    encoder = load_encoder(brush.about["encoder"])
    if encoder.fingerprint != brush.about["fingerprint"]:
        raise UsageError(f"{name}: the brush was trained with another encoder than this {encoder.name}")
    return brush, encoder


def opened(wish: Wish) -> tuple[Brush, Encoder, Slide, Grid]:
    """Brush, its encoder, the reference, and the pixels that are to be painted.

    Raises:
        WsiBrushError: if one of them cannot be had, or they do not belong together.
    """
    from wsi_brush.slide import open_slide
    from wsi_brush.synthesize import choose_canvas

    slide = open_slide(wish.reference)
    brush, encoder = load_both(wish.brush)
    brush.ladder.starting_at(wish.mpp)
    return brush, encoder, slide, choose_canvas(slide, wish.painting, brush.tissue_of(slide))


# -- doing it ------------------------------------------------------------------------------------------


def paint(
    wish: Wish, target: Path, *, overwrite: bool = False, tell: Tell | None = None,
    look: Callable[[Picture], None] | None = None,
) -> Painted:  # fmt: skip
    """Paint a slide after a reference at `target`; stopped, the same call goes on. `look` sees it while it sharpens.

    Raises:
        WsiBrushError: as `synthesize_slide`.
        StoppedError: if `tell` raised it.
    """
    from wsi_brush.synthesize import synthesize_slide

    brush, encoder, _, canvas = opened(wish)
    with at_full_speed(wish.painting):
        return synthesize_slide(
            wish.reference, target, wish.painting, brush=brush, encoder=encoder, overwrite=overwrite, tell=tell,
            show=None if look is None else shown(canvas, look),
        )  # fmt: skip


def paint_seeds(
    wish: Wish, seeds: range, *, tell: Tell | None = None, look: Callable[[Seeded], None]
) -> tuple[int, int]:
    """Paint one place once for each seed, in memory, and the reference there first; (height, width) in pixels.

    The reference is embedded once for all of them.

    Raises:
        WsiBrushError: as `synthesize_slide`.
        StoppedError: if `tell` raised it.
    """
    from wsi_brush.embed import embed_region
    from wsi_brush.paint import paint_canvas
    from wsi_brush.pair import read_reference
    from wsi_brush.stages import whole

    brush, encoder, slide, canvas = opened(wish)
    place = Grid(canvas.mpp, 0, 0, *canvas.shape)
    corner = (canvas.top * canvas.mpp, canvas.left * canvas.mpp)
    look(Seeded(0, None, Picture(read_reference(slide, canvas, place), canvas.mpp, corner), True))
    telling = tell or (lambda what, done, total: None)
    with at_full_speed(wish.painting):
        maps = embed_region(
            slide, whole(canvas, brush.ladder.starting_at(canvas.mpp)), encoder=encoder, pitches=brush.pitches,
            tissue=brush.tissue_of(slide), progress=lambda done, total: telling("embedding the reference", done, total),
        )  # fmt: skip
        for number, seed in enumerate(seeds, 1):

            def told(what: str, done: int, total: int, number: int = number) -> None:
                telling(f"{what} {number} of {len(seeds)}", done + (number - 1) * total, total * len(seeds))

            def see(picture: Picture, number: int = number, seed: int = seed) -> None:
                look(Seeded(number, seed, picture, False))

            painting = replace(wish.painting, seed=seed)
            state = paint_canvas(brush, maps, canvas, painting, tell=told, show=shown(canvas, see))
            look(Seeded(number, seed, picture_of(canvas, canvas.mpp, state, most=max(canvas.shape)), True))
    return canvas.shape


@contextmanager
def at_full_speed(painting: Painting) -> Iterator[None]:
    """As the command line paints: activations are kept, which is two to three times faster on a CPU."""
    from wsi_brush.machine import keep_memory, release_memory
    from wsi_brush.stages import kept

    keep_memory(kept(painting.memory))
    try:
        yield
    finally:
        release_memory()


def shown(canvas: Grid, look: Callable[[Picture], None]) -> Show:
    """Has `look` see a canvas while it is painted, as often as that costs little: one fifth of the time at most."""
    ready = 0.0

    def show(pitch: float, plane: Plane) -> None:
        nonlocal ready
        start = time.monotonic()
        if start >= ready:
            look(picture_of(canvas, pitch, plane))
            took = time.monotonic() - start
            ready = start + took + max(_OFTEN, 4 * took)

    return show


def picture_of(canvas: Grid, pitch: float, plane: Plane, *, most: int = LARGEST) -> Picture:
    """What `plane` (3, rows, columns; about [-1, 1]; at least the canvas, at `pitch`) shows of the canvas."""
    import torch

    from wsi_brush.synthesize import as_pixels

    height, width = (math.ceil(side * canvas.mpp / pitch - 1e-6) for side in canvas.shape)
    every = -(-max(height, width) // most)
    values = np.array(plane[:, :height:every, :width:every], dtype=np.float32)
    shift = (pitch - canvas.mpp) / 2  # the middle of a coarse pixel is not that of its first fine one
    corner = (canvas.top * canvas.mpp + shift, canvas.left * canvas.mpp + shift)
    return Picture(as_pixels(torch.from_numpy(values)), pitch * every, corner)


def one_line(error: Exception) -> str | None:
    """What to say of an error that a user can put right; None of others, which are ours."""
    if isinstance(error, WsiBrushError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return "out of memory; paint a smaller region" if isinstance(error, MemoryError) else None
