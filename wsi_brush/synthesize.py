"""Verb: brush + reference -> pyramid: a new slide that follows a reference's embeddings and copies none of its pixels."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import __version__
from .brush import Brush
from .commit import check_target, staged
from .diffusion import Rung, finer, solve
from .embed import embed_region
from .encoder import Encoder
from .errors import UsageError
from .field import NoiseField
from .grid import Grid
from .pyramid import SHARD, Pyramid
from .slide import Slide, open_slide
from .store import EmbeddingMap
from .stream import TILE, CanvasDenoiser
from .tissue import Tissue, find_tissue

KIND = "pyramid"


@dataclass(frozen=True)
class Painting:
    """What is to be painted, and how.

    `region`: (top, left, height, width) in level-0 pixels of the reference; else the `size` x `size` pixels at
    `mpp` with the most tissue.
    """

    size: int = 4096
    region: tuple[int, int, int, int] | None = None
    mpp: float = 0.5
    seed: int = 0
    steps: int = 20
    guidance: float = 2.0
    tile: int = TILE
    progressive: bool = True


@dataclass(frozen=True)
class Painted:
    """What came of it: where the slide is, which region (level-0 pixels of the reference), what it took, how close it is.

    cosine: mean cosine between the standardised embeddings of the painting and of its reference, by pitch in µm.
    """

    path: Path
    region: tuple[int, int, int, int]
    shape: tuple[int, int]
    seconds: float
    cosine: dict[float, float]


Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def choose_canvas(slide: Slide, painting: Painting, tissue: Tissue) -> Grid:
    """The pixels to paint, at the painting's pitch.

    Raises:
        UsageError: if the region or the size does not fit the slide.
    """
    scale = slide.mpp / painting.mpp
    if painting.region is not None:
        top, left, height, width = painting.region
        inside = min(top, left) >= 0 and top + height <= slide.grid.height and left + width <= slide.grid.width
        if not inside or height < 1 or width < 1:
            raise UsageError(
                f"{slide.path}: region {top},{left},{height},{width} is not inside the slide; level 0 is "
                f"{slide.grid.height} x {slide.grid.width} pixels; give TOP,LEFT,HEIGHT,WIDTH within it"
            )
        edges = (round(top * scale), round(left * scale), round((top + height) * scale), round((left + width) * scale))
        if edges[2] <= edges[0] or edges[3] <= edges[1]:
            raise UsageError(f"{slide.path}: the region is smaller than one pixel at {painting.mpp:g} µm; enlarge it")
        return Grid(painting.mpp, edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1])
    if painting.size < 1:
        raise UsageError(f"a size of {painting.size} pixels cannot be painted; give --size 4096")
    room = [math.floor(side * scale + 1e-6) for side in slide.grid.shape]
    if min(room) < painting.size:
        raise UsageError(
            f"{slide.path}: {room[0]} x {room[1]} pixels at {painting.mpp:g} µm, too small for {painting.size} x "
            f"{painting.size}; give --size {min(room)} or less"
        )
    top, left = _richest(tissue, painting.size * painting.mpp)
    # whole cells of the coarsest pitch, so that every level of the ladder starts at a pixel
    corner = [
        min(round(place / painting.mpp), side - painting.size) // 16 * 16
        for place, side in zip((top, left), room, strict=True)
    ]
    return Grid(painting.mpp, corner[0], corner[1], painting.size, painting.size)


def _richest(tissue: Tissue, side: float) -> tuple[float, float]:
    """Corner in µm of the square of `side` µm with the most tissue; of equals the one nearest the tissue's middle."""
    mask, mpp = tissue.mask, tissue.grid.mpp
    cells = [max(1, min(round(side / mpp), length)) for length in mask.shape]
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    down, right = cells
    counts = total[down:, right:] - total[:-down, right:] - total[down:, :-right] + total[:-down, :-right]
    best = np.argwhere(counts == counts.max())
    places = np.argwhere(mask)
    middle = (places.mean(0) if len(places) else np.array(mask.shape) / 2) - np.array(cells) / 2
    top, left = best[np.argmin(((best - middle) ** 2).sum(1))]
    return (tissue.grid.top + float(top)) * mpp, (tissue.grid.left + float(left)) * mpp


