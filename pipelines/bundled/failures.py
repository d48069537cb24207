"""The worst of what held_out.py painted: real tiles above, the paintings that follow them least below.

    python pipelines/bundled/failures.py pipelines/bundled/brush.toml --slides DATA/slides --paintings WORK -o SHEET.jpg

WORK is what held_out.py wrote. A row of each scale of its report: the tiles with the smallest cosine with their own
reference, in the space of the brush's encoder.
"""

import argparse
import json
import sys
from pathlib import Path

from blind_sheet import opened
from PIL import Image, ImageDraw

from wsi_brush.errors import WsiBrushError
from wsi_brush.grid import Grid

WORDS = "Lower of each pair: SYNTHETIC, painted by wsi-brush; not for diagnosis. The worst tiles of the held-out parts."
SHOWN, SIDE, GAP, HEAD = 8, 192, 6, 24  # tiles a scale; pixels of one, between them, and above


def main(arguments: argparse.Namespace) -> None:
    """Read, draw, write."""
    figures = json.loads((arguments.paintings / "report" / "report.json").read_text(encoding="utf-8"))
    sides = opened(arguments.recipe, arguments.slides, arguments.paintings)
    first = figures["encoders"][0]
    scales = {mpp: one["worst"][:SHOWN] for mpp, one in figures["control"][first["name"]]["cosine"].items()
              if one.get("worst")}  # fmt: skip
    row = 2 * SIDE + HEAD + GAP
    sheet = Image.new("RGB", (GAP + SHOWN * (SIDE + GAP), HEAD + len(scales) * row), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 6), WORDS, fill=(160, 0, 0))
    for number, (mpp, tiles) in enumerate(scales.items()):
        top = HEAD + number * row
        for column, one in enumerate(tiles):
            left = GAP + column * (SIDE + GAP)
            theirs, ours = sides.real[one["real"]], sides.synthetic[one["synthetic"]]
            words = f"mpp {mpp}: {one['cosine']:.2f}, {theirs.name.split('_')[0]}"
            draw.text((left, top + 6), words, fill=(0, 0, 0))
            for line, (field, place) in enumerate(((theirs, one["there"]), (ours, one["place"]))):
                tile = field.slide.read(Grid(float(mpp), *place, first["tile"], first["tile"]))
                picture = Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(picture, (left, top + HEAD + line * SIDE))
    sheet.save(arguments.out, format="JPEG", quality=90, comment=WORDS)
    print(arguments.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--paintings", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    try:
        main(parser.parse_args())
    except WsiBrushError as error:
        sys.exit(f"{error}")
