"""Verb: slide -> store. A slide is seen tile by tile at several pitches, and each tile becomes a vector.

The tiles of a pitch stand on one lattice anchored at the slide's origin, so a tile is the same tile, and has
the same embedding, in whatever region it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .commit import check_target, fingerprint, read_manifest
from .errors import RefusedError, SlideError, UsageError
from .grid import Grid
from .outlines import find_outlines, outlines_digest, read_outlines
from .slide import Slide, open_slide
from .store import KIND, EmbeddingMap, EmbeddingStore, write_store
from .tissue import RULES, Tissue, find_tissue

PITCHES = (0.5, 2.0, 8.0)
"""µm a pixel at which tiles are seen: nuclei, glands, architecture."""
COVER = 0.05
"""Share of a tile that must be tissue for it to be embedded."""
SUFFIXES = frozenset(
    (
        *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"),
        *(".zarr", ".png", ".jpg", ".jpeg"),
    )
)
"""What is taken for a slide when a folder is searched; a file that is named is tried whatever it is called."""

_BATCH = 128  # tiles given to the encoder at once
_WINDOW, _FOOTPRINT = 1024, 8192  # pixels a side read at once: at the pitch, and at level 0 (a slide may have no other)
_SAMPLE, _SAMPLES = 1 << 20, 64  # bytes of a piece, and pieces, of a large file that its fingerprint is made from

Progress = Callable[[int, int], None]
"""Called with the tiles done and the tiles there are."""


class TileEncoder(Protocol):
    """What embedding asks of an encoder (`encoder.Encoder` is one)."""

    @property
    def name(self) -> str:
        """What it was loaded as."""

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""

    @property
    def tile(self) -> int:
        """Side of a tile, pixels."""

    @property
    def fingerprint(self) -> str:
        """Digest of its weights and of what is done to a tile before them."""

    def __call__(self, tiles: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """(n, tile, tile, 3) -> (n, dim)."""


@dataclass(frozen=True)
class SlideReport:
    """What came of one slide. `status` is done, unchanged, empty (no tissue; a valid result) or failed."""

    path: Path
    store: Path
    status: str
    tiles: int = 0
    seconds: float = 0.0
    mpp: float | None = None
    mpp_source: str = ""
    message: str = ""
    exit_code: int = 0


def embed_region(
    slide: Slide,
    region: Grid,
    *,
    encoder: TileEncoder,
    pitches: Sequence[float] = PITCHES,
    tissue: Tissue | None = None,
    progress: Progress | None = None,
) -> dict[float, EmbeddingMap]:
    """The embeddings of the tiles that cover `region` (a grid of any pitch), by pitch.

    A tile of which less than `COVER` is tissue is NaN; tiles reach beyond the region, and see white beyond the slide.

    Raises:
        SlideError: if the slide cannot be read, or the encoder answers with numbers that are not finite.
    """
    tissue = find_tissue(slide) if tissue is None else tissue
    lattices = {mpp: region.at(encoder.tile * mpp) for mpp in pitches}
    wanted = {mpp: tissue.cover(lattice) >= COVER for mpp, lattice in lattices.items()}
    done, total = 0, sum(int(cells.sum()) for cells in wanted.values())
    maps = {}
    for mpp, lattice in lattices.items():
        values = np.full((*lattice.shape, encoder.dim), np.nan, np.float16)
        for cells, tiles in _batches(slide, lattice, mpp, wanted[mpp], encoder.tile):
            with np.errstate(over="ignore"):  # what does not fit is found on the next line
                vectors = encoder(tiles).astype(np.float16)
            if not np.isfinite(vectors).all():
                raise SlideError(
                    f"{slide.path}: encoder {encoder.name} gives numbers that are not finite at {mpp} µm/px"
                )
            values[tuple(cells.T)] = vectors
            done += len(cells)
            if progress is not None:
                progress(done, total)
        maps[mpp] = EmbeddingMap(mpp, lattice, values)
    return maps


def embed_slide(
    path: Path | str,
    out: Path | str,
    *,
    encoder: TileEncoder,
    assume_mpp: float | None = None,
    force_mpp: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    name: str | None = None,
    outlines: Path | None = None,
) -> SlideReport:
    """Embed a whole slide into the store `out`/NAME.zarr, by default named after the slide.

    A finished store of the same slide and parameters is left as it is, also under `overwrite`. `outlines` (GeoJSON, or
    a folder with NAME.geojson) says what is tissue; without, it is looked for.

    Raises:
        SlideError: if the slide or its outlines cannot be read.
        RefusedError: if the store is there and damaged, foreign, or made otherwise; the message says what differs.
        MachineError: if the store cannot be written.
    """
    start = time.monotonic()
    path, name = Path(path), name or slide_name(Path(path))
    target = Path(out) / f"{name}.zarr"
    slide = open_slide(path, assume_mpp=assume_mpp, force_mpp=force_mpp)
    drawn = None if outlines is None else find_outlines(outlines, name)
    about = _provenance(slide, path, encoder, drawn)
    if _is_done(target, about["parameters"], overwrite=overwrite):
        return SlideReport(path, target, "unchanged", mpp=slide.mpp, mpp_source=slide.mpp_source)
    check_target(target, kind=KIND, overwrite=overwrite)
    tissue = find_tissue(slide) if drawn is None else read_outlines(drawn, slide)
    maps = embed_region(slide, slide.grid, encoder=encoder, tissue=tissue, progress=progress)
    tiles = {f"{mpp:g}": int(one.present.sum()) for mpp, one in maps.items()}
    about |= {"tiles": tiles, "tissue_fraction": round(tissue.fraction, 4)}
    write_store(target, maps, tissue=tissue, about=about, overwrite=overwrite)
    count, seconds = sum(tiles.values()), time.monotonic() - start
    status, message = ("done", "") if count else ("empty", "no tissue found")
    return SlideReport(path, target, status, count, seconds, slide.mpp, slide.mpp_source, message)


def find_slides(paths: Iterable[Path | str]) -> list[Path]:
    """Files as they are, and the slides in folders at every depth, in the order of their names; each once.

    Raises:
        UsageError: if a folder holds no slides.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        slides = list(_walk(path)) if path.is_dir() and path.suffix.lower() != ".zarr" else [path]
        if not slides:
            raise UsageError(f"{path}: no slides in this folder; known are {' '.join(sorted(SUFFIXES))}")
        for slide in slides:
            found.setdefault(slide.resolve(), slide)
    return list(found.values())


