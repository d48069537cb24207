"""Which paths are ours to read: RGB OME-Zarr, slides of scanners, tiled RGB pyramids in TIFF, stores of embeddings.

Whatever is not is left to other plugins, so a name is never enough: the first bytes, or a manifest, must say it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsi_brush.commit import read_manifest
from wsi_brush.errors import RefusedError, SlideError, UsageError, WsiBrushError

from .layers import LayerData, say, slide_layer, store_layers, zarr_layer

STORE, PYRAMID = "embedding store", "pyramid"  # the kinds in our manifests
_TIFFS = (".svs", ".ndpi", ".scn", ".bif", ".svslide")  # of scanners alone
_OTHERS = (".mrxs", ".vms", ".vmu")
_NOTHING: list[Any] = [(None,)]  # npe2's word for: it was ours, and gives no layer


def get_reader(path: str | Sequence[str]) -> Callable[[str], list[LayerData]] | None:
    """The function that reads `path`, or None where it is for others."""
    if not isinstance(path, str):
        return None
    return read if _is_ours(Path(path)) else None


def read(path: str) -> list[LayerData]:
    """The layers of what is at `path`; none, and a notification of one line, where it is ours and damaged.

    Raises:
        ValueError: if it is for others.
    """
    place = Path(path)
    if not _is_ours(place):
        raise ValueError(f"{path}: no RGB OME-Zarr of 8 bits, slide or store; open it with another reader")
    try:
        return layers_of(place)
    except WsiBrushError as error:
        say(str(error))
        return _NOTHING


def layers_of(path: Path | str, *, assume_mpp: float | None = None) -> list[LayerData]:
    """The layers of a slide, a painting or a store, whatever its name.

    Raises:
        SlideError: if it is no slide that can be read.
        RefusedError: if it is a store or a painting, and damaged.
        UsageError: if it is something else of wsi-brush.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == STORE:
        _say_slide(path)
        return store_layers(path)
    if kind not in (None, PYRAMID):
        raise UsageError(f"{path}: a {kind} of wsi-brush; expected a slide, a painting or a store")
    layer = zarr_layer(path)
    if layer is not None:
        return [layer]
    if kind == PYRAMID:
        raise RefusedError(f"{path / 'zarr.json'}: missing or damaged; paint it again")
    return [slide_layer(path, assume_mpp=assume_mpp)]


def _kind(path: Path) -> str | None:
    """What the manifest says that it is, where there is one of ours."""
    manifest = read_manifest(path) if path.is_dir() else None
    return None if manifest is None else str(manifest.get("kind"))


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        try:
            kind = _kind(path)
        except RefusedError:
            return True  # our name is on its manifest, so it is for us to say that it is damaged
        return kind in (STORE, PYRAMID) or (kind is None and zarr_layer(path) is not None)
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        return path.is_file()
    return suffix in (*_TIFFS, ".tif", ".tiff") and _is_tiff(path) and (suffix in _TIFFS or _is_pyramid(path))


def _is_tiff(path: Path) -> bool:
    from wsi_brush.slide.tiff import MAGICS

    try:
        with path.open("rb") as file:
            return file.read(4) in MAGICS
    except OSError:
        return False


def _is_pyramid(path: Path) -> bool:
    """Whether a TIFF is a tiled pyramid in RGB whose pixel size is known: the directories alone are read first."""
    from wsi_brush.slide import open_slide
    from wsi_brush.slide.tiff import inspect

    try:
        facts = inspect(path)
        return facts.colour and facts.tiled and len(open_slide(path).levels) > 1
    except (SlideError, OSError, ValueError):
        return False


def _say_slide(store: Path) -> None:
    """Where no layer of the viewer is the slide of a store, which one to open."""
    from wsi_brush.store import EmbeddingStore

    shown = sys.modules.get("napari.viewer")  # without it there is no viewer, and its import takes seconds
    viewer = None if shown is None else shown.current_viewer()
    name = EmbeddingStore.open(store).about.get("slide", {}).get("name")
    if viewer is None or name is None:
        return
    if name not in {Path(str(layer.metadata.get("path", ""))).name for layer in viewer.layers}:
        say(f"{store.name}: embeddings of {name}, which is not open; open it too, to see what they lie on", "info")
