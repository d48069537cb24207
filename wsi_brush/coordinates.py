"""What a brush is trained on: points, their values and what they belong to, at random places and pitches.

A `TrainingPack` is a folder of zarr arrays: every slide decoded at each pitch of the ladder (block means, so that the
pitches are exact Haar levels of each other) beside its embeddings. A `CoordinateSampler` draws scenes from it. Of a
scene the operator is given a fixed budget of points, whatever the size of the slide: one contiguous window, so that
local operators see real neighbours, and scattered points over the rest, so that the grid level sees the layout. The
scattered points carry the inverse of their density as weight (Horvitz and Thompson, 1952): sums over points then
estimate sums over the scene without bias.

A draw is a pure function of (seed, step): training resumes bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from .commit import read_manifest, staged
from .embed import PITCHES, TileEncoder, embed_region
from .errors import RefusedError, UsageError
from .grid import Grid
from .machine import undisturbed
from .slide import Slide
from .tissue import find_tissue

KIND = "training pack"
LADDER = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pitches of the ladder, µm."""
TRAIN_UNTIL = 0.75
"""Part of a slide's width that is trained on; what lies right of it is held out."""
_STRIP = 1024


def build_pack(
    slides: Sequence[Slide],
    target: Path,
    *,
    encoder: TileEncoder,
    overwrite: bool = False,
    pitches: Sequence[float] = LADDER,
    sources: Sequence[dict[str, Any]] = (),
) -> None:
    """Decode and embed slides into a training pack; needs about 4 bytes a pixel at the finest pitch.

    `sources`: what the pack remembers of where the slides came from, so that it is known again.

    Raises:
        SlideError: if a slide cannot be read.
        RefusedError, MachineError: as `commit.staged`.
    """
    about: dict[str, Any] = {"encoder": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim}
    about |= {"tile": encoder.tile, "pitches": list(pitches), "until": TRAIN_UNTIL, "slides": len(slides)}
    about["sources"] = list(sources)
    with staged(target, kind=KIND, about=about, overwrite=overwrite) as stage:
        root = zarr.open_group(stage / "slides", mode="w-", zarr_format=3)
        moments = _Moments(encoder.dim, len(pitches))
        for number, slide in enumerate(slides):
            group = root.create_group(str(number))
            tissue = find_tissue(slide)
            size = [
                math.floor(side / pitches[-1] + 1e-6) * round(pitches[-1] / pitches[0])
                for side in slide.grid.extent[2:]
            ]
            finest = Grid(pitches[0], 0, 0, size[0], size[1])
            level = np.concatenate([slide.read(strip) for strip in _strips(finest)])
            for depth, pitch in enumerate(pitches):
                if depth:
                    coarse = _halved(level)
                    moments.add_detail(depth - 1, level[:, : int(TRAIN_UNTIL * level.shape[1])])
                    level = coarse
                _keep(group, f"image/{pitch:g}", level)
            for mpp, found in embed_region(slide, finest, encoder=encoder, tissue=tissue).items():
                _keep(group, f"embedding/{mpp:g}", found.values)
                moments.add_embeddings(mpp, found.values)
            cover = tissue.cover(Grid(pitches[-1], 0, 0, level.shape[0], level.shape[1]))
            _keep(group, "tissue", (cover > 0.5).astype(np.uint8))
        about["details"] = moments.details()
        about["embeddings"] = moments.embeddings()


def _strips(grid: Grid) -> list[Grid]:
    return [
        Grid(grid.mpp, top, grid.left, min(_STRIP, grid.bottom - top), grid.width)
        for top in range(grid.top, grid.bottom, _STRIP)
    ]


