"""The embeddings of a region: tiles through an encoder, onto lattices of several pitches; what cannot be read is named.

Neither what is damaged nor what was done before changes the embedding of another tile: batches are cut at the same
places, and a bad tile keeps its place in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .blocks import Blocks
from .errors import SlideError
from .grid import Grid
from .machine import Item, Result, side_by_side
from .reading import Readers
from .slide import Slide
from .store import EmbeddingMap
from .tiles import Batch, Window, batches, windows, without_first
from .tissue import PITCH, Tissue, tissue_mask

COVER = 0.05
"""Share of a tile that must be tissue for it to be embedded."""
_LISTED = 1000  # damaged tiles whose places a store gives, at each pitch; all of them are counted
_PIECE = 8  # cells a side of the piece of a tissue mask that damage costs

Progress = Callable[[int, int], None]
"""Called with the tiles done and the tiles there are."""


class TileEncoder(Protocol):
    """What embedding asks of an encoder (`encoder.Encoder` is one).

    One that computes with PyTorch may also say how many calls `at_once` it bears and gains by; without, it is one.
    """

    @property
    def name(self) -> str:
        """What it was loaded as."""

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""

    @property
    def tile(self) -> int:
        """Side of a tile, pixels."""

    @property
    def fingerprint(self) -> str:
        """Digest of its weights and of what is done to a tile before them."""

    def __call__(self, tiles: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """(n, tile, tile, 3) -> (n, dim)."""


@dataclass
class Damage:
    """Tiles that cannot be read: their cells by pitch, and why the first of them cannot."""

    cells: dict[float, list[tuple[int, int]]] = field(default_factory=dict)
    why: str = ""

    def __len__(self) -> int:
        return sum(len(cells) for cells in self.cells.values())

    def about(self) -> dict[str, Any]:
        """What a store says of it."""
        return {
            f"{mpp:g}": {"tiles": len(cells), "cells": [list(cell) for cell in cells[:_LISTED]]}
            for mpp, cells in self.cells.items()
        }


def embed_lattices(
    slide: Slide, region: Grid, tissue: Tissue, readers: Readers, encoder: TileEncoder, pitches: Sequence[float], *,
    strict: bool, progress: Progress | None, blocks: Blocks | None = None,
) -> tuple[dict[float, EmbeddingMap], Damage]:  # fmt: skip
    """The maps of a region, and what of it cannot be read: NaN there, or with `strict` an error.

    `blocks` has what was done before, and is given what is done. All else is as in `embed.embed_region`.

    Raises:
        SlideError: with `strict`, if a tile cannot be read; if the slide is gone, or too many readers die of it; if the
            encoder answers with numbers that are not finite.
    """
    lattices = {mpp: region.at(encoder.tile * mpp) for mpp in pitches}
    wanted = {mpp: tissue.cover(lattice) >= COVER for mpp, lattice in lattices.items()}
    values = {mpp: np.full((*one.shape, encoder.dim), np.nan, np.float16) for mpp, one in lattices.items()}
    total, damage = sum(int(cells.sum()) for cells in wanted.values()), Damage()

    def order() -> Iterator[Window]:
        for mpp, lattice in lattices.items():
            yield from windows(slide, lattice, mpp, wanted[mpp], encoder.tile)

    def put(rows: NDArray[np.float16], runs: Iterable[tuple[float, NDArray[np.intp]]]) -> None:
        start = 0
        for mpp, run in runs:
            cells = run[: len(rows) - start]
            if not len(cells):
                break
            values[mpp][tuple(cells.T)] = part = rows[start : start + len(cells)]
            start += len(cells)
            if len(bad := cells[np.isnan(part[:, 0])]):
                damage.cells.setdefault(mpp, []).extend((int(row), int(column)) for row, column in bad)

    done = 0
    for rows in () if blocks is None else blocks.load():
        put(rows, ((window.grid.mpp, window.cells) for window in without_first(order(), done)))
        done += len(rows)
    if strict and damage:
        raise SlideError(f"{slide.path}: {len(damage)} tiles could not be read before this run was killed")
    read = batches(readers.read(without_first(order(), done)), encoder.tile)
    for batch, rows in at_once(encoder, partial(_vectors, slide, encoder), read):
        if batch.bad:
            damage.why = damage.why or next(iter(batch.bad.values()))
            if strict:
                raise SlideError(damage.why)
        put(rows, batch.runs)
        if blocks is not None:
            blocks.add(rows)
        done += len(rows)
        if progress is not None:
            progress(done, total)
    return {mpp: EmbeddingMap(mpp, lattices[mpp], one) for mpp, one in values.items()}, damage


def at_once(
    encoder: TileEncoder, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """What `work`, which asks the encoder, makes of items, in order; as many are under way as the encoder gains by."""
    count = getattr(encoder, "at_once", 1)
    if count == 1:
        return ((item, work(item)) for item in items)
    return side_by_side(work, items, threads=count, cores=None, patient=False)


def _vectors(slide: Slide, encoder: TileEncoder, batch: Batch) -> NDArray[np.float16]:
    """The embeddings of a batch: (n, dim), NaN where a tile is bad.

    Numbers that are not finite end it: no damage makes them, and the next slide would have them too.
    """
    bad = np.zeros(len(batch.tiles), np.bool_)
    bad[list(batch.bad)] = True
    if bad.all():
        return np.full((len(bad), encoder.dim), np.nan, np.float16)
    with np.errstate(over="ignore"):  # what does not fit is found on the next line
        rows = encoder(batch.tiles).astype(np.float16)
    wrong = np.flatnonzero(~bad & ~np.isfinite(rows).all(axis=1))
    if len(wrong):
        places = [(mpp, row, column) for mpp, cells in batch.runs for row, column in cells]
        mpp, row, column = places[int(wrong[0])]
        raise SlideError(
            f"{slide.path}: encoder {encoder.name} gives numbers that are not finite, of the tile in row {row}, column "
            f"{column} at {mpp} µm/px"
        )
    rows[bad] = np.nan
    return rows


def readable_tissue(slide: Slide, readers: Readers) -> Tissue:
    """As `find_tissue`, by readers; what cannot be read may be tissue, and is tried again where its tiles are read.

    Raises:
        SlideError: if the slide is gone, or too many readers die of it.
    """
    grid = slide.grid.at(PITCH)
    pieces = slide.grid.at(PITCH * _PIECE)
    rgb = np.full((pieces.height, _PIECE, pieces.width, _PIECE, 3), 255, np.uint8)
    unread = np.zeros(pieces.shape, np.bool_)
    for one in readers.read(windows(slide, pieces, PITCH, np.ones(pieces.shape, np.bool_), _PIECE)):
        rows, columns = one.window.cells.T
        rgb[rows, :, columns] = one.tiles
        bad = list(one.bad)
        rgb[rows[bad], :, columns[bad]] = 255
        unread[rows[bad], columns[bad]] = True
    whole = rgb.reshape(pieces.height * _PIECE, pieces.width * _PIECE, 3)[: grid.height, : grid.width]
    mask = tissue_mask(whole, PITCH)
    if unread.any():
        mask |= unread.repeat(_PIECE, 0).repeat(_PIECE, 1)[: grid.height, : grid.width]
    return Tissue(mask, grid)
