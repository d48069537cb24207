"""Noise is a function: any window, read in any order, is the same noise.

python examples/1_noise_is_a_function.py
"""

import torch

from wsi_brush.field import NoiseField
from wsi_brush.grid import Grid

field = NoiseField(seed=7)
whole = field.read(Grid(mpp=0.5, top=0, left=0, height=512, width=512))
window = field.read(Grid(mpp=0.5, top=100, left=200, height=64, width=64))
print("a window of the whole is the window:", torch.equal(whole[:, 100:164, 200:264], window))

smooth = field.read_mollified(Grid(mpp=0.5, top=0, left=0, height=512, width=512), width=2.0)
print(f"A ξ is as strong at the border ({smooth[:, 0].std():.3f}) as inside ({smooth[:, 256].std():.3f})")
