"""RGB OME-Zarr folders (0.4 and 0.5) as one lazily loaded, multiscale RGB layer in µm.

napari wants colour last and OME-Zarr has it first, hence `ChannelLast`: nothing is read but the
windows that napari asks for. Whatever is not RGB is left to other plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

LayerData = tuple[Any, dict[str, Any], str]
RGB = ("FF0000", "00FF00", "0000FF")
MICROMETERS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}


def get_reader(path: str | Sequence[str]) -> Callable[[str], list[LayerData]] | None:
    """The function that reads `path`, or None where it is no OME-Zarr folder with an RGB image."""
    if not isinstance(path, str) or _layer(path) is None:
        return None
    return read


def read(path: str) -> list[LayerData]:
    """One layer: the levels, how to show them, "image".

    Raises:
        ValueError: if `path` is no OME-Zarr folder with an RGB image.
    """
    layer = _layer(path)
    if layer is None:
        raise ValueError(f"{path}: no OME-Zarr folder with an RGB image of 8 bits; open it with another reader")
    return [layer]


class ChannelLast:
    """A zarr array of axes (..., c, y, x) as a lazy (y, x, c) one; axes before are read at 0."""

    ndim = 3

    def __init__(self, array: zarr.Array[Any]) -> None:
        channels, height, width = array.shape[-3:]
        self.shape = (height, width, channels)
        self.dtype = np.dtype(np.uint8)
        self.size = height * width * channels
        self._array = array

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        window = key if isinstance(key, tuple) else (key,)
        rows, columns, channels = _filled(window)
        before = (0,) * (self._array.ndim - 3)
        read = np.asarray(self._array[(*before, slice(None), rows, columns)])
        return np.asarray(np.moveaxis(read, 0, -1)[..., channels], dtype=np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __len__(self) -> int:
        return self.shape[0]


def _filled(window: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """An index of up to three axes, `...` included, as one of exactly three."""
    everything: tuple[Any, ...] = (slice(None),) * (4 - len(window))
    for place, part in enumerate(window):
        if part is Ellipsis:
            rows, columns, channels = (*window[:place], *everything, *window[place + 1 :])
            return rows, columns, channels
    return _filled((*window, Ellipsis))


def _layer(path: str) -> LayerData | None:
    """The layer of the folder at `path`, or None: metadata of others may lack anything at all."""
    if not Path(path).is_dir():
        return None
    try:
        root = zarr.open_group(path, mode="r")
        attributes: Any = root.attrs.asdict()
        ome = attributes.get("ome", attributes)
        image = ome["multiscales"][0]
        levels = [root[str(dataset["path"])] for dataset in image["datasets"]]
        if not (_is_rgb(ome, image) and all(_is_colour(level) for level in levels)):
            return None
        shown = _placed(image)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError):
        return None
    arrays = [ChannelLast(level) for level in levels if isinstance(level, zarr.Array)]
    about = attributes.get("wsi_brush")
    synthetic = isinstance(about, Mapping) and about.get("synthetic") is True
    name = Path(path).name.removesuffix(".zarr").removesuffix(".ome")
    multiscale = len(arrays) > 1
    shown |= {
        "name": f"synthetic: {name}" if synthetic else name,
        "rgb": True,
        "multiscale": multiscale,
        "metadata": {"wsi_brush": about} if about else {},
    }
    return arrays if multiscale else arrays[0], shown, "image"


def _is_rgb(ome: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    """Whether the axes end in c, y, x and the three channels are pure red, green and blue."""
    axes = [axis["name"] for axis in image["axes"]]
    colours = tuple(str(channel["color"]).upper().removeprefix("#") for channel in ome["omero"]["channels"])
    return axes[-3:] == ["c", "y", "x"] and colours == RGB


def _is_colour(level: Any) -> bool:
    """Whether this is an array of three channels of 8 bits with nothing but single planes before them."""
    shape = level.shape
    return bool(level.dtype == np.uint8 and shape[-3] == 3 and set(shape[:-3]) <= {1})


def _placed(image: Mapping[str, Any]) -> dict[str, Any]:
    """Scale and translation of the finest level in µm; in pixels where the axes have no length unit."""
    scale, shift = np.ones(2), np.zeros(2)
    steps = [*image["datasets"][0].get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]
    for step in steps:
        if step["type"] == "scale":
            factor = np.array(step["scale"][-2:], dtype=float)
            scale, shift = scale * factor, shift * factor
        elif step["type"] == "translation":
            shift = shift + np.array(step["translation"][-2:], dtype=float)
    units = [MICROMETERS.get(axis.get("unit")) for axis in image["axes"][-2:]]
    if None in units:
        return {"scale": (1.0, 1.0), "units": ("pixel", "pixel")}
    lengths = np.array(units, dtype=float)
    return {
        "scale": tuple((scale * lengths).tolist()),
        "translate": tuple((shift * lengths).tolist()),
        "units": ("micrometer", "micrometer"),
    }
