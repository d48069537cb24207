"""All steps of all pitches: a canvas from noise to image, in memory or on disk, and on from where it was.

A painting is a list of stages, each a function of the state before it: the noise it starts from, a move of the solver,
a change to the next finer pitch. So the number of stages that are done and the state after them are all that a run is.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .baselines import System
from .brush import Brush
from .denoiser import NODE, DenoiserConfig
from .diffusion import Ladder, Move, Solver, finer, moves, ramped
from .errors import UsageError
from .field import NoiseField
from .grid import Grid
from .machine import Precision, check_precision, find_device, full_device_said, release_memory
from .progress import Tell, Told
from .scratch import CHUNK, Plane, Work, check_room, new_plane
from .store import EmbeddingMap
from .stream import TILE, CanvasDenoiser, on_host, read_plane, side_by_side, threads_for, tiles_of

SAVE_EVERY = 60.0
"""Seconds between two generations on disk of a state that is in memory."""
_GUIDED_FROM = 0.6  # noise of a mean over 1 µm²; below, guidance changed nothing that was seen, and takes more time
_RETOUCHED_BELOW = 0.1  # noise of a pixel; a mean over 8 x 8 of them then carries 0.0125, and shows nothing new
_RETOUCHES = 3  # at most, one after another
_PIXEL = 12  # bytes of one pixel of a plane
_BASE = 1_200_000_000  # bytes of a process that has torch, brush, encoder and the slide's libraries loaded
_WINDOWS = 240, 300  # bytes that the operator takes for a pixel of its window, measured from 640 to 1280 pixels a side
_CARRIED = 160  # of a pixel of a window that a GPU is given: it, what was before, and results of three tiles, twice
_SCARCE = 3 * 10**9  # bytes; of less, large activations go back to the system at once, which takes a fifth more time


@dataclass(frozen=True)
class Painting:
    """What is to be painted, and how.

    `region`: (top, left, height, width) in level-0 pixels of the reference; else the `size` x `size` pixels at
    `mpp` with the most tissue. `guidance` is for high noise. `memory`: bytes of the host that all of it may take; a
    state that does not fit is on disk. `device`: cpu, cuda or cuda:N; `precision`: of products there, grid level apart.
    """

    size: int = 4096
    region: tuple[int, int, int, int] | None = None
    mpp: float = 0.5
    seed: int = 0
    steps: int = 20
    guidance: float = 2.0
    solver: Solver = "2m"
    tile: int = TILE
    progressive: bool = True
    memory: int = 4 * 10**9
    device: str = "cpu"
    precision: Precision = "float32"


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


class Stage(NamedTuple):
    """One part of a painting: at a pitch (level of the ladder), a move, or without one the entry to the pitch."""

    level: int
    mpp: float
    sigma: float  # of the state before it; where it enters the first pitch, of the noise
    move: Move | None
    plain: bool = False  # keeps its evaluation without guidance, for the next one has none to be compared with
    retouches: tuple[Move, ...] = ()  # moves that follow at once, with what is deeper than 4 pixels kept


def stages(ladder: Ladder, painting: Painting) -> list[Stage]:
    """The stages of a painting; `ladder` starts at the canvas's pitch."""
    found: list[Stage] = []
    sigma, before = 0.0, None
    for index, rung in enumerate(ladder.rungs(painting.steps, progressive=painting.progressive)):
        level = ladder.pitches.index(rung.mpp)
        found.append(Stage(level, rung.mpp, sigma if index else rung.sigmas[0], None))
        steps = moves(rung.sigmas, painting.solver, stream=1000 * (index + 1), before=before)
        found += [Stage(level, rung.mpp, move.sigma, move) for move in steps]
        sigma, before = rung.sigmas[-1], 2 * steps[-1].sigma
    following = found[-1]
    for index in range(len(found) - 1, -1, -1):
        stage = found[index]
        if stage.move is not None:
            found[index] = stage._replace(plain=guidance_at(painting, stage) != guidance_at(painting, following))
            following = stage
    return _with_retouches(found, painting)


def _with_retouches(todo: list[Stage], painting: Painting) -> list[Stage]:
    """Moves at next to no noise made part of the stage before them."""
    found: list[Stage] = []
    for stage in todo:
        last = found[-1] if found else stage
        if (
            stage.move is not None and stage.sigma < _RETOUCHED_BELOW and guidance_at(painting, stage) == 1
            and last.move is not None and len(last.retouches) < _RETOUCHES
        ):  # fmt: skip
            found[-1] = last._replace(retouches=(*last.retouches, stage.move))
        else:
            found.append(stage)
    return found


def reach(config: DenoiserConfig) -> int:
    """Pixels around a tile that a stage reads at most."""
    return config.halo + _RETOUCHES * config.retouch_halo


def wants_before(stage: Stage) -> bool:
    """Whether a stage reads the last evaluation: a finer pitch begins with its slopes, a multistep move with itself."""
    return stage.move is None or stage.move.old != 0


def guidance_at(painting: Painting, stage: Stage) -> float:
    """How strongly the embeddings are followed at a stage: guidance is for what they decide, not for fine detail.

    Kynkäänniemi et al. (2024) found the same for low noise levels.
    """
    return painting.guidance if stage.sigma * stage.mpp >= _GUIDED_FROM else 1.0


def whole(canvas: Grid, ladder: Ladder) -> Grid:
    """The canvas grown until every pitch of the ladder sees whole blocks of it."""
    return canvas.rounded(32 << (len(ladder.pitches) - 1))


def evaluated_pixels(ladder: Ladder, canvas: Grid, painting: Painting) -> int:
    """Pixels that the denoiser is asked about, over all stages; `ladder` starts at the canvas's pitch."""
    area = whole(canvas, ladder)
    return sum(_pixels(area.level(stage.level)) for stage in stages(ladder, painting) if stage.move)


