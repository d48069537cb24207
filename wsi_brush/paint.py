"""All steps of all pitches: a canvas from noise to image, in memory or on disk, and on from where it was."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .baselines import System
from .brush import Brush
from .diffusion import Move, finer, ramped
from .errors import UsageError
from .field import NoiseField
from .grid import Grid
from .machine import check_precision, find_device, full_device_said, release_memory, side_by_side
from .progress import StoppedError, Tell, Told
from .scratch import CHUNK, Plane, Work, check_room, new_plane
from .stages import (
    BASE,
    Painting,
    Stage,
    budget,
    evaluated_pixels,
    guidance_at,
    kept,
    pixels_of,
    stages,
    state_bytes,
    wants_before,
    whole,
)
from .store import EmbeddingMap
from .stream import CanvasDenoiser, on_host, read_plane, threads_for, tiles_of

SAVE_EVERY = 60.0
"""Seconds between two generations on disk of a state that is in memory."""


Show = Callable[[float, Plane], None]
"""Called with a pitch (µm) and what the whole canvas (`stages.whole`) looks like there so far: (3, rows, columns) in
about [-1, 1]. First at coarse pitches, last with what was painted; the plane is the painting's own, not to be kept."""


class Hands(Protocol):
    """Others who do the tiles of a sweep; `number` is that of the stage, counted from 1."""

    def sketch(self, number: int, tiles: Iterable[Grid]) -> Iterable[tuple[Grid, NDArray[np.float32]]]:
        """Sweep A."""
        ...

    def paint(
        self, number: int, tiles: Iterable[Grid], denoiser: CanvasDenoiser | None, folder: Path
    ) -> Iterable[Grid]:
        """The state after the stage, written into `folder`; `denoiser` has its grid level ready for a move."""
        ...


def check_rival(rival: System, canvas: Grid, painting: Painting) -> None:
    """Whether the canvas of one of `baselines` fits the memory that the painting may take, which is the device's too.

    Raises:
        UsageError: if not, or it is to be painted in bfloat16.
    """
    if painting.precision != "float32":
        raise UsageError(f"{rival.name} paints in float32; leave out --precision {painting.precision}")
    need = BASE + rival.bytes_for(canvas)
    if need > painting.memory:
        raise UsageError(
            f"{rival.name} holds all of {canvas.height} x {canvas.width} pixels in memory, {need / 1e9:.2f} GB, and "
            f"--max-memory is {painting.memory / 1e9:g}GB; give {need / 1e9 + 0.01:.2f}GB or more, or paint less"
        )


def _by_rival(
    rival: System, brush: Brush, maps: Mapping[float, EmbeddingMap], canvas: Grid, painting: Painting, tell: Tell | None
) -> Plane:
    check_rival(rival, canvas, painting)

    def told(what: str, done: int, total: int) -> None:
        if tell is not None:
            tell(f"{what} with {rival.name} (interrupted, it begins anew)", done, total)

    with torch.no_grad(), full_device_said(painting.device, "paint less"):
        image = rival.paint(
            brush.condition(maps, canvas, canvas.mpp), canvas, brush.ladder.starting_at(canvas.mpp),
            seed=painting.seed, steps=painting.steps, guidance=painting.guidance, tell=told,
        )  # fmt: skip
        return on_host(image)


def paint_canvas(
    brush: Brush, maps: Mapping[float, EmbeddingMap], canvas: Grid, painting: Painting, *,
    work: Work | None = None, hands: Hands | None = None, tell: Tell | None = None, show: Show | None = None,
) -> Plane:  # fmt: skip
    """Paint `canvas` (finest pitch): (3, height, width) or a little more, in about [-1, 1].

    With a work folder it goes on from the newest generation there, and the state is on disk where it is more than
    `painting.memory`; the plane that comes back may then lie there. `hands`: a cluster that does the tiles; then it is
    on disk in any case. One of `baselines` paints by itself, in memory, and never goes on from a generation, nor does
    it `show` anything.

    Raises:
        UsageError: if the brush does not paint at that pitch, or the memory is too little.
        MachineError: if the disk has no room for the state, or the device is not there or has no memory for a tile.
        RefusedError: if a generation is damaged.
    """
    device = find_device(painting.device)
    check_precision(painting.precision, device)
    brush = brush.on(device)
    if brush.rival is not None:
        return _by_rival(brush.rival, brush, maps, canvas, painting, tell)
    ladder = brush.ladder.starting_at(canvas.mpp)
    todo = stages(ladder, painting)
    area = whole(canvas, ladder)
    tile, room = budget(painting, brush.denoiser.config)
    painting = replace(painting, tile=tile)
    on_disk = work is not None and (hands is not None or state_bytes(canvas, ladder) > room)
    done, planes = (work.newest() if work is not None else None) or (0, {})
    if work is not None and on_disk:
        check_room(work.folder, state_bytes(canvas, ladder))
    else:
        planes = {name: read_plane(plane, Grid(1.0, 0, 0, *plane.shape[1:])).numpy() for name, plane in planes.items()}
    total = evaluated_pixels(ladder, canvas, painting)
    painted = sum(pixels_of(area.level(stage.level)) for stage in todo[:done] if stage.move)
    run = Run(brush, maps, area, painting, work.folder / "grid" if work is not None and on_disk else None)
    run.count = Told(tell, "painting", total, done=painted).add
    saved = time.monotonic()
    try:
        for number, stage in enumerate(todo[done:], done + 1):
            keep = number < len(todo) and wants_before(todo[number])
            if work is not None and on_disk:
                with work.generation(number) as folder:
                    run.after(stage, planes, folder, keep=keep, number=number, hands=hands)
                planes = (work.newest() or (0, {}))[1]
            else:
                planes, done = run.after(stage, planes, None, keep=keep), number
            if show is not None and (number == len(todo) or "image" in planes):
                show(stage.mpp, planes.get("image", planes["x"]))
            if work is not None and not on_disk and time.monotonic() - saved > SAVE_EVERY and number < len(todo):
                work.save(number, planes)
                saved = time.monotonic()
    except (KeyboardInterrupt, StoppedError):
        if work is not None and not on_disk and planes:
            work.save(done, planes)  # if there is room; else the same command begins at the last one
        raise
    return planes["x"]


