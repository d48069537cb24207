"""How the plugin's sample data was made: a square of examples/reference.tif, and a painting after it; both synthetic.

python examples/make_samples.py plugins/napari_wsi_brush/samples
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

from wsi_brush.brush import load_brush
from wsi_brush.encoder import load_encoder
from wsi_brush.grid import Grid
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide

SIDE, MPP, QUALITY = 1024, 0.5, 80
CORNER = 1536, 1536


def write(path: Path, source: Path, top: int, left: int) -> None:
    """A square of `source` as a pyramidal tiled JPEG TIFF that says it is synthetic."""
    slide = open_slide(source)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            pitch, side = MPP * 2**level, SIDE >> level
            pixels = slide.read(Grid(pitch, top >> level, left >> level, side, side))
            tiff.write(
                np.ascontiguousarray(pixels), tile=(256, 256), photometric="rgb", compression="jpeg",
                compressionargs={"level": QUALITY}, subfiletype=int(level > 0), metadata=None,
                resolution=(1e4 / pitch,) * 2, resolutionunit="CENTIMETER", software="wsi-brush",
                description="SYNTHETIC image painted by wsi-brush; synthetic=true; not a patient's, not for diagnosis",
            )  # fmt: skip


folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
write(folder / "reference.tif", Path(__file__).with_name("reference.tif"), *CORNER)
brush = load_brush()
with tempfile.TemporaryDirectory() as work:
    target = Path(work) / "painted.ome.zarr"
    painting = Painting(region=(0, 0, SIDE, SIDE), mpp=MPP, seed=1)
    encoder = load_encoder(brush.about["encoder"])
    print(synthesize_slide(folder / "reference.tif", target, painting, brush=brush, encoder=encoder))
    write(folder / "painting.tif", target, 0, 0)