def state_bytes(canvas: Grid, ladder: Ladder) -> int:
    """What the state takes at most: x and the evaluation before, each old and new, and the grid level."""
    return round(_pixels(whole(canvas, ladder)) * (4 * _PIXEL + 2.5))


def kept(memory: int) -> int | None:
    """Bytes of the largest activation that is kept for the next (`machine.keep_memory`), within so much memory: all, or
    where memory is scarce those of a band."""
    return 4 * 2**20 if memory < _SCARCE else None


def budget(painting: Painting, config: DenoiserConfig) -> tuple[int, int]:
    """Side of the tiles, and bytes that are left for the state, within the memory that the painting may take.

    Raises:
        UsageError: if it is too little for the smallest tile.
    """
    sides = [side for side in (1024, 768, 512, 256, 128) if side <= painting.tile] or [painting.tile]
    window = _WINDOWS[kept(painting.memory) is None]
    if not painting.device.startswith("cpu"):  # the operator takes the GPU's memory; as large as they are asked for
        sides = [painting.tile, *(painting.tile // k for k in (2, 4) if painting.tile % (k * NODE) == 0)]
        window = _CARRIED
    threads = threads_for(torch.device(painting.device)) or torch.get_num_threads()
    needs = [_BASE + threads * window * (side + 2 * reach(config)) ** 2 for side in sides]
    for side, need in zip(sides, needs, strict=True):
        if need <= painting.memory:
            return side, painting.memory - need
    raise UsageError(
        f"--max-memory {painting.memory / 1e9:g}GB is too small for one tile; give {needs[-1] / 1e9 + 0.01:.2f}GB or "
        "more, or fewer --threads"
    )


def check_rival(rival: System, canvas: Grid, painting: Painting) -> None:
    """Whether the canvas of one of `baselines` fits the memory that the painting may take, which is the device's too.

    Raises:
        UsageError: if not, or it is to be painted in bfloat16.
    """
    if painting.precision != "float32":
        raise UsageError(f"{rival.name} paints in float32; leave out --precision {painting.precision}")
    need = _BASE + rival.bytes_for(canvas)
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
    work: Work | None = None, hands: Hands | None = None, tell: Tell | None = None,
) -> Plane:  # fmt: skip
    """Paint `canvas` (finest pitch): (3, height, width) or a little more, in about [-1, 1].

    With a work folder it goes on from the newest generation there, and the state is on disk where it is more than
    `painting.memory`; the plane that comes back may then lie there. `hands`: a cluster that does the tiles; then it is
    on disk in any case. One of `baselines` paints by itself, in memory, and never goes on from a generation.

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
    painted = sum(_pixels(area.level(stage.level)) for stage in todo[:done] if stage.move)
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
                continue
            planes, done = run.after(stage, planes, None, keep=keep), number
            if work is not None and time.monotonic() - saved > SAVE_EVERY and number < len(todo):
                work.save(number, planes)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if work is not None and not on_disk and planes:
            work.save(done, planes)  # if there is room; else the same command begins at the last one
        raise
    return planes["x"]


class Run:
    """What the stages of one painting share; `area` is the whole canvas, as `whole` gives it.

    `grid_folder`: where the grid level is kept, else in memory; only its `owner` makes it, others read it.
    """

    def __init__(
        self, brush: Brush, maps: Mapping[float, EmbeddingMap], area: Grid, painting: Painting,
        grid_folder: Path | None, *, owner: bool = True,
    ) -> None:  # fmt: skip
        self._device = find_device(painting.device)
        check_precision(painting.precision, self._device)
        self._brush, self._maps, self._area, self._painting = brush.on(self._device), maps, area, painting
        ladder = brush.ladder.starting_at(area.mpp)
        self._details, self._top = ladder.details, len(ladder.pitches) - 1 if painting.progressive else 0
        self._grid_folder, self._owner = grid_folder, owner
        self._field = NoiseField(painting.seed)
        self._denoise: tuple[tuple[int, float], CanvasDenoiser] | None = None
        self.count: Callable[[int], None] = lambda pixels: None

    def after(
        self, stage: Stage, planes: Mapping[str, Plane], folder: Path | None, *, keep: bool, number: int = 0,
        hands: Hands | None = None,
    ) -> dict[str, Plane]:  # fmt: skip
        """The planes after a stage, new ones, in `folder` or in memory: x, and if it is to be kept the evaluation."""
        shape = self._area.level(stage.level).shape
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
        if hands is not None and folder is not None:
            done = hands.paint(number, tiles, denoiser, folder)
        else:
            done = self._here(stage, planes, found, tiles)
        for tile in done:
            if stage.move is not None:
                self.count(_pixels(tile))

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
        """White noise in a window counted from the canvas's corner."""
        grid = self._area.level(stage.level)
        place = Grid(grid.mpp, grid.top + window.top, grid.left + window.left, *window.shape)
        return self._field.read(place, stream=stream, device=self._device)

    def _entered(self, stage: Stage, planes: Mapping[str, Plane], tile: Grid) -> dict[str, Tensor]:
        """Noise where nothing is yet, else the coarser state and its last evaluation made finer."""
        if stage.level == self._top:
            return {"x": stage.sigma * self._noise(stage, tile)}
        below = tile.level(1)
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
            made = CanvasDenoiser(
                self._brush, self._maps, self._area, mpp=stage.mpp, guidance=key[1], tile=self._painting.tile,
                folder=self._grid_folder, precision=self._painting.precision,
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


def _pixels(grid: Grid) -> int:
    return grid.height * grid.width