class Run:
    """What the stages of one painting share; `area` is the whole canvas, as `whole` gives it.

    `grid_folder`: where the grid level is kept, else in memory; only its `owner` makes it, others read it. `windows`:
    what is painted of each pitch's canvas, counted from its corner, finest first; by default all of it. Their edges are
    multiples of NODE, and every one lies inside the next, coarser one.
    """

    def __init__(
        self, brush: Brush, maps: Mapping[float, EmbeddingMap], area: Grid, painting: Painting,
        grid_folder: Path | None, *, owner: bool = True, windows: Sequence[Grid] | None = None,
    ) -> None:  # fmt: skip
        self._device = find_device(painting.device)
        check_precision(painting.precision, self._device)
        self._brush, self._maps, self._area, self._painting = brush.on(self._device), maps, area, painting
        ladder = brush.ladder.starting_at(area.mpp)
        self._details, self._top = ladder.details, len(ladder.pitches) - 1 if painting.progressive else 0
        self._grid_folder, self._owner = grid_folder, owner
        levels = [area.level(level) for level in range(len(ladder.pitches))]
        self._windows = windows or [Grid(level.mpp, 0, 0, *level.shape) for level in levels]
        self._field = NoiseField(painting.seed)
        self._denoise: tuple[tuple[int, float], CanvasDenoiser] | None = None
        self.count: Callable[[int], None] = lambda pixels: None

    def after(
        self, stage: Stage, planes: Mapping[str, Plane], folder: Path | None, *, keep: bool, number: int = 0,
        hands: Hands | None = None,
    ) -> dict[str, Plane]:  # fmt: skip
        """The planes after a stage, new ones, in `folder` or in memory: x, and if it is to be kept the evaluation."""
        shape = self._windows[stage.level].shape
        names = ("x", "image") if keep else ("x",)
        found = {name: new_plane((3, *shape), folder, name, axes=(1, 2)) for name in names}
        while self._painting.tile % (2 * CHUNK) == 0 and hands is None:
            try:
                self._do(stage, planes, found, folder, number, hands)
                return found
            except torch.OutOfMemoryError:  # of the device; half the tile takes a quarter
                self._painting, self._denoise = replace(self._painting, tile=self._painting.tile // 2), None
            torch.cuda.empty_cache()
        with full_device_said(self._painting.device, f"tiles of {self._painting.tile} pixels are too large for it"):
            self._do(stage, planes, found, folder, number, hands)
        return found

    def _do(
        self, stage: Stage, planes: Mapping[str, Plane], found: Mapping[str, Plane], folder: Path | None, number: int,
        hands: Hands | None,
    ) -> None:  # fmt: skip
        if kept(self._painting.memory) is not None:
            release_memory()  # pieces that the stage before left
        tiles = tiles_of(found["x"].shape, self._painting.tile, threads=threads_for(self._device))
        denoiser = self.denoiser(stage) if stage.move is not None else None
        if denoiser is not None:
            denoiser.prepare(planes["x"], stage.sigma, partial(hands.sketch, number) if hands is not None else None)
        for tile in (  # without a name it ends with the loop, also where a painting is stopped
            hands.paint(number, tiles, denoiser, folder)
            if hands is not None and folder is not None
            else self._here(stage, planes, found, tiles)
        ):
            if stage.move is not None:
                self.count(pixels_of(tile))

    def _here(
        self, stage: Stage, planes: Mapping[str, Plane], found: Mapping[str, Plane], tiles: list[Grid]
    ) -> Iterator[Grid]:
        def work(tile: Grid) -> dict[str, Tensor]:
            values = self.tile_after(stage, planes, tile)
            return {name: values[name] for name in found}  # nothing else waits to be written

        for tile, values in side_by_side(work, tiles, threads=threads_for(self._device)):
            write_tile(found, tile, values)
            yield tile

    def tile_after(self, stage: Stage, planes: Mapping[str, Plane], tile: Grid) -> dict[str, Tensor]:
        """x in a tile after a stage, and the last evaluation: after an entry the coarser one, with its slopes."""
        if stage.move is None:
            return self._entered(stage, planes, tile)
        denoiser, canvas = self.denoiser(stage), Grid(tile.mpp, 0, 0, *planes["x"].shape[1:])
        halo, count = self._brush.denoiser.config.retouch_halo, len(stage.retouches)
        windows = [tile.pad(halo * left).clip(canvas) for left in range(count, -1, -1)]
        seen = denoiser.image(planes["x"], windows[0], keep=count > 0)
        before = read_plane(planes["image"], windows[0], self._device) if stage.move.old else None
        x = stage.move.of(seen.state, seen.image, before, self._fresh(stage, stage.move, windows[0]))
        image, before, seen = seen.plain if stage.plain else seen.image, None, seen._replace(state=x)
        for move, (window, inner) in zip(stage.retouches, pairwise(windows), strict=True):
            found, place = denoiser.retouch(x, window, seen, inner, canvas, move.sigma), inner.within(window)
            x, image = move.of(x[:, *place], found, image[:, *place], self._fresh(stage, move, inner)), found
        return {"x": x, "image": image}

    def _fresh(self, stage: Stage, move: Move, window: Grid) -> Tensor | None:
        return self._noise(stage, window, stream=move.stream) if move.fresh else None

    def _noise(self, stage: Stage, window: Grid, *, stream: int = 0) -> Tensor:
        """White noise in a window counted from the corner of what is painted."""
        grid, mine = self._area.level(stage.level), self._windows[stage.level]
        top, left = grid.top + mine.top + window.top, grid.left + mine.left + window.left
        place = Grid(grid.mpp, top, left, *window.shape)
        return self._field.read(place, stream=stream, device=self._device)

    def _entered(self, stage: Stage, planes: Mapping[str, Plane], tile: Grid) -> dict[str, Tensor]:
        """Noise where nothing is yet, else the coarser state and its last evaluation made finer."""
        if stage.level == self._top:
            return {"x": stage.sigma * self._noise(stage, tile)}
        here, around = self._windows[stage.level : stage.level + 2]
        below = Grid(tile.mpp, here.top + tile.top, here.left + tile.left, *tile.shape).level(1)
        below = replace(below, top=below.top - around.top, left=below.left - around.left)
        coarse = read_plane(planes["x"], below, self._device)
        image = ramped(_with_neighbours(planes["image"], below, self._device))
        noise = self._noise(stage, tile, stream=1 + stage.level)
        return {"x": finer(coarse, stage.sigma, self._details[stage.level], noise, image), "image": image}

    def denoiser(self, stage: Stage) -> CanvasDenoiser:
        """The denoiser of the stage's pitch and guidance."""
        key = stage.level, guidance_at(self._painting, stage)
        if self._denoise is None or self._denoise[0] != key:
            if self._grid_folder is not None and self._owner:
                shutil.rmtree(self._grid_folder, ignore_errors=True)
            self._denoise = None  # before another is made: each holds the embeddings of the canvas
            window = self._windows[stage.level]
            top, left = window.top << stage.level, window.left << stage.level
            place = replace(self._area, top=self._area.top + top, left=self._area.left + left)
            made = CanvasDenoiser(
                self._brush, self._maps, place, mpp=stage.mpp, guidance=key[1], tile=self._painting.tile,
                folder=self._grid_folder, precision=self._painting.precision, origin=window.extent[:2],
            )  # fmt: skip
            self._denoise = key, made
        return self._denoise[1]


def _with_neighbours(plane: Plane, tile: Grid, device: torch.device) -> Tensor:
    """A tile and one pixel around it; beyond the canvas its edge goes on."""
    around = tile.pad(1)
    inside = around.clip(Grid(tile.mpp, 0, 0, *plane.shape[1:]))
    beyond = (
        inside.left - around.left,
        around.right - inside.right,
        inside.top - around.top,
        around.bottom - inside.bottom,
    )
    return functional.pad(read_plane(plane, inside, device)[None], beyond, mode="replicate")[0]


def write_tile(planes: Mapping[str, Plane], tile: Grid, values: Mapping[str, Tensor]) -> None:
    """Write what is kept of a tile."""
    for name, plane in planes.items():
        plane[:, tile.top : tile.bottom, tile.left : tile.right] = on_host(values[name])
