"""The two sides that are compared, and which synthetic slide follows which real one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .distances import Groups
from .embed import slide_fingerprint
from .grid import Grid
from .inputs import find_inputs
from .progress import Tell, Told
from .samples import Field, Spot, blocks, drawn, field_of, halves, slide_halves, spots_of
from .slide import Slide, open_slide


def painted_after(path: Path) -> dict[str, Any] | None:
    """What a painting of ours says of itself, or None."""
    import zarr

    if not path.is_dir():
        return None
    try:
        about = zarr.open_group(path, mode="r").attrs.get("wsi_brush")
    except (OSError, ValueError, KeyError):
        return None
    return dict(about) if isinstance(about, dict) and about.get("synthetic") else None


class Pair(NamedTuple):
    """A synthetic field and the real one that it follows, by their numbers; `down` and `right`: where the corner of
    the synthetic one lies on the real slide, µm."""

    real: int
    synthetic: int
    down: float
    right: float

    def there(self, grid: Grid) -> Grid:
        """The place on the real slide of a square of the synthetic one, to the nearest pixel."""
        return self._moved(grid, 1)

    def here(self, grid: Grid) -> Grid:
        """The other way: the place on the synthetic slide of a square of the real one."""
        return self._moved(grid, -1)

    def _moved(self, grid: Grid, way: int) -> Grid:
        top, left = (way * round(shift / grid.mpp) for shift in (self.down, self.right))
        return Grid(grid.mpp, grid.top + top, grid.left + left, grid.height, grid.width)


@dataclass
class Sides:
    """The two sides, which synthetic field follows which real one, and what was searched for copies."""

    real: list[Field]
    synthetic: list[Field]
    pairs: list[Pair]
    notes: list[str] = field(default_factory=list)
    brushes: list[dict[str, Any]] = field(default_factory=list)
    training: list[Slide] = field(default_factory=list)

    @property
    def paired(self) -> bool:
        """Whether every synthetic field follows a real one."""
        return len(self.pairs) == len(self.synthetic)

    def spots(
        self, mpp: float, side: int, *, stride: float = 0.5, most: int = 1024, seed: int = 0
    ) -> tuple[list[Spot], list[Spot]]:
        """Squares of both sides, as `spots_of`. Where all are paired, the synthetic ones lie at the places of the real
        ones, whatever was painted there: tissue that is missing is not to be missed."""
        options: dict[str, Any] = {"stride": stride, "most": most, "seed": seed}
        real = spots_of(self.real, mpp, side, **options)
        if not self.paired:
            return real, spots_of(self.synthetic, mpp, side, **options)
        every = [self.painted(pair, grid) for k, grid in real for pair in self.pairs if pair.real == k]
        inside = [spot for spot in every if spot is not None]
        return real, [inside[k] for k in drawn(len(inside), most, seed)]

    def painted(self, pair: Pair, grid: Grid) -> Spot | None:
        """Where a real square is in the painting that follows it; None where it is not whole in there."""
        here, inside = pair.here(grid), self.synthetic[pair.synthetic].area.whole_cells(grid.mpp)
        return Spot(pair.synthetic, here) if here.clip(inside) == here else None

    def followed(self, spots: Sequence[Spot]) -> list[Spot]:
        """The real squares at the places of synthetic ones, where all are paired."""
        pairs = {pair.synthetic: pair for pair in self.pairs}
        return [Spot(pairs[k].real, pairs[k].there(grid)) for k, grid in spots]

    def halves(self, spots: Sequence[Spot]) -> tuple[tuple[list[int], list[int]], bool]:
        """Real squares in two halves, by number: neighbouring ones (`samples.halves`), as a painting is a neighbour of
        what it follows; where not all are paired, and there are slides enough, of other slides. Whether they are."""
        by_slide = None if self.paired else slide_halves(self.real, spots)
        return (halves(self.real, spots), False) if by_slide is None else (by_slide, True)

    def groups(
        self, real: Sequence[Spot], synthetic: Sequence[Spot], *, wide: int | None = None
    ) -> tuple[Groups, Groups]:
        """`samples.blocks` of the squares of both sides. Where all are paired, the synthetic ones are in those of the
        real ones that they follow, with the same numbers, so that two paintings of one place are one witness."""
        if not self.paired:
            return blocks(self.real, real, wide=wide), blocks(self.synthetic, synthetic, wide=wide)
        both = blocks(self.real, [*real, *self.followed(synthetic)], wide=wide)
        return both[: len(real)], both[len(real) :]


def open_all(
    paths: Iterable[Slide | Path | str], *, assume_mpp: float | None = None, force_mpp: float | None = None
) -> list[Slide]:
    """The slides of one side, each as often as it is named; one that is open already is taken as it is.

    A painting of ours keeps the pixel size that it was painted with, whatever is forced on the others.

    Raises:
        SlideError: if one cannot be read.
        UsageError: if a folder is empty.
    """
    found = []
    for path in paths:
        if isinstance(path, Slide):
            found.append(path)
            continue
        for one in find_inputs([path]):
            force = None if force_mpp is None or painted_after(one.path) else force_mpp
            found.append(open_slide(one.path, assume_mpp=one.assumed(assume_mpp), force_mpp=force))
    return found


def open_sides(
    real: Iterable[Slide | Path | str], synthetic: Iterable[Slide | Path | str], *, assume_mpp: float | None = None,
    force_mpp: float | None = None, by_order: bool = True, tell: Tell | None = None,
) -> Sides:  # fmt: skip
    """Slides, pyramids, plain images and folders of them, as fields.

    A painting of ours says which region of which slide it follows: that one is looked for among all real ones, by the
    fingerprint of its file. Other slides, and older paintings, which name none, are pairs by their order where there
    are as many of one side as of the other, and where the real slide (the region) is as large as the synthetic one;
    not `by_order`, only those that say so are pairs.

    A real region that several paintings follow is one field. A painting without tissue is one that failed, and counts.

    Raises:
        SlideError: if one cannot be read, or a real one has no tissue.
        UsageError: if a folder is empty.
    """
    slides = [open_all(paths, assume_mpp=assume_mpp, force_mpp=force_mpp) for paths in (real, synthetic)]
    first: dict[Path, Slide] = {}
    slides[0] = [first.setdefault(slide.path.resolve(), slide) for slide in slides[0]]  # however it is spelt
    about = [painted_after(slide.path) for slide in slides[1]]
    sides = Sides([], [], [], brushes=[one for one in about if one is not None])
    matched = _matched(slides[0], slides[1], about, sides.notes, by_order=by_order)
    again = [path.name for path, count in Counter(slide.path.resolve() for slide in slides[1]).items() if count > 1]
    sides.notes += [f"{name}: given more than once, and counted as often" for name in again]
    regions = _regions(slides[0], matched, sides.notes)
    order, told = list(regions), Told(tell, "looking for tissue", len(regions) + len(slides[1]))
    for (_, area), slide in regions.items():
        sides.real.append(field_of(slide, None if area == slide.grid else area))
        told.add()
    for number, (slide, found) in enumerate(zip(slides[1], matched, strict=True)):
        sides.synthetic.append(one := field_of(slide, blank=True))
        if not one.tissue.any():
            sides.notes.append(f"{one.name}: no tissue; is it H&E, and is its pixel size right?")
        if found is not None:
            region = order.index((slides[0][found[0]].path, found[1]))
            sides.pairs.append(Pair(region, number, *found[1].extent[:2]))
        told.add()
    sides.pairs.sort()
    pitches = sorted({round(one.mpp, 4) for side in slides for one in side})
    if pitches[-1] > pitches[0] * 1.001:
        sides.notes.append(f"pixel sizes from {pitches[0]:g} to {pitches[-1]:g} µm: all are read at the same pitches")
    return sides


def _matched(
    real: list[Slide], synthetic: list[Slide], about: list[dict[str, Any] | None], notes: list[str], *, by_order: bool
) -> list[tuple[int, Grid] | None]:
    """For each synthetic slide the number of the real one that it follows and the place there, if that is known."""
    named = [(made or {}).get("reference", {}).get("fingerprint") for made in about]
    prints = [slide_fingerprint(one.path) for one in real] if any(named) else []
    in_order = by_order and len(real) == len(synthetic)
    found: list[tuple[int, Grid] | None] = []
    for number, (slide, made, name) in enumerate(zip(synthetic, about, named, strict=True)):
        among = [number] if in_order else []
        if name:
            among = [k for k, digits in enumerate(prints) if digits.startswith(str(name))]
        mine = number if number in among else among[0] if among else None
        place = None if mine is None else _place(real[mine], slide, made)
        found.append(None if mine is None or place is None else (mine, place))
        if name and mine is None:
            notes.append(f"{slide.path.name}: painted after none of the real slides, so no pair")
        elif mine is not None and place is None:
            notes.append(f"{slide.path.name}: {_unlike(real[mine], made)}, so no pair")
    loose = [number for number, name in enumerate(named) if not name]
    if loose and not in_order:
        names = ", ".join(synthetic[number].path.name for number in loose)
        notes.append(
            f"{names}: in no pair, so left out of control"
            if len(loose) < len(synthetic)
            else f"{len(real)} real and {len(synthetic)} synthetic: not paired, so nothing is said about control"
        )
    ordered = [number for number in loose if found[number] is not None]
    if ordered:
        first, more = ordered[0], f", and {len(ordered) - 1} more" if len(ordered) > 1 else ""
        notes.append(f"paired by their order: {real[first].path.name} with {synthetic[first].path.name}{more}")
    return found


def _regions(
    real: list[Slide], matched: list[tuple[int, Grid] | None], notes: list[str]
) -> dict[tuple[Path, Grid], Slide]:
    """What is looked at of each real slide, once: the places that paintings follow, or all of it; where all paintings
    follow some, nothing of the others."""
    followed = {real[found[0]].path for found in matched if found is not None}
    strangers = {slide.path for slide in real if slide.path not in followed}
    if strangers and None not in matched:
        names = ", ".join(dict.fromkeys(slide.path.name for slide in real if slide.path in strangers))
        notes.append(f"{names}: left out, as nothing was painted after it")
        strangers = set()
    regions: dict[tuple[Path, Grid], Slide] = {}
    for number, slide in enumerate(real):
        places = [found[1] for found in matched if found is not None and found[0] == number]
        places += [slide.grid] if slide.path in strangers else []
        regions |= {(slide.path, place): slide for place in places}
    return regions


def _unlike(real: Slide, made: dict[str, Any] | None) -> str:
    """Why a slide is none that was painted after a real one."""
    if made is None:
        return f"of another size than {real.path.name}"
    reference, name = made.get("reference", {}), real.path.name
    if "fingerprint" not in reference:
        return f"not painted after {name}"
    if f"{reference['mpp']:.4g}" != f"{real.mpp:.4g}":
        return f"painted after {name} with pixels of {reference['mpp']:.4g} µm, which now has {real.mpp:.4g}"
    return f"painted after more than {name} holds"


def _place(real: Slide, synthetic: Slide, made: dict[str, Any] | None) -> Grid | None:
    """Where a synthetic slide lies on its real one (level-0 pixels), if that is known."""
    place = real.grid
    if made is not None:
        reference = made.get("reference", {})
        if abs(real.mpp / reference.get("mpp", math.inf) - 1) > 1e-3:
            return None
        place = Grid(real.mpp, *reference["region"])
        beyond = 1 + math.ceil(synthetic.mpp / real.mpp / 2)  # a pixel of level 0, and half of the painting's last one
        if place.clip(real.grid.pad(beyond)) != place:
            return None
        place = place.clip(real.grid)
    sizes = [[length * one.mpp for length in one.shape] for one in (place, synthetic.grid)]
    most = 2 * max(real.mpp, synthetic.mpp)
    return place if all(abs(one - other) <= most for one, other in zip(*sizes, strict=True)) else None
