"""A painting whose condition passes from one slide to another, and whether a border is seen on the way.

    python pipelines/bundled/between.py SLIDE[@MPP] SLIDE[@MPP] -o OUT.png [--size 2048] [--seed 0] [--device cuda]

The embeddings under the left border are those of the first slide's square with the most tissue, under the right border
those of the second's; between them they are turned from one to the other, column by column (`slerp`). Writes OUT.png,
which says that it is synthetic, and OUT.json: how far neighbouring columns of pixels differ, beside both references,
and where on the way the painted tiles are.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from wsi_brush import __version__
from wsi_brush.baselines.patches import slerp
from wsi_brush.brush import Brush, load_brush
from wsi_brush.commit import write_json
from wsi_brush.embed import embed_region
from wsi_brush.encoder import Encoder, load_encoder
from wsi_brush.errors import RefusedError, UsageError, WsiBrushError
from wsi_brush.grid import Grid
from wsi_brush.machine import keep_memory
from wsi_brush.paint import paint_canvas
from wsi_brush.slide import Slide, moved, open_slide
from wsi_brush.stages import Painting, whole
from wsi_brush.store import EmbeddingMap
from wsi_brush.stream import read_plane
from wsi_brush.synthesize import as_pixels, choose_canvas
from wsi_brush.tissue import Tissue

MARK = "SYNTHETIC image, painted by wsi-brush; not for diagnosis"
NEAR = 32  # columns on either side that one is compared with
HEAD = 24


def reference(word: str, painting: Painting, brush: Brush) -> tuple[Slide, Tissue]:
    """A slide, as SLIDE or SLIDE@MPP, seen from the corner of its square with the most tissue."""
    path, at, mpp = word.rpartition("@")
    try:
        slide = open_slide(path, assume_mpp=float(mpp)) if at else open_slide(word)
    except ValueError:
        raise UsageError(f"{word}: {mpp!r} is no pixel size; expected SLIDE or SLIDE@MPP, as a.tif@0.5") from None
    tissue = brush.tissue_of(slide)
    canvas = choose_canvas(slide, painting, tissue)
    cells, corner = tissue.grid, canvas.extent[:2]
    top, left = (round(edge / cells.mpp) for edge in corner)
    return moved(slide, *corner), Tissue(tissue.mask, replace(cells, top=cells.top - top, left=cells.left - left))


def between(
    one: Mapping[float, EmbeddingMap], other: Mapping[float, EmbeddingMap], canvas: Grid, brush: Brush
) -> dict[float, EmbeddingMap]:
    """Maps that are the one's under the left border of a canvas, the other's under the right one."""
    _, left, _, right = canvas.extent
    found = {}
    for mpp, first in one.items():
        second, lattice = other[mpp], first.lattice
        if second.lattice != lattice:
            raise ValueError(f"{mpp:g} µm: {second.lattice} and {lattice} are not one lattice")
        edges = np.clip(
            np.arange(lattice.left, lattice.right + 1) * lattice.mpp, left, right
        )  # the parts of cells there
        share = ((edges[1:] + edges[:-1]) / 2 - left) / (right - left)
        start, end = (brush.standardised(mpp, side.values.astype(np.float32)) for side in (first, second))
        values = np.where(np.isnan(start), end, start)  # where one shows no tissue, the other alone
        both = np.isfinite(start[..., 0]) & np.isfinite(end[..., 0])
        shares = np.broadcast_to(share.astype(np.float32), both.shape)[both]
        values[both] = slerp(*(torch.from_numpy(one) for one in (start[both], end[both], shares))).numpy()
        moments = brush.about["embeddings"][f"{mpp:g}"]
        mean, std = (np.asarray(moments[name], np.float32) for name in ("mean", "std"))
        found[mpp] = EmbeddingMap(mpp, lattice, (values * std + mean).astype(np.float32))
    return found


def borders(pixels: NDArray[np.uint8]) -> dict[str, float]:
    """How far neighbours differ across each vertical line (mean), over the median of the lines near it.

    `largest` is that of the line that stands out most, `at` its column; `middle` the largest in the middle third. A
    border that is seen is one line that stands out more than any of a real picture.
    """
    steps = np.abs(np.diff(pixels.astype(np.int16), axis=1)).mean((0, 2))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(steps, NEAR, mode="reflect"), 2 * NEAR + 1)
    ratio = steps / np.maximum(np.median(around, -1), 1e-6)
    third = len(ratio) // 3
    found = {
        "largest": ratio.max(),
        "at": ratio.argmax() + 1,
        "middle": ratio[third:-third].max(),
        "spread": ratio.std(),
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def passage(
    painted: NDArray[np.uint8], real: list[NDArray[np.uint8]], brush: Brush, encoder: Encoder, mpp: float
) -> list[float]:
    """How far each column of tiles has come from the first reference (0) to the second (1): the mean embedding's place
    on the line through the references' means."""
    side = encoder.tile
    rows, columns = (length // side for length in painted.shape[:2])
    means = []
    for picture in (painted, *real):
        tiles = picture[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        vectors = encoder(np.ascontiguousarray(tiles.reshape(-1, side, side, 3)))
        means.append(brush.standardised(mpp, vectors).astype(np.float64).reshape(rows, columns, -1).mean(0))
    start, end = (one.mean(0) for one in means[1:])
    way = end - start
    return [round(float(one), 3) for one in (means[0] - start) @ way / max(float(way @ way), 1e-12)]


def main(arguments: argparse.Namespace) -> None:
    """Embed, paint, look, write."""
    target, key = arguments.out, arguments.out.with_suffix(".json")
    if target.suffix.lower() != ".png":
        raise UsageError(f"-o {target}: expected a name that ends in .png")
    for path in (target, key):
        if path.exists():
            raise RefusedError(f"{path}: exists; choose another name")
    brush = load_brush(arguments.brush, device=arguments.device)
    encoder = load_encoder(brush.about["encoder"], device=arguments.device)
    painting = Painting(size=arguments.size, seed=arguments.seed, steps=arguments.steps, device=arguments.device)
    canvas = Grid(painting.mpp, 0, 0, painting.size, painting.size)
    area = whole(canvas, brush.ladder.starting_at(canvas.mpp))
    maps, real = [], []
    for word in arguments.slides:
        moved, tissue = reference(word, painting, brush)
        seen = cast(Slide, moved)  # it is read, and its tissue is given
        maps.append(embed_region(seen, area, encoder=encoder, pitches=brush.pitches, tissue=tissue))
        real.append(moved.read(canvas))
    plane = paint_canvas(brush, between(maps[0], maps[1], canvas, brush), canvas, painting)
    pixels = as_pixels(read_plane(plane, canvas))
    picture = Image.new("RGB", (painting.size, painting.size + HEAD), "white")
    picture.paste(Image.fromarray(pixels), (0, HEAD))
    ImageDraw.Draw(picture).text((8, 6), MARK, fill=(160, 0, 0))
    marks = PngInfo()
    marks.add_text("Comment", MARK)
    picture.save(target, format="PNG", pnginfo=marks)
    names = [Path(word.rpartition("@")[0] or word).name for word in arguments.slides]
    found: dict[str, Any] = {
        "synthetic": True, "wsi_brush": __version__, "brush_sha256": brush.sha256, "slides": names,
        "size": painting.size, "mpp": painting.mpp, "seed": painting.seed, "steps": painting.steps,
        "painted": borders(pixels), "real": [borders(one) for one in real],
        "passage": passage(pixels, real, brush, encoder, painting.mpp),
    }  # fmt: skip
    write_json(key, found)
    print(f"{target}, {key}")
    print(f"line that stands out most: painted {found['painted']}, real {found['real']}")
    print(f"passage: {found['passage']}")


if __name__ == "__main__":
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", nargs=2, help="a slide; SLIDE@MPP where its header has no pixel size")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--brush", default="bundled")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Painting.steps)
    try:
        main(parser.parse_args())
    except WsiBrushError as error:
        sys.exit(f"{error}")
