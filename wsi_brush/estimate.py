"""How long a painting will take here, from a few tiles done on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from .brush import Brush
from .denoiser import NODE
from .embed import TileEncoder
from .encoder import Encoder
from .grid import Grid
from .machine import check_precision, find_device, side_by_side, wait_for
from .pair import COMPARED
from .progress import Tell
from .regions import at_once
from .stages import Painting, budget, guidance_at, stages, whole
from .store import EmbeddingMap
from .stream import CanvasDenoiser, Seen, threads_for, tiles_of


def painting_seconds(brush: Brush, canvas: Grid, painting: Painting, *, tell: Tell | None = None) -> float:
    """Seconds of all moves: one tile a thread is timed, with guidance and without, and the grid level. `tell`
    may end it.

    Raises:
        UsageError: if the brush does not paint at that pitch, or the memory is too little.
        MachineError: if the painting's device is not there.
    """
    ladder, halo, device = (
        brush.ladder.starting_at(canvas.mpp),
        brush.denoiser.config.halo,
        find_device(painting.device),
    )
    check_precision(painting.precision, device)
    brush, alone = brush.on(device), threads_for(device)
    threads = alone or torch.get_num_threads()
    side, area = budget(painting, brush.denoiser.config)[0], whole(canvas, ladder)
    side = min(side, *area.shape)
    margin = -(-halo // NODE) * NODE
    seen: dict[Grid, Seen] = {}
    square = Grid(canvas.mpp, 0, 0, side + 2 * margin, side + 2 * margin)
    inner, state = Grid(1.0, margin, margin, side, side), np.zeros((3, *square.shape), np.float32)

    def timed(guidance: float) -> tuple[float, float, float]:
        """Seconds a pixel of the grid level, and of both sweeps over one tile while every thread has one; and of a
        retouch of it."""
        denoise = CanvasDenoiser(
            brush, _embeddings(brush, square), square, mpp=canvas.mpp, guidance=guidance, tile=side,
            precision=painting.precision,
        )  # fmt: skip

        def sweeps(tile: Grid) -> None:
            if tell is not None:
                tell("timing a few tiles", 0, 0)
            denoise.sketch(state, tile)
            seen[tile] = denoise.image(state, tile, keep=guidance == 1)
            seen[tile].image.cpu()  # as it comes back

        def retouch(tile: Grid) -> None:
            denoise.retouch(seen[tile].state, tile, seen[tile], tile, tile, 1.0)
            wait_for(device)

        if tell is not None:
            tell("timing a few tiles", 0, 0)
        denoise.at(1.0)
        nodes = [(tile, denoise.sketch(state, tile)) for tile in denoise.tiles(state)]
        denoise.prepare(state, 1.0, lambda _: nodes)
        list(side_by_side(sweeps, [inner] * threads, threads=alone))  # the first ones also warm up
        layout = _seconds(lambda: denoise.prepare(state, 1.0, lambda _: nodes)) / _pixels(square)
        both = _seconds(lambda: list(side_by_side(sweeps, [inner] * threads, threads=alone)))
        tiles = [inner] * threads if guidance == 1 else []
        if alone:  # a GPU's first one is much slower
            list(side_by_side(retouch, tiles, threads=alone))
        again = _seconds(lambda: list(side_by_side(retouch, tiles, threads=alone)))
        return layout, both, again

    costs = {guidance: timed(guidance) for guidance in {1.0, painting.guidance}}
    total = 0.0
    for stage in stages(ladder, painting):
        if stage.move is not None:
            layout, both, _ = costs[guidance_at(painting, stage)]
            again = costs[1.0][2] * len(stage.retouches)
            level = area.level(stage.level)
            tiles = tiles_of(level.shape, side, threads=alone)
            margin = halo + brush.denoiser.config.retouch_halo * len(stage.retouches)
            windows = sum(_pixels(tile.pad(margin).clip(Grid(1.0, 0, 0, *level.shape))) for tile in tiles)
            share = 1 / min(len(tiles), threads)
            total += layout * _pixels(level) + both * windows / _pixels(inner.pad(halo)) * share
            total += again * _pixels(level) / _pixels(inner) * share
    return total


def embedding_seconds(encoder: Encoder, brush: Brush, canvas: Grid) -> float:
    """Seconds of the encoder besides: the reference's tiles, and for the comparison some of them and of the painting's
    (`pair.compare`)."""
    tiles = [canvas.height * canvas.width / (brush.about["tile"] * mpp / canvas.mpp) ** 2 for mpp in brush.pitches]
    return encoder_seconds(encoder, sum(count + 2 * min(count, COMPARED) for count in tiles))


def encoder_seconds(encoder: TileEncoder, tiles: float, *, batch: int = 64) -> float:
    """Seconds of the encoder for so many tiles: two batches of blank ones are timed, after two that warm up."""
    blank = [np.zeros((batch, encoder.tile, encoder.tile, 3), np.uint8)] * 2
    list(at_once(encoder, encoder, blank))
    return _seconds(lambda: list(at_once(encoder, encoder, blank))) * tiles / (2 * batch)


def _embeddings(brush: Brush, canvas: Grid) -> dict[float, EmbeddingMap]:
    """Of nothing: what a tile shows does not change how long it takes."""
    maps = {}
    for mpp in brush.pitches:
        lattice = canvas.at(brush.about["tile"] * mpp)
        maps[mpp] = EmbeddingMap(mpp, lattice, np.zeros((*lattice.shape, brush.denoiser.config.dim), np.float32))
    return maps


def _pixels(grid: Grid) -> int:
    return grid.height * grid.width


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
