"""What something is: a slide, a store, a brush, a pyramid, a canvas or a palette. Read are headers and manifests, no
pixels, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ink
from .canvas import FORMAT as CANVAS_FORMAT
from .canvas import KIND as CANVAS
from .commit import read_manifest
from .errors import PixelSizeError, RefusedError, UsageError
from .slide import Slide, open_slide
from .store import KIND as STORE
from .store import EmbeddingStore

BUNDLED = Path(__file__).parent / "weights" / "brush"
BRUSH, PYRAMID = "brush", "pyramid"  # the kinds in their manifests; their own modules take seconds to import
_KNOWN = "a slide, a store, a brush, a pyramid, a canvas or a palette"
# Of a brush: long, or said otherwise.
_NOT_SAID = {"system", "encoder", "fingerprint", "tile", "embeddings", "denoiser", "ladder", "training"}


def describe(path: Path | str, *, assume_mpp: float | None = None, force_mpp: float | None = None) -> dict[str, Any]:
    """What is at `path` (or the `bundled` brush), as JSON values: kind, synthetic, sizes in pixels and µm, encoder,
    provenance.

    Raises:
        UsageError: if there is nothing, or an artefact that is none of these.
        SlideError: if it is no slide that can be read; a slide without a pixel size is described without one.
        RefusedError: if it is damaged.
    """
    path = BUNDLED if str(path) == "bundled" and not Path(path).exists() else Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; expected {_KNOWN}")
    manifest = read_manifest(path) if path.is_dir() else None
    kind = "slide" if manifest is None else str(manifest.get("kind"))
    facts: dict[str, Any] = {"path": str(path), "kind": kind}
    if manifest is None or kind == PYRAMID:
        facts |= _slide(path, assume_mpp, force_mpp) | (_painted(path) if kind == PYRAMID else {})
    elif kind == STORE:
        facts |= _store(EmbeddingStore.open(path))
    elif kind == BRUSH:
        facts |= _brush(path, manifest)
    elif kind == ink.KIND:
        facts |= _palette(path)
    elif kind == CANVAS:
        facts |= _canvas(path)
    else:
        raise UsageError(f"{path}: a {kind} of wsi-brush; expected {_KNOWN}")
    return facts | {"bytes": _bytes(path)}


def _slide(path: Path, assume_mpp: float | None, force_mpp: float | None) -> dict[str, Any]:
    facts: dict[str, Any]
    try:
        slide = open_slide(path, assume_mpp=assume_mpp, force_mpp=force_mpp)
    except PixelSizeError as error:
        slide = open_slide(path, force_mpp=1.0)  # all else is known
        facts = {"mpp": None, "mpp_source": str(error).removeprefix(f"{path}: ")}
    else:
        height, width = (round(side * slide.mpp / 1000, 3) for side in slide.grid.shape)
        facts = {"mpp": slide.mpp, "mpp_source": slide.mpp_source, "millimetres": {"height": height, "width": width}}
        if slide.pixel != (slide.mpp, slide.mpp):
            facts["pixel"] = dict(zip(("height", "width"), slide.pixel, strict=True))
    full = slide.levels[0]
    shape = {"synthetic": slide.synthetic, "reader": slide.reader, "height": full.height, "width": full.width}
    facts["pixel_sizes"] = [size._asdict() for size in slide.sizes]
    return shape | facts | {"levels": _levels(slide, facts["mpp"])}


def _levels(slide: Slide, mpp: float | None) -> list[dict[str, Any]]:
    found = []
    for level in slide.levels:
        one: dict[str, Any] = {"height": level.height, "width": level.width}
        found.append(one if mpp is None else one | {"mpp": round(slide.pixel[0] * level.tall, 6)})
    return found


def _painted(path: Path) -> dict[str, Any]:
    """What stands on a pyramid of how it came to be."""
    import zarr

    about = zarr.open_group(path, mode="r").attrs.asdict().get("wsi_brush")
    if not isinstance(about, dict):
        raise RefusedError(f"{path / 'zarr.json'}: says nothing of its provenance; paint it again")
    return {"provenance": {name: value for name, value in about.items() if name != "synthetic"}}


def _store(store: EmbeddingStore) -> dict[str, Any]:
    about = store.about
    parameters, slide = about.get("parameters", {}), about.get("slide", {})
    maps = []
    for mpp in about["pitches"]:
        lattice = store.lattice_at(mpp)
        tiles = about.get("tiles", {}).get(f"{mpp:g}")
        one = {"mpp": mpp, "rows": lattice.height, "columns": lattice.width, "tiles": tiles}
        bad = about.get("damaged", {}).get(f"{mpp:g}")
        maps.append(one if bad is None else one | {"could_not_be_read": bad["tiles"]})
    return {
        "synthetic": about.get("synthetic"),
        "slide": slide.get("name"),
        "mpp": slide.get("mpp"),
        "mpp_source": slide.get("mpp_source"),
        "height": slide.get("height"),
        "width": slide.get("width"),
        "encoder": parameters.get("encoder"),
        "encoder_sha256": parameters.get("encoder_weights"),
        "tile": parameters.get("tile"),
        "dim": parameters.get("dim"),
        "maps": maps,
        "tissue_fraction": about.get("tissue_fraction"),
        "tissue_rules": parameters.get("tissue_rules"),
        "fingerprint": about.get("parameters_fingerprint"),
        "version": about.get("wsi_brush"),
    }


def _brush(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        about = json.loads((path / "brush.json").read_text(encoding="utf-8"))
        training, weights = about.get("training", {}), manifest["files"]["brush.safetensors"]
        return {
            "system": about.get("system", "ours"),
            "encoder": about["encoder"],
            "encoder_sha256": about["fingerprint"],
            "tile": about["tile"],
            "dim": about["denoiser"]["dim"],
            "embeddings": [float(mpp) for mpp in about["embeddings"]],
            "pitches": about["ladder"]["pitches"],
            "sha256": weights["sha256"],
            "training": {name: training[name] for name in ("steps", "minutes", "device") if name in training},
            "provenance": {name: value for name, value in about.items() if name not in _NOT_SAID},
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RefusedError(f"{path}: no brush that can be read ({error}); train or fetch it again") from None


def _palette(path: Path) -> dict[str, Any]:
    inks = ink.load_palette(path)
    return {"encoder": inks[0].encoder, "encoder_sha256": inks[0].fingerprint, "inks": [one.name for one in inks]}


def _canvas(path: Path) -> dict[str, Any]:
    group: Any = ink.open_group(path, CANVAS, CANVAS_FORMAT)
    about = group.attrs.asdict()
    grid = about["grid"]
    return {
        "synthetic": True, "height": grid["height"], "width": grid["width"], "mpp": grid["mpp"],
        "encoder": about["encoder"], "encoder_sha256": about["fingerprint"], "tile": about["tile"],
        "maps": sorted(array.attrs["mpp"] for _, array in group["base"].arrays()),
        "strokes": about["done"], "undone": len(about["strokes"]) - about["done"],
    }  # fmt: skip


def _bytes(path: Path) -> int:
    """What it takes on the disk; of a MIRAX also the folder beside it."""
    beside = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
    files = [path] if path.is_file() else []
    files += [file for file in beside.rglob("*") if file.is_file()] if beside.is_dir() else []
    return sum(file.stat().st_size for file in files)
