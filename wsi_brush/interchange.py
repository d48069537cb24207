"""A store of embeddings in the files that others read, and their embeddings as maps for a brush.

    trident-h5  `features` (n, dim), `coords` (n, 2) as int64, x and y of a tile's corner in level-0 pixels, the attributes
                of TRIDENT on `coords`; CLAM and what is built on either read the same keys
    stamp-h5    `feats` (n, dim), `coords` (n, 2) in µm, the attributes of STAMP on the file
    anndata     X (n, dim), `obs` with the place of each tile, `obsm['spatial']` its centre in level-0 pixels
    parquet     a row a tile
    geojson     the tissue (`outlines`)

Tiles come in raster order, those without tissue are left out. What was painted says so in each of them. The conventions
were read off files and sources of TRIDENT 0.3, CLAM and STAMP 2.5; no line of theirs is here.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .commit import staged_file
from .errors import MachineError, RefusedError, UsageError
from .grid import Grid
from .outlines import to_geojson
from .store import EmbeddingMap, EmbeddingStore

Format = Literal["trident-h5", "stamp-h5", "anndata", "parquet", "geojson"]
FORMATS: tuple[Format, ...] = get_args(Format)
PITCH_TOLERANCE = 0.05
"""How far the pitch of foreign tiles may be from the brush's: TRIDENT's are as nominal as its magnifications."""

_ROWS = 512  # of a chunk
_OFF = 0.01  # of a tile: how far from its cell on the lattice a corner may lie; STAMP's are float32
# Magnification that TRIDENT gives a slide whose pixel is below so many µm; it knows no others.
_NOMINAL = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10))


@dataclass(frozen=True)
class Tiles:
    """The tiles of one pitch of a store as rows: where they are and what they look like.

    values: (n, dim); cells: (n, 2) row and column on `lattice`; pixel: height and width of a level-0 pixel, µm.
    """

    values: NDArray[np.float16] | NDArray[np.float32]
    cells: NDArray[np.int64]
    lattice: Grid
    mpp: float
    pixel: tuple[float, float]
    about: dict[str, Any]

    @property
    def synthetic(self) -> bool:
        """Whether the slide was painted."""
        return self.about["synthetic"] is not False

    @property
    def side(self) -> int:
        """Pixels a side of a tile, at `mpp`."""
        return round(self.lattice.mpp / self.mpp)

    @property
    def corners(self) -> NDArray[np.float64]:
        """x and y of the upper left corners, µm: (n, 2)."""
        return (self.cells[:, ::-1] + np.array((self.lattice.left, self.lattice.top))) * self.lattice.mpp

    @property
    def level0(self) -> NDArray[np.float64]:
        """The same in level-0 pixels."""
        return self.corners / self.pixel[::-1]

    @property
    def facts(self) -> dict[str, Any]:
        """What every format says of them beside its own attributes."""
        slide, parameters = self.about["slide"], self.about["parameters"]
        return {
            "synthetic": self.synthetic,
            "slide": slide["name"],
            "mpp_x": self.pixel[1],
            "mpp_y": self.pixel[0],
            "mpp_source": slide["mpp_source"],
            "target_mpp": self.mpp,
            "encoder": parameters["encoder"],
            "weights_sha256": parameters["encoder_weights"],
            "fingerprint": self.about["parameters_fingerprint"],
            "tool_version": f"wsi-brush {__version__}",
        }


def tiles_of(store: EmbeddingStore, mpp: float = 0.5) -> Tiles:
    """The tiles of a store at one pitch.

    Raises:
        UsageError: if the store has no such pitch, or does not say what it was made from.
        RefusedError: if it is damaged.
    """
    if mpp not in store.maps:
        raise UsageError(f"{store.path}: no embeddings at {mpp:g} µm; --mpp may be {_listed(store.maps)}")
    _check_about(store)
    one = store.maps[mpp]
    cells = np.argwhere(one.present).astype(np.int64)
    return Tiles(one.values[tuple(cells.T)], cells, one.lattice, mpp, _pixel(store), store.about)


def export_store(
    store: EmbeddingStore, target: Path | str, to: Format, *, mpp: float = 0.5, overwrite: bool = False
) -> int:
    """Write one pitch of a store (of geojson its tissue) as one file, whole or not at all; how many tiles (pieces).

    Raises:
        UsageError, RefusedError: as `tiles_of`, or if something is at `target`.
        MachineError: if a library is missing, or `target` cannot be written to.
    """
    target = Path(target)
    if to == "geojson":
        _check_about(store)
        about = {"slide": store.about["slide"]["name"], "tool_version": f"wsi-brush {__version__}"}
        text = to_geojson(store.tissue, _pixel(store), synthetic=store.about["synthetic"] is not False, about=about)
        count = len(json.loads(text)["features"])

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

    else:
        tiles, writer = tiles_of(store, mpp), _WRITERS[to]
        libraries = {name: _library(name, to) for name in _LIBRARIES[to]}
        count = len(tiles.values)

        def write(path: Path) -> None:
            writer(path, tiles, *libraries.values())

    with staged_file(target, kind=f"{to} file", ours=lambda path: _is_ours(path, to), overwrite=overwrite) as path:
        write(path)
    return count


# -- how each is written -------------------------------------------------------------------------------


def _write_trident(path: Path, tiles: Tiles, h5py: Any) -> None:
    slide = tiles.about["slide"]
    height, width = (
        round(slide[name] * slide["mpp"] / pixel) for name, pixel in zip(("height", "width"), tiles.pixel, strict=True)
    )
    name = Path(slide["name"]).stem
    attributes = {
        "patch_size": tiles.side,
        "patch_size_level0": round(tiles.lattice.mpp / tiles.pixel[1]),
        "level0_magnification": nominal_magnification(tiles.pixel[1]),
        "target_magnification": _whole(10 / tiles.mpp),
        "overlap": 0,
        "name": name,
        "level0_width": width,
        "level0_height": height,
    }
    with h5py.File(path, "x") as file:
        _put(file, "features", tiles.values.astype(np.float32), {"name": name, "synthetic": tiles.synthetic})
        coords = np.rint(tiles.level0).astype(np.int64)
        _put(file, "coords", coords, {**attributes, "encoder": tiles.facts["encoder"], "synthetic": tiles.synthetic})
        _finish(file, tiles)


def _write_stamp(path: Path, tiles: Tiles, h5py: Any) -> None:
    with h5py.File(path, "x") as file:
        _put(file, "feats", tiles.values, {})
        _put(file, "coords", tiles.corners.astype(np.float32), {})
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tiles.lattice.mpp
        file.attrs["tile_size_px"] = tiles.side
        file.attrs["extractor"] = tiles.facts["encoder"]
        file.attrs["feat_type"] = "tile"
        # STAMP compares its own version with it and refuses files of later ones; what made this one is not STAMP.
        file.attrs["stamp_version"] = "2.5.0"
        file.attrs["code_hash"] = tiles.facts["fingerprint"][:8]
        _finish(file, tiles)


def _write_anndata(path: Path, tiles: Tiles, anndata: Any) -> None:
    (x_um, y_um), (x, y) = tiles.corners.T, np.rint(tiles.level0).astype(np.int64).T
    places = {"row": tiles.cells[:, 0], "column": tiles.cells[:, 1], "x": x, "y": y, "x_um": x_um, "y_um": y_um}
    observations = anndata.AnnData(
        tiles.values.astype(np.float32),
        obs=places | {"synthetic": np.full(len(tiles.cells), tiles.synthetic)},
        obsm={"spatial": (tiles.corners + tiles.lattice.mpp / 2) / tiles.pixel[::-1]},
        uns={"wsi_brush": {**tiles.facts, "tile_um": tiles.lattice.mpp, "about": json.dumps(tiles.about)}},
    )
    observations.obs_names = [f"{row}_{column}" for row, column in tiles.cells.tolist()]
    observations.write_h5ad(path)


def _write_parquet(path: Path, tiles: Tiles, pyarrow: Any, parquet: Any) -> None:
    n, dim = tiles.values.shape
    (x_um, y_um), (x, y) = tiles.corners.T, np.rint(tiles.level0).astype(np.int64).T
    flat = pyarrow.array(tiles.values.astype(np.float32).ravel())
    columns = {
        "slide": pyarrow.array([tiles.facts["slide"]] * n, pyarrow.string()),
        "synthetic": pyarrow.array([tiles.synthetic] * n, pyarrow.bool_()),
        "row": tiles.cells[:, 0], "column": tiles.cells[:, 1], "x": x, "y": y, "x_um": x_um, "y_um": y_um,
        "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, dim),
    }  # fmt: skip
    facts = {**tiles.facts, "tile_um": tiles.lattice.mpp, "about": tiles.about}
    table = pyarrow.table(columns).replace_schema_metadata({"wsi_brush": json.dumps(facts)})
    parquet.write_table(table, path)


_WRITERS: dict[str, Callable[..., None]] = {
    "trident-h5": _write_trident, "stamp-h5": _write_stamp, "anndata": _write_anndata, "parquet": _write_parquet,
}  # fmt: skip
_LIBRARIES = {
    "trident-h5": ("h5py",), "stamp-h5": ("h5py",), "anndata": ("anndata",), "parquet": ("pyarrow", "pyarrow.parquet"),
}  # fmt: skip


def _put(file: Any, name: str, values: NDArray[Any], attributes: dict[str, Any]) -> None:
    """A dataset in chunks of many rows, and what it says of itself."""
    chunks = (min(len(values), _ROWS), *values.shape[1:]) if values.size else None
    file.create_dataset(name, data=values, chunks=chunks).attrs.update(attributes)


def _finish(file: Any, tiles: Tiles) -> None:
    """What is ours: the place of each tile on the lattice, the lattice, and where all of it comes from."""
    _put(file, "grid_ij", tiles.cells, {"lattice": json.dumps(asdict(tiles.lattice))})
    file.attrs.update(tiles.facts)
    file.attrs["wsi_brush"] = json.dumps(tiles.about)


def nominal_magnification(mpp: float) -> float:
    """The magnification by which TRIDENT calls a slide of `mpp` µm a pixel; beyond those, 10 / mpp."""
    return next((float(nominal) for below, nominal in _NOMINAL if mpp < below), 10 / mpp)


def _whole(number: float) -> float | int:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


def _library(name: str, to: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MachineError(
            f'{to}: needs {name.partition(".")[0]}, which is not installed; pip install "wsi-brush[interchange]"'
        ) from None


def _is_ours(path: Path, to: Format) -> bool:
    """Whether a file is one that `export_store` wrote in this format."""
    try:
        if to == "geojson":
            return "wsi_brush" in json.loads(path.read_text(encoding="utf-8"))
        if to == "parquet":
            return b"wsi_brush" in (_library("pyarrow.parquet", to).read_schema(path).metadata or {})
        with _library("h5py", to).File(path, "r") as file:
            return "wsi_brush" in (file.get("uns", ()) if to == "anndata" else file.attrs)
    except (OSError, ValueError, TypeError):  # also what pyarrow raises of a foreign file
        return False


def _check_about(store: EmbeddingStore) -> None:
    slide, parameters = store.about.get("slide", {}), store.about.get("parameters", {})
    if not {"name", "mpp", "mpp_source", "height", "width"} <= set(slide) or (
        not {"encoder", "encoder_weights"} <= set(parameters)
    ):
        raise UsageError(f"{store.path}: does not say which slide and encoder it is of; embed the slide again")


def _pixel(store: EmbeddingStore) -> tuple[float, float]:
    """Height and width of a level-0 pixel, µm."""
    slide = store.about["slide"]
    height, width = slide.get("pixel", (slide["mpp"], slide["mpp"]))
    return float(height), float(width)


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


# -- read back -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """Embeddings that were read from a file: the map, and what the file says of it (weights: their SHA-256)."""

    path: Path
    map: EmbeddingMap
    encoder: str
    weights: str | None
    synthetic: bool


def read_h5(path: Path | str, *, slide_mpp: float | None = None) -> Foreign:
    """The embeddings of an h5 of TRIDENT or STAMP, or one that was exported here, as a map.

    `slide_mpp` is the side of a level-0 pixel, µm: TRIDENT's files do not say it.

    Raises:
        RefusedError: if the file is neither, or its tiles lie on no lattice: shifted, overlapping, doubled.
        UsageError: if the pixel size is missing.
        MachineError: if h5py is missing.
    """
    path, h5py = Path(path), _library("h5py", "reading h5")
    try:
        with h5py.File(path, "r") as file:
            about = {name: _text(value) for name, value in file.attrs.items()}
            name = "features" if "features" in file else "feats"
            if name not in file or "coords" not in file:
                raise RefusedError(
                    f"{path}: holds {_named(file)}; expected features (or feats) and coords, a row a tile"
                )
            values, coords = np.asarray(file[name][()]), np.asarray(file["coords"][()], np.float64)
            about |= {key: _text(value) for key, value in file["coords"].attrs.items()}
            frame = json.loads(file["grid_ij"].attrs["lattice"]) if "grid_ij" in file else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"{path}: no HDF5 of embeddings that can be read ({error}); export it again") from None
    values = values.reshape(values.shape[1:]) if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or coords.shape != (len(values), 2):
        raise RefusedError(f"{path}: features of {values.shape} with coords of {coords.shape}; expected a row a tile")
    if values.dtype not in (np.float16, np.float32):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise RefusedError(f"{path}: features that are not finite; extract them again")
    stamp = name == "feats"
    pitch, side, unit = _stamp_pitch(path, about) if stamp else _trident_pitch(path, about, slide_mpp)
    lattice = _map_lattice(path, coords * unit / pitch, pitch, frame)
    cells = np.rint(coords[:, ::-1] * unit / pitch).astype(np.int64) - (lattice.top, lattice.left)
    spread = np.full((*lattice.shape, values.shape[1]), np.nan, values.dtype)
    spread[tuple(cells.T)] = values
    weights = str(about["weights_sha256"]) if "weights_sha256" in about else None
    encoder = str(about.get("encoder") or about.get("extractor") or "unknown")
    return Foreign(path, EmbeddingMap(pitch / side, lattice, spread), encoder, weights, bool(about.get("synthetic")))


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
    found: dict[float, EmbeddingMap] = {}
    for path in paths:
        one = read_h5(path, slide_mpp=slide_mpp)
        lattice, place = one.map.lattice, f"{one.path}: embeddings of {one.encoder}"
        near = [pitch for pitch in pitches if abs(one.map.mpp / pitch - 1) <= PITCH_TOLERANCE]
        if not near:
            raise UsageError(f"{place} at {one.map.mpp:.4g} µm; the brush follows tiles at {_listed(pitches)} µm")
        if abs(lattice.mpp / (near[0] * tile) - 1) > PITCH_TOLERANCE:
            side = round(lattice.mpp / one.map.mpp)
            raise UsageError(
                f"{place}, tiles of {side} pixels; the brush follows tiles of {tile}, one beside the other"
            )
        if one.map.dim != dim:
            raise UsageError(f"{place}, {one.map.dim} numbers each; the brush follows {dim} numbers of its own encoder")
        if one.weights is None and not same_encoder:
            raise UsageError(f"{place}, whose weights it does not name; pass same_encoder=True if they are the brush's")
        if one.weights not in (None, weights):
            raise UsageError(
                f"{place} ({str(one.weights)[:12]}); the brush follows an encoder of weights {weights[:12]}"
            )
        if near[0] in found:
            raise UsageError(f"{place} at {near[0]:g} µm, which another file has already; give one file a pitch")
        found[near[0]] = one.map
    missing = [pitch for pitch in pitches if pitch not in found]
    if missing:
        raise UsageError(f"no file at {_listed(missing)} µm; the brush follows tiles at {_listed(pitches)} µm")
    return found


def _trident_pitch(path: Path, about: dict[str, Any], slide_mpp: float | None) -> tuple[float, int, float]:
    """Side of a tile in µm and in pixels, and µm of a unit of its coords."""
    if "patch_size" not in about or "patch_size_level0" not in about:
        raise RefusedError(
            f"{path}: coords do not say patch_size and patch_size_level0, as CLAM's do not; extract it with TRIDENT"
        )
    if about.get("overlap", 0):
        raise RefusedError(f"{path}: tiles overlap by {about['overlap']} pixels; expected tiles side by side")
    pixel = slide_mpp if slide_mpp is not None else about.get("mpp_x")
    if pixel is None:
        raise UsageError(f"{path}: does not say the slide's pixel size; pass it as slide_mpp (wsi-brush info SLIDE)")
    side = int(about["patch_size"])
    # Where the true pitch is known, the level-0 side is it, rounded.
    pitch = float(about["target_mpp"]) * side if "target_mpp" in about else float(about["patch_size_level0"]) * pixel
    return pitch, side, float(pixel)


def _stamp_pitch(path: Path, about: dict[str, Any]) -> tuple[float, int, float]:
    if about.get("unit") != "um" or "tile_size_um" not in about or "tile_size_px" not in about:
        raise RefusedError(
            f"{path}: does not say unit=um, tile_size_um and tile_size_px, as STAMP 2.1 and later do; extract it again"
        )
    return float(about["tile_size_um"]), int(about["tile_size_px"]), 1.0


def _map_lattice(path: Path, corners: NDArray[np.float64], pitch: float, frame: Any) -> Grid:
    """The lattice on which corners (n, 2), x and y in sides of a tile, are whole numbers."""
    cells = np.rint(corners).astype(np.int64)
    off = np.abs(corners - cells).max(initial=0)
    if off > _OFF:
        raise RefusedError(
            f"{path}: a tile is {off:.2f} of its side off the lattice of its tiles from the slide's corner; expected "
            "tiles side by side, as TRIDENT and STAMP cut them"
        )
    if len(np.unique(cells, axis=0)) != len(cells):
        raise RefusedError(f"{path}: tiles lie on one another; expected each place once")
    if frame is not None:
        return Grid(pitch, *(int(frame[name]) for name in ("top", "left", "height", "width")))
    if not len(cells):
        return Grid(pitch, 0, 0, 0, 0)
    (left, top), (right, bottom) = cells.min(0).tolist(), (cells.max(0) + 1).tolist()
    return Grid(pitch, top, left, bottom - top, right - left)


def _text(value: Any) -> Any:
    """An attribute as plain Python has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value


def _named(file: Any) -> str:
    return ", ".join(sorted(file)[:6]) or "nothing"
