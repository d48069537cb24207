"""What a painting follows where there is no slide: a store, or the h5 of others, checked against the brush.

A store says which slide it is of, so its painting has the canvas, the pixels and the provenance of one that was made
after the slide itself. An h5 has places and no more: its plane ends where its last tile does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .brush import Brush
from .commit import MANIFEST, fingerprint, sha256_of
from .errors import UsageError
from .foreign import matched, read_h5
from .grid import Grid
from .interchange import check_about, listed
from .store import EmbeddingMap, EmbeddingStore
from .tissue import Tissue

_KNOWN = "a store, as `wsi-brush embed` writes it, or the h5 of TRIDENT or STAMP, one a pitch"


@dataclass(frozen=True)
class Followed:
    """Embeddings that a painting follows in place of a slide; `follow` opens them.

    tissue: where there is something to follow. grid: the slide's level-0 pixels; of h5 the tiles of the finest pitch,
    from the plane's corner to the last. pitches: µm, of the brush. encoder, encoder_fingerprint: of the brush, which
    are theirs. digest: of the store's manifest, or of the files. about: what a painting says of them. slide: what it
    says of their slide, where they know it.
    """

    path: Path
    tissue: Tissue
    grid: Grid
    pitches: tuple[float, ...]
    encoder: str
    encoder_fingerprint: str
    digest: str
    about: dict[str, Any]
    slide: dict[str, Any] | None
    _read: Callable[[float], EmbeddingMap] = field(repr=False)

    @property
    def mpp(self) -> float:
        """Side of a pixel of `grid`, µm."""
        return self.grid.mpp

    def maps(self, area: Grid) -> dict[float, EmbeddingMap]:
        """The cells that touch `area` (of any pitch), by pitch, as `embed.embed_region` gives them of a slide: NaN
        where there is no embedding, also beyond the slide.

        Raises:
            RefusedError: if they are damaged.
        """
        found = {}
        for mpp in self.pitches:
            one = self._read(mpp)
            near, lattice = one.crop(area), area.at(one.lattice.mpp)
            values = np.full((*lattice.shape, one.dim), np.nan, one.values.dtype)
            values[near.lattice.within(lattice)] = near.values
            found[mpp] = EmbeddingMap(mpp, lattice, values)
        return found

    def check_brush(self, brush: Brush) -> None:
        """Whether a brush follows these embeddings.

        Raises:
            UsageError: if not.
        """
        _check_encoder(self.path, self.encoder, self.encoder_fingerprint, brush)
        _check_pitches(self.path, self.pitches, brush)

    def check_placed(self) -> None:
        """Whether a region in level-0 pixels can be meant.

        Raises:
            UsageError: if they do not say how large their slide is.
        """
        if self.slide is None:
            raise UsageError(
                f"{self.path}: an h5 does not say how large its slide is, so it has no regions; give --size 1024"
            )

    def provenance(self, region: tuple[int, int, int, int]) -> dict[str, Any]:
        """What a painting of that region (level-0 pixels) says of what it follows; nothing of a patient."""
        about = {"encoder": self.encoder, "encoder_fingerprint": self.encoder_fingerprint, "embeddings": self.about}
        return about if self.slide is None else about | {"reference": {**self.slide, "region": list(region)}}


def follow(
    paths: Iterable[Path | str], *, brush: Brush, slide_mpp: float | None = None, same_encoder: bool = False
) -> Followed:
    """Open what a brush is to follow: one store, or h5 of TRIDENT, STAMP or `export`, one a pitch.

    `slide_mpp`, `same_encoder`: what h5 of others do not say, as in `foreign.read_conditions`.

    Raises:
        UsageError: if there is nothing, no tissue, several stores, or encoder, tile or pitches are not the brush's.
        RefusedError: if a store or a file is damaged, or neither.
        MachineError: if h5py is missing.
    """
    found = [Path(path) for path in paths]
    for path in found:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder; expected {_KNOWN}")
    stores = [path for path in found if path.is_dir()]
    if not found:
        raise UsageError(f"no embeddings to follow; give {_KNOWN}")
    if stores and len(found) > 1:
        other = "another store" if len(stores) > 1 else "h5"
        raise UsageError(f"{stores[0]}: a store has all pitches and is followed alone, here beside {other}; give one")
    if stores:
        return _of_store(stores[0], brush)
    return _of_files(found, brush, slide_mpp, same_encoder=same_encoder)


def _of_store(path: Path, brush: Brush) -> Followed:
    store = EmbeddingStore.open(path)
    check_about(store)
    slide, parameters = store.about["slide"], store.about["parameters"]
    _check_encoder(path, parameters["encoder"], parameters["encoder_weights"], brush)
    _check_pitches(path, tuple(store.maps), brush)
    tissue, digest = store.tissue, sha256_of(path / MANIFEST)[:16]
    if not tissue.mask.any() or not any(store.about.get("tiles", {"": 1}).values()):
        raise UsageError(f"{path}: no tile of its slide holds tissue, so there is nothing to follow; give another")
    about = {"kind": "store", "fingerprint": digest, "synthetic": store.about.get("synthetic") is not False}
    terms = {name: value for name, value in store.about.get("encoder_terms", {}).items() if value is not None}
    known = {"mpp": slide["mpp"], "mpp_source": slide["mpp_source"]}
    if "slide" in parameters:
        known["fingerprint"] = parameters["slide"][:16]
    return Followed(
        path, tissue, Grid(slide["mpp"], 0, 0, slide["height"], slide["width"]), brush.pitches, brush.about["encoder"],
        brush.about["fingerprint"], digest, about | ({"encoder_terms": terms} if terms else {}), known, store.map_at,
    )  # fmt: skip


def _of_files(paths: list[Path], brush: Brush, slide_mpp: float | None, *, same_encoder: bool) -> Followed:
    found = matched(
        (read_h5(path, slide_mpp=slide_mpp) for path in paths), pitches=brush.pitches, tile=brush.about["tile"],
        dim=brush.network.config.dim, weights=brush.about["fingerprint"], same_encoder=same_encoder,
    )  # fmt: skip
    finest, path = found[brush.pitches[0]].map, found[brush.pitches[0]].path
    plane = Grid(finest.lattice.mpp, 0, 0, max(0, finest.lattice.bottom), max(0, finest.lattice.right))
    finest = finest.crop(plane)
    if not finest.present.any():
        raise UsageError(f"{path}: holds no tile, so there is nothing to follow; give another")
    if len({one.made for one in found.values()} - {None}) > 1:
        raise UsageError(f"{path}: was exported of another store than the file beside it; give files of one slide")
    digest = fingerprint(sorted(sha256_of(one.path) for one in found.values()))
    about = {
        "kind": "h5", "fingerprint": digest, "synthetic": any(one.synthetic for one in found.values()),
        "encoder_named": all(one.weights is not None for one in found.values()),
    }  # fmt: skip
    about |= {} if slide_mpp is None else {"slide_mpp": slide_mpp}
    return Followed(
        path, Tissue(finest.present, finest.lattice), plane, brush.pitches, brush.about["encoder"],
        brush.about["fingerprint"], fingerprint({"files": digest, "slide mpp": slide_mpp}), about, None,
        {pitch: one.map for pitch, one in found.items()}.__getitem__,
    )  # fmt: skip


def _check_encoder(path: Path, name: str, weights: str, brush: Brush) -> None:
    wanted, known = brush.about["encoder"], brush.about["fingerprint"]
    if weights != known:
        raise UsageError(
            f"{path}: embeddings of {name} ({weights[:12]}), the brush was trained on those of {wanted} "
            f"({known[:12]}); embed the slide with --encoder {wanted}, or take another --brush"
        )


def _check_pitches(path: Path, pitches: tuple[float, ...], brush: Brush) -> None:
    if missing := [pitch for pitch in brush.pitches if pitch not in pitches]:
        raise UsageError(
            f"{path}: embeddings at {listed(pitches)} µm, the brush follows also {listed(missing)}; embed the slide "
            "again"
        )
