"""A canvas: strokes edit embedding maps as functions, can be undone, and stay as they were on disk."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import TileStatistics
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_brush.canvas import Canvas, Stroke
from wsi_brush.commit import read_manifest
from wsi_brush.embed import COVER
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.info import describe
from wsi_brush.ink import THUMBNAIL, Ink, save_palette
from wsi_brush.slide import open_slide
from wsi_brush.store import EmbeddingMap

GRID, DIM, PITCHES = Grid(0.5, 64, 0, 1024, 1536), 3, (0.5, 2.0, 8.0)


def ink(seed: int = 0, *, dim: int = DIM, fingerprint: str = "none") -> Ink:
    random = np.random.default_rng(seed)
    vectors = {mpp: random.normal(size=dim).astype(np.float32) for mpp in PITCHES}
    picture = np.full((THUMBNAIL, THUMBNAIL, 3), seed, np.uint8)
    return Ink(f"ink {seed}", vectors, picture, "none", fingerprint, 128, (0.1, 1 / 3), "0" * 16)


def canvas(seed: int | None = 1) -> Canvas:
    """With random maps, a fifth of the cells without tissue; or without any."""
    maps = {}
    random = np.random.default_rng(seed)
    for mpp in PITCHES:
        lattice = GRID.at(128 * mpp)
        values = random.normal(size=(*lattice.shape, DIM)).astype(np.float16)
        values[(random.random(lattice.shape) < 0.2) if seed is not None else ...] = np.nan
        maps[mpp] = EmbeddingMap(mpp, lattice, values)
    return Canvas(GRID, maps, encoder="none", fingerprint="none", tile=128)


def same(one: Canvas, other: Canvas) -> bool:
    mine, theirs = one.maps(), other.maps()
    return mine.keys() == theirs.keys() and all(
        mine[mpp].lattice == theirs[mpp].lattice and mine[mpp].values.tobytes() == theirs[mpp].values.tobytes()
        for mpp in mine
    )


PLACES = st.tuples(st.floats(-50, 620), st.floats(-50, 820))
INKS = [None, ink(0), ink(1)]
STROKES = st.builds(
    Stroke,
    st.sampled_from(INKS),
    st.lists(PLACES, min_size=1, max_size=4).map(tuple),
    st.floats(20, 400),
    st.floats(0, 1),
    st.floats(0, 1),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(STROKES, min_size=1, max_size=4), st.integers(1, 4))
def test_undo_and_redo_are_exact(strokes: list[Stroke], back: int) -> None:
    painted, states = canvas(), [canvas()]
    for count, stroke in enumerate(strokes, 1):
        painted.add(stroke)
        states.append(canvas())
        for one in strokes[:count]:
            states[-1].add(one)
    back = min(back, len(strokes))
    for _ in range(back):
        assert painted.undo()
    assert same(painted, states[len(strokes) - back])
    assert painted.undone == back
    for _ in range(back):
        assert painted.redo()
    assert same(painted, states[-1])
    assert not painted.redo()


def test_a_new_stroke_ends_what_was_undone() -> None:
    painted = canvas()
    assert not painted.undo()
    painted.add(Stroke(ink(), ((200, 200),), 100))
    painted.undo()
    painted.add(Stroke(ink(1), ((200, 200),), 100))
    assert (painted.undone, len(painted.strokes), painted.redo()) == (0, 1, False)


@settings(max_examples=25, deadline=None)
@given(STROKES)
def test_cells_away_from_a_stroke_keep_their_bytes(stroke: Stroke) -> None:
    painted, before = canvas(), canvas().maps()
    painted.add(stroke)
    for mpp, one in painted.maps().items():
        # the nearest point of a cell may be this near where its centre is half its diagonal further away
        rows, columns = np.meshgrid(*one.lattice.centres(), indexing="ij")
        way = np.array([*stroke.path, stroke.path[-1]])
        apart = np.full(rows.shape, np.inf)
        for start, end in pairwise(way):
            for share in np.linspace(0, 1, 200):
                point = start + share * (end - start)
                apart = np.minimum(apart, np.hypot(rows - point[0], columns - point[1]))
        far = apart > stroke.size / 2 + one.lattice.mpp * 0.7072 + 4
        assert one.values[far].tobytes() == before[mpp].values[far].tobytes()


@settings(max_examples=25, deadline=None)
@given(STROKES, STROKES)
def test_the_order_matters_only_where_strokes_meet(one: Stroke, other: Stroke) -> None:
    first, second = canvas(), canvas()
    for stroke in (one, other):
        first.add(stroke)
    for stroke in (other, one):
        second.add(stroke)
    for mpp, mine in first.maps().items():
        both = np.ones(mine.lattice.shape, bool)
        for stroke in (one, other):
            part, cover = stroke.cover(mine.lattice)
            touched = np.zeros(mine.lattice.shape, bool)
            touched[part.within(mine.lattice)] = cover > 0
            both &= touched
        theirs = second.maps()[mpp].values
        assert mine.values[~both].tobytes() == theirs[~both].tobytes()


def test_the_last_stroke_is_on_top() -> None:
    painted = canvas()
    for number in (0, 1):
        painted.add(Stroke(ink(number), ((300, 300),), 300, 1, 0))
    np.testing.assert_array_equal(painted.maps()[0.5].read(Grid(64, 4, 4, 1, 1))[0, 0], ink(1).vectors[0.5])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(PLACES, min_size=1, max_size=4).map(tuple), st.floats(20, 400), st.floats(0, 1), st.floats(0, 1),
    st.sampled_from(PITCHES),
)  # fmt: skip
def test_softer_is_less(
    path: tuple[tuple[float, float], ...], size: float, one: float, other: float, mpp: float
) -> None:
    hard, soft = (Stroke(None, path, size, 1, softness) for softness in sorted((one, other)))
    lattice = GRID.at(128 * mpp)
    assert (hard.cover(lattice)[1] >= soft.cover(lattice)[1]).all()


@pytest.mark.parametrize("size", [60.0, 200.0, 500.0])
@pytest.mark.parametrize("mpp", PITCHES)
def test_a_cell_is_covered_by_the_area_of_the_disc(mpp: float, size: float) -> None:
    lattice = Grid(128 * mpp, -16, -16, 32, 32)
    part, cover = Stroke(None, ((11.0, -7.0),), size, 1, 0).cover(lattice)
    assert cover.sum() * lattice.mpp**2 == pytest.approx(np.pi * (size / 2) ** 2, rel=0.02)
    assert part.clip(lattice) == part


def test_a_path_over_itself_is_not_twice_as_strong() -> None:
    lattice = GRID.at(64)
    once = Stroke(None, ((200, 100), (200, 500)), 120, 0.5, 0.7).cover(lattice)
    twice = Stroke(None, ((200, 100), (200, 500), (200, 100), (200, 500)), 120, 0.5, 0.7).cover(lattice)
    assert once[0] == twice[0]
    np.testing.assert_array_equal(once[1], twice[1])


def test_a_small_stroke_changes_a_large_cell_in_proportion() -> None:
    painted, new = canvas(2), ink()
    before = painted.maps()[8.0].values[0, 0]
    assert np.isfinite(before).all()
    stroke = Stroke(new, ((300, 300),), 200, 0.8, 0)
    painted.add(stroke)
    share = 0.8 * np.pi * 100**2 / 1024**2
    wanted = before + share * (new.vectors[8.0] - before)
    np.testing.assert_allclose(painted.maps()[8.0].values[0, 0], wanted, atol=2e-3)
    assert np.abs(painted.maps()[8.0].values[0, 0] - before).max() > 0.01


def test_an_empty_cell_takes_an_ink_where_it_is_covered() -> None:
    painted, new = canvas(None), ink()
    stroke = Stroke(new, ((300, 300),), 330, 0.3, 0)
    painted.add(stroke)
    for mpp, enough in ((0.5, 0.5), (2.0, COVER), (8.0, COVER)):
        one = painted.maps()[mpp]
        part, cover = stroke.cover(one.lattice)
        wanted = np.zeros(one.lattice.shape, bool)
        wanted[part.within(one.lattice)] = cover >= enough
        np.testing.assert_array_equal(one.present, wanted)
        assert wanted.any()
        assert (one.values[wanted] == new.vectors[mpp]).all()
    assert painted.maps()[0.5].present.sum() * 64**2 == pytest.approx(np.pi * 165**2, rel=0.15)


def test_an_eraser_leaves_nothing_where_it_covers_more_than_half() -> None:
    painted = canvas()
    before, stroke = painted.maps(), Stroke(None, ((300, 300),), 330, 0.0, 0.2)
    painted.add(stroke)
    for mpp, one in painted.maps().items():
        part, cover = stroke.cover(one.lattice)
        gone = np.zeros(one.lattice.shape, bool)
        gone[part.within(one.lattice)] = cover > 0.5
        np.testing.assert_array_equal(one.present, before[mpp].present & ~gone)
        assert one.values[~gone].tobytes() == before[mpp].values[~gone].tobytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(STROKES, max_size=3), st.lists(STROKES, max_size=2))
def test_what_changed_holds_every_difference(before: list[Stroke], after: list[Stroke]) -> None:
    painted = canvas()
    for stroke in before:
        painted.add(stroke)
    state, old = painted.strokes, painted.maps()[0.5]
    if before:
        painted.undo()
    for stroke in after:
        painted.add(stroke)
    found = painted.changed(state)
    coarse = Grid(8.0, 4, 0, 64, 96)  # the canvas at 8 µm
    differs = ~np.isclose(old.read(coarse), painted.maps()[0.5].read(coarse), rtol=0, atol=0, equal_nan=True).all(-1)
    if found is not None:
        assert found.clip(GRID) == found
        rows, columns = found.at(8.0).clip(coarse).within(coarse)
        differs[rows, columns] = False
    assert not differs.any()


def test_nothing_changed() -> None:
    painted = canvas()
    assert painted.changed(()) is None
    painted.add(Stroke(ink(), ((300, 300),), 100, 0.0))
    painted.add(Stroke(ink(), ((5000, 5000),), 100))
    assert painted.changed(()) is None
    state = painted.strokes
    painted.add(Stroke(ink(), ((300, 300),), 100))
    painted.undo()
    assert painted.changed(state) is None
    painted.redo()
    # cells of 64 µm from 192 to 384 are touched, and half a cell around them
    assert painted.changed(state) == Grid(0.5, 320, 320, 512, 512)


@settings(max_examples=15, deadline=None)
@given(strokes=st.lists(STROKES, max_size=4), back=st.integers(0, 2))
def test_on_disk_it_is_what_it_was(tmp_path_factory: pytest.TempPathFactory, strokes: list[Stroke], back: int) -> None:
    painted, target = canvas(), tmp_path_factory.mktemp("canvas") / "one.zarr"
    for stroke in strokes:
        painted.add(stroke)
    back = sum(painted.undo() for _ in range(back))
    painted.save(target)
    found = Canvas.load(target)
    assert same(found, painted)
    assert (found.grid, found.undone, found.fingerprint) == (painted.grid, back, painted.fingerprint)
    for one, other in zip(found.strokes, painted.strokes, strict=True):
        assert (one.path, one.size, one.strength, one.softness) == (
            other.path, other.size, other.strength, other.softness,
        )  # fmt: skip
        assert (one.ink and one.ink.digest) == (other.ink and other.ink.digest)
    for _ in range(back):
        assert painted.redo()
        assert found.redo()
    assert same(found, painted)


def test_info_says_what_it_is(tmp_path: Path) -> None:
    one = canvas()
    for place in ((40.0, 40.0), (80.0, 60.0)):
        one.add(Stroke(ink(3), (place,), 50.0))
    one.undo()
    one.save(tmp_path / "a.zarr")
    found = describe(tmp_path / "a.zarr")
    assert (found["kind"], found["synthetic"], found["strokes"], found["undone"]) == ("canvas", True, 1, 1)
    assert ((found["height"], found["width"]), found["maps"]) == (one.grid.shape, list(one.pitches))
    save_palette([ink(3)], tmp_path / "inks.zarr")
    found = describe(tmp_path / "inks.zarr")
    assert (found["kind"], found["inks"], found["encoder"]) == ("palette", [ink(3).name], ink(3).encoder)


def test_a_copy_is_apart() -> None:
    one = canvas()
    one.add(Stroke(ink(), ((300, 300),), 100))
    other = one.copy()
    assert same(one, other)
    one.add(Stroke(ink(1), ((300, 300),), 100))
    assert (len(other.strokes), same(one, other)) == (1, False)
    one.undo()
    assert same(one, other)


def test_another_painting_another_fingerprint() -> None:
    one, other = canvas(), canvas()
    assert one.fingerprint == other.fingerprint
    other.add(Stroke(ink(), ((300, 300),), 100, 0.5))
    assert one.fingerprint != other.fingerprint


def test_a_damaged_canvas_is_refused(tmp_path: Path) -> None:
    painted, target = canvas(), tmp_path / "one.zarr"
    painted.add(Stroke(ink(), ((300, 300),), 100))
    painted.save(target)
    with pytest.raises(RefusedError, match="exists"):
        painted.save(target)
    chunk = target / "base" / "0.5" / "c" / "0" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RefusedError, match="damaged"):
        Canvas.load(target)
    chunk.unlink()
    with pytest.raises(RefusedError, match="damaged"):
        Canvas.load(target)
    chunk.write_bytes(whole)
    Canvas.load(target)
    manifest = read_manifest(target)
    assert manifest is not None
    (target / "wsi-brush.json").write_text(json.dumps(manifest | {"kind": "brush"}))
    with pytest.raises(RefusedError, match="is no canvas of wsi-brush"):
        Canvas.load(target)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"path": ()}, "one point"),
        ({"path": ((float("nan"), 0.0),)}, "one point"),
        ({"size": 0.0}, "diameter"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"softness": -0.1}, "softness -0.1"),
    ],
)
def test_strokes_that_cannot_be(wrong: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Stroke(**{"ink": None, "path": ((1.0, 1.0),), "size": 10.0, **wrong})  # type: ignore[arg-type]


def test_an_ink_or_a_brush_of_another_encoder_is_refused() -> None:
    painted = canvas()
    with pytest.raises(UsageError, match="pick it again"):
        painted.add(Stroke(ink(fingerprint="another"), ((300, 300),), 100))
    with pytest.raises(UsageError, match="no 3 numbers"):
        painted.add(Stroke(ink(dim=4), ((300, 300),), 100))
    assert painted.strokes == ()
    painted.check_brush("none", "none", PITCHES)
    with pytest.raises(UsageError, match=r"follows embeddings of uni \(1234\), the canvas has those of none"):
        painted.check_brush("uni", "1234", PITCHES)
    with pytest.raises(UsageError, match="at 4 µm"):
        painted.check_brush("none", "none", (0.5, 4.0))


def test_a_canvas_of_a_region_has_its_embeddings(tissue_slide: Path) -> None:
    encoder, grid = TileStatistics(), Grid(0.5, 256, 256, 300, 300)
    painted = Canvas.of_region(open_slide(tissue_slide), grid, encoder=encoder)
    empty = Canvas.empty(grid, encoder=encoder)
    assert painted.pitches == empty.pitches == PITCHES
    assert painted.maps()[0.5].lattice == empty.maps()[0.5].lattice == Grid(64, 2, 2, 4, 4)  # whole blocks of 512
    assert painted.maps()[0.5].present.all()
    assert not empty.maps()[0.5].present.any()
    assert (painted.blank, empty.blank) == (False, True)
    assert painted.maps()[0.5].dim == empty.maps()[0.5].dim == 24
