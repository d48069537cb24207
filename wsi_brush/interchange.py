"""A store of embeddings in the files that others read.

    trident-h5  `features` (n, dim), `coords` (n, 2) as int64, x and y of a tile's corner in level-0 pixels, TRIDENT's
                attributes on `coords`; CLAM and what is built on either read the same keys
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .commit import staged_file
from .errors import MachineError, UsageError
from .grid import Grid
from .outlines import to_geojson
from .store import EmbeddingStore

Format = Literal["trident-h5", "stamp-h5", "anndata", "parquet", "geojson"]
FORMATS: tuple[Format, ...] = get_args(Format)

_ROWS = 512  # of a chunk
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
        return np.asarray((self.cells[:, ::-1] + (self.lattice.left, self.lattice.top)) * self.lattice.mpp)

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
        raise UsageError(f"{store.path}: no embeddings at {mpp:g} µm; --mpp may be {listed(store.maps)}")
    check_about(store)
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
        check_about(store)
        about = {"slide": store.about["slide"]["name"], "tool_version": f"wsi-brush {__version__}"}
        text = to_geojson(store.tissue, _pixel(store), synthetic=store.about["synthetic"] is not False, about=about)
        count = len(json.loads(text)["features"])

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

    else:
        tiles, writer = tiles_of(store, mpp), _WRITERS[to]
        libraries = {name: library(name, to) for name in _LIBRARIES[to]}
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
        "level0_magnification": _whole(nominal_magnification(tiles.pixel[1])),
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
        _put(file, "feats", tiles.values, {"synthetic": tiles.synthetic})
        _put(file, "coords", tiles.corners.astype(np.float32), {"synthetic": tiles.synthetic})
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tiles.lattice.mpp
        file.attrs["tile_size_px"] = tiles.side
        file.attrs["extractor"] = tiles.facts["encoder"]
        file.attrs["feat_type"] = "tile"
        # The first version with this layout: STAMP refuses files of versions later than itself.
        file.attrs["stamp_version"] = "2.1.0"
        file.attrs["code_hash"] = tiles.facts["fingerprint"][:8]
        _finish(file, tiles)


def _write_anndata(path: Path, tiles: Tiles, h5py: Any) -> None:
    """By its specification on disk (anndata 0.8 and later): the library itself keeps pandas at older versions."""
    n, dim = tiles.values.shape
    (x_um, y_um), (x, y) = tiles.corners.T, np.rint(tiles.level0).astype(np.int64).T
    places = {"row": tiles.cells[:, 0], "column": tiles.cells[:, 1], "x": x, "y": y, "x_um": x_um, "y_um": y_um}
    names = [f"{row}_{column}" for row, column in tiles.cells.tolist()]
    with h5py.File(path, "x") as file:
        file.attrs.update(_encoding("anndata", "0.1.0"))
        _put(file, "X", tiles.values.astype(np.float32), _encoding("array"))
        _put_frame(file, "obs", names, places | {"synthetic": np.full(n, tiles.synthetic)}, h5py)
        _put_frame(file, "var", [str(number) for number in range(dim)], {}, h5py)
        for name in ("layers", "obsm", "obsp", "uns", "uns/wsi_brush", "varm", "varp"):
            file.create_group(name).attrs.update(_encoding("dict", "0.1.0"))
        _put(file, "obsm/spatial", (tiles.corners + tiles.lattice.mpp / 2) / tiles.pixel[::-1], _encoding("array"))
        facts = {**tiles.facts, "tile_um": tiles.lattice.mpp, "about": json.dumps(tiles.about)}
        for name, value in facts.items():
            file[f"uns/wsi_brush/{name}"] = value
            kind = "string" if isinstance(value, str) else "numeric-scalar"
            file[f"uns/wsi_brush/{name}"].attrs.update(_encoding(kind))


def _put_frame(file: Any, name: str, index: list[str], columns: dict[str, NDArray[Any]], h5py: Any) -> None:
    """A table as AnnData keeps one: a group with a dataset a column."""
    group, text = file.create_group(name), h5py.string_dtype()
    group.attrs.update({**_encoding("dataframe"), "_index": "_index"})
    group.attrs.create("column-order", list(columns), dtype=text, shape=(len(columns),))
    group.create_dataset("_index", data=index, dtype=text, shape=(len(index),)).attrs.update(_encoding("string-array"))
    for column, values in columns.items():
        _put(group, column, values, _encoding("array"))


def _encoding(kind: str, version: str = "0.2.0") -> dict[str, str]:
    return {"encoding-type": kind, "encoding-version": version}


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
    "trident-h5": ("h5py",), "stamp-h5": ("h5py",), "anndata": ("h5py",), "parquet": ("pyarrow", "pyarrow.parquet"),
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


def library(name: str, to: str) -> Any:
    """A library that only interchange needs.

    Raises:
        MachineError: if it is not installed.
    """
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
            found = json.loads(path.read_text(encoding="utf-8"))
            return found.get("type") == "FeatureCollection" and "wsi_brush" in found
        if to == "parquet":
            return b"wsi_brush" in (library("pyarrow.parquet", to).read_schema(path).metadata or {})
        with library("h5py", to).File(path, "r") as file:
            own = {"trident-h5": "features", "stamp-h5": "feats", "anndata": "X"}[to] in file
            return own and "wsi_brush" in (file.get("uns", ()) if to == "anndata" else file.attrs)
    except (OSError, ValueError, TypeError, AttributeError):  # also what pyarrow raises of a foreign file
        return False


def check_about(store: EmbeddingStore) -> None:
    """Whether a store says which slide and encoder it is of.

    Raises:
        UsageError: if not.
    """
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


def listed(numbers: Iterable[float]) -> str:
    """Numbers as a user writes them."""
    return ", ".join(f"{number:g}" for number in numbers)
