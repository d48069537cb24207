"""What a brush is trained on: points, their values and what they belong to, at random places and pitches.

A `TrainingPack` is a folder of zarr arrays: every slide decoded at each pitch of the ladder (block means, so that the
pitches are exact Haar levels of each other) beside its embeddings. A `CoordinateSampler` draws scenes from it. A scene
is a function, read where it is needed. The operator is given a fixed budget of its points, whatever its size: one
contiguous window, so that local operators see real neighbours, and scattered points over the rest, so that the grid
level sees the layout.

A draw is a pure function of (seed, step): training resumes bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from .commit import read_manifest, staged
from .embed import PITCHES, TileEncoder, embed_region, slide_fingerprint, terms_of
from .errors import RefusedError, UsageError
from .grid import Grid
from .labels import Labels
from .machine import undisturbed
from .scenes import Images, Scenes
from .slide import Slide
from .stains import draw_stain, in_stain
from .tissue import PITCH, Tissue, find_tissue

KIND = "training pack"
LADDER = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pitches of the ladder, µm."""
TRAIN_UNTIL = 0.75
"""Part of a slide's width that is trained on; what lies right of it is held out."""
LIMIT = 3.0
"""How far a standardised number of an embedding may go. A number that is nearly the same on all slides of a pack can be
hundreds of spreads away on another slide; a brush would be asked for what it has never seen."""
Symmetries = Literal["square", "mirror", "none"]
"""What scenes are turned by: all eight symmetries of the square, left and right exchanged, or nothing."""
_TURNS: dict[Symmetries, int] = {"square": 7, "mirror": 2, "none": 0}  # bits of `turned`
_STRIP = 1024


def build_pack(
    slides: Sequence[Slide],
    target: Path,
    *,
    encoder: TileEncoder | Labels,
    overwrite: bool = False,
    pitches: Sequence[float] = LADDER,
    sources: Sequence[dict[str, Any]] = (),
    labels: Sequence[str] = (),
    everywhere: bool = False,
    until: float = TRAIN_UNTIL,
    stains: int = 0,
) -> None:
    """Decode and embed slides into a training pack; that takes about 4 bytes a pixel of the finest pitch and stain.

    `sources`: what the pack remembers of where the slides came from, so that it is known again. `labels`: that of each
    slide, where `encoder` is `Labels`. `everywhere`: all of a slide is taken for tissue. `until`: part of a slide's
    width that is trained on. `stains`: after each slide it follows so many times more, each time in another stain,
    drawn by its place among the slides.

    Raises:
        SlideError: if a slide cannot be read.
        RefusedError, MachineError: as `commit.staged`.
    """
    about: dict[str, Any] = {"encoder": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim}
    about |= {"tile": encoder.tile, "pitches": list(pitches), "until": until, "slides": (1 + stains) * len(slides)}
    about |= {"sources": list(sources), "encoder_terms": terms_of(encoder)}
    about |= {"origins": [{"fingerprint": slide_fingerprint(one.path)[:16], "mpp": one.mpp} for one in slides]}
    about |= {"labels": list(encoder.names)} if isinstance(encoder, Labels) else {}
    about |= {"everywhere": True} if everywhere else {}
    about |= {"stains": stains} if stains else {}
    with staged(target, kind=KIND, about=about, overwrite=overwrite) as stage:
        root = zarr.open_group(stage / "slides", mode="w-", zarr_format=3)
        moments = _Moments(encoder.dim, len(pitches))
        for number, slide in enumerate(slides):
            tissue = Tissue.everywhere(slide.grid.at(PITCH)) if everywhere else find_tissue(slide)
            finest = _finest(slide, pitches)
            generator = np.random.default_rng(number)
            others = [in_stain(slide, draw_stain(generator)) for _ in range(stains)]
            for copy, seen in enumerate([slide, *others], number * (1 + stains)):
                group = root.create_group(str(copy))
                height, width = _keep_levels(group, seen, finest, pitches, moments, until)
                if isinstance(encoder, Labels):
                    maps = encoder.maps(labels[number], finest)
                else:
                    maps = embed_region(seen, finest, encoder=encoder, tissue=tissue)
                for mpp, found in maps.items():
                    _keep(group, f"embedding/{mpp:g}", found.values)
                    moments.add_embeddings(mpp, found.values[:, : math.ceil(found.values.shape[1] * until)])
                cover = tissue.cover(Grid(pitches[-1], 0, 0, height, width))
                _keep(group, "tissue", (cover > 0.5).astype(np.uint8))
        about["details"] = moments.details()
        about["embeddings"] = moments.embeddings()


