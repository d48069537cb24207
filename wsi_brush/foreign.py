"""Embeddings that others made, as maps for a brush: the h5 of TRIDENT and of STAMP, and what `interchange` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedError, UsageError
from .grid import Grid
from .interchange import library, listed
from .store import EmbeddingMap

PITCH_TOLERANCE = 0.05
"""How far the pitch of foreign tiles may be from the brush's: TRIDENT's are as nominal as its magnifications."""

_OFF = 0.01  # sides of a tile from its cell on the lattice; STAMP's corners are float32
_MOST = 1 << 30  # numbers of a map, 4 GB: 5.5 x 5.5 cm in tiles of 64 µm with 1,536 each
_FRAME = ("top", "left", "height", "width")


@dataclass(frozen=True)
class Foreign:
    """Embeddings that were read from a file: the map, and what the file says of it (weights: their SHA-256; made: one
    digest for all that was exported of one store)."""

    path: Path
    map: EmbeddingMap
    encoder: str
    weights: str | None
    synthetic: bool
    made: str | None = None


def read_h5(path: Path | str, *, slide_mpp: float | None = None) -> Foreign:
    """The embeddings of an h5 of TRIDENT or STAMP, or one that was exported here, as a map.

    `slide_mpp` is the side of a level-0 pixel, µm: TRIDENT's files do not say it.

    Raises:
        RefusedError: if the file is neither, or its tiles lie on no lattice: shifted, overlapping, doubled.
        UsageError: if the pixel size is missing.
        MachineError: if h5py is missing.
    """
    path, h5py = Path(path), library("h5py", "reading h5")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected the h5 of TRIDENT or STAMP")
    try:
        with h5py.File(path, "r") as file:
            about = {name: _plain(value) for name, value in file.attrs.items()}
            name = "features" if "features" in file else "feats"
            if name not in file or "coords" not in file:
                held = ", ".join(sorted(file)[:6]) or "nothing"
                raise RefusedError(f"{path}: holds {held}; expected features (or feats) and coords, a row a tile")
            values, coords = np.asarray(file[name][()]), np.asarray(file["coords"][()], np.float64)
            if values.dtype not in (np.float16, np.float32):
                values = values.astype(np.float32)
            about |= {key: _plain(value) for key, value in file["coords"].attrs.items()}
            scale = _stamp(path, about) if name == "feats" else _trident(path, about, slide_mpp)
            frame = json.loads(file["grid_ij"].attrs["lattice"]) if "grid_ij" in file else None
            own = None if frame is None else Grid(scale.pitch, *(int(frame[key]) for key in _FRAME))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RefusedError(f"{path}: no HDF5 of embeddings that can be read ({error}); export it again") from None
    if values.ndim != 2 or coords.shape != (len(values), 2):
        raise RefusedError(f"{path}: features of {values.shape} with coords of {coords.shape}; expected a row a tile")
    if not (np.isfinite(values).all() and np.isfinite(coords).all()):
        raise RefusedError(f"{path}: numbers that are not finite; extract it again")
    cells = _cells(path, coords[:, ::-1] * scale.unit / scale.pitch, _OFF + scale.rounded / scale.pitch)
    lattice = own or _around(cells, scale.pitch)
    inside = (cells >= (lattice.top, lattice.left)) & (cells < (lattice.bottom, lattice.right))
    if not inside.all() or lattice.height * lattice.width * values.shape[1] > _MOST:
        raise RefusedError(
            f"{path}: tiles are spread over {lattice.height} x {lattice.width} cells, no slide; export it again"
        )
    spread = np.full((*lattice.shape, values.shape[1]), np.nan, values.dtype)
    spread[tuple((cells - (lattice.top, lattice.left)).T)] = values
    weights = str(about["weights_sha256"]) if "weights_sha256" in about else None
    encoder = str(about.get("encoder") or about.get("extractor") or "an encoder that it does not name")
    one = EmbeddingMap(scale.pitch / scale.side, lattice, spread)
    made = str(about["fingerprint"]) if "fingerprint" in about else None
    return Foreign(path, one, encoder, weights, bool(about.get("synthetic")), made)


def read_conditions(
    paths: Iterable[Path | str],
    *,
    pitches: Sequence[float],
    tile: int,
    dim: int,
    weights: str,
    slide_mpp: float | None = None,
    same_encoder: bool = False,
) -> dict[float, EmbeddingMap]:
    """The maps that a brush is to follow, one file a pitch: `Brush.condition` and `paint.paint_canvas` take them.

    pitches (µm), tile (pixels), dim, weights (SHA-256 of the encoder's): of the brush. Files of others do not name the
    weights that made them: with `same_encoder` the caller says that they are the brush's.

    Raises:
        UsageError: if a pitch is missing or there twice, or tile, dimension or encoder are not the brush's.
        RefusedError, MachineError: as `read_h5`.
    """
    found = matched(
        (read_h5(path, slide_mpp=slide_mpp) for path in paths),
        pitches=pitches, tile=tile, dim=dim, weights=weights, same_encoder=same_encoder,
    )  # fmt: skip
    return {pitch: one.map for pitch, one in found.items()}


def matched(
    files: Iterable[Foreign], *, pitches: Sequence[float], tile: int, dim: int, weights: str, same_encoder: bool = False
) -> dict[float, Foreign]:
    """Embeddings that were read, by the pitch of the brush that each is for; all else as `read_conditions`.

    Raises:
        UsageError: as `read_conditions`.
    """
    found: dict[float, Foreign] = {}
    for one in files:
        lattice, place = one.map.lattice, f"{one.path}: embeddings of {one.encoder}"
        near = [pitch for pitch in pitches if abs(one.map.mpp / pitch - 1) <= PITCH_TOLERANCE]
        if not near:
            raise UsageError(f"{place} at {one.map.mpp:.4g} µm; the brush follows tiles at {listed(pitches)} µm")
        if abs(lattice.mpp / (near[0] * tile) - 1) > PITCH_TOLERANCE:
            side = round(lattice.mpp / one.map.mpp)
            raise UsageError(
                f"{place}, tiles of {side} pixels; the brush follows tiles of {tile}, one beside the other"
            )
        if one.map.dim != dim:
            raise UsageError(f"{place}, {one.map.dim} numbers each; the brush follows {dim} numbers of its own encoder")
        if one.weights is None and not same_encoder:
            raise UsageError(
                f"{place}, whose weights it does not name; give --same-encoder (in Python same_encoder=True) if they "
                "are the brush's"
            )
        if one.weights not in (None, weights):
            raise UsageError(
                f"{place} ({str(one.weights)[:12]}); the brush follows an encoder of weights {weights[:12]}"
            )
        if near[0] in found:
            raise UsageError(f"{place} at {near[0]:g} µm, which another file has already; give one file a pitch")
        found[near[0]] = one
    missing = [pitch for pitch in pitches if pitch not in found]
    if missing:
        raise UsageError(f"no file at {listed(missing)} µm; the brush follows tiles at {listed(pitches)} µm")
    return found


class _Scale(NamedTuple):
    """Side of a tile in µm and in pixels; height and width of a unit of the coords in µm, and how far those round."""

    pitch: float
    side: int
    unit: tuple[float, float]
    rounded: float = 0.0

    def checked(self, path: Path) -> _Scale:
        if not (self.side > 0 and all(math.isfinite(one) and one > 0 for one in (self.pitch, *self.unit))):
            raise RefusedError(f"{path}: tiles of {self.side} pixels and {self.pitch:g} µm; export it again")
        return self


def _trident(path: Path, about: dict[str, Any], slide_mpp: float | None) -> _Scale:
    if "patch_size" not in about or "patch_size_level0" not in about:
        raise RefusedError(
            f"{path}: coords do not say patch_size and patch_size_level0, as CLAM's do not; extract it with TRIDENT"
        )
    if about.get("overlap", 0):
        raise RefusedError(f"{path}: tiles overlap by {about['overlap']} pixels; expected tiles side by side")
    pixel: tuple[Any, Any] = (about.get("mpp_y"), about.get("mpp_x")) if slide_mpp is None else (slide_mpp, slide_mpp)
    if None in pixel:
        raise UsageError(
            f"{path}: does not say the slide's pixel size; give --assume-mpp, in Python slide_mpp "
            "(wsi-brush info SLIDE)"
        )
    height, width = (float(length) for length in pixel)
    side, level0 = int(about["patch_size"]), float(about["patch_size_level0"])
    if "target_mpp" in about:  # ours: the side at level 0 is the true one, rounded, and so are the corners
        return _Scale(float(about["target_mpp"]) * side, side, (height, width), max(height, width) / 2).checked(path)
    return _Scale(level0 * width, side, (height, width)).checked(path)


def _stamp(path: Path, about: dict[str, Any]) -> _Scale:
    if about.get("unit") != "um" or "tile_size_um" not in about or "tile_size_px" not in about:
        raise RefusedError(
            f"{path}: does not say unit=um, tile_size_um and tile_size_px, as STAMP 2.1 and later do; extract it again"
        )
    return _Scale(float(about["tile_size_um"]), int(about["tile_size_px"]), (1.0, 1.0)).checked(path)


def _cells(path: Path, corners: NDArray[np.float64], most: float) -> NDArray[np.int64]:
    """The cells (n, 2) of a lattice on which corners (n, 2), row and column in sides of a tile, are whole numbers."""
    cells = np.rint(corners.clip(-1e9, 1e9))
    off = np.abs(corners - cells).max(initial=0)
    if off > most:
        raise RefusedError(
            f"{path}: a tile stands {off:.2g} of its side beside the lattice that the others and the slide's corner "
            "give; expected tiles side by side, as TRIDENT and STAMP cut them"
        )
    if len(np.unique(cells, axis=0)) != len(cells):
        raise RefusedError(f"{path}: tiles stand on one another; expected each place once")
    return np.asarray(cells, np.int64)


def _around(cells: NDArray[np.int64], pitch: float) -> Grid:
    """The smallest lattice that holds cells (n, 2)."""
    if not len(cells):
        return Grid(pitch, 0, 0, 0, 0)
    (top, left), (bottom, right) = cells.min(0).tolist(), (cells.max(0) + 1).tolist()
    return Grid(pitch, top, left, bottom - top, right - left)


def _plain(value: Any) -> Any:
    """An attribute as plain Python has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
