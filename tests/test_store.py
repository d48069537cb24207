"""A map of embeddings is a function; a store of them is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush import commit
from wsi_brush.errors import RefusedError
from wsi_brush.grid import Grid
from wsi_brush.store import EmbeddingMap, EmbeddingStore, write_store
from wsi_brush.tissue import Tissue

ABOUT = {"slide": {"name": "a.svs"}, "synthetic": False}


def some_map(seed: int = 0, *, absent: float = 0.3, mpp: float = 2.0, dim: int = 3) -> EmbeddingMap:
    """A 6 x 5 lattice that does not begin at 0, with some cells absent."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(6, 5, dim)).astype(np.float32)
    values[generator.random((6, 5)) < absent] = np.nan
    return EmbeddingMap(mpp, Grid(64 * mpp, 2, -1, 6, 5), values)


def at(one: EmbeddingMap, y: float, x: float) -> NDArray[np.float64]:
    """The bilinear value at a point, by the formula, with the weights of present cells brought to one."""
    total, weight = np.zeros(one.dim), 0.0
    for i in range(one.lattice.height):
        for j in range(one.lattice.width):
            v, u = (one.lattice.top + i + 0.5) * one.lattice.mpp, (one.lattice.left + j + 0.5) * one.lattice.mpp
            hat = max(0.0, 1 - abs(y - v) / one.lattice.mpp) * max(0.0, 1 - abs(x - u) / one.lattice.mpp)
            if hat > 0 and not np.isnan(one.values[i, j]).any():
                total, weight = total + hat * one.values[i, j], weight + hat
    return total / weight if weight > 1e-5 else np.full(one.dim, np.nan)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    absent=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    mpp=st.sampled_from([3.7, 16.0, 50.0, 128.0, 300.0]),
    y=st.integers(-20, 60),
    x=st.integers(-20, 60),
)
def test_reading_is_bilinear_between_present_cells(seed: int, absent: float, mpp: float, y: int, x: int) -> None:
    one = some_map(seed, absent=absent)
    grid = Grid(mpp, y, x, 3, 4)
    values = one.read(grid)
    rows, columns = grid.centres()
    expected = np.array([[at(one, v, u) for u in columns] for v in rows])
    assert values.shape == (3, 4, 3)
    assert values.dtype == np.float32
    decided = ~np.isnan(expected) | np.isnan(values)  # a weight of less than 1e-5 may fall on either side
    assert decided.mean() > 0.9
    both = ~np.isnan(expected) & ~np.isnan(values)
    assert np.array_equal(both, ~np.isnan(expected))
    np.testing.assert_allclose(values[both], expected[both], atol=2e-3)


def test_reading_does_not_depend_on_the_window() -> None:
    one = some_map()
    whole = Grid(5.3, 10, -40, 150, 160)
    values = one.read(whole)
    for part in whole.tiles(37):
        assert np.array_equal(one.read(part), values[part.within(whole)], equal_nan=True)


def test_reading_on_the_lattice_gives_the_cells() -> None:
    one = some_map()
    assert np.array_equal(one.read(one.lattice), one.values, equal_nan=True)


def test_a_linear_map_is_read_exactly() -> None:
    lattice = Grid(32.0, 0, 0, 8, 9)
    rows, columns = lattice.centres()
    ramp = np.stack(np.broadcast_arrays(rows[:, None], columns[None, :]), axis=-1).astype(np.float32)
    grid = Grid(4.0, 8, 8, 40, 48)
    y, x = grid.centres()
    expected = np.stack(np.broadcast_arrays(y[:, None], x[None, :]), axis=-1)
    np.testing.assert_allclose(EmbeddingMap(0.5, lattice, ramp).read(grid), expected, rtol=1e-5)


def test_nothing_is_known_far_away_or_without_tissue() -> None:
    assert np.isnan(some_map().read(Grid(2.0, 99999, 0, 4, 4))).all()
    assert np.isnan(some_map(absent=1.0).read(Grid(2.0, 128, 0, 4, 4))).all()
    assert some_map().read(Grid(2.0, 0, 0, 0, 4)).shape == (0, 4, 3)


def test_crop_keeps_cells_in_their_place() -> None:
    one = some_map()
    part = one.crop(Grid(0.5, 1100, 100, 500, 300))
    assert part.lattice == Grid(128.0, 4, 0, 3, 2)
    assert np.array_equal(part.values, one.values[2:5, 1:3], equal_nan=True)
    assert np.array_equal(part.read(part.lattice), part.values, equal_nan=True)
    assert one.crop(Grid(0.5, 10**6, 0, 4, 4)).values.size == 0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="on a lattice"):
        EmbeddingMap(0.5, Grid(32, 0, 0, 2, 2), np.zeros((2, 3, 4), np.float32))


