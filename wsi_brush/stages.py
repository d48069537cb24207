"""A painting as a list of stages, and the memory that it takes.

Each stage is a function of the state before it: the noise it starts from, a move of the solver, a change to the next
finer pitch. So the number of stages that are done and the state after them are all that a run is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .denoiser import NODE, DenoiserConfig
from .diffusion import Ladder, Move, Solver, moves
from .errors import UsageError
from .grid import Grid
from .machine import Precision
from .stream import TILE, threads_for

_GUIDED_FROM = 0.6  # noise of a mean over 1 µm²; below, guidance changed nothing that was seen, and takes more time
_RETOUCHED_BELOW = 0.1  # noise of a pixel; a mean over 8 x 8 of them then carries 0.0125, and shows nothing new
_RETOUCHES = 3  # at most, one after another
_PIXEL = 12  # bytes of one pixel of a plane
BASE = 1_200_000_000
"""Bytes of a process that has torch, brush, encoder and the slide's libraries loaded."""
_WINDOWS = 240, 300  # bytes that the operator takes for a pixel of its window, measured from 640 to 1280 pixels a side
_CARRIED = 160  # of a pixel of a window that a GPU is given: it, what was before, and results of three tiles, twice
_SCARCE = 3 * 10**9  # bytes; of less, large activations go back to the system at once, which takes a fifth more time


@dataclass(frozen=True)
class Painting:
    """What is to be painted, and how.

    `region`: (top, left, height, width) in level-0 pixels of the reference; else the `size` x `size` pixels at
    `mpp` with the most tissue. `guidance` is for high noise, where any but 1 takes twice the evaluations. `memory`:
    bytes of the host that all of it may take; a state that does not fit is on disk. `device`: cpu, cuda or cuda:N;
    `precision`: of products there, grid level apart.
    """

    size: int = 4096
    region: tuple[int, int, int, int] | None = None
    mpp: float = 0.5
    seed: int = 0
    steps: int = 20
    guidance: float = 1.0
    solver: Solver = "2m"
    tile: int = TILE
    progressive: bool = True
    memory: int = 4 * 10**9
    device: str = "cpu"
    precision: Precision = "float32"


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
    return sum(pixels_of(area.level(stage.level)) for stage in stages(ladder, painting) if stage.move)


def state_bytes(canvas: Grid, ladder: Ladder) -> int:
    """What the state takes at most: x and the evaluation before, each old and new, and the grid level."""
    return round(pixels_of(whole(canvas, ladder)) * (4 * _PIXEL + 2.5))


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
    needs = [BASE + threads * window * (side + 2 * reach(config)) ** 2 for side in sides]
    for side, need in zip(sides, needs, strict=True):
        if need <= painting.memory:
            return side, painting.memory - need
    raise UsageError(
        f"--max-memory {painting.memory / 1e9:g}GB is too small for one tile; give {needs[-1] / 1e9 + 0.01:.2f}GB or "
        "more, or fewer --threads"
    )


def pixels_of(grid: Grid) -> int:
    """How many pixels a grid has."""
    return grid.height * grid.width
