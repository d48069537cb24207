"""Inputs: the slides that are meant by files, folders, patterns and tables, each once, and what each is called."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .commit import read_manifest
from .errors import RefusedError, UsageError
from .slide import dicom
from .slide.pixelsize import PLAUSIBLE
from .slide.slide import is_zarr
from .store import KIND

SUFFIXES = frozenset(
    (
        *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"),
        *(".zarr", ".png", ".jpg", ".jpeg"),
    )
)
"""What is taken for a slide when a folder is searched; a file that is named is tried whatever it is called."""

_INDICES = frozenset((".vms", ".vmu"))  # of Hamamatsu: texts that list the files of a slide
_INDEX = 1 << 20  # bytes of one that are read
_LONGEST = 140  # bytes of a name: work folders and claims are called after it too, and file systems end at 255
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Input:
    """A slide that is meant: where it is, what its store is called, and, where a table says so, the pixel size in µm
    that stands in for one that its header lacks."""

    path: Path
    name: str
    mpp: float | None = None

    def assumed(self, mpp: float | None) -> float | None:
        """The pixel size for a header without one: the table's, or where it says none, `mpp`."""
        return mpp if self.mpp is None else self.mpp


def find_inputs(words: Iterable[Path | str]) -> list[Input]:
    """The slides meant by files, folders, patterns that no shell has expanded, and tables (.csv); each once.

    A file is taken whatever it is called. Folders are searched at every depth for `SUFFIXES` and for DICOM, in the
    order of names, links to folders last. A pattern (`*`, `?`, `[...]`, `**` for folders at every depth) is for what is
    no file of that name; what it finds is as if it were named, but where its last part is nothing but stars and
    question marks files are those that a folder would give. A part of a slide (of MIRAX, VMS or a DICOM series) is its
    slide.

    A table has the columns `path` (or `wsi`) and perhaps `mpp` and `id`, others are passed over; its paths start at its
    own folder.

    The name is the table's id, else the file's without its endings (`slide_name`); of a DICOM series that has a folder
    to itself, the folder's. Where several have one name, in small letters or capitals, those without an id get a dash
    and 8 hexadecimal digits: SHA-256 of their real path; so does a name of more than 140 bytes, of which the first are
    kept. Of a slide and links to it the slide gives the name. So a name depends on what it is given with, and never on
    the order.

    Raises:
        UsageError: if a folder holds no slides, a pattern finds none, or a table has a row that is not right.
    """
    search = _Search()
    meant: dict[str, _Meant] = {}
    for word in map(Path, words):
        for one in search.meant(word):
            place = os.path.realpath(one.path)
            known = meant.setdefault(place, one)
            if known.row and one.row and (known.id, known.mpp) != (one.id, one.mpp):
                raise UsageError(f"{one.row}: the slide of {known.row} again, with another id or mpp; keep one of them")
            if _rank(one, place) < _rank(known, place):
                meant[place] = one
    rows: dict[str, str] = {}
    for one in meant.values():
        if one.id and (first := rows.setdefault(_alike(one.id), one.row)) != one.row:
            raise UsageError(f"{one.row}: id {one.id} stands in {first} already; every slide needs its own")
    names = [one.id or search.name(one.path) for one in meant.values()]
    count = Counter(map(_alike, names))
    found = []
    for (place, one), name in zip(meant.items(), names, strict=True):
        digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
        if len(long := os.fsencode(name)) > _LONGEST:
            name = f"{long[:_LONGEST].decode('utf-8', 'ignore')}-{digest}"
        elif not one.id and count[_alike(name)] > 1:
            name = f"{name}-{digest}"
        found.append(Input(one.path, name, one.mpp))
    return found


def slide_name(path: Path) -> str:
    """The name of a slide's file without its endings: lung for lung.ome.tif."""
    name = path.name
    while Path(name).suffix.lower() in SUFFIXES | {".ome"}:
        name = Path(name).stem
    return name


def _alike(name: str) -> str:
    """The same for names that some disks take for one (capitals, accents): a store each would be one store there."""
    return unicodedata.normalize("NFC", name.casefold())


class _Meant(NamedTuple):
    """A slide, and what the row of a table says of it; `row` names the row, nothing where there is none."""

    path: Path
    row: str = ""
    id: str = ""
    mpp: float | None = None


