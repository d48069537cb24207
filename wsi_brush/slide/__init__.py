"""A slide is a colour at every point of the plane, white where it does not reach.

resample      exact, place-independent resampling
pixelsize     how large a pixel is, and who says so
tiff          whether a TIFF is whole, and what its first page holds
readers       OpenSlide, TiffSlide, OME-Zarr, plain images: pixels of a level
jpeg          levels of a TIFF that are plain JPEGs, decoded here: the same pixels, sooner
dicom         DICOM: which files are one slide, and the pixels of their levels
slide         Slide, open_slide, moved
"""

from .readers import Level
from .slide import Slide, moved, open_slide

__all__ = ["Level", "Slide", "moved", "open_slide"]
