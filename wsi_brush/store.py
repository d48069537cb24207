"""An embedding at every point, at several pitches: what a slide is to the brush.

On disk a store is one Zarr v3 group with a manifest (`commit`), read-only once it is there:

    NAME.zarr/wsi-brush.json          manifest: kind, provenance, size and SHA-256 of every file
    NAME.zarr/tissue                  bool (rows, columns)
    NAME.zarr/embeddings/<mpp>        float (rows, columns, dim), NaN where there is no tissue

Every chunk carries a checksum and is written, also an empty one: a missing chunk is damage, not zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .commit import MANIFEST, read_manifest, sha256_of, staged
from .errors import RefusedError
from .grid import Grid
from .machine import undisturbed
from .tissue import Tissue

if TYPE_CHECKING:
    import zarr

KIND = "embedding store"
FORMAT = 1
METADATA = "zarr.json"
_CHUNK = 64  # lattice cells a side of a chunk


@dataclass(frozen=True)
class EmbeddingMap:
    """Embeddings of tiles seen at `mpp` µm a pixel, one a cell of `lattice` (whose pitch is a tile's side, µm).

    `values` is (rows, columns, dim), float16 or float32, NaN in cells without tissue.
    """

    mpp: float
    lattice: Grid
    values: NDArray[np.float16] | NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.values.shape[:2] != self.lattice.shape:
            raise ValueError(f"embeddings of shape {self.values.shape} on a lattice of {self.lattice.shape}")

    @property
    def dim(self) -> int:
        """Numbers in one embedding."""
        return int(self.values.shape[2])

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which cells hold an embedding: (rows, columns)."""
        if self.dim == 0:
            return np.zeros(self.lattice.shape, np.bool_)
        return ~np.isnan(self.values[..., 0])

    def read(self, grid: Grid) -> NDArray[np.float32]:
        """The map at the grid's pixel centres: (height, width, dim), bilinear between the centres of cells.

        Absent cells, and those outside the lattice, count for nothing: the weights of the present ones are
        brought to one, and where all four are absent the answer is NaN. A pixel's value does not depend on
        the grid that it is read in.
        """
        rows, columns = grid.centres()
        top, down = _neighbours(rows, self.lattice.mpp)
        left, across = _neighbours(columns, self.lattice.mpp)
        if not grid.height or not grid.width:
            return np.empty((*grid.shape, self.dim), np.float32)
        # The cells around the grid, with absent ones as zeros of no weight.
        near = Grid(self.lattice.mpp, int(top[0]), int(left[0]), int(top[-1] - top[0]) + 2, int(left[-1] - left[0]) + 2)
        inside = near.clip(self.lattice)
        cells = np.zeros((*near.shape, self.dim + 1), np.float32)
        if inside.height and inside.width:
            values = self.values[inside.within(self.lattice)].astype(np.float32)
            here = ~np.isnan(values[..., :1])
            cells[inside.within(near)] = np.concatenate([np.where(here, values, 0), here], axis=-1)
        top, left = top - near.top, left - near.left
        bands = cells[top] * (1 - down)[:, None, None] + cells[top + 1] * down[:, None, None]
        mixed = bands[:, left] * (1 - across)[None, :, None] + bands[:, left + 1] * across[None, :, None]
        weight = mixed[..., -1:]
        return np.where(weight > 0, mixed[..., :-1] / np.where(weight > 0, weight, 1), np.float32(np.nan))

    def crop(self, grid: Grid) -> EmbeddingMap:
        """The cells that touch `grid` (of any pitch), where they are in the lattice."""
        lattice = grid.at(self.lattice.mpp).clip(self.lattice)
        if not lattice.height or not lattice.width:
            return EmbeddingMap(self.mpp, lattice, self.values[: lattice.height, : lattice.width])
        return EmbeddingMap(self.mpp, lattice, self.values[lattice.within(self.lattice)])


class EmbeddingStore:
    """The embeddings of one slide on disk. Open with `EmbeddingStore.open`; nothing is read until asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.about: dict[str, Any] = manifest["about"]

    @staticmethod
    def open(path: Path | str) -> EmbeddingStore:
        """Open a finished store, if every file is there at its size and the metadata are as they were written.

        What the chunks hold is checked when they are read, and all at once by `commit.verify`.

        Raises:
            RefusedError: if `path` is not there, unfinished, foreign, damaged, or of a newer format.
        """
        path = Path(path)
        if not path.exists():
            raise RefusedError(f"{path}: no such store; make it with: wsi-brush embed SLIDE -o {path.parent}")
        manifest = read_manifest(path)
        if manifest is None:
            raise RefusedError(
                f"{path}: no {MANIFEST} in it, so it is no finished {KIND}; make it with: wsi-brush embed"
            )
        if manifest.get("kind") != KIND:
            raise RefusedError(f"{path}: is a {manifest.get('kind')} of wsi-brush, not an {KIND}")
        if manifest.get("format") != FORMAT:
            raise RefusedError(
                f"{path}: format {manifest.get('format')}, this version reads {FORMAT}; embed the slide again"
            )
        if not isinstance(manifest.get("about"), dict) or not isinstance(manifest.get("files"), dict):
            raise RefusedError(f"{path / MANIFEST}: damaged; remove {path} and embed the slide again")
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != expected["size"]:
                raise RefusedError(f"{file}: missing or cut short; remove {path} and embed the slide again")
            if file.name == METADATA and sha256_of(file) != expected["sha256"]:
                raise RefusedError(f"{file}: changed since it was written; remove {path} and embed the slide again")
        return EmbeddingStore(path, manifest)

    @cached_property
    def maps(self) -> Mapping[float, EmbeddingMap]:
        """The map of each pitch (µm a pixel), read when it is first asked for."""
        return _Maps(self, tuple(float(mpp) for mpp in self.about["pitches"]))

    @cached_property
    def tissue(self) -> Tissue:
        """The tissue mask of the slide."""
        array = self._array("tissue")
        return Tissue(_whole(array, self.path), _grid(array, "grid"))

    def lattice_at(self, mpp: float) -> Grid:
        """The lattice of the map of one pitch, without its values."""
        return _grid(self._array(f"embeddings/{mpp:g}"), "lattice")

    def map_at(self, mpp: float) -> EmbeddingMap:
        """Read the map of one pitch from disk."""
        array = self._array(f"embeddings/{mpp:g}")
        return EmbeddingMap(mpp, _grid(array, "lattice"), _whole(array, self.path))

    def _array(self, name: str) -> zarr.Array[Any]:
        import zarr

        try:
            return zarr.open_array(self.path / name, mode="r", zarr_format=3)
        except (OSError, ValueError, KeyError) as error:  # a node that is missing, or metadata that do not parse
            raise RefusedError(f"{self.path / name}: cannot be read ({error}); embed the slide again") from None


class _Maps(Mapping[float, EmbeddingMap]):
    """The maps of a store, each read once."""

    def __init__(self, store: EmbeddingStore, pitches: tuple[float, ...]) -> None:
        self._store, self._pitches = store, pitches
        self._read: dict[float, EmbeddingMap] = {}

    def __getitem__(self, mpp: float) -> EmbeddingMap:
        if mpp not in self._pitches:
            raise KeyError(mpp)
        if mpp not in self._read:
            self._read[mpp] = self._store.map_at(mpp)
        return self._read[mpp]

    def __iter__(self) -> Iterator[float]:
        return iter(self._pitches)

    def __len__(self) -> int:
        return len(self._pitches)


def write_store(
    path: Path,
    maps: Mapping[float, EmbeddingMap],
    *,
    tissue: Tissue,
    about: Mapping[str, Any],
    overwrite: bool = False,
) -> EmbeddingStore:
    """Write a store at `path`, whole or not at all, and open it.

    `about` is its provenance (JSON); it is the caller's duty to put nothing there that identifies a patient.

    Raises:
        RefusedError, MachineError: as `commit.staged`.
    """
    import zarr

    about = {"wsi_brush": __version__, **about, "pitches": list(maps)}
    manifest = {"format": FORMAT, "about": about}
    with staged(path, kind=KIND, about=manifest, overwrite=overwrite) as stage, undisturbed():
        group = zarr.create_group(stage, zarr_format=3)
        embeddings = group.create_group("embeddings")
        write_array(group, "tissue", tissue.mask, {"grid": asdict(tissue.grid)})
        for mpp, one in maps.items():
            write_array(embeddings, f"{mpp:g}", one.values, {"mpp": mpp, "lattice": asdict(one.lattice)})
    return EmbeddingStore.open(path)


def write_array(group: zarr.Group, name: str, values: NDArray[Any], attributes: dict[str, Any]) -> None:
    """One array, every chunk of it, with checksums."""
    from zarr.codecs import ZstdCodec

    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=tuple(max(1, size if axis == 2 else min(size, _CHUNK)) for axis, size in enumerate(values.shape)),
        compressors=ZstdCodec(level=3, checksum=True),
        fill_value=np.nan if values.dtype.kind == "f" else values.dtype.type(0),
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    for corner in product(*(range(0, size, step) for size, step in zip(values.shape, array.chunks, strict=True))):
        part = tuple(slice(first, first + step) for first, step in zip(corner, array.chunks, strict=True))
        array[part] = values[part]  # one at a time: ten are copied and compressed at once otherwise


def _whole(array: zarr.Array[Any], path: Path) -> NDArray[Any]:
    """All values of an array.

    Raises:
        RefusedError: if a chunk is missing, or fails its checksum.
    """
    try:
        if array.nchunks_initialized != array.nchunks and array.size:
            raise RefusedError(f"{path / array.path}: chunks are missing; remove {path} and embed the slide again")
        return np.asarray(array[...])
    except (RuntimeError, ValueError, OSError) as error:  # what the codec, the buffer and the file system say
        raise RefusedError(f"{path}: damaged ({error}); remove it and embed the slide again") from None


def _grid(array: zarr.Array[Any], name: str) -> Grid:
    """The grid that an array stands on; its metadata were checked when the store was opened."""
    attributes: dict[str, Any] = array.attrs.asdict()
    return Grid(**attributes[name])


def _neighbours(centres: NDArray[np.float64], pitch: float) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """For points (µm) of one axis: the last cell whose centre is not after it, and the weight of the next."""
    place = centres / pitch - 0.5
    first = np.floor(place)
    return first.astype(np.intp), (place - first).astype(np.float32)
