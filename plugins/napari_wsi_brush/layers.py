"""What napari shows of a slide, a painting or a store of embeddings: layer data, read a window at a time, in µm.

Where a window is damaged, it is drawn as grey stripes and said once for each layer: napari asks again for every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_brush.errors import SlideError
from wsi_brush.grid import Grid
from wsi_brush.slide.pixelsize import UNITS

if TYPE_CHECKING:
    import zarr

LayerData = tuple[Any, dict[str, Any], str]
RGB = ("FF0000", "00FF00", "0000FF")
MICROMETRES = ("micrometer", "micrometer")
_COARSEST, _STRIP = 2048, 256  # pixels: napari always reads the coarsest level whole; rows of it that are read at once
_WINDOW = 512  # pixels a side that are read together of a slide that is no zarr


class Source(Protocol):
    """A level of a picture, of which windows can be read."""

    shape: tuple[int, int]
    chunks: tuple[int, int]

    def read(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """(height, width, 3).

        Raises:
            SlideError: if it is damaged there.
        """


class Level:
    """A level as the lazy (height, width, 3) array that napari indexes; axes are read no further than asked for.

    `chunks` lets napari ask for whole chunks, and for nothing while it moves inside those that it has.
    """

    ndim = 3
    dtype = np.dtype(np.uint8)

    def __init__(self, source: Source, damaged: Callable[[str], None]) -> None:
        self.shape = (*source.shape, 3)
        self.chunks = (*source.chunks, 3)
        self.size = source.shape[0] * source.shape[1] * 3
        self._source, self._damaged = source, damaged

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        window = key if isinstance(key, tuple) else (key,)
        rows, columns, channels = _filled(window)
        spans = [_span(part, side) for part, side in zip((rows, columns), self.shape[:2], strict=True)]
        pixels = self._read(*(slice(first, last) for first, last, _ in spans))
        return np.asarray(pixels[spans[0][2], spans[1][2]][..., channels], dtype=np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def _read(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """A window; where it cannot be read, chunk by chunk, with stripes for those that are damaged."""
        try:
            return self._source.read(rows, columns)
        except SlideError:
            pixels = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
            for down in _pieces(rows, self.chunks[0]):
                for across in _pieces(columns, self.chunks[1]):
                    place = (slice(down.start - rows.start, down.stop - rows.start),
                             slice(across.start - columns.start, across.stop - columns.start))  # fmt: skip
                    try:
                        pixels[place] = self._source.read(down, across)
                    except SlideError as error:
                        pixels[place] = _stripes(down, across)
                        self._damaged(str(error))
            return pixels


class ZarrLevel:
    """A zarr array of axes (..., c, y, x), of which axes before c are read at 0.

    A painting of ours has all its shards (`folder` is where they are, else None): one that is not there is damage,
    where zarr would answer with its fill value.
    """

    def __init__(self, array: zarr.Array[Any], folder: Path | None) -> None:
        self.shape = (array.shape[-2], array.shape[-1])
        self.chunks = (array.chunks[-2], array.chunks[-1])
        self._array, self._folder = array, folder

    def read(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """As `Source.read`."""
        window: tuple[Any, ...] = (*(0,) * (self._array.ndim - 3), slice(None), rows, columns)
        try:
            self._check(rows, columns)
            read = np.asarray(self._array[window])
        except (OSError, ValueError, LookupError, RuntimeError, TypeError) as error:
            line = " ".join(str(error).split())[:160] or type(error).__name__
            place = f"rows {rows.start}-{rows.stop}, columns {columns.start}-{columns.stop} of level {self._array.path}"
            raise SlideError(f"{place} cannot be read ({line})") from None
        return np.moveaxis(read, 0, -1)

    def _check(self, rows: slice, columns: slice) -> None:
        if self._folder is None or self._array.shards is None:
            return
        spans = zip((rows, columns), self._array.shards[-2:], strict=True)
        down, across = (range(part.start // side, -(-part.stop // side)) for part, side in spans)
        for row in down:
            for column in across:
                if not (self._folder / "c" / "0" / str(row) / str(column)).is_file():
                    raise OSError(f"shard {row}/{column} is missing")


class SlideLevel:
    """A level of a slide that `open_slide` reads, or a coarser one that the file lacks."""

    def __init__(self, slide: Any, mpp: float) -> None:
        self._slide, self._grid = slide, slide.grid.at(mpp)
        self.shape: tuple[int, int] = self._grid.shape
        self.chunks = (_WINDOW, _WINDOW)

    def read(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """As `Source.read`; a strip at a time, so that little of a finer level is held."""
        width = columns.stop - columns.start
        strips = [
            self._slide.read(Grid(self._grid.mpp, part.start, columns.start, part.stop - part.start, width))
            for part in _pieces(rows, _STRIP)
        ]
        return np.concatenate(strips) if strips else np.empty((0, width, 3), np.uint8)


def zarr_layer(path: Path) -> LayerData | None:
    """An RGB OME-Zarr (0.4 or 0.5) as one layer, or None: metadata of others may lack anything at all."""
    if not path.is_dir():
        return None
    import zarr

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
    about = attributes.get("wsi_brush")
    synthetic = isinstance(about, Mapping) and about.get("synthetic") is True
    sources = [
        ZarrLevel(level, path / level.path if synthetic else None) for level in levels if isinstance(level, zarr.Array)
    ]
    return _picture(path, sources, shown, about=dict(about) if synthetic else about, synthetic=synthetic)


def slide_layer(path: Path, *, assume_mpp: float | None = None) -> LayerData:
    """A slide as one layer in µm; in pixels, and with a warning, where nobody says how large they are.

    Raises:
        SlideError: if it cannot be read.
    """
    from wsi_brush.errors import PixelSizeError
    from wsi_brush.slide import open_slide

    shown: dict[str, Any] = {"units": MICROMETRES}
    try:
        slide = open_slide(path, assume_mpp=assume_mpp)
        shown["scale"] = (slide.mpp, slide.mpp)
    except PixelSizeError as error:
        slide = open_slide(path, force_mpp=1.0)  # all else is known
        shown = {"units": ("pixel", "pixel"), "scale": (1.0, 1.0)}
        reason = str(error).removeprefix(f"{path}: ").split(";")[0]
        say(f"{path.name}: {reason}; shown in pixels, without a scale in µm", "warning")
    pitches = [slide.mpp * level.tall for level in slide.levels]
    while max(slide.grid.at(pitches[-1]).shape) > _COARSEST:
        pitches.append(2 * pitches[-1])
    return _picture(path, [SlideLevel(slide, mpp) for mpp in pitches], shown, about=None, synthetic=slide.synthetic)


def store_layers(path: Path) -> list[LayerData]:
    """A store of embeddings as a layer a pitch, the finest one shown: RGBA, see-through where nothing is known.

    Colours are the first three principal components of the standardised embeddings: what looks alike has a like colour,
    and no colour means anything by itself.

    Raises:
        RefusedError: if it is damaged.
    """
    from wsi_brush.store import EmbeddingStore

    store = EmbeddingStore.open(path)
    slide = store.about.get("slide", {})
    half = float(slide.get("mpp") or 0) / 2  # napari's world begins in the middle of the slide's first pixel
    mark = "synthetic: " if store.about.get("synthetic") is True else ""
    layers: list[LayerData] = []
    for mpp in sorted(store.maps):
        one = store.maps[mpp]
        side = one.lattice.mpp
        shown = {
            "name": f"{mark}{path.stem}: embeddings at {mpp:g} µm",
            "rgb": True,
            "scale": (side, side),
            "translate": tuple((corner + 0.5) * side - half for corner in (one.lattice.top, one.lattice.left)),
            "units": MICROMETRES,
            "opacity": 0.6,
            "visible": not layers,
            "metadata": {"wsi_brush": {"store": str(path), "slide": slide.get("name"), "mpp": mpp}},
        }
        layers.append((coloured(one.values), shown, "image"))
    return layers


def coloured(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Embeddings (rows, columns, dim) as RGBA: principal components between their 2nd and 98th percentiles; 0 alpha
    where they are NaN."""
    present = ~np.isnan(values[..., 0])
    colours = np.zeros((*present.shape, 4), np.uint8)
    vectors = values[present].astype(np.float32)
    if len(vectors) < 2:
        colours[present] = (128, 128, 128, 255)
        return colours
    spread = vectors.std(axis=0)
    vectors = (vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1)
    _, axes = np.linalg.eigh(vectors.T @ vectors / len(vectors))  # the last ones are the first components
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # else the sign is chance
    places = vectors @ axes
    low, high = np.percentile(places, (2, 98), axis=0)
    shares = np.clip((places - low) / np.where(high > low, high - low, 1), 0, 1)
    colours[present, : shares.shape[1]] = np.rint(255 * shares)
    colours[present, 3] = 255
    return colours


