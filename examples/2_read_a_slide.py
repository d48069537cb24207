"""A slide is a function: ask for any pitch, anywhere; beyond the slide it is white.

python examples/2_read_a_slide.py examples/reference.tif
"""

import sys

from wsi_brush.grid import Grid
from wsi_brush.slide import open_slide
from wsi_brush.tissue import find_tissue

slide = open_slide(sys.argv[1])
print(f"{slide.path.name}: {slide.grid.height} x {slide.grid.width} pixels, read by {slide.reader}")
print(f"{slide.mpp:g} µm a pixel, says {slide.mpp_source}")
for mpp in (0.5, 2.0, 7.3):
    pixels = slide.read(Grid(mpp, top=0, left=0, height=128, width=128))
    print(f"at {mpp:g} µm: mean colour {pixels.mean((0, 1)).round(1)}")
print(f"tissue: {find_tissue(slide).fraction:.1%} of the slide")