def check_outlines(place: Path | None, slides: int) -> None:
    """Whether outlines can be those of so many slides.

    Raises:
        UsageError: if there are none, or of one slide for several.
    """
    if place is not None and not place.exists():
        raise UsageError(f"{place}: no such file or folder; expected a GeoJSON, or a folder with SLIDENAME.geojson")
    if place is not None and place.is_file() and slides > 1:
        raise UsageError(
            f"{place}: the tissue of one slide, for {slides}; give a folder with SLIDENAME.geojson of each"
        )


def slide_name(path: Path) -> str:
    """The name of a slide's file without its endings: lung for lung.ome.tif."""
    name = path.name
    while Path(name).suffix.lower() in SUFFIXES | {".ome"}:
        name = Path(name).stem
    return name


def slide_fingerprint(path: Path) -> str:
    """A digest of a slide's bytes: of all of them up to 64 MiB, else of the size and 64 pieces spread over the file.

    Of a slide that is a folder (OME-Zarr, MIRAX), also of the names and sizes of its files.
    """
    digest = hashlib.sha256()
    folder = path if path.is_dir() else path.with_suffix("") if path.suffix.lower() == ".mrxs" else None
    if folder is not None and folder.is_dir():
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            if file.suffix in {".json", ".dat", ".ini"} or file.name.startswith(".z"):
                _digest_file(file, digest.update, samples=4)
    if path.is_file():
        _digest_file(path, digest.update, samples=_SAMPLES)
    return digest.hexdigest()[:32]


