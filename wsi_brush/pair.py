"""A painting beside its reference: how close it is, and both as one picture."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .brush import Brush
from .distances import cosine
from .embed import COVER
from .encoder import Encoder
from .errors import MachineError, RefusedError
from .grid import Grid
from .regions import at_once
from .slide import Slide
from .tissue import PITCH, Tissue, tissue_mask

MARK = "right half: synthetic image, painted by wsi-brush; not for diagnosis"
"""Stands in the comment of every picture of a pair."""
COMPARED = 64
"""Tiles of a pitch that are compared at most."""


def read_reference(slide: Slide, canvas: Grid, grid: Grid) -> NDArray[np.uint8]:
    """The reference at `grid`, which is counted from the canvas's corner, as the painting's pixels are.

    Where that corner is no pixel of `grid`'s pitch, the nearest one is.
    """
    top, left = (round(edge / grid.mpp) for edge in canvas.extent[:2])
    return slide.read(Grid(grid.mpp, grid.top + top, grid.left + left, grid.height, grid.width))


def compare(slide: Slide, painted: Slide, canvas: Grid, *, brush: Brush, encoder: Encoder) -> dict[float, float]:
    """Mean cosine between standardised embeddings of a painting and of its reference at the same place, by pitch.

    Over the tiles that lie whole inside the painting and hold tissue in the reference, whatever was painted there; of
    many, over 64 that are spread evenly. NaN where there is none, and at pitches finer than the painting's, of which it
    has nothing to show.
    """
    cells = canvas.whole_cells(PITCH)
    tissue = Tissue.everywhere(cells)
    if not brush.everywhere:
        tissue = Tissue(tissue_mask(read_reference(slide, canvas, cells), PITCH), cells)
    found = {}
    for mpp in brush.pitches:
        lattice = canvas.whole_cells(encoder.tile * mpp)
        seen = tissue.cover(lattice) >= COVER if mpp > 0.99 * canvas.mpp else np.zeros(lattice.shape, np.bool_)
        corners = np.argwhere(seen) * encoder.tile
        corners = corners[np.linspace(0, len(corners) - 1, min(len(corners), COMPARED)).round().astype(int)]
        if not len(corners):
            found[mpp] = math.nan
            continue
        grids = [Grid(mpp, int(y), int(x), encoder.tile, encoder.tile) for y, x in corners]
        sides = (
            np.stack([read_reference(slide, canvas, grid) for grid in grids]),
            np.stack([painted.read(grid) for grid in grids]),
        )
        real, ours = (vectors for _, vectors in at_once(encoder, encoder, sides))
        found[mpp] = float(cosine(brush.standardised(mpp, real), brush.standardised(mpp, ours)).mean())
    return found


def write_pair(path: Path, slide: Slide, painted: Slide, canvas: Grid, *, side: int = 1024) -> None:
    """Reference and painting side by side, whole above and the middle at full resolution below, as a PNG."""
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    factor = -(-max(canvas.shape) // side)
    small = Grid(canvas.mpp * factor, 0, 0, *(max(1, length // factor) for length in canvas.shape))
    crop = min(side, *canvas.shape)
    near = Grid(canvas.mpp, (canvas.height - crop) // 2, (canvas.width - crop) // 2, crop, crop)
    rows = []
    for grid in (small, near):
        left, right = read_reference(slide, canvas, grid), painted.read(grid)
        rows.append(np.concatenate([left, np.full((left.shape[0], 16, 3), 255, np.uint8), right], 1))
    width = max(max(row.shape[1] for row in rows), 420)  # room for the words
    padded = [np.pad(row, ((8, 8), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    picture = Image.fromarray(np.concatenate([np.full((24, width, 3), 255, np.uint8), *padded]))
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), "left: reference", fill=(0, 0, 0))
    draw.text((130, 6), "right: SYNTHETIC, painted by wsi-brush", fill=(160, 0, 0))
    marks = PngInfo()
    marks.add_text("Comment", MARK)
    partial = path.with_name(f"{path.name}.partial")
    try:
        picture.save(partial, format="PNG", pnginfo=marks)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_picture(path: Path, *, overwrite: bool) -> None:
    """Whether a picture may be written at `path`: nothing is there, or a picture of ours that is to be replaced.

    Raises:
        RefusedError, MachineError: if not.
    """
    from PIL import Image, UnidentifiedImageError

    if path.exists():
        try:
            with Image.open(path) as picture:
                ours = picture.info.get("Comment") == MARK
        except (UnidentifiedImageError, OSError):
            ours = False
        if not ours or not overwrite:
            cure = "choose another name or pass --overwrite" if ours else "choose another name"
            raise RefusedError(f"{path}: exists{'' if ours else ' and is no picture of wsi-brush'}; {cure}")
    probe = path.with_name(f"{path.name}.partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MachineError(f"{path.parent}: cannot be written to ({error.strerror}); choose another --png") from None