def check_room(
    slides: Sequence[Slide], *, shares: Sequence[float], sizes: Sequence[int], until: float = TRAIN_UNTIL,
    pitches: Sequence[float] = LADDER,
) -> None:  # fmt: skip
    """Whether a pack of the slides will have room for the scenes of a `CoordinateSampler`, if it has the tissue.

    Raises:
        UsageError: if no slide has room for a scene of some pitch.
    """
    shapes = [_finest(slide, pitches).shape for slide in slides]
    for depth, (pitch, share, size) in enumerate(zip(pitches, shares, sizes, strict=True)):
        if share and not any(min(height >> depth, int((width >> depth) * until)) >= size for height, width in shapes):
            raise _no_room(size, pitch)


def _no_room(size: int, pitch: float) -> UsageError:
    return UsageError(
        f"no slide has {size} x {size} pixels at {pitch:g} µm to train on; give larger slides, smaller `sizes`, or "
        "that pitch a share of 0"
    )


def _finest(slide: Slide, pitches: Sequence[float]) -> Grid:
    """What a pack has of a slide: whole pixels of the coarsest pitch."""
    height, width = (
        math.floor(side / pitches[-1] + 1e-6) * round(pitches[-1] / pitches[0]) for side in slide.grid.extent[2:]
    )
    return Grid(pitches[0], 0, 0, height, width)


def _strips(grid: Grid) -> list[Grid]:
    return [
        Grid(grid.mpp, top, grid.left, min(_STRIP, grid.bottom - top), grid.width)
        for top in range(grid.top, grid.bottom, _STRIP)
    ]


