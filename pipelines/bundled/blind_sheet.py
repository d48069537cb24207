"""A sheet for a blind reading: crops of held-out tissue and of paintings after it, mixed by a seed.

    python pipelines/bundled/blind_sheet.py pipelines/bundled/brush.toml --slides DATA/slides --paintings WORK
        -o SHEET.png [--seed 0]

WORK is what held_out.py (or a setting's folder of sweeps.py) wrote. Half of the crops are real; no place is shown
twice, so a painting never stands beside its reference. All have tissue in the reference, and both kinds went through
one codec. The key, SHEET.json, says of each number what it is, of which slide, and where; readers do not get it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from held_out import MPP, held_out, target_of
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from wsi_brush import __version__
from wsi_brush.commit import write_json
from wsi_brush.errors import RefusedError, UsageError, WsiBrushError
from wsi_brush.recipe import read_config
from wsi_brush.samples import Codec, Spot, spots_of
from wsi_brush.sides import Sides, open_sides

COLUMNS, GAP, HEAD, LINE = 6, 8, 28, 20  # crops a row; pixels between them, above all, and above each


def opened(recipe: Path, slides: Path, paintings: Path) -> Sides:
    """The paintings that are there, and what they follow.

    Raises:
        UsageError: if there are none, or one shows what was trained on.
    """
    known = held_out(read_config(recipe).data, slides, least=1)
    places = [one for one in known if target_of(one.slide, paintings).exists()]
    if not places:
        raise UsageError(f"{paintings}: no painting after a slide of {recipe}; give the --work of held_out.py")
    sides = open_sides([one.slide for one in places], [target_of(one.slide, paintings) for one in places])
    first = {one.slide.path: one.region[1] for one in places}
    for pair in sides.pairs:
        real = sides.real[pair.real]
        if real.area.left + 1 < first[real.slide.path]:  # a painting's corner is rounded to a pixel of level 0
            name = sides.synthetic[pair.synthetic].name
            raise UsageError(f"{name}: begins at column {real.area.left}, and {first[real.slide.path]} are trained on")
    return sides


def drawn(sides: Sides, side: int, count: int, seed: int) -> list[tuple[Spot, bool]]:
    """Places (numbers of pairs, squares on the real slide), and whether the painting is shown there: half of them,
    evenly over the slides, in the order of the sheet.

    Raises:
        UsageError: if there are not as many.
    """
    random = np.random.default_rng(seed)
    spots = spots_of([sides.real[pair.real] for pair in sides.pairs], MPP, side, stride=1.0, most=sys.maxsize)
    if len(spots) < count:
        raise UsageError(f"{len(spots)} squares of {side} pixels with tissue, {count} are wanted; give fewer --crops")
    spots = [spots[number] for number in random.permutation(len(spots))]
    turns: dict[int, int] = {}  # how many places of a pair come before
    order: list[tuple[int, int]] = []
    for spot in spots:
        order.append((turns.setdefault(spot.field, 0), len(order)))
        turns[spot.field] += 1
    taken = sorted((spots[index] for _, index in sorted(order)[:count]), key=lambda spot: spot.field)
    swapped = bool(random.integers(2))
    shown = [(spot, (number % 2 == 0) != swapped) for number, spot in enumerate(taken)]
    return [shown[number] for number in random.permutation(count)]


def sheet_of(crops: list[Any], words: str) -> Image.Image:
    """The crops, numbered from 1."""
    side = crops[0].shape[0]
    columns = min(COLUMNS, len(crops))
    rows = -(-len(crops) // columns)
    picture = Image.new("RGB", (GAP + columns * (side + GAP), HEAD + rows * (side + LINE + GAP)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, 8), words, fill=(160, 0, 0))
    for number, crop in enumerate(crops):
        left, top = corner(number, side, columns)
        draw.text((left, top - LINE + 4), str(number + 1), fill=(0, 0, 0))
        picture.paste(Image.fromarray(crop), (left, top))
    return picture


def corner(number: int, side: int, columns: int = COLUMNS) -> tuple[int, int]:
    """Left and top of a crop on the sheet, counted from 0."""
    row, column = divmod(number, columns)
    return GAP + column * (side + GAP), HEAD + LINE + row * (side + LINE + GAP)


def main(arguments: argparse.Namespace) -> None:
    """Draw, write."""
    target, key = arguments.out, arguments.out.with_suffix(".json")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"-o {target}: expected a name that ends in .png, .jpg or .jpeg")
    if arguments.crops < 2 or arguments.crops % 2:
        raise UsageError(f"--crops {arguments.crops}: expected an even number, for half of them are real")
    for path in (target, key):
        if path.exists():
            raise RefusedError(f"{path}: exists; choose another name")
    codec = Codec(arguments.codec)
    sides = opened(arguments.recipe, arguments.slides, arguments.paintings)
    crops, said = [], {}
    for number, (spot, painted) in enumerate(drawn(sides, arguments.side, arguments.crops, arguments.seed), 1):
        pair, grid = sides.pairs[spot.field], spot.grid
        real, synthetic = sides.real[pair.real], sides.synthetic[pair.synthetic]
        crops.append(codec(synthetic.slide.read(pair.here(grid)) if painted else real.slide.read(grid)))
        place = [grid.top, grid.left]
        said[str(number)] = {"is": "painted" if painted else "real", "slide": real.name, "place": place}
    half, mark = arguments.crops // 2, "not for diagnosis"
    words = f"Holds SYNTHETIC images: {half} of {arguments.crops}, painted by wsi-brush; {mark}. Seed {arguments.seed}."
    picture = sheet_of(crops, words)
    if target.suffix.lower() == ".png":
        marks = PngInfo()
        marks.add_text("Comment", words)
        picture.save(target, format="PNG", pnginfo=marks)
    else:
        picture.save(target, format="JPEG", quality=95, subsampling=0, comment=words)
    about = {"wsi_brush": __version__, "seed": arguments.seed, "mpp": MPP, "side": arguments.side, "codec": codec.word}
    brushes = sorted({made["brush_sha256"] for made in sides.brushes})
    write_json(key, {**about, "brush_sha256": brushes, "place": "row and column at mpp on the slide", "crops": said})
    print(f"{target}, {key}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--paintings", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crops", type=int, default=24)
    parser.add_argument("--side", type=int, default=256, help="of a crop, pixels of 0.5 µm")
    parser.add_argument("--codec", default="jpeg:90")
    try:
        main(parser.parse_args())
    except WsiBrushError as error:
        sys.exit(f"{error}")