def say(line: str, severity: str = "error") -> None:
    """One line in napari's corner, from any thread."""
    from napari.utils.notifications import Notification, notification_manager

    notification_manager.dispatch(Notification(" ".join(line.split()), severity))


def marked(**facts: Any) -> dict[str, Any]:
    """What stands in the metadata of a layer that shows a painting, beside `facts` of how it was painted."""
    return {"wsi_brush": {"synthetic": True, **facts}, "synthetic": True}


def _picture(path: Path, sources: list[Any], shown: dict[str, Any], *, about: Any, synthetic: bool) -> LayerData:
    """Layer data of the levels of an RGB picture."""
    name = path.name.removesuffix(".zarr").removesuffix(".ome")
    name = f"synthetic: {name}" if synthetic else name
    told: set[str] = set()

    def damaged(line: str) -> None:
        if not told:
            told.add(line)
            say(f"{name}: damaged, {line}; grey stripes stand for what is lost")

    levels = [Level(source, damaged) for source in sources]
    multiscale = len(levels) > 1
    known = {"wsi_brush": about or {"synthetic": True}} if about or synthetic else {}
    shown = shown | {
        "name": name,
        "rgb": True,
        "multiscale": multiscale,
        "metadata": {**known, "path": str(path), "synthetic": synthetic},
    }
    return levels if multiscale else levels[0], shown, "image"


