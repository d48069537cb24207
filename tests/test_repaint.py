"""A part of a painting painted anew: only the part is touched, and it is what the whole painting would be."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_brush, make_maps
from numpy.typing import NDArray

from wsi_brush.baselines import build
from wsi_brush.errors import UsageError
from wsi_brush.grid import Grid
from wsi_brush.paint import Run, paint_canvas
from wsi_brush.progress import StoppedError
from wsi_brush.repaint import EDGE, cone, repaint
from wsi_brush.stages import Painting, stages, whole
from wsi_brush.store import EmbeddingMap
from wsi_brush.stream import read_plane
from wsi_brush.synthesize import as_pixels

CANVAS = Grid(0.5, 512, 0, 480, 600)  # no whole blocks, and not at the plane's corner
PAINTING = Painting(seed=3, steps=5, tile=256)
CORE = Grid(0.5, 700, 250, 60, 80)
MARGIN = 96


@cache
def brush() -> Any:
    return make_brush(dim=6, tile=32)


@cache
def maps() -> dict[float, EmbeddingMap]:
    return make_maps(whole(CANVAS, brush().ladder), dim=6, tile=32)


@cache
def painted() -> NDArray[np.uint8]:
    plane = paint_canvas(brush(), maps(), CANVAS, PAINTING)
    return as_pixels(read_plane(plane, Grid(0.5, 0, 0, *CANVAS.shape)))


def here(part: Grid) -> tuple[slice, slice]:
    return part.within(CANVAS)


@pytest.mark.usefixtures("one_thread")
def test_all_of_a_canvas_painted_again_is_what_it_was() -> None:
    """The windows are the whole canvas: the same noise, places and embeddings, so the same bytes."""
    part, pixels = repaint(brush(), maps(), CANVAS, CANVAS, painted(), PAINTING, margin=512)
    assert part == CANVAS
    np.testing.assert_array_equal(pixels, painted())


@pytest.mark.usefixtures("one_thread")
def test_a_part_with_nothing_changed_is_nearly_what_it_was() -> None:
    part, pixels = repaint(brush(), maps(), CANVAS, CORE, painted(), PAINTING, margin=MARGIN)
    ring = MARGIN - EDGE
    assert part == CORE.pad(ring)
    old = painted()[here(part)].astype(float)
    spread = old.std((0, 1)).mean()
    assert np.sqrt(((pixels - old) ** 2).mean()) < 0.15 * spread
    other, found = repaint(brush(), maps(), CANVAS, CORE, painted(), replace(PAINTING, seed=4), margin=MARGIN)
    assert other == part
    assert np.sqrt(((found - old)[ring:-ring, ring:-ring] ** 2).mean()) > 0.5 * spread  # other noise is seen


@pytest.mark.usefixtures("one_thread")
def test_what_changed_is_painted_and_fades_into_the_old() -> None:
    changed = {
        mpp: replace(one, values=np.where(np.isnan(one.values), one.values, np.float16(3)))
        for mpp, one in maps().items()
    }
    shown: list[tuple[Grid, NDArray[np.uint8]]] = []
    told: list[tuple[str, int, int]] = []
    part, pixels = repaint(
        brush(), changed, CANVAS, CORE, painted(), PAINTING, margin=MARGIN,
        show=lambda grid, seen: shown.append((grid, seen)), tell=lambda *words: told.append(words),
    )  # fmt: skip
    ring = MARGIN - EDGE
    away = np.abs(pixels.astype(int) - painted()[here(part)]).mean(-1)
    assert away[ring:-ring, ring:-ring].mean() > 4
    # smoothstep: 0.0003 of the new one at the outermost pixel, half of it in the middle of the ring
    for edge in (away[0], away[-1], away[:, 0], away[:, -1]):
        assert edge.max() <= 1
    rows = away[:, ring:-ring].mean(1)
    assert rows[: ring // 3].mean() < rows[ring // 3 : ring].mean() < 1.3 * rows[ring:-ring].mean()
    assert len(shown) > 4
    assert all(grid == part and seen.shape == (*part.shape, 3) for grid, seen in shown)
    np.testing.assert_array_equal(shown[-1][1], pixels)
    first, last = (np.abs(seen.astype(int) - pixels).mean() for _, seen in (shown[0], shown[-2]))
    assert last < first
    assert told[-1][0] == "repainting"
    assert told[-1][1] == told[-1][2]


def test_windows_lie_within_the_next_and_do_not_grow_with_the_canvas() -> None:
    """As `Run` needs them: whole blocks, each inside the coarser one with its neighbours."""
    sizes = []
    for side in (4096, 16384):
        area, core = Grid(0.5, 0, 0, side, side), Grid(0.5, 1555, 1999, 300, 411)
        windows = cone(area, core, 5, 64)
        sizes.append([window.shape for window in windows])
        for level, window in enumerate(windows):
            assert (window.top % 32, window.left % 32, window.height % 32, window.width % 32) == (0, 0, 0, 0)
            pitch = area.level(level)
            assert window.clip(Grid(pitch.mpp, 0, 0, *pitch.shape)) == window
            padded = core.coarsened(2**level).pad(64).clip(pitch)
            assert padded.clip(window) == padded
            if level:
                finer = windows[level - 1].level(1)
                assert finer.clip(window) == finer
    assert sizes[0][:2] == sizes[1][:2]
    assert max(sizes[1][4]) <= 64 * 2 + 32 * 3
    with pytest.raises(ValueError, match="a margin of 8"):
        cone(area, core, 5, 8)


def test_a_window_knows_where_on_the_canvas_it_lies() -> None:
    area = whole(CANVAS, brush().ladder)
    windows = cone(area, CORE, 5, MARGIN)
    stage = next(one for one in stages(brush().ladder, PAINTING) if one.level == 0 and one.move is not None)
    here, there = (
        Run(brush(), maps(), area, PAINTING, None, windows=given).denoiser(stage)._asked[0].setting
        for given in (windows, None)
    )
    top, left = windows[0].top, windows[0].left
    assert min(top, left) > 0
    some = torch.tensor([[0.5, 7.5]])
    torch.testing.assert_close(here.places(some, some), there.places(some + top, some + left))
    for mine, other in zip(here.maps, there.maps, strict=True):
        torch.testing.assert_close(mine.corner + torch.tensor([[top, left]]), other.corner)


def test_bad_calls() -> None:
    with pytest.raises(UsageError, match="nothing of it lies in the canvas"):
        repaint(brush(), maps(), CANVAS, Grid(0.5, 0, 0, 100, 100), painted(), PAINTING)
    with pytest.raises(UsageError, match=r"the painting is \(10, 10, 3\)"):
        repaint(brush(), maps(), CANVAS, CORE, np.zeros((10, 10, 3), np.uint8), PAINTING)
    rival = replace(brush(), network=build("infty-diff", {"dim": 6, "width": 16}))
    with pytest.raises(UsageError, match="whole canvases only"):
        repaint(rival, maps(), CANVAS, CORE, painted(), PAINTING)


def test_it_can_be_stopped() -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise StoppedError

    before = painted().copy()
    with pytest.raises(StoppedError):
        repaint(brush(), maps(), CANVAS, CORE, painted(), PAINTING, margin=MARGIN, tell=stop)
    np.testing.assert_array_equal(painted(), before)
