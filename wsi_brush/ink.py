"""Ink: what a tile of a slide shows, as one embedding at each pitch, picked up at a place; and palettes of inks.

On disk a palette is one Zarr v3 group with a manifest (`commit`), read-only once it is there:

    NAME.palette/vectors/<mpp>    float32 (inks, dim)
    NAME.palette/thumbnails       uint8 (inks, 96, 96, 3)

Names, places and encoder stand in its attributes. Of a slide nothing is kept but the place and half of the digest of
its bytes, by which whoever has the file can tell it from others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .commit import read_manifest, staged, verify
from .embed import COVER, PITCHES, TileEncoder, slide_fingerprint
from .errors import RefusedError, UsageError
from .grid import Grid
from .machine import undisturbed
from .slide import Slide
from .store import write_array
from .tissue import PITCH, tissue_mask

if TYPE_CHECKING:
    import zarr

KIND = "palette"
FORMAT = 1
THUMBNAIL = 96
"""Side of a thumbnail, pixels."""
_AROUND = 512.0  # µm on either side of a place in which tissue is looked for; its rules want to see neighbours


@dataclass(frozen=True, eq=False)
class Ink:
    """One embedding at each pitch: what a stroke puts on a canvas.

    `vectors`: by pitch (µm), (dim,) float32, as the encoder says them; `thumbnail`: (96, 96, 3); `encoder` and
    `fingerprint`: whose embeddings; `tile`: side of its tiles, pixels; `place`: µm (down, across) on the slide of which
    `slide` is half a digest.
    """

    name: str
    vectors: Mapping[float, NDArray[np.float32]]
    thumbnail: NDArray[np.uint8]
    encoder: str
    fingerprint: str
    tile: int
    place: tuple[float, float]
    slide: str

    def __post_init__(self) -> None:
        if any(one.ndim != 1 or not np.isfinite(one).all() for one in self.vectors.values()):
            raise ValueError(f"ink {self.name}: its vectors must be finite numbers in one dimension")
        if self.thumbnail.shape != (THUMBNAIL, THUMBNAIL, 3) or self.thumbnail.dtype != np.uint8:
            raise ValueError(f"ink {self.name}: a thumbnail of {self.thumbnail.dtype} {self.thumbnail.shape}")

    @property
    def digest(self) -> str:
        """The same vectors, thumbnail and facts, the same digest."""
        digest = hashlib.sha256(repr(sorted(self.facts().items())).encode())
        for mpp in sorted(self.vectors):
            digest.update(f"{mpp:g}".encode() + np.ascontiguousarray(self.vectors[mpp]).tobytes())
        digest.update(np.ascontiguousarray(self.thumbnail).tobytes())
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """All but the numbers, as JSON values."""
        return {
            "name": self.name, "encoder": self.encoder, "fingerprint": self.fingerprint, "tile": self.tile,
            "place": list(self.place), "slide": self.slide,
        }  # fmt: skip


def pick_ink(
    slide: Slide,
    place: tuple[float, float],
    *,
    encoder: TileEncoder,
    pitches: Sequence[float] = PITCHES,
    name: str = "",
    everywhere: bool = False,
) -> Ink:
    """The ink at a place of a slide, µm (down, across): the tiles of every pitch around it.

    `everywhere`: of pictures that are no H&E, where all of it is to be looked at.

    Raises:
        UsageError: if the place is not on the slide, or there is no tissue.
        SlideError: if the slide cannot be read.
    """
    top, left, bottom, right = slide.grid.extent
    if not (top <= place[0] < bottom and left <= place[1] < right):
        raise UsageError(f"{place[0]:.0f}, {place[1]:.0f} µm is not on {slide.path.name}; click inside the slide")
    around = {mpp: _tile_around(place, mpp, encoder.tile) for mpp in pitches}
    finest = around[min(pitches)]
    if not everywhere and _tissue_in(slide, finest) < COVER:
        raise UsageError(f"{place[0]:.0f}, {place[1]:.0f} µm of {slide.path.name}: no tissue there; click on tissue")
    vectors = {mpp: np.asarray(encoder(slide.read(grid)[None])[0], np.float32) for mpp, grid in around.items()}
    return Ink(
        name or f"ink at {place[0]:.0f}, {place[1]:.0f} µm", vectors, _thumbnail(slide.read(finest)), encoder.name,
        encoder.fingerprint, encoder.tile, (float(place[0]), float(place[1])), slide_fingerprint(slide.path)[:16],
    )  # fmt: skip


def save_palette(inks: Sequence[Ink], target: Path | str, *, overwrite: bool = False) -> None:
    """Write a palette, whole or not at all.

    Raises:
        UsageError: if there are no inks, or they are of several encoders.
        RefusedError, MachineError: as `commit.staged`.
    """
    import zarr

    if not inks:
        raise UsageError("a palette without inks; pick one first")
    with staged(Path(target), kind=KIND, about={"format": FORMAT}, overwrite=overwrite) as stage, undisturbed():
        write_inks(zarr.create_group(stage, zarr_format=3), inks)


def load_palette(path: Path | str) -> list[Ink]:
    """The inks of a palette.

    Raises:
        RefusedError: if `path` is no palette, or damaged, or of a newer format.
    """
    return read_inks(open_group(Path(path), KIND, FORMAT))


def write_inks(group: zarr.Group, inks: Sequence[Ink]) -> None:
    """Inks into an empty group; they are all of one encoder.

    Raises:
        UsageError: if not.
    """
    kinds = {(ink.fingerprint, ink.tile, tuple(sorted(ink.vectors))) for ink in inks}
    if len(kinds) > 1:
        names = ", ".join(sorted({ink.encoder for ink in inks}))
        raise UsageError(f"inks of several encoders ({names}) or pitches; keep them in palettes of their own")
    group.attrs["inks"] = [ink.facts() for ink in inks]
    if inks:
        vectors = group.create_group("vectors")
        for mpp in inks[0].vectors:
            write_array(vectors, f"{mpp:g}", np.stack([ink.vectors[mpp] for ink in inks]), {"mpp": mpp})
        write_array(group, "thumbnails", np.stack([ink.thumbnail for ink in inks]), {})


def read_inks(group: zarr.Group) -> list[Ink]:
    """The inks that `write_inks` wrote."""
    facts: Any = group.attrs["inks"]
    if not facts:
        return []
    vectors = {float(array.attrs["mpp"]): np.asarray(array[...]) for _, array in group["vectors"].arrays()}  # type: ignore[union-attr, arg-type]
    thumbnails: Any = group["thumbnails"]
    seen = np.asarray(thumbnails[...])
    return [
        Ink(
            vectors={mpp: vectors[mpp][number] for mpp in sorted(vectors)}, thumbnail=seen[number],
            **{**one, "place": tuple(one["place"])},
        )
        for number, one in enumerate(facts)
    ]  # fmt: skip


def open_group(path: Path, kind: str, version: int) -> zarr.Group:
    """The group of a finished artefact of ours, every byte of which is as it was written.

    Raises:
        RefusedError: if it is not there, foreign, damaged, or of another format.
    """
    import zarr

    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is None or manifest.get("kind") != kind:
        found = "no such folder" if not path.exists() else f"is no {kind} of wsi-brush"
        raise RefusedError(f"{path}: {found}; expected a folder that wsi-brush saved as a {kind}")
    if manifest.get("format") != version:
        raise RefusedError(f"{path}: format {manifest.get('format')}, this version reads {version}")
    wrong = verify(path)
    if wrong:
        raise RefusedError(f"{path}: damaged ({wrong[0]}); take another copy of it")
    return zarr.open_group(path, mode="r", zarr_format=3)


def _tile_around(place: tuple[float, float], mpp: float, tile: int) -> Grid:
    top, left = (round(axis / mpp - tile / 2) for axis in place)
    return Grid(mpp, top, left, tile, tile)


def _tissue_in(slide: Slide, tile: Grid) -> float:
    """Share of a tile that is tissue."""
    inner = tile.at(PITCH)
    cells = inner.pad(round(_AROUND / PITCH))
    return float(tissue_mask(slide.read(cells), PITCH)[inner.within(cells)].mean())


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), np.uint8)
