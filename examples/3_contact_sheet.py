"""Paint after several slides, and look: reference | painting at two zooms, and who is closest to whom.

python examples/3_contact_sheet.py SLIDE[@MPP] ... -o FOLDER [--size 2048] [--mpp 2]

The table is the cosine between region vectors: the mean over tiles of the standardised embeddings, at `--at` µm. A
painting should be closest to its own reference (the diagonal). The spectrum is the painting's detail variance over the
reference's, octave by octave from the finest (what the mean over 2 x 2 pixels loses, then over 4 x 4, ...): 1 is right.
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wsi_brush.brush import load_brush
from wsi_brush.encoder import load_encoder
from wsi_brush.grid import Grid
from wsi_brush.machine import keep_memory
from wsi_brush.pair import read_reference
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import choose_canvas, synthesize_slide
from wsi_brush.texture import octaves
from wsi_brush.tissue import find_tissue

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("slides", nargs="+", help="a slide; SLIDE@MPP where its header has no pixel size")
parser.add_argument("-o", "--out", type=Path, required=True)
parser.add_argument("--size", type=int, default=2048)
parser.add_argument("--at", type=float, default=1.0, help="pitch of the table, µm")
parser.add_argument("--brush", default="bundled")
parser.add_argument("--guidance", type=float, default=Painting.guidance)
parser.add_argument("--steps", type=int, default=Painting.steps)
arguments = parser.parse_args()

keep_memory()
brush = load_brush(arguments.brush)
encoder = load_encoder(brush.about["encoder"])
arguments.out.mkdir(parents=True, exist_ok=True)


def region_vector(read, canvas):
    """The mean standardised embedding of the tiles of a canvas; `read` takes grids counted from its corner."""
    tile, side = encoder.tile, encoder.tile * arguments.at
    rows, columns = (int(length * canvas.mpp / side + 1e-6) for length in canvas.shape)
    grids = [
        Grid(arguments.at, tile * row, tile * column, tile, tile) for row in range(rows) for column in range(columns)
    ]
    vector = brush.standardised(arguments.at, encoder(np.stack([read(grid) for grid in grids]))).mean(0)
    return vector / np.linalg.norm(vector)


references, paintings, spectra, rows, seconds = [], [], [], [], []
names = [Path(name.split("@")[0]).stem for name in arguments.slides]
for name, argument in zip(names, arguments.slides, strict=True):
    path, _, mpp = argument.partition("@")
    slide = open_slide(path, assume_mpp=float(mpp) if mpp else None)
    painting = Painting(size=arguments.size, guidance=arguments.guidance, steps=arguments.steps)
    canvas = choose_canvas(slide, painting, find_tissue(slide))
    target = arguments.out / f"{name}.ome.zarr"
    done = synthesize_slide(path, target, painting, brush=brush, encoder=encoder, assume_mpp=slide.mpp, overwrite=True)
    seconds.append(done.seconds)
    painted, here = open_slide(target).read, functools.partial(read_reference, slide, canvas)
    local = Grid(canvas.mpp, 0, 0, *canvas.shape)
    references.append(region_vector(here, canvas))
    paintings.append(region_vector(painted, canvas))
    spectra.append(octaves(painted(local)) / octaves(here(local)))
    factor = arguments.size // 512
    middle = (arguments.size - 512) // 2
    far, near = Grid(canvas.mpp * factor, 0, 0, 512, 512), Grid(canvas.mpp, middle, middle, 512, 512)
    rows.append(np.concatenate([read(grid) for grid in (far, near) for read in (here, painted)], 1))
    cosine = {pitch: round(value, 3) for pitch, value in done.cosine.items()}
    print(f"{name}: {done.seconds:.0f} s, cosine by tile {cosine}, spectrum {spectra[-1].round(2)}", flush=True)

sheet = Image.fromarray(np.concatenate([np.full((24, rows[0].shape[1], 3), 255, np.uint8), *rows]))
draw = ImageDraw.Draw(sheet)
for column, text in enumerate(("reference", "SYNTHETIC", "reference, 0.5 µm/px", "SYNTHETIC, 0.5 µm/px")):
    draw.text((column * 512 + 6, 6), text, fill=(0, 0, 0))
sheet.save(arguments.out / "contact_sheet.jpg", quality=88)

table = np.stack(paintings) @ np.stack(references).T
print(f"cosine of region vectors at {arguments.at:g} µm; rows: paintings, columns: references")
print(" " * 28 + " ".join(f"{name[:9]:>9}" for name in names))
for name, line in zip(names, table, strict=True):
    print(f"{name[:28]:<28}" + " ".join(f"{value:9.3f}" for value in line))
closest = (table.argmax(1) == np.arange(len(names))).tolist()
print("closest to its own reference:", closest)
report = {"slides": names, "cosine": table.round(4).tolist(), "own_is_closest": closest}
report |= {"seconds": np.round(seconds, 1).tolist(), "spectrum": np.round(spectra, 3).tolist()}
(arguments.out / "contact_sheet.json").write_text(json.dumps(report, indent=1) + "\n")