def paint_canvas(
    brush: Brush, maps: dict[float, EmbeddingMap], canvas: Grid, painting: Painting, *, tell: Tell | None = None
) -> Tensor:
    """Paint `canvas` (finest pitch): pixels (3, height, width) in about [-1, 1].

    Raises:
        UsageError: if the brush does not paint at that pitch.
    """
    ladder = brush.ladder.starting_at(canvas.mpp)
    rungs = ladder.rungs(painting.steps, progressive=painting.progressive)
    whole = canvas.rounded(32 << (len(ladder.pitches) - 1))
    field = NoiseField(painting.seed)
    counter = _Counter(rungs, ladder.pitches, whole, tell)
    state = rungs[0].sigmas[0] * field.read(whole.level(ladder.pitches.index(rungs[0].mpp)))
    for index, rung in enumerate(rungs):
        if index:
            level = ladder.pitches.index(rung.mpp)
            noise = field.read(whole.level(level), stream=1 + level)
            state = finer(state, rungs[index - 1].sigmas[-1], ladder.details[level], noise)
        denoise = CanvasDenoiser(
            brush, maps, whole, mpp=rung.mpp, guidance=painting.guidance, tile=painting.tile, tell=counter.add
        )
        state = solve(denoise, state, rung.sigmas)
    return state[:, : canvas.height, : canvas.width]


class _Counter:
    """Pixels evaluated so far, of all that the rungs will evaluate."""

    def __init__(self, rungs: list[Rung], pitches: tuple[float, ...], whole: Grid, tell: Tell | None) -> None:
        self._done, self._tell = 0, tell
        areas = {pitch: (whole.height >> level) * (whole.width >> level) for level, pitch in enumerate(pitches)}
        self._total = sum((len(rung.sigmas) - 1) * areas[rung.mpp] for rung in rungs)

    def add(self, pixels: int) -> None:
        self._done += pixels
        if self._tell is not None:
            self._tell("painting", self._done, self._total)


def synthesize_slide(
    reference: Path | str, target: Path | str, painting: Painting, *, brush: Brush, encoder: Encoder,
    assume_mpp: float | None = None, force_mpp: float | None = None, overwrite: bool = False, png: Path | None = None,
    tell: Tell | None = None,
) -> Painted:  # fmt: skip
    """Paint a new slide after a reference, as an OME-Zarr pyramid at `target`.

    `png`: also write the reference and the painting side by side there.

    Raises:
        UsageError, SlideError, RefusedError, MachineError: one line each, before the hours of work where possible.
    """
    start = time.monotonic()
    target = Path(target)
    check_target(target, kind=KIND, overwrite=overwrite)
    if png is not None and not os.access(png.parent, os.W_OK):
        raise UsageError(f"{png}: its folder is missing or cannot be written to")
    if brush.about["fingerprint"] != encoder.fingerprint:
        raise UsageError(
            f"the brush was trained on embeddings of {brush.about['encoder']} ({brush.about['fingerprint'][:12]}), "
            f"the encoder is {encoder.name} ({encoder.fingerprint[:12]}); use the encoder it was trained with"
        )
    slide = open_slide(reference, assume_mpp=assume_mpp, force_mpp=force_mpp)
    tissue = find_tissue(slide)
    canvas = choose_canvas(slide, painting, tissue)
    told = None if tell is None else (lambda done, total: tell("embedding the reference", done, total))
    whole = canvas.rounded(32 << (len(brush.ladder.starting_at(canvas.mpp).pitches) - 1))
    maps = embed_region(slide, whole, encoder=encoder, pitches=brush.pitches, tissue=tissue, progress=told)
    with staged(target, kind=KIND, about={"format": 1}, overwrite=overwrite) as stage:
        state = paint_canvas(brush, maps, canvas, painting, tell=tell)
        pyramid = Pyramid(stage, canvas, about=_provenance(slide, canvas, painting, brush, encoder))
        for part in canvas.tiles(SHARD):
            rows, columns = part.within(canvas)
            pyramid.write(part, as_pixels(state[:, rows, columns]))
        pyramid.finish()
        del state
    painted = open_slide(target)
    if png is not None:
        write_pair(png, slide, painted, canvas)
    cosine = compare(slide, painted, canvas, brush=brush, encoder=encoder)
    return Painted(target, _level0(slide, canvas), canvas.shape, time.monotonic() - start, cosine)


