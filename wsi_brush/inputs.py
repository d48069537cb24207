"""Inputs: the slides that are meant by files and folders, each once, and what each of them is called."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .commit import read_manifest
from .errors import RefusedError, UsageError
from .store import KIND

SUFFIXES = frozenset(
    (
        *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"),
        *(".zarr", ".png", ".jpg", ".jpeg"),
    )
)
"""What is taken for a slide when a folder is searched; a file that is named is tried whatever it is called."""


def named_slides(paths: Iterable[Path | str]) -> Iterator[tuple[Path, str]]:
    """A name for each slide of `find_slides`; those of one name in several folders get a digest of where they are."""
    slides = find_slides(paths)
    count = Counter(slide_name(path) for path in slides)
    for path in slides:
        name = slide_name(path)
        place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
        yield path, name if count[name] == 1 else f"{name}-{place}"


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


def slide_name(path: Path) -> str:
    """The name of a slide's file without its endings: lung for lung.ome.tif."""
    name = path.name
    while Path(name).suffix.lower() in SUFFIXES | {".ome"}:
        name = Path(name).stem
    return name


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
