"""Canvas: a map of embeddings that is painted on with strokes, and what there is to be undone.

A stroke edits the embedding as a function: in every lattice cell of every pitch it becomes old + a (ink - old), a being
the stroke's strength times the mean of its soft mask over the cell. So a stroke that is smaller than a cell of 8 µm
(1 mm) changes that cell in proportion. Mixed are the encoder's own numbers: a brush standardises them by an affine map,
so to mix before is to mix after, up to its limit. (An encoder that pools its tile by a mean says nearly this mixture of
a tile that is half one tissue, half another.)

Whether a cell holds tissue is decided by the mask alone, as there is nothing to mix with. A cell of the finest pitch
that held nothing takes the ink, whole, where at least half of it is covered, so the tissue's area is the stroke's; one
of a coarser pitch from `embed.COVER` on, as the encoder gives a large tile with little tissue its vector. An eraser
leaves nothing in cells of which it covers more than half.

On disk a canvas is one Zarr v3 group with a manifest (`commit`):

    NAME.zarr/base/<mpp>          float32 (rows, columns, dim), what was there before the strokes
    NAME.zarr/points              float64 (points, 2), µm, of all strokes after one another
    NAME.zarr/inks                the strokes' inks, as a palette has them
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .commit import staged
from .embed import COVER, PITCHES, TileEncoder, embed_region
from .errors import RefusedError, UsageError
from .grid import Grid
from .ink import Ink, open_group, read_inks, write_inks
from .machine import undisturbed
from .slide import Slide
from .store import EmbeddingMap, write_array
from .tissue import Tissue

KIND = "canvas"
FORMAT = 1
HALF = 0.5
"""Share of a cell of the finest pitch from which it takes an ink; above it any cell is erased."""
_BLOCK = 512  # pixels: a canvas's maps cover whole blocks of it, as a painting does
_SAMPLES = (8, 16, 256)  # along a cell: at least, for the stroke's size, at most
_SHARP = 1e-6  # a softness below it is none


@dataclass(frozen=True, eq=False)
class Stroke:
    """A path drawn with an ink, or with the eraser (None).

    `path`: points (down, across) in µm; `size`: diameter in µm; `strength`: how far the ink replaces what was there, 0
    to 1, of no matter to the eraser; `softness`: the share of the radius over which the mask falls to zero, 0 to 1.

    Raises:
        UsageError: if one of them is out of range.
    """

    ink: Ink | None
    path: tuple[tuple[float, float], ...]
    size: float
    strength: float = 1.0
    softness: float = 0.5

    def __post_init__(self) -> None:
        if not self.path or not all(len(point) == 2 and all(map(math.isfinite, point)) for point in self.path):
            raise UsageError("a stroke needs one point or more, each two numbers in µm")
        if not (math.isfinite(self.size) and self.size > 0):
            raise UsageError(f"a stroke of size {self.size}; expected a diameter in µm above 0")
        for name, value in (("strength", self.strength), ("softness", self.softness)):
            if not 0 <= value <= 1:
                raise UsageError(f"a stroke of {name} {value}; expected 0 to 1")

    def mask(self, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """The soft mask at points in µm (any shape): 1 along the path, 0 from half the size on.

        It depends on the distance to the whole path, so a path that crosses itself is not twice as strong there.
        """
        radius = self.size / 2
        away = _distance(rows, columns, self.path)
        if self.softness < _SHARP:
            return (away <= radius).astype(np.float64)
        share = ((radius - away) / (radius * self.softness)).clip(0, 1)
        return np.asarray(share * share * (3 - 2 * share))

    def cover(self, lattice: Grid) -> tuple[Grid, NDArray[np.float32]]:
        """The mean of the mask over each cell: the part of the lattice where it may be more than 0, and the means."""
        points, radius, cell = np.asarray(self.path, np.float64), self.size / 2, lattice.mpp
        top, left = (int(edge) for edge in np.floor((points.min(0) - radius) / cell))
        bottom, right = (int(edge) for edge in np.floor((points.max(0) + radius) / cell) + 1)
        part = Grid(cell, top, left, bottom - top, right - left).clip(lattice)
        found = np.zeros(part.shape, np.float32)
        rows, columns = np.meshgrid(*part.centres(), indexing="ij")
        near = np.argwhere(_distance(rows, columns, self.path) <= radius + cell * math.sqrt(0.5))
        least, wanted, most = _SAMPLES
        count = min(most, max(least, math.ceil(wanted * cell / self.size)))
        offsets = ((np.arange(count) + 0.5) / count - 0.5) * cell
        for row, column in near:
            down, across = rows[row, column] + offsets[:, None], columns[row, column] + offsets
            found[row, column] = self.mask(*np.broadcast_arrays(down, across)).mean()
        return part, found


class _Touch(NamedTuple):
    """A stroke and, by pitch, which cells it covers and how much of them."""

    stroke: Stroke
    covers: dict[float, tuple[Grid, NDArray[np.float32]]]


class Canvas:
    """A place to be painted, embedding maps of it, and strokes on them.

    `grid`: the pixels, at the pitch that they are painted at; `base`: the maps before any stroke. Make one with
    `empty`, `of_region` or `load`.
    """

    def __init__(
        self, grid: Grid, base: Mapping[float, EmbeddingMap], *, encoder: str, fingerprint: str, tile: int
    ) -> None:
        self.grid, self.encoder, self.encoder_fingerprint, self.tile = grid, encoder, fingerprint, tile
        self._base = {
            mpp: replace(base[mpp], values=np.ascontiguousarray(base[mpp].values, np.float32)) for mpp in sorted(base)
        }
        self._done: list[_Touch] = []
        self._undone: list[_Touch] = []
        self._maps: dict[float, EmbeddingMap] | None = dict(self._base)

    @staticmethod
    def empty(grid: Grid, *, encoder: TileEncoder, pitches: Sequence[float] = PITCHES) -> Canvas:
        """A canvas of `grid` with no tissue anywhere, for inks of an encoder."""
        maps = {}
        for mpp in pitches:
            lattice = _whole(grid).at(encoder.tile * mpp)
            maps[mpp] = EmbeddingMap(mpp, lattice, np.full((*lattice.shape, encoder.dim), np.nan, np.float32))
        return Canvas(grid, maps, encoder=encoder.name, fingerprint=encoder.fingerprint, tile=encoder.tile)

    @staticmethod
    def of_region(
        slide: Slide, grid: Grid, *, encoder: TileEncoder, pitches: Sequence[float] = PITCHES,
        tissue: Tissue | None = None,
    ) -> Canvas:  # fmt: skip
        """A canvas of `grid`, a place on a slide's plane, with the slide's embeddings.

        Raises:
            SlideError: as `embed_region`.
        """
        maps = embed_region(slide, _whole(grid), encoder=encoder, pitches=pitches, tissue=tissue)
        return Canvas(grid, maps, encoder=encoder.name, fingerprint=encoder.fingerprint, tile=encoder.tile)

    @property
    def strokes(self) -> tuple[Stroke, ...]:
        """What is painted on it, first stroke first: the state that `changed` compares with."""
        return tuple(touch.stroke for touch in self._done)

    @property
    def undone(self) -> int:
        """How many strokes `redo` can bring back."""
        return len(self._undone)

    @property
    def pitches(self) -> tuple[float, ...]:
        """Pitches of its maps, µm, finest first."""
        return tuple(self._base)

    @property
    def blank(self) -> bool:
        """Whether there was no tissue anywhere before the strokes."""
        return not any(one.present.any() for one in self._base.values())

    @property
    def fingerprint(self) -> str:
        """A short digest of all that decides what is painted: the place, the maps, whose embeddings they are."""
        digest = hashlib.sha256(f"{self.grid} {self.encoder_fingerprint} {self.tile}".encode())
        for mpp, one in self.maps().items():
            digest.update(f"{mpp:g} {one.lattice}".encode() + one.values.tobytes())
        return digest.hexdigest()[:16]

    def maps(self) -> dict[float, EmbeddingMap]:
        """The maps with all strokes, by pitch; not to be changed."""
        if self._maps is None:
            values = _copied(self._base)
            for touch in self._done:
                self._apply(touch, values)
            self._maps = {mpp: replace(one, values=values[mpp]) for mpp, one in self._base.items()}
        return dict(self._maps)

    def copy(self) -> Canvas:
        """The same canvas apart from this one: what is drawn here afterwards is not drawn there."""
        names = {"encoder": self.encoder, "fingerprint": self.encoder_fingerprint}
        other = Canvas(self.grid, self._base, **names, tile=self.tile)
        other._done, other._undone, other._maps = list(self._done), list(self._undone), self.maps()
        return other

    def add(self, stroke: Stroke) -> None:
        """Draw a stroke; what was undone cannot be brought back after it.

        Raises:
            UsageError: if its ink is another encoder's, or lacks a pitch.
        """
        touch = self._touch(stroke)
        if self._maps is not None:
            values = _copied(self._maps)
            self._apply(touch, values)
            self._maps = {mpp: replace(one, values=values[mpp]) for mpp, one in self._base.items()}
        self._done.append(touch)
        self._undone.clear()

    def undo(self) -> bool:
        """Take back the last stroke; False where there is none."""
        return self._move(self._done, self._undone)

    def redo(self) -> bool:
        """Bring back the stroke that was taken back last; False where there is none."""
        return self._move(self._undone, self._done)

    def changed(self, since: Sequence[Stroke]) -> Grid | None:
        """Where the canvas differs from the state in which its `strokes` were `since`: a rectangle of its pixels, or
        None where nothing does.

        It holds every cell of the finest pitch that is touched by a stroke that is not in both, and half a cell around
        them, as far as interpolation reaches. Cells of coarser pitches are touched too, and reach further: there the
        embedding changes in proportion to how much of them is covered, and old pixels are to stay.
        """
        here, there = self.strokes, tuple(since)
        same = 0
        while same < min(len(here), len(there)) and here[same] is there[same]:
            same += 1
        finest, boxes = self.pitches[0], []
        for touch in [*self._done[same:], *map(self._touch, there[same:])]:
            part, cover = touch.covers[finest]
            places = np.argwhere(cover > 0)
            if len(places) and (touch.stroke.ink is None or touch.stroke.strength > 0):
                low, high = places.min(0) - 0.5, places.max(0) + 1.5
                corner = np.array((part.top, part.left))
                boxes.append((*((corner + low) * part.mpp), *((corner + high) * part.mpp)))
        if not boxes:
            return None
        edges = np.array(boxes) / self.grid.mpp
        (top, left), (bottom, right) = np.floor(edges[:, :2].min(0)), np.ceil(edges[:, 2:].max(0))
        found = Grid(self.grid.mpp, int(top), int(left), int(bottom - top), int(right - left)).clip(self.grid)
        return found if found.height and found.width else None

    def check_brush(self, name: str, fingerprint: str, pitches: Sequence[float]) -> None:
        """Whether a brush that follows embeddings of this name, fingerprint and pitches can paint it.

        Raises:
            UsageError: if not.
        """
        if fingerprint != self.encoder_fingerprint:
            raise UsageError(
                f"the brush follows embeddings of {name} ({fingerprint[:12]}), the canvas has those of {self.encoder} "
                f"({self.encoder_fingerprint[:12]}); make a canvas with inks of {name}"
            )
        missing = [f"{mpp:g}" for mpp in pitches if mpp not in self._base]
        if missing:
            raise UsageError(f"the brush needs embeddings at {', '.join(missing)} µm, which the canvas does not have")

    def save(self, target: Path | str, *, overwrite: bool = False) -> None:
        """Write it with all its strokes, those that are undone as well, whole or not at all.

        Raises:
            RefusedError, MachineError: as `commit.staged`.
        """
        import zarr

        touches = [*self._done, *reversed(self._undone)]
        inks = list({id(touch.stroke.ink): touch.stroke.ink for touch in touches if touch.stroke.ink}.values())
        number = {id(ink): index for index, ink in enumerate(inks)}
        facts = [
            {
                "ink": None if one.ink is None else number[id(one.ink)], "points": len(one.path), "size": one.size,
                "strength": one.strength, "softness": one.softness,
            }
            for one in (touch.stroke for touch in touches)
        ]  # fmt: skip
        points = np.array([point for touch in touches for point in touch.stroke.path], np.float64).reshape(-1, 2)
        manifest = {"format": FORMAT, "wsi_brush": __version__, "synthetic": True}
        with staged(Path(target), kind=KIND, about=manifest, overwrite=overwrite) as stage, undisturbed():
            group = zarr.create_group(stage, zarr_format=3)
            group.attrs.update(
                {
                    "grid": asdict(self.grid), "encoder": self.encoder, "fingerprint": self.encoder_fingerprint,
                    "tile": self.tile, "strokes": facts, "done": len(self._done),
                }
            )  # fmt: skip
            base = group.create_group("base")
            for mpp, one in self._base.items():
                write_array(base, f"{mpp:g}", one.values, {"mpp": mpp, "lattice": asdict(one.lattice)})
            write_array(group, "points", points, {})
            write_inks(group.create_group("inks"), inks)

    @staticmethod
    def load(path: Path | str) -> Canvas:
        """A canvas as it was saved.

        Raises:
            RefusedError: if `path` is no canvas, or damaged, or of a newer format.
        """
        group: Any = open_group(Path(path), KIND, FORMAT)
        try:
            about = group.attrs.asdict()
            base, inks, points = {}, read_inks(group["inks"]), np.asarray(group["points"][...]).tolist()
            for _, array in group["base"].arrays():
                lattice = Grid(**array.attrs["lattice"])
                base[float(array.attrs["mpp"])] = EmbeddingMap(array.attrs["mpp"], lattice, np.asarray(array[...]))
            names = {name: about[name] for name in ("encoder", "fingerprint", "tile")}
            canvas, first = Canvas(Grid(**about["grid"]), base, **names), 0
            for one in about["strokes"]:
                path_ = tuple((down, across) for down, across in points[first : first + one["points"]])
                first += one["points"]
                ink = None if one["ink"] is None else inks[one["ink"]]
                canvas.add(Stroke(ink, path_, one["size"], one["strength"], one["softness"]))
        except (KeyError, TypeError, ValueError, IndexError, UsageError) as error:
            raise RefusedError(
                f"{path}: made by another version of wsi-brush ({error}); make the canvas again"
            ) from None
        while len(canvas.strokes) > about["done"]:
            canvas.undo()
        return canvas

    def _move(self, one: list[_Touch], other: list[_Touch]) -> bool:
        if not one:
            return False
        other.append(one.pop())
        self._maps = None
        return True

    def _touch(self, stroke: Stroke) -> _Touch:
        ink = stroke.ink
        if ink is not None and (ink.fingerprint != self.encoder_fingerprint or ink.tile != self.tile):
            raise UsageError(
                f"{ink.name}: an ink of {ink.encoder} ({ink.fingerprint[:12]}), the canvas has embeddings of "
                f"{self.encoder} ({self.encoder_fingerprint[:12]}); pick it again with that encoder"
            )
        for mpp, one in self._base.items():
            if ink is not None and (mpp not in ink.vectors or len(ink.vectors[mpp]) != one.dim):
                raise UsageError(f"{ink.name}: no {one.dim} numbers at {mpp:g} µm; pick it at the canvas's pitches")
        return _Touch(stroke, {mpp: stroke.cover(one.lattice) for mpp, one in self._base.items()})

    def _apply(self, touch: _Touch, values: Mapping[float, NDArray[np.float32]]) -> None:
        """Edit the maps' values in place."""
        stroke = touch.stroke
        for mpp, (part, cover) in touch.covers.items():
            cells = values[mpp][part.within(self._base[mpp].lattice)]
            if stroke.ink is None:
                cells[cover > HALF] = np.nan
                continue
            ink, share = stroke.ink.vectors[mpp], np.float32(stroke.strength) * cover
            held = ~np.isnan(cells[..., 0])
            mixed = held & (share > 0)
            part_of = share[mixed][:, None]
            cells[mixed] = cells[mixed] * (1 - part_of) + ink * part_of  # exactly the ink at 1
            enough = HALF if mpp == self.pitches[0] else COVER
            cells[~held & (cover >= enough) & (share > 0)] = ink


def _whole(grid: Grid) -> Grid:
    return grid.rounded(_BLOCK)


def _copied(maps: Mapping[float, EmbeddingMap]) -> dict[float, NDArray[np.float32]]:
    return {mpp: one.values.astype(np.float32) for mpp, one in maps.items()}


def _distance(
    rows: NDArray[np.float64], columns: NDArray[np.float64], path: Sequence[tuple[float, float]]
) -> NDArray[np.float64]:
    """How far points are from a path, µm."""
    ends = np.asarray(path, np.float64)
    found: NDArray[np.float64] = np.hypot(rows - ends[0, 0], columns - ends[0, 1])
    for start, end in pairwise(ends):
        way = end - start
        length = float(way @ way)
        if length == 0:
            continue
        along = (((rows - start[0]) * way[0] + (columns - start[1]) * way[1]) / length).clip(0, 1)
        np.minimum(found, np.hypot(rows - start[0] - along * way[0], columns - start[1] - along * way[1]), out=found)
    return found