def _halved(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    h, w, c = image.shape
    means = np.rint(image.reshape(h // 2, 2, w // 2, 2, c).mean((1, 3), dtype=np.float32))
    return np.asarray(means, np.uint8)


def _keep_levels(
    group: zarr.Group, slide: Slide, finest: Grid, pitches: Sequence[float], moments: _Moments, until: float
) -> tuple[int, int]:
    """Every pitch of a slide's image; height and width of the coarsest."""
    level = np.concatenate([slide.read(strip) for strip in _strips(finest)])
    _keep(group, f"image/{pitches[0]:g}", level)
    for depth, pitch in enumerate(pitches[1:]):
        moments.add_detail(depth, level[:, : int(until * level.shape[1])])
        level = _halved(level)
        _keep(group, f"image/{pitch:g}", level)
    height, width = level.shape[:2]
    return height, width


def _keep(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    chunks = tuple(min(size, 512) for size in values.shape[:2]) + values.shape[2:]
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        compressors=zarr.codecs.ZstdCodec(level=1, checksum=True),
        config={"write_empty_chunks": True},
    )
    with undisturbed():
        array[...] = values


class _Moments:
    """Sums over the slides: the data's detail at every pitch, mean and spread of the embeddings."""

    def __init__(self, dim: int, levels: int) -> None:
        self._detail = np.zeros((levels - 1, 2))
        self._sums: dict[float, tuple[NDArray[np.float64], NDArray[np.float64], int]] = {}
        self._dim = dim

    def add_detail(self, level: int, image: NDArray[np.uint8]) -> None:
        h, w = (side // 2 * 2 for side in image.shape[:2])
        blocks = image[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).astype(np.float32) / 127.5
        detail = blocks - blocks.mean((1, 3), keepdims=True)
        self._detail[level] += float((detail**2).sum(dtype=np.float64)), detail.size

    def add_embeddings(self, mpp: float, values: NDArray[np.float16] | NDArray[np.float32]) -> None:
        present = values.reshape(-1, self._dim).astype(np.float64)
        present = present[np.isfinite(present[:, 0])]
        total, squares, count = self._sums.get(mpp, (np.zeros(self._dim), np.zeros(self._dim), 0))
        self._sums[mpp] = total + present.sum(0), squares + (present**2).sum(0), count + len(present)

    def details(self) -> list[float]:
        return [max(round(float(math.sqrt(total / max(count, 1))), 5), 1e-4) for total, count in self._detail]

    def embeddings(self) -> dict[str, dict[str, list[float] | float]]:
        found = {}
        for mpp, (total, squares, count) in self._sums.items():
            mean = total / max(count, 1)
            spread = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 1e-8))
            found[f"{mpp:g}"] = {"mean": mean.round(5).tolist(), "std": spread.round(5).tolist(), "limit": LIMIT}
        return found


@dataclass(frozen=True)
class Packed:
    """One slide of a pack beside its images: embeddings by pitch, tissue at the coarsest pitch."""

    embeddings: dict[float, NDArray[np.float16]]
    tissue: NDArray[np.uint8]


class TrainingPack:
    """A pack that was built; images stay on disk (zarr) unless `in_memory`, or in the memory of a `device`."""

    def __init__(self, path: Path, *, in_memory: bool = False, device: torch.device | None = None) -> None:
        """Raises:
        RefusedError: if there is no finished pack at `path`.
        """
        manifest = read_manifest(path)
        if manifest is None or manifest.get("kind") != KIND:
            raise RefusedError(f"{path}: no finished training pack; build it with `wsi-brush train`")
        self.about: dict[str, Any] = manifest
        root: Any = zarr.open_group(path / "slides", mode="r")
        numbers, where = range(manifest["slides"]), device or (torch.device("cpu") if in_memory else None)
        self.images = {
            pitch: Images.of([root[f"{number}/image/{pitch:g}"] for number in numbers], where)
            for pitch in manifest["pitches"]
        }
        self.slides = [
            Packed(
                {mpp: np.asarray(root[f"{number}/embedding/{mpp:g}"][...]) for mpp in PITCHES},
                np.asarray(root[f"{number}/tissue"][...]),
            )
            for number in numbers
        ]


class CoordinateSampler:
    """Endless draws of scenes from a pack.

    shares: probability of each pitch; sizes: side of a scene at each pitch, pixels, a multiple of 32; window: side of
    the contiguous window, a multiple of 32; points: scattered points a scene; symmetries: what scenes are turned by;
    reach: if given, what `Scenes.seen` says of it is read by `draw`, which may be in another thread; device: where the
    scenes are wanted (the pack's images may be on disk).
    """

    def __init__(
        self,
        pack: TrainingPack,
        *,
        shares: Sequence[float],
        sizes: Sequence[int],
        window: int,
        points: int,
        seed: int = 0,
        held_out: bool = False,
        symmetries: Symmetries = "square",
        reach: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises:
        UsageError: if no slide has room for a scene of some pitch.
        """
        self._pack, self._window, self._count, self._seed = pack, window, points, seed
        self._pitches = tuple(pack.about["pitches"])
        self._tile, self._device = pack.about["tile"], torch.device(device)
        self._shares = np.asarray(shares) / np.sum(shares)
        self._sizes = dict(zip(self._pitches, sizes, strict=True))
        self._held_out, self._turns, self._reach = held_out, _TURNS[symmetries], reach
        self._room = {pitch: self._candidates(pitch) for pitch in self._pitches}
        for (pitch, room), share in zip(self._room.items(), self._shares, strict=True):
            if share and not room:
                raise _no_room(self._sizes[pitch], pitch)
        self._cells = {pitch: _Cells.of([s.embeddings[pitch] for s in pack.slides], self._device) for pitch in PITCHES}

    def _span(self, width: int) -> tuple[int, int]:
        edge = int(width * self._pack.about["until"])
        return (edge, width) if self._held_out else (0, edge)

    def _candidates(self, pitch: float) -> list[tuple[int, NDArray[np.int64]]]:
        """(slide, tissue cells (k, 2) of its part at the coarsest pitch) for the slides with room for a scene."""
        found = []
        for number, slide in enumerate(self._pack.slides):
            height, width = self._pack.images[pitch].shapes[number].tolist()
            first, last = self._span(width)
            if min(height, last - first) < self._sizes[pitch]:
                continue
            first, last = self._span(slide.tissue.shape[1])
            cells = np.argwhere(slide.tissue[:, first:last]) + np.array([0, first])
            if len(cells):
                found.append((number, cells))
        return found

    def draw(self, step: int, batch: int, *, mpp: float | None = None) -> Scenes:
        """The scenes of a step; the pitch is drawn unless given."""
        rng = np.random.default_rng([self._seed, step])
        mpp = float(rng.choice(self._pitches, p=self._shares)) if mpp is None else mpp
        size = self._sizes[mpp]
        slides, corners = self._places(rng, mpp, size, batch)
        turns = rng.integers(8, size=batch) & self._turns
        windows = rng.integers(0, (size - self._window) // 32 + 1, (batch, 2)) * 32
        places = self._lines(mpp, slides, corners, turns), windows, self._scatter(rng, windows, size)
        lines, at, points = (torch.from_numpy(found).to(self._device) for found in places)
        maps = {
            pitch: cells.around(slides, corners, size, self._tile * pitch / mpp, turns)
            for pitch, cells in self._cells.items()
        }
        scenes = Scenes(mpp, size, self._pack.images[mpp], lines, maps, at, self._window, points)
        if self._reach is not None:
            scenes.seen(self._reach)
        return scenes

    def _lines(
        self, mpp: float, slides: NDArray[np.int64], corners: NDArray[np.int64], turns: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """`Scenes.lines`: a symmetry begins in another corner and goes other ways."""
        images, back = self._pack.images[mpp], turns[:, None] >> np.arange(2) & 1
        width = images.shapes[slides, 1]
        top, left = (corners + back * (self._sizes[mpp] - 1)).T
        steps = np.stack([width, np.ones_like(width)], 1) * (1 - 2 * back)
        steps = np.where(turns[:, None] & 4, steps[:, ::-1], steps)
        return np.column_stack([images.starts[slides] + top * width + left, steps])

    def _places(
        self, rng: np.random.Generator, mpp: float, size: int, batch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slides (batch,), and corners (batch, 2) near random tissue cells, so that scenes stay in the slides' part."""
        room = self._room[mpp]
        odds = np.sqrt([len(cells) for _, cells in room])
        chosen, picks = rng.choice(len(room), batch, p=odds / odds.sum()), rng.random(batch)
        cells = np.stack(
            [room[index][1][int(pick * len(room[index][1]))] for index, pick in zip(chosen, picks, strict=True)]
        )
        slides = np.array([room[index][0] for index in chosen])
        centre = (cells + rng.random((batch, 2))) * self._pitches[-1] / mpp
        corner = np.rint(centre - size / 2 + rng.uniform(-0.4, 0.4, (batch, 2)) * size)
        shapes = self._pack.images[mpp].shapes[slides]
        spans = np.array([self._span(int(width)) for width in shapes[:, 1]])
        least = np.stack([np.zeros(batch), spans[:, 0]], 1)
        most = np.stack([shapes[:, 0], spans[:, 1]], 1) - size
        return slides, np.clip(corner, least, most).astype(np.int64)

    def _scatter(self, rng: np.random.Generator, windows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Distinct places outside each window, (n, k, 2), uniform; none where the window is the scene."""
        side = self._window
        if not self._count or size == side:
            return np.zeros((len(windows), 0, 2), np.int64)
        outside = size * size - side * side
        index = np.stack([rng.choice(outside, self._count, replace=False, shuffle=False) for _ in windows])
        top, left = windows[:, :1], windows[:, 1:]
        # in raster order: the rows above the window, those beside it, those below
        beside, below = index - top * size, index - top * size - side * (size - side)
        column = beside % (size - side)
        rows = np.where(
            beside < 0, index // size, np.where(below < 0, top + beside // (size - side), top + side + below // size)
        )
        across = np.where(below < 0, column + side * (column >= left), below % size)
        return np.stack([rows, np.where(beside < 0, index % size, across)], -1)


Picture = TypeVar("Picture", NDArray[Any], Tensor)


def turned(image: Picture, turn: int) -> Picture:
    """One of the eight symmetries of the square, on two axes first: flip rows (1), flip columns (2), transpose (4)."""
    axes = tuple(axis for axis in (0, 1) if turn >> axis & 1)
    if isinstance(image, Tensor):
        image = image.flip(axes) if axes else image
    elif axes:
        image = np.flip(image, axes)
    return image.swapaxes(0, 1) if turn & 4 else image


@dataclass(frozen=True)
class _Cells:
    """The embeddings of all slides at one pitch: rows of `values`, the last one for where there is none; `shapes`
    (slides, 2) in cells, `starts` (slides,) rows."""

    values: Tensor
    shapes: NDArray[np.int64]
    starts: NDArray[np.int64]

    @staticmethod
    def of(slides: Sequence[NDArray[np.float16]], device: torch.device) -> _Cells:
        shapes = np.array([values.shape[:2] for values in slides])
        parts = [values.reshape(-1, values.shape[-1]) for values in slides]
        absent = np.full((1, slides[0].shape[-1]), np.nan, np.float16)
        starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
        return _Cells(torch.from_numpy(np.concatenate([*parts, absent])).to(device), shapes, starts)

    def around(
        self, slides: NDArray[np.int64], corners: NDArray[np.int64], size: int, cell: float, turns: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """What bilinear reading inside turned scenes touches: values and presence of cells, corners in the scenes'
        pixels, a cell's side in pixels."""
        count = math.ceil(size / cell) + 2
        first = np.floor(corners / cell - 0.5)
        lines = first[..., None].astype(int) + np.arange(count)  # (n, 2, count)
        corner = first * cell - corners
        back = (turns[:, None] >> np.arange(2) & 1).astype(bool)
        lines = np.where(back[..., None], lines[..., ::-1], lines)
        corner = np.where(back, size - corner - count * cell, corner)
        inside = (lines >= 0) & (lines < self.shapes[slides][..., None])
        index = (self.starts[slides, None] + lines[:, 0] * self.shapes[slides, 1:])[:, :, None] + lines[:, 1, None]
        index = np.where(inside[:, 0, :, None] & inside[:, 1, None], index, len(self.values) - 1)
        across = (turns & 4).astype(bool)
        index = np.where(across[:, None, None], index.swapaxes(1, 2), index)
        corner = np.where(across[:, None], corner[:, ::-1], corner).astype(np.float32)
        device = self.values.device
        values = self.values[torch.from_numpy(index).to(device)].float()
        present = values[..., 0].isfinite()
        values = values.where(present[..., None], 0.0)
        return values, present.float(), torch.from_numpy(corner).to(device), cell