def _rank(one: _Meant, place: str) -> tuple[bool, bool, str]:
    """Of a slide that is meant twice: the row of a table goes first, then the slide itself, then links by name."""
    return not one.row, one.path.name != Path(place).name, one.path.name


class _Folder(NamedTuple):
    """What a folder holds itself: slides, other folders, the slide that each file of a slide belongs to (None: of no
    slide), and which slides are DICOM series."""

    slides: frozenset[Path]
    folders: tuple[Path, ...]
    owners: dict[Path, Path | None]
    series: frozenset[Path]


class _Search:
    """Looks at every folder once."""

    def __init__(self) -> None:
        self._folders: dict[Path, _Folder] = {}

    def meant(self, word: Path) -> Iterator[_Meant]:
        """What a word of the user's stands for."""
        if word.suffix.lower() == ".csv" and word.is_file():
            yield from self._table(word)
        elif _PATTERN.search(str(word)) and not os.path.lexists(word):
            yield from map(_Meant, self._matches(word))
        else:
            slides = list(self._slides(word))
            if not slides:
                raise UsageError(f"{word}: no slides in this folder; known are DICOM and {' '.join(sorted(SUFFIXES))}")
            yield from map(_Meant, slides)

    def name(self, path: Path) -> str:
        """What a slide is called where nobody says so."""
        here = self._beside(path)
        own = here is not None and path in here.series and here.slides == {path}
        return (slide_name(Path(os.path.realpath(path.parent))) if own else "") or slide_name(path)

    def _slides(self, path: Path) -> Iterator[Path]:
        """What is named: a slide, the slide that it is part of, or those of a folder."""
        owner = self._owner(path)
        if owner is not None:
            yield owner
        elif path.is_dir() and path.suffix.lower() != ".zarr" and not is_zarr(path):
            yield from self._walk(path)
        else:
            yield path

    def _owner(self, path: Path) -> Path | None:
        """The slide that a file or folder is a part of."""
        here, above = self._beside(path), self._beside(path.parent) if _is_mirax(path.parent) else None
        owner = here.owners.get(path) if here else None
        return above.owners.get(path.parent) if owner is None and above else owner

    def _beside(self, path: Path) -> _Folder | None:
        """The folder of what is named; None where there is nothing to be seen."""
        return self._look(path.parent) if path.exists() and os.access(path.parent, os.R_OK) else None

    def _look(self, folder: Path) -> _Folder:
        if folder not in self._folders:
            self._folders[folder] = _look(folder)
        return self._folders[folder]

    def _walk(self, folder: Path) -> Iterator[Path]:
        """The slides in a folder at every depth; a link to a folder that was searched or holds the link is left."""
        seen: set[str] = set()
        links = [folder]
        for one in links:  # grows
            yield from self._descend(one, seen, links)

    def _descend(self, folder: Path, seen: set[str], links: list[Path]) -> Iterator[Path]:
        place = os.path.realpath(folder)
        if place in seen:
            return
        seen.add(place)
        here = self._look(folder)
        for path in sorted(here.slides.union(here.folders)):
            if path in here.slides:
                yield path
            elif not path.is_symlink():
                yield from self._descend(path, seen, links)
            elif not Path(place).is_relative_to(os.path.realpath(path)):
                links.append(path)

    def _matches(self, word: Path) -> Iterator[Path]:
        """What a pattern finds; hidden files and what is inside an OME-Zarr only where the pattern says so."""
        first = next(number for number, part in enumerate(word.parts) if _PATTERN.search(part))
        base, pattern = Path(*word.parts[:first]), "/".join(word.parts[first:])
        try:
            matches = sorted(base.glob(pattern))
        except (ValueError, NotImplementedError) as error:
            raise UsageError(
                f"{word}: no pattern ({error}); ** stands for folders and needs a part of its own"
            ) from None
        hidden, loose = "/." in f"/{pattern}", not word.name.strip("*?")
        none = True
        for path in matches:
            parts = path.relative_to(base).parts
            inside = [base.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
            if not hidden and any(part.startswith(".") for part in parts):
                continue
            if any(one.suffix.lower() == ".zarr" or is_zarr(one) for one in inside) or _is_store(path):
                continue
            if loose and path.is_file() and self._owner(path) is None and path not in self._look(path.parent).slides:
                continue
            for slide in self._slides(path):
                none = False
                yield slide
        if none:
            raise UsageError(f"{word}: there is no such file, and as a pattern it finds no slides")

    def _table(self, table: Path) -> Iterator[_Meant]:
        """The rows of a table."""
        for number, row in _rows(table):
            where = f"{table}, row {number}"
            given = row["path"]
            path = table.parent / (given if (table.parent / given).exists() else given.strip())
            if not given.strip():
                raise UsageError(f"{where}: no path; expected a slide, from the folder of the table")
            if not path.exists():
                raise UsageError(f"{where}: no such file, {path}; paths start at the folder of the table")
            slides = list(self._slides(path))
            if len(slides) != 1:
                raise UsageError(f"{where}: {path} is a folder of {len(slides)} slides; expected one slide a row")
            name = row.get("id", "")
            if re.search(r"[/\\\x00-\x1f]", name) or name.startswith(".") or len(os.fsencode(name)) > _LONGEST:
                raise UsageError(
                    f"{where}: id {name[:40]!r} cannot name a store; expected at most {_LONGEST} bytes, no slashes or "
                    "line breaks, and no dot in front"
                )
            yield _Meant(slides[0], where, name, _positive(row.get("mpp", ""), where))


def _look(folder: Path) -> _Folder:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # stages of commits, shadows
    owners: dict[Path, Path | None] = {}
    for path in entries:
        suffix = path.suffix.lower()
        if suffix in _INDICES and path.is_file() and os.access(path, os.R_OK):
            owners |= {folder / name: path for name in _listed(path)}
        if suffix == ".mrxs" and _is_mirax(path.with_suffix("")):
            owners[path.with_suffix("")] = path
    files = dicom.slides_of(dicom.candidates(folder))
    owners |= files
    series = frozenset(base for base in files.values() if base is not None)
    slides, folders = set(series), []
    for path in entries:
        if path in owners:
            continue
        if path.is_dir() and path.suffix.lower() != ".zarr" and not is_zarr(path):
            folders.append(path)
        elif (path.suffix.lower() in SUFFIXES or path.is_dir()) and not _is_store(path):
            slides.add(path)
    return _Folder(frozenset(slides), tuple(folders), owners, series)


def _listed(index: Path) -> list[str]:
    """The files that Hamamatsu's index of a slide names."""
    with index.open("rb") as file:
        text = file.read(_INDEX).decode("utf-8", "replace")
    return re.findall(r"^(?:ImageFile(?:\(.*?\))?|MapFile|OptimisationFile|MacroImage)\s*=\s*(\S.*?)\s*$", text, re.M)


def _is_mirax(folder: Path) -> bool:
    """Whether a folder holds the pixels of a MIRAX slide, whose own file stands beside it."""
    return (folder / "Slidedat.ini").is_file()


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table that hold anything, with their numbers in a spreadsheet: the header is 1."""
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{table}: no UTF-8 ({error.reason} at byte {error.start}); save it as CSV UTF-8") from None
    if "\0" in text:
        raise UsageError(f"{table}: no CSV, it holds zero bytes; save it as CSV UTF-8")
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)  # a spreadsheet's semicolon where the comma is in numbers
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise UsageError(f"{table}: no CSV ({error}); save it as CSV UTF-8") from None
    header = [name.strip().lower() for name in lines[0]] if lines else []
    column = next((header.index(name) for name in ("path", "wsi") if name in header), None)
    if column is None:
        raise UsageError(
            f"{table}: its first row is {head.strip()[:80]!r}; expected a column path (or wsi), and perhaps mpp and id"
        )
    found = False
    for number, cells in enumerate(lines[1:], start=2):
        if any(cell.strip() for cell in cells):
            found = True
            row = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
            yield number, {**row, "path": cells[column] if column < len(cells) else ""}
    if not found:
        raise UsageError(f"{table}: a header and no rows; expected a slide a row")


def _positive(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = math.nan
    if not PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:
        raise UsageError(
            f"{where}: mpp {text}; expected a pixel size between 0.05 and 100 µm, or nothing: the header's"
        )
    return value


def _is_store(path: Path) -> bool:
    """Whether a folder is a store of embeddings, which stand beside slides and are none."""
    try:
        return (read_manifest(path) or {}).get("kind") == KIND
    except RefusedError:
        return False