def written(path: Path, *, overwrite: bool = False) -> EmbeddingStore:
    maps = {
        0.5: EmbeddingMap(0.5, Grid(32, 0, 0, 70, 65), np.full((70, 65, 3), np.nan, np.float16)),  # all chunks empty
        2.0: some_map(),
    }
    tissue = Tissue(np.eye(40, dtype=bool), Grid(8.0, 0, 0, 40, 40))
    return write_store(path, maps, tissue=tissue, about=ABOUT, overwrite=overwrite)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written(tmp_path / "a.zarr")
    store = EmbeddingStore.open(tmp_path / "a.zarr")
    assert list(store.maps) == [0.5, 2.0]
    assert store.maps[2.0].lattice == some_map().lattice
    assert np.array_equal(store.maps[2.0].values, some_map().values, equal_nan=True)
    assert store.maps[0.5].values.dtype == np.float16
    assert not store.maps[0.5].present.any()
    assert store.maps[2.0] is store.maps[2.0]
    assert store.tissue.grid == Grid(8.0, 0, 0, 40, 40)
    assert np.array_equal(store.tissue.mask, np.eye(40, dtype=bool))
    assert store.about.items() >= ABOUT.items()
    assert commit.verify(store.path) == []
    with pytest.raises(KeyError):
        store.maps[1.0]


def test_an_existing_store_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    written(tmp_path / "a.zarr")
    with pytest.raises(RefusedError, match="exists"):
        written(tmp_path / "a.zarr")
    written(tmp_path / "a.zarr", overwrite=True)


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "precious").touch()
    with pytest.raises(RefusedError, match="is no embedding store"):
        written(tmp_path / "a.zarr", overwrite=True)
    assert (tmp_path / "a.zarr" / "precious").exists()


def chunks(store: Path, name: str) -> list[Path]:
    return sorted(path for path in (store / name / "c").rglob("*") if path.is_file())


def test_a_missing_chunk_is_refused_and_not_read_as_empty(tmp_path: Path) -> None:
    store = written(tmp_path / "a.zarr")
    files = chunks(store.path, "embeddings/0.5")
    assert len(files) == 4  # also the empty ones
    files[1].unlink()
    with pytest.raises(RefusedError, match="missing or cut short"):
        EmbeddingStore.open(store.path)
    with pytest.raises(RefusedError, match="missing"):
        store.maps[0.5]  # opened before it went


@pytest.mark.parametrize("name", ["embeddings/2", "tissue"])
def test_a_flipped_bit_is_found_by_verify_and_by_reading(tmp_path: Path, name: str) -> None:
    store = written(tmp_path / "a.zarr")
    file = chunks(store.path, name)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert commit.verify(store.path) == [f"{file.relative_to(store.path).as_posix()}: changed since it was written"]
    with pytest.raises(RefusedError, match=r"a\.zarr: damaged"):
        _ = EmbeddingStore.open(store.path).tissue if name == "tissue" else store.maps[2.0]


def test_changed_metadata_are_refused(tmp_path: Path) -> None:
    store = written(tmp_path / "a.zarr")
    file = store.path / "embeddings" / "2" / "zarr.json"
    text = file.read_text("utf-8")
    file.write_text(text.replace('"left": -1', '"left": -2'), "utf-8")
    assert file.read_text("utf-8") != text
    with pytest.raises(RefusedError, match="changed since it was written"):
        EmbeddingStore.open(store.path)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such store"):
        EmbeddingStore.open(tmp_path / "none.zarr")
    with pytest.raises(RefusedError, match="no finished"):
        EmbeddingStore.open(tmp_path)
    (tmp_path / "text").write_text("x")
    with pytest.raises(RefusedError, match="no finished"):
        EmbeddingStore.open(tmp_path / "text")
    with commit.staged(tmp_path / "b", kind="brush", about={}):
        pass
    with pytest.raises(RefusedError, match="is a brush"):
        EmbeddingStore.open(tmp_path / "b")


@pytest.mark.parametrize("change", [{"format": 99}, {"about": None}, {"files": 3}])
def test_another_format_and_a_damaged_manifest_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    store = written(tmp_path / "a.zarr")
    manifest = json.loads((store.path / commit.MANIFEST).read_text("utf-8"))
    (store.path / commit.MANIFEST).write_text(json.dumps(manifest | change), "utf-8")
    with pytest.raises(RefusedError, match=r"format 99|damaged") as error:
        EmbeddingStore.open(store.path)
    assert "\n" not in str(error.value)
