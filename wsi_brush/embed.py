"""Verb: slide -> store. A slide is seen tile by tile at several pitches, and each tile becomes a vector.

The tiles of a pitch stand on one lattice anchored at the slide's origin, so a tile is the same tile, and has
the same embedding, in whatever region it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .blocks import Blocks
from .commit import check_target, differences, fingerprint, read_manifest
from .errors import RefusedError, SlideError, UsageError
from .grid import Grid
from .inputs import slide_name
from .machine import release_memory
from .outlines import find_outlines, outlines_digest, read_outlines
from .reading import Readers
from .regions import COVER as COVER
from .regions import Progress, embed_lattices, readable_tissue
from .regions import TileEncoder as TileEncoder
from .scratch import work_folder, working
from .slide import Slide, open_slide
from .store import KIND, EmbeddingMap, EmbeddingStore, write_store
from .tissue import RULES, Tissue, find_tissue

PITCHES = (0.5, 2.0, 8.0)
"""µm a pixel at which tiles are seen: nuclei, glands, architecture."""

_SAMPLE, _SAMPLES = 1 << 20, 64  # bytes of a piece, and pieces, of a large file that its fingerprint is made from


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
    bad_tiles: int = 0
    """Tiles that cannot be read, NaN in the store; they are not in `tiles`."""


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
        SlideError: if a tile cannot be read, or the encoder answers with numbers that are not finite.
    """
    tissue = find_tissue(slide) if tissue is None else tissue
    with Readers(slide) as readers:
        return embed_lattices(slide, region, tissue, readers, encoder, pitches, strict=True, progress=progress)[0]


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
    workers: int = 0,
    strict: bool = False,
) -> SlideReport:
    """Embed a whole slide into the store `out`/NAME.zarr, by default named after the slide.

    A finished store of the same slide and parameters is left as it is, also under `overwrite`. `outlines` (GeoJSON, or
    a folder with NAME.geojson) says what is tissue; without, it is looked for. `workers`: processes that read (see
    `reading`). A tile that cannot be read is NaN, listed in the store and counted in the report; `strict` refuses it.
    Killed, the same call goes on.

    Raises:
        SlideError: if the slide or its outlines cannot be read, or none of its tiles, or with `strict` one of them.
        RefusedError: if the store is there and damaged, foreign, or made otherwise; the message says what differs.
        MachineError: if the store cannot be written.
    """
    start = time.monotonic()
    path, name = Path(path), name or slide_name(Path(path))
    target = Path(out) / f"{name}.zarr"
    slide = open_slide(path, assume_mpp=assume_mpp, force_mpp=force_mpp)
    drawn = None if outlines is None else find_outlines(outlines, name)
    about = _provenance(slide, path, encoder, drawn)
    run = about["parameters"] | {"version": __version__}
    if (store := _done(target, about["parameters"], overwrite=overwrite)) is not None:
        if work_folder(target).exists():  # killed when it had only this to do
            with contextlib.suppress(RefusedError), working(target, run, overwrite=overwrite):
                pass
        bad = sum(one["tiles"] for one in store.about.get("damaged", {}).values())
        if bad and strict:
            raise SlideError(f"{path}: {_bad_tiles(bad)} when {target} was made; remove it, or leave out --strict")
        return SlideReport(
            path, target, "unchanged", mpp=slide.mpp, mpp_source=slide.mpp_source, bad_tiles=bad,
            message=f"{path}: {_bad_tiles(bad)}, NaN in the store" if bad else "",
        )  # fmt: skip
    check_target(target, kind=KIND, overwrite=overwrite)
    with working(target, run, overwrite=overwrite) as work, Readers(slide, workers, tile=encoder.tile) as readers:
        tissue = readable_tissue(slide, readers) if drawn is None else read_outlines(drawn, slide)
        release_memory()  # of the slide's picture: the maps need as much
        maps, damage = embed_lattices(
            slide, slide.grid, tissue, readers, encoder, PITCHES, strict=strict, progress=progress,
            blocks=Blocks(work.folder, encoder.dim),
        )  # fmt: skip
        tiles = {f"{mpp:g}": int(one.present.sum()) for mpp, one in maps.items()}
        count, bad = sum(tiles.values()), len(damage)
        if bad and not count:
            raise SlideError(f"{path}: none of its {bad} tiles can be read ({damage.why})")
        about |= {"tiles": tiles, "tissue_fraction": round(tissue.fraction, 4)}
        about |= {"damaged": damage.about()} if bad else {}
        write_store(target, maps, tissue=tissue, about=about, overwrite=overwrite)
    message = f"{path}: {_bad_tiles(bad)}, NaN in the store" if bad else "" if count else "no tissue found"
    status, seconds = "done" if count else "empty", time.monotonic() - start
    return SlideReport(
        path, target, status, count, seconds, slide.mpp, slide.mpp_source, message, bad_tiles=bad
    )  # fmt: skip


def _bad_tiles(count: int) -> str:
    return "1 tile could not be read" if count == 1 else f"{count} tiles could not be read"


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


def _done(target: Path, parameters: dict[str, Any], *, overwrite: bool) -> EmbeddingStore | None:
    """The store, if it is there and whole, made from the same slide with the same parameters."""
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None or manifest.get("kind") != KIND:
        return None
    try:
        store = EmbeddingStore.open(target)
    except RefusedError:
        if overwrite:
            return None
        raise
    changed = differences(store.about.get("parameters", {}), parameters)
    if changed and not overwrite:
        raise RefusedError(
            f"{target}: made otherwise ({'; '.join(changed)}); choose another output or pass --overwrite"
        )
    return None if changed else store