def _halved(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    h, w, c = image.shape
    means = np.rint(image.reshape(h // 2, 2, w // 2, 2, c).mean((1, 3), dtype=np.float32))
    return np.asarray(means, np.uint8)


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

    def embeddings(self) -> dict[str, dict[str, list[float]]]:
        found = {}
        for mpp, (total, squares, count) in self._sums.items():
            mean = total / max(count, 1)
            spread = np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 1e-8))
            found[f"{mpp:g}"] = {"mean": mean.round(5).tolist(), "std": spread.round(5).tolist()}
        return found


@dataclass(frozen=True)
class Packed:
    """One slide of a pack: images by pitch, embeddings by pitch, tissue at the coarsest pitch."""

    images: dict[float, Any]
    embeddings: dict[float, NDArray[np.float16]]
    tissue: NDArray[np.uint8]


class TrainingPack:
    """A pack that was built; images stay on disk (zarr) unless `in_memory`."""

    def __init__(self, path: Path, *, in_memory: bool = False) -> None:
        """Raises:
        RefusedError: if there is no finished pack at `path`.
        """
        manifest = read_manifest(path)
        if manifest is None or manifest.get("kind") != KIND:
            raise RefusedError(f"{path}: no finished training pack; build it with `wsi-brush train`")
        self.about: dict[str, Any] = manifest
        root = zarr.open_group(path / "slides", mode="r")
        self.slides = []
        for number in range(manifest["slides"]):
            images: dict[float, Any] = {}
            for pitch in manifest["pitches"]:
                array = root[f"{number}/image/{pitch:g}"]
                images[pitch] = array[...] if in_memory else array  # type: ignore[index]
            embeddings = {mpp: np.asarray(root[f"{number}/embedding/{mpp:g}"][...]) for mpp in PITCHES}  # type: ignore[index]
            self.slides.append(Packed(images, embeddings, np.asarray(root[f"{number}/tissue"][...])))  # type: ignore[index]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes of one pitch, pixels in [-1, 1].

    images: (n, 3, size, size); maps: by pitch of the embeddings (values (n, r, c, dim) not standardised, zeros where
    absent; present (n, r, c); corner (n, 2) in pixels; cell in pixels); windows: (n, 2) corner of the contiguous window
    of side `window`; points: (n, k, 2) scattered places outside the windows; weight: inverse density of those points.
    """

    mpp: float
    images: NDArray[np.float32]
    maps: dict[float, tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]]
    windows: NDArray[np.int64]
    window: int
    points: NDArray[np.int64]
    weight: float


class CoordinateSampler:
    """Endless draws of scenes from a pack.

    shares: probability of each pitch; sizes: side of a scene at each pitch, pixels, a multiple of 32; window: side of
    the contiguous window, a multiple of 32; points: scattered points a scene.
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
    ) -> None:
        """Raises:
        UsageError: if no slide has room for a scene of some pitch.
        """
        self._pack, self._window, self._count, self._seed = pack, window, points, seed
        self._pitches = tuple(pack.about["pitches"])
        self._tile = pack.about["tile"]
        self._shares = np.asarray(shares) / np.sum(shares)
        self._sizes = dict(zip(self._pitches, sizes, strict=True))
        self._held_out = held_out
        self._room = {pitch: self._candidates(pitch) for pitch in self._pitches}
        for (pitch, room), share in zip(self._room.items(), self._shares, strict=True):
            if share and not room:
                raise UsageError(
                    f"no slide has {self._sizes[pitch]} x {self._sizes[pitch]} pixels at {pitch:g} µm to train on"
                )

    def _span(self, width: int) -> tuple[int, int]:
        edge = int(width * self._pack.about["until"])
        return (edge, width) if self._held_out else (0, edge)

    def _candidates(self, pitch: float) -> list[tuple[int, NDArray[np.int64]]]:
        """(slide, tissue cells (k, 2) of its part at the coarsest pitch) for the slides with room for a scene."""
        found = []
        for number, slide in enumerate(self._pack.slides):
            height, width = slide.images[pitch].shape[:2]
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
        size, room = self._sizes[mpp], self._room[mpp]
        odds = np.sqrt([len(cells) for _, cells in room])
        images = np.empty((batch, 3, size, size), np.float32)
        parts: dict[float, list[tuple[NDArray[Any], ...]]] = {pitch: [] for pitch in PITCHES}
        windows = np.empty((batch, 2), np.int64)
        points = np.empty((batch, self._count, 2), np.int64)
        for index in range(batch):
            number, cells = room[rng.choice(len(room), p=odds / odds.sum())]
            slide = self._pack.slides[number]
            top, left = self._place(rng, slide, cells, mpp, size)
            turn = int(rng.integers(8))
            pixels = np.asarray(slide.images[mpp][top : top + size, left : left + size], np.float32)
            images[index] = turned(pixels, turn).transpose(2, 0, 1) / 127.5 - 1
            for pitch, values in slide.embeddings.items():
                parts[pitch].append(_map_of(values, top, left, size, self._tile * pitch / mpp, turn))
            windows[index] = rng.integers(0, (size - self._window) // 32 + 1, 2) * 32
            points[index] = self._scatter(rng, windows[index], size)
        maps: dict[float, tuple[NDArray[Any], NDArray[Any], NDArray[Any], float]] = {}
        for pitch, rows in parts.items():
            values, present, corner = (np.stack(column) for column in zip(*rows, strict=True))
            maps[pitch] = (values, present, corner, self._tile * pitch / mpp)
        outside = size * size - self._window**2
        return Scenes(mpp, images, maps, windows, self._window, points, outside / self._count if self._count else 0.0)

    def _place(
        self, rng: np.random.Generator, slide: Packed, cells: NDArray[np.int64], mpp: float, size: int
    ) -> tuple[int, int]:
        """A corner near a random tissue cell, so that the scene stays in the slide's part."""
        height, width = slide.images[mpp].shape[:2]
        first, last = self._span(width)
        centre = (cells[rng.integers(len(cells))] + rng.random(2)) * self._pitches[-1] / mpp
        corner = np.rint(centre - size / 2 + rng.uniform(-0.4, 0.4, 2) * size).astype(int)
        return int(np.clip(corner[0], 0, height - size)), int(np.clip(corner[1], first, last - size))

    def _scatter(self, rng: np.random.Generator, window: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Distinct places outside the window, uniform; none where the window is the scene."""
        if not self._count or size == self._window:
            return np.zeros((self._count, 2), np.int64)
        inside = np.zeros((size, size), bool)
        inside[window[0] : window[0] + self._window, window[1] : window[1] + self._window] = True
        free = np.flatnonzero(~inside)
        return np.stack(np.unravel_index(rng.choice(free, self._count, replace=False), (size, size)), -1)


def turned(image: NDArray[Any], turn: int) -> NDArray[Any]:
    """One of the eight symmetries of the square, on two axes first: flip rows (1), flip columns (2), transpose (4)."""
    if turn & 1:
        image = image[::-1]
    if turn & 2:
        image = image[:, ::-1]
    return image.swapaxes(0, 1) if turn & 4 else image


def _map_of(
    values: NDArray[np.float16], top: int, left: int, size: int, cell: float, turn: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """The cells that bilinear reading inside a scene touches: values, presence, corner in the turned scene's pixels."""
    count = math.ceil(size / cell) + 2
    first = [math.floor(edge / cell - 0.5) for edge in (top, left)]
    rows, columns = (np.arange(start, start + count) for start in first)
    inside = ((rows >= 0) & (rows < values.shape[0]))[:, None] & ((columns >= 0) & (columns < values.shape[1]))
    found = values[rows.clip(0, values.shape[0] - 1)][:, columns.clip(0, values.shape[1] - 1)].astype(np.float32)
    present = inside & np.isfinite(found[..., 0])
    found = np.where(present[..., None], found, 0)
    corner = np.array([first[0] * cell - top, first[1] * cell - left], np.float32)
    end = corner + count * cell
    if turn & 1:
        corner[0] = size - end[0]
    if turn & 2:
        corner[1] = size - end[1]
    if turn & 4:
        corner = corner[::-1].copy()
    return np.ascontiguousarray(turned(found, turn)), np.ascontiguousarray(turned(present, turn), np.float32), corner