def as_pixels(image: Tensor) -> NDArray[np.uint8]:
    """(3, h, w) in [-1, 1] -> (h, w, 3) in 0 to 255."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def compare(slide: Slide, painted: Slide, canvas: Grid, *, brush: Brush, encoder: Encoder) -> dict[float, float]:
    """Mean cosine between standardised embeddings of a painting and of its reference at the same place, by pitch.

    Over the tiles of the painting that lie whole inside it and hold tissue in both; NaN where there is none.
    """
    found = {}
    for mpp in brush.pitches:
        side = encoder.tile * mpp
        inner = Grid(side, 0, 0, *(math.floor(edge / side + 1e-6) for edge in painted.grid.extent[2:]))
        if not (inner.height and inner.width):
            found[mpp] = math.nan
            continue
        here = Shifted(slide, canvas)
        pair = [
            embed_region(one, inner, encoder=encoder, pitches=(mpp,), tissue=find_tissue(one))[mpp]
            for one in (here, painted)
        ]
        vectors = [brush.standardised(mpp, one.values.astype(np.float32)) for one in pair]
        both = np.isfinite(vectors[0][..., 0]) & np.isfinite(vectors[1][..., 0])
        first, second = (vector[both] for vector in vectors)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        found[mpp] = float(((first * second).sum(1) / norms).mean()) if both.any() else math.nan
    return found


@dataclass(frozen=True)
class Shifted:
    """A part of a slide seen as a slide of its own: its corner is the canvas's."""

    slide: Slide
    canvas: Grid

    @property
    def path(self) -> Path:
        """The slide's file."""
        return self.slide.path

    @property
    def mpp(self) -> float:
        """The canvas's pitch, µm."""
        return self.canvas.mpp

    @property
    def grid(self) -> Grid:
        """The canvas, at its own corner."""
        return Grid(self.canvas.mpp, 0, 0, self.canvas.height, self.canvas.width)

    def read(self, grid: Grid) -> NDArray[np.uint8]:
        """As `Slide.read`; a canvas whose corner is no pixel of `grid`'s pitch is moved to the nearest."""
        top, left = (round(edge / grid.mpp) for edge in self.canvas.extent[:2])
        return self.slide.read(Grid(grid.mpp, grid.top + top, grid.left + left, grid.height, grid.width))


def write_pair(path: Path, slide: Slide, painted: Slide, canvas: Grid, *, side: int = 1024) -> None:
    """Reference and painting side by side, whole above and the middle at full resolution below, as a PNG."""
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    factor = max(1, -(-max(canvas.shape) // side))
    small = Grid(canvas.mpp * factor, 0, 0, canvas.height // factor, canvas.width // factor)
    crop = min(side, *canvas.shape)
    near = Grid(canvas.mpp, (canvas.height - crop) // 2, (canvas.width - crop) // 2, crop, crop)
    rows = []
    for grid in (small, near):
        left, right = Shifted(slide, canvas).read(grid), painted.read(grid)
        rows.append(np.concatenate([left, np.full((left.shape[0], 16, 3), 255, np.uint8), right], 1))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((8, 8), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    picture = Image.fromarray(np.concatenate([np.full((24, width, 3), 255, np.uint8), *padded]))
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), "reference", fill=(0, 0, 0))
    draw.text((rows[0].shape[1] // 2 + 16, 6), "SYNTHETIC (painted by wsi-brush)", fill=(160, 0, 0))
    marks = PngInfo()
    marks.add_text("Comment", "right half: synthetic image, painted by wsi-brush; not for diagnosis")
    partial = path.with_name(f"{path.name}.partial")
    picture.save(partial, format="PNG", pnginfo=marks)
    os.replace(partial, path)


def _level0(slide: Slide, canvas: Grid) -> tuple[int, int, int, int]:
    top, left, bottom, right = (round(edge / slide.mpp) for edge in canvas.extent)
    return top, left, bottom - top, right - left


def _provenance(slide: Slide, canvas: Grid, painting: Painting, brush: Brush, encoder: Encoder) -> dict[str, Any]:
    """What stands on every level of the painting; nothing of the reference but its pixel size and the region."""
    return {
        "synthetic": True,
        "generator": "wsi-brush",
        "versions": {"wsi-brush": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "brush_sha256": brush.sha256,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "seed": painting.seed,
        "steps": painting.steps,
        "guidance": painting.guidance,
        "progressive": painting.progressive,
        "mpp": canvas.mpp,
        "reference": {"mpp": slide.mpp, "mpp_source": slide.mpp_source, "region": list(_level0(slide, canvas))},
    }
