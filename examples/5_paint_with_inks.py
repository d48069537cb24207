"""Pick two inks of a slide, paint a canvas with them, and synthesize it.

python examples/5_paint_with_inks.py examples/reference.tif -o FOLDER [--first 500,400] [--second 1500,1200]

The first ink fills 1024 x 1024 pixels, the second is a thick soft curve through them, the eraser takes out a corner.
Writes the canvas, the new slide, and a picture: the strokes as they were drawn, beside what was painted.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wsi_brush.brush import load_brush
from wsi_brush.canvas import Canvas, Stroke
from wsi_brush.encoder import load_encoder
from wsi_brush.grid import Grid
from wsi_brush.ink import pick_ink
from wsi_brush.machine import keep_memory
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_canvas


def place(text):
    down, across = (float(part) for part in text.split(","))
    return down, across


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("slide", type=Path)
parser.add_argument("-o", "--out", type=Path, required=True)
parser.add_argument("--first", type=place, default=(500.0, 400.0), help="µm down, across")
parser.add_argument("--second", type=place, default=(1500.0, 1200.0), help="µm down, across")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

keep_memory()
brush = load_brush()
slide, encoder = open_slide(arguments.slide), load_encoder(brush.about["encoder"])
first, second = (
    pick_ink(slide, where, encoder=encoder, pitches=brush.pitches) for where in (arguments.first, arguments.second)
)

canvas = Canvas.empty(Grid(0.5, 0, 0, 1024, 1024), encoder=encoder, pitches=brush.pitches)
canvas.add(Stroke(first, ((256, 256),), 1200, softness=0))
curve = tuple((256 + 140 * float(np.sin(x / 80)), x) for x in np.linspace(0, 512, 40))
canvas.add(Stroke(second, curve, 180, softness=0.6))
canvas.add(Stroke(None, ((512, 512),), 300, softness=0))

arguments.out.mkdir(parents=True, exist_ok=True)
canvas.save(arguments.out / "canvas.zarr")
painted = synthesize_canvas(canvas, arguments.out / "painted.ome.zarr", Painting(seed=arguments.seed), brush=brush)

side = Grid(8.0, 0, 0, 64, 64)
rows, columns = np.meshgrid(*side.centres(), indexing="ij")
drawn = np.full((64, 64, 3), 255.0)
for stroke in canvas.strokes:
    colour = 255.0 if stroke.ink is None else stroke.ink.thumbnail.mean((0, 1))
    share = stroke.mask(rows, columns)[..., None] * (1.0 if stroke.ink is None else stroke.strength)
    drawn += share * (colour - drawn)
new = open_slide(painted.path)
sheet = Image.new("RGB", (2 * 1024 + 136, 1024 + 24), "white")
sheet.paste(Image.fromarray(np.rint(drawn).astype(np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC), (0, 24))
sheet.paste(Image.fromarray(new.read(new.grid)), (1024 + 16, 24))
for number, ink in enumerate((first, second)):
    sheet.paste(Image.fromarray(ink.thumbnail), (2 * 1024 + 32, 24 + 110 * number))
words = ImageDraw.Draw(sheet)
words.text((8, 6), "the strokes, in their inks' mean colours", fill=(0, 0, 0))
words.text((1048, 6), "SYNTHETIC, painted by wsi-brush; not for diagnosis. Right: the inks", fill=(160, 0, 0))
sheet.save(arguments.out / "painted.png")
print(f"{arguments.out / 'painted.png'}: {painted.seconds:.0f} s")