def _digest_file(path: Path, update: Callable[[bytes], None], *, samples: int) -> None:
    size = path.stat().st_size
    update(f"{size}\0".encode())
    step = max(_SAMPLE, (size - _SAMPLE) // max(1, samples - 1))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            update(file.read(_SAMPLE))


def _batches(
    slide: Slide, lattice: Grid, mpp: float, wanted: NDArray[np.bool_], tile: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8]]]:
    """The wanted tiles of a lattice: their rows and columns in `wanted` (n, 2), and pixels (n, tile, tile, 3).

    Tiles are read in windows of many, windows without a wanted tile not at all.
    """
    side = max(1, int(min(_WINDOW, _FOOTPRINT * slide.mpp / mpp)) // tile)
    cells: list[NDArray[np.intp]] = []
    tiles: list[NDArray[np.uint8]] = []
    waiting = 0
    for block in lattice.tiles(side):
        rows, columns = block.within(lattice)
        inside = np.argwhere(wanted[rows, columns])
        if not len(inside):
            continue
        (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
        window = Grid(
            mpp,
            (block.top + int(top)) * tile,
            (block.left + int(left)) * tile,
            int(bottom - top) * tile,
            int(right - left) * tile,
        )
        pixels = slide.read(window).reshape(int(bottom - top), tile, int(right - left), tile, 3).swapaxes(1, 2)
        cells.append(inside + np.array([rows.start, columns.start]))
        tiles.append(pixels[inside[:, 0] - top, inside[:, 1] - left])
        waiting += len(inside)
        if waiting >= _BATCH:
            yield from _cut(np.concatenate(cells), np.concatenate(tiles))
            cells, tiles, waiting = [], [], 0
    if waiting:
        yield from _cut(np.concatenate(cells), np.concatenate(tiles))


def _cut(cells: NDArray[np.intp], tiles: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8]]]:
    for start in range(0, len(cells), _BATCH):
        yield cells[start : start + _BATCH], tiles[start : start + _BATCH]


def terms_of(encoder: object) -> dict[str, str | None]:
    """The licence of an encoder and what it asks of what is made from its outputs, where it has any."""
    return dict(getattr(encoder, "terms", None) or {"licence": None, "outputs": None})


def _provenance(slide: Slide, path: Path, encoder: TileEncoder, drawn: Path | None) -> dict[str, Any]:
    """What the manifest says of the slide (an allow-list: no other field of its header) and of how it was seen."""
    parameters = {
        "slide": slide_fingerprint(path),
        "mpp": slide.mpp,
        "encoder": encoder.name,
        "encoder_weights": encoder.fingerprint,
        "tile": encoder.tile,
        "dim": encoder.dim,
        "pitches": list(PITCHES),
        "cover": COVER,
        "tissue_rules": RULES if drawn is None else f"outlines {outlines_digest(drawn)}",
    }
    square = slide.pixel == (slide.mpp, slide.mpp)
    return {
        "slide": {
            "name": path.name,
            "mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
            "height": slide.grid.height,
            "width": slide.grid.width,
            **({} if square else {"pixel": list(slide.pixel)}),
        },
        "synthetic": slide.synthetic,
        "encoder_terms": terms_of(encoder),
        "parameters": parameters,
        "parameters_fingerprint": fingerprint(parameters),
    }


def _is_done(target: Path, parameters: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether the store is there and whole, made from the same slide with the same parameters."""
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None or manifest.get("kind") != KIND:
        return False
    try:
        made = EmbeddingStore.open(target).about.get("parameters", {})
    except RefusedError:
        if overwrite:
            return False
        raise
    differences = [
        f"{key} was {made.get(key)}, is {parameters.get(key)}"
        for key in sorted(made.keys() | parameters.keys())
        if made.get(key) != parameters.get(key)
    ]
    if differences and not overwrite:
        raise RefusedError(
            f"{target}: made otherwise ({'; '.join(differences)}); choose another output or pass --overwrite"
        )
    return not differences


def named_slides(paths: Iterable[Path | str]) -> Iterator[tuple[Path, str]]:
    """A name for each slide of `find_slides`; those of one name in several folders get a digest of where they are."""
    slides = find_slides(paths)
    count = Counter(slide_name(path) for path in slides)
    for path in slides:
        name = slide_name(path)
        place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
        yield path, name if count[name] == 1 else f"{name}-{place}"


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_dir() and path.is_symlink()):
            continue  # stages of commits, shadows of other systems; links may go round in circles
        if path.is_dir() and path.suffix.lower() != ".zarr":
            yield from _walk(path)
        elif path.suffix.lower() in SUFFIXES and not _is_store(path):
            yield path


def _is_store(path: Path) -> bool:
    """Whether a folder is a store of embeddings, which stand beside slides and are none."""
    try:
        return (read_manifest(path) or {}).get("kind") == KIND
    except RefusedError:
        return False
