"""What repainting a part costs and how near it comes to a painting of the whole canvas.

    OMP_WAIT_POLICY=passive python tests/benchmarks/repainting.py near [--ref SLIDE] [--size 2048] [--core 640]
    OMP_WAIT_POLICY=passive python tests/benchmarks/repainting.py time [--ref SLIDE] [--size 2048] [--core 1024]

`near`: a square in the middle is repainted with nothing changed, for each of --margins; root mean square difference in
grey levels of 255 from the painting of the whole canvas, in the core, in rings of 32 pixels around it (before they are
blended) and in the ring that is blended. `time`: seconds until the first estimate is shown and until the end, beside
those of a canvas of the changed part's size in the same run, and the load of the machine.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wsi_brush.brush import load_brush
from wsi_brush.embed import embed_region
from wsi_brush.encoder import load_encoder
from wsi_brush.grid import Grid
from wsi_brush.machine import keep_memory
from wsi_brush.paint import Run, paint_canvas
from wsi_brush.repaint import EDGE, MARGIN, cone, repaint
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting, budget, stages, wants_before, whole
from wsi_brush.stream import read_plane
from wsi_brush.synthesize import as_pixels, choose_canvas


def window_alone(brush, maps, canvas, core, painting, margin):
    """The finest window of a cone as it was painted, without a blend."""
    ladder = brush.ladder.starting_at(canvas.mpp)
    area, todo = whole(canvas, ladder), stages(ladder, painting)
    windows = cone(area, core, len(ladder.pitches), margin)
    painting = replace(painting, tile=budget(painting, brush.denoiser.config)[0])
    run, planes = Run(brush, maps, area, painting, None, windows=windows), {}
    for number, stage in enumerate(todo, 1):
        planes = run.after(stage, planes, None, keep=number < len(todo) and wants_before(todo[number]))
    inside = windows[0].clip(Grid(canvas.mpp, 0, 0, *canvas.shape))
    local = replace(inside, top=inside.top - windows[0].top, left=inside.left - windows[0].left)
    return inside, as_pixels(read_plane(planes["x"], local))


def near(brush, maps, canvas, core, painting, painted, margins):
    found = {}
    here = replace(core, top=core.top - canvas.top, left=core.left - canvas.left)
    for margin in margins:
        start = time.perf_counter()
        inside, pixels = window_alone(brush, maps, canvas, core, painting, margin)
        taken = time.perf_counter() - start
        old = painted[inside.within(Grid(canvas.mpp, 0, 0, *canvas.shape))]
        square = ((pixels.astype(np.float64) - old) ** 2).mean(-1)
        rows, columns = (places / canvas.mpp for places in inside.centres())
        beyond = np.maximum(
            np.maximum(here.top - rows, rows - here.bottom)[:, None],
            np.maximum(here.left - columns, columns - here.right)[None],
        )
        one = {"core": round(float(np.sqrt(square[beyond <= 0].mean())), 2)}
        for first in range(0, margin, 32):
            ring = (beyond > first) & (beyond <= first + 32)
            one[f"{first}-{first + 32}"] = round(float(np.sqrt(square[ring].mean())), 2)
        weight = 1 - np.clip(beyond / (margin - EDGE), 0, 1)
        weight = weight**2 * (3 - 2 * weight)
        ring = (beyond > 0) & (beyond < margin - EDGE)
        one["blended ring"] = round(float(np.sqrt((square * weight**2)[ring].mean())), 2)
        one["seconds"] = round(taken, 1)
        found[str(margin)] = one
        print(margin, one, flush=True)
    return found


def timed(brush, maps, canvas, core, painting):
    """What the old pixels are is no matter to the time: they are glass here."""
    glass = np.full((*canvas.shape, 3), 255, np.uint8)
    start, shown = time.perf_counter(), []
    part, _ = repaint(
        brush, maps, canvas, core, glass, painting, show=lambda *_: shown.append(time.perf_counter() - start)
    )
    end = time.perf_counter() - start
    start = time.perf_counter()
    paint_canvas(brush, maps, core, painting)
    return {
        "changed": core.shape, "replaced": part.shape, "margin": MARGIN, "first estimate s": round(shown[0], 2),
        "estimates": len(shown), "all s": round(end, 1),
        "a canvas of that size s": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main(arguments):
    keep_memory()
    brush = load_brush()
    slide, encoder = open_slide(arguments.ref), load_encoder(brush.about["encoder"])
    painting = Painting(size=arguments.size, seed=1)
    tissue = brush.tissue_of(slide)
    canvas = choose_canvas(slide, painting, tissue)
    maps = embed_region(slide, whole(canvas, brush.ladder), encoder=encoder, pitches=brush.pitches, tissue=tissue)
    found = {
        "reference": arguments.ref.name, "canvas": canvas.shape, "threads": torch.get_num_threads(),
        "load": [round(one, 1) for one in os.getloadavg()],
    }  # fmt: skip
    side = arguments.core or (640 if arguments.what == "near" else 1024)
    middle = (arguments.size - side) // 2 // 16 * 16
    core = Grid(canvas.mpp, canvas.top + middle, canvas.left + middle, side, side)
    if arguments.what == "near":
        plane = paint_canvas(brush, maps, canvas, painting)
        painted = as_pixels(read_plane(plane, Grid(canvas.mpp, 0, 0, *canvas.shape)))
        found |= near(brush, maps, canvas, core, painting, painted, arguments.margins)
    else:
        found |= timed(brush, maps, canvas, core, painting)
    found["load after"] = [round(one, 1) for one in os.getloadavg()]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["near", "time"])
    parser.add_argument("--ref", type=Path, default=Path("examples/reference.tif"))
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--core", type=int)
    parser.add_argument("--margins", type=int, nargs="+", default=[64, 128, 256])
    main(parser.parse_args())
