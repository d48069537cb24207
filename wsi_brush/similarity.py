"""How like its reference a painting is, tile by tile: a map, with the worst places."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .distances import cosine
from .embed import TileEncoder, embed_region
from .errors import UsageError
from .grid import Grid
from .slide import Slide, moved
from .store import EmbeddingMap, EmbeddingStore
from .tissue import PITCH, Tissue, tissue_mask

if TYPE_CHECKING:
    from .brush import Brush  # takes seconds to import

_WHOLE = 1 / 32  # of a cell: lattices that lie no farther apart are one
_READ = 1024  # cells of tissue a side that are looked for at once


@dataclass(frozen=True)
class SimilarityMap:
    """Cosine of the standardised embeddings of two pictures, (rows, columns), NaN where there is nothing to compare.

    A cell of `lattice` is a tile seen at `mpp` µm a pixel; it is counted from the corner of the painting, in µm.
    """

    mpp: float
    lattice: Grid
    values: NDArray[np.float32]

    @property
    def worst(self) -> list[tuple[int, int]]:
        """The cells that were compared, least alike first: row, column."""
        order = np.argsort(self.values, axis=None, kind="stable")[: int(np.isfinite(self.values).sum())]
        rows, columns = np.unravel_index(order, self.values.shape)
        return list(zip(rows.tolist(), columns.tolist(), strict=True))

    def centre(self, cell: tuple[int, int]) -> tuple[float, float]:
        """The middle of a cell: µm down and right of the painting's corner."""
        rows, columns = self.lattice.centres()
        return float(rows[cell[0]]), float(columns[cell[1]])


def compare_slides(
    real: Slide,
    synthetic: Slide,
    mpp: float,
    *,
    brush: Brush,
    encoder: TileEncoder,
    down: float = 0.0,
    right: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> SimilarityMap:
    """The similarity of the tiles that lie whole inside a painting, where its reference has tissue.

    `down` and `right` say where the painting's corner lies on the real slide, µm. `progress` is told the tiles done and
    all that there are, of both; what it raises ends the comparison.

    Raises:
        UsageError: if the brush knows no embeddings at `mpp`, or the painting is coarser, or smaller than a tile.
        SlideError: if a slide cannot be read.
    """
    if mpp not in brush.pitches:
        known = ", ".join(f"{pitch:g}" for pitch in brush.pitches)
        raise UsageError(f"{mpp:g} µm: the brush knows embeddings at {known} µm")
    if synthetic.mpp > 1.01 * mpp:
        raise UsageError(
            f"{synthetic.path}: pixels of {synthetic.mpp:g} µm show nothing at {mpp:g} µm; take a coarser pitch"
        )
    lattice = synthetic.grid.whole_cells(encoder.tile * mpp)
    if not (lattice.height and lattice.width):
        raise UsageError(f"{synthetic.path}: smaller than a tile of {lattice.mpp:g} µm; take a finer pitch")
    placed = moved(real, down, right)
    tissue = _tissue(placed, lattice.at(PITCH), brush)
    maps, done = [], 0
    for slide in (placed, synthetic):

        def told(count: int, total: int, before: int = done) -> None:
            nonlocal done
            done = before + count
            if progress is not None:
                progress(done, 2 * total)

        found = embed_region(slide, lattice, encoder=encoder, pitches=(mpp,), tissue=tissue, progress=told)
        maps.append(found[mpp])
    return compare_maps(*maps, brush=brush)


def compare_stores(
    real: Path, synthetic: Path, mpp: float, *, brush: Brush, down: float = 0.0, right: float = 0.0
) -> SimilarityMap | None:
    """The same from two stores; None where their tiles are not the same ones: another lattice, or half a tile beside.

    Raises:
        RefusedError: if a store is damaged.
    """
    one, other = (EmbeddingStore.open(path).maps.get(mpp) for path in (real, synthetic))
    if one is None or other is None or one.dim != other.dim or not math.isclose(one.lattice.mpp, other.lattice.mpp):
        return None
    cells = [shift / one.lattice.mpp for shift in (down, right)]
    if any(abs(shift - round(shift)) > _WHOLE for shift in cells):
        return None
    top, left = one.lattice.top - round(cells[0]), one.lattice.left - round(cells[1])
    return compare_maps(replace(one, lattice=replace(one.lattice, top=top, left=left)), other, brush=brush)


def compare_maps(real: EmbeddingMap, synthetic: EmbeddingMap, *, brush: Brush) -> SimilarityMap:
    """The cosine of the standardised embeddings of every cell of the second that both have; lattices of one pitch."""
    common = synthetic.lattice.clip(real.lattice)
    one, other = (
        brush.standardised(each.mpp, each.values[common.within(each.lattice)].astype(np.float32))
        for each in (real, synthetic)
    )
    values = np.full(synthetic.lattice.shape, np.nan, np.float32)
    values[common.within(synthetic.lattice)] = cosine(one, other)
    return SimilarityMap(synthetic.mpp, synthetic.lattice, values)


def _tissue(slide: Slide, cells: Grid, brush: Brush) -> Tissue:
    if brush.everywhere:
        return Tissue.everywhere(cells)
    rgb = np.full((*cells.shape, 3), 255, np.uint8)
    for window in cells.tiles(_READ):
        rgb[window.within(cells)] = slide.read(window)
    return Tissue(tissue_mask(rgb, PITCH), cells)