def _filled(window: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """An index of up to three axes, `...` included, as one of exactly three."""
    everything: tuple[Any, ...] = (slice(None),) * (4 - len(window))
    for place, part in enumerate(window):
        if part is Ellipsis:
            rows, columns, channels = (*window[:place], *everything, *window[place + 1 :])
            return rows, columns, channels
    return _filled((*window, Ellipsis))


def _span(part: Any, size: int) -> tuple[int, int, Any]:
    """What an index of one axis needs: first and last pixel (exclusive), and the index into those."""
    if isinstance(part, slice):
        places = range(size)[part]
        if not places:
            return 0, 0, slice(0, 0)
        low, high = min(places[0], places[-1]), max(places[0], places[-1]) + 1
        return low, high, slice(None, None, places.step)
    place = range(size)[part]
    return place, place + 1, 0


def _pieces(part: slice, size: int) -> Iterator[slice]:
    """A span of pixels cut at multiples of `size`."""
    start = part.start
    while start < part.stop:
        stop = min(part.stop, (start // size + 1) * size)
        yield slice(start, stop)
        start = stop


def _stripes(rows: slice, columns: slice) -> NDArray[np.uint8]:
    """What stands where nothing could be read; no tissue looks so."""
    across = np.arange(rows.start, rows.stop)[:, None] + np.arange(columns.start, columns.stop)
    grey = np.where(across // 16 % 2, 150, 200).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


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
    units = [UNITS.get(str(axis.get("unit"))) for axis in image["axes"][-2:]]
    if None in units:
        return {"scale": (1.0, 1.0), "units": ("pixel", "pixel")}
    lengths = np.array(units, dtype=float)
    return {
        "scale": tuple((scale * lengths).tolist()),
        "translate": tuple((shift * lengths).tolist()),
        "units": MICROMETRES,
    }
