"""How examples/reference.tif was made: a painting of this project as a pyramidal tiled JPEG TIFF, marked as synthetic.

wsi-brush synthesize --ref SLIDE -o painted.ome.zarr
python examples/make_reference.py painted.ome.zarr examples/reference.tif
"""

import sys

import numpy as np
import tifffile

from wsi_brush.grid import Grid
from wsi_brush.slide import open_slide

source, target = sys.argv[1:3]
quality = int(sys.argv[3]) if len(sys.argv) > 3 else 80
slide = open_slide(source)
with tifffile.TiffWriter(target) as tiff:
    mpp, level = slide.mpp, 0
    while level == 0 or min(slide.grid.shape) >> level >= 256:
        side = tuple(length >> level for length in slide.grid.shape)
        pixels = slide.read(Grid(mpp * 2**level, 0, 0, *side))
        tiff.write(
            np.ascontiguousarray(pixels), tile=(256, 256), photometric="rgb", compression="jpeg",
            compressionargs={"level": quality}, subfiletype=int(level > 0), metadata=None,
            resolution=(1e4 / (mpp * 2**level),) * 2, resolutionunit="CENTIMETER", software="wsi-brush",
            description="SYNTHETIC image painted by wsi-brush; synthetic=true; not a patient's, not for diagnosis",
        )  # fmt: skip
        level += 1
