"""A store in the files of others, read as they read them: with h5py, anndata, pyarrow and json alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_brush import interchange
from wsi_brush.commit import STAGE
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.interchange import FORMATS, Format, export_store, nominal_magnification, tiles_of
from wsi_brush.store import EmbeddingMap, EmbeddingStore, write_store
from wsi_brush.tissue import Tissue

h5py, parquet = pytest.importorskip("h5py"), pytest.importorskip("pyarrow.parquet")

DIM, TILE = 5, 128


def make_store(
    path: Path, *, mpp: float = 0.2527, synthetic: bool = False, absent: float = 0.4, pixel: list[float] | None = None
) -> EmbeddingStore:
    """A store as `embed` writes one: three pitches of a slide of 9000 x 7000 pixels, without the slide."""
    random, slide = np.random.default_rng(3), Grid(mpp, 0, 0, 9000, 7000)
    maps = {}
    for pitch in (0.5, 2.0, 8.0):
        lattice = slide.at(TILE * pitch)
        values = random.normal(size=(*lattice.shape, DIM)).astype(np.float16)
        values[random.random(lattice.shape) < absent] = np.nan
        maps[pitch] = EmbeddingMap(pitch, lattice, values)
    parameters = {"encoder": "bundled", "encoder_weights": "f" * 64, "tile": TILE, "dim": DIM, "tissue_rules": 1}
    about = {
        "slide": {
            "name": "a b.svs", "mpp": mpp, "mpp_source": "openslide.mpp", "height": 9000, "width": 7000,
            **({} if pixel is None else {"pixel": pixel}),
        },
        "synthetic": synthetic, "parameters": parameters, "parameters_fingerprint": "0123456789abcdef",
        "tiles": {f"{pitch:g}": int(one.present.sum()) for pitch, one in maps.items()},
    }  # fmt: skip
    cells = slide.at(8.0)
    tissue = Tissue(np.indices(cells.shape).sum(0) % 40 < 25, cells)
    return write_store(path, maps, tissue=tissue, about=about)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("stores") / "real.zarr")


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("stores") / "painted.zarr", synthetic=True)


def read_h5ad(path: Path) -> Any:
    """With the library, where it is; it takes seconds to import and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("anndata").read_h5ad(path)


def expected(store: EmbeddingStore, mpp: float) -> list[tuple[int, int, Any]]:
    """Row, column and embedding of each tile, in raster order."""
    one = store.maps[mpp]
    return [
        (row, column, one.values[row, column])
        for row in range(one.lattice.height)
        for column in range(one.lattice.width)
        if not np.isnan(one.values[row, column]).any()
    ]


@pytest.mark.parametrize("mpp", [0.5, 2.0, 8.0])
def test_trident_and_clam_find_their_keys(store: EmbeddingStore, tmp_path: Path, mpp: float) -> None:
    assert export_store(store, tmp_path / "a b.h5", "trident-h5", mpp=mpp) == len(expected(store, mpp))
    with h5py.File(tmp_path / "a b.h5", "r") as file:
        assert {"features", "coords"} <= set(file)
        features, coords = file["features"][:], file["coords"][:]
        about = dict(file["coords"].attrs)
        assert file["features"].attrs["name"] == about["name"] == "a b"
        assert file["features"].chunks is None or file["features"].chunks[0] > 1
        ours = dict(file.attrs)
        grid = file["grid_ij"][:]
    assert features.dtype == np.float32
    assert coords.dtype == np.int64
    for row, (top, left, vector) in enumerate(expected(store, mpp)):
        assert np.array_equal(features[row], vector.astype(np.float32))
        assert np.abs(coords[row] - np.array((left, top)) * TILE * mpp / 0.2527).max() <= 0.5
        assert grid[row].tolist() == [top, left]
    assert len(features) == len(expected(store, mpp))
    assert about["patch_size"] == TILE
    assert about["patch_size_level0"] == round(TILE * mpp / 0.2527)
    assert (about["level0_magnification"], about["target_magnification"]) == (40, 10 / mpp)
    assert (about["overlap"], about["level0_width"], about["level0_height"]) == (0, 7000, 9000)
    assert not about["synthetic"]
    assert (ours["mpp_x"], ours["mpp_y"], ours["mpp_source"]) == (0.2527, 0.2527, "openslide.mpp")
    assert (ours["target_mpp"], ours["encoder"], ours["weights_sha256"]) == (mpp, "bundled", "f" * 64)
    assert ours["fingerprint"] == "0123456789abcdef"
    assert json.loads(ours["wsi_brush"])["parameters"]["tile"] == TILE
    assert isinstance(about["patch_size"].item(), int)


def test_stamp_finds_its_keys(store: EmbeddingStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "a.h5", "stamp-h5", mpp=2.0)
    with h5py.File(tmp_path / "a.h5", "r") as file:
        feats, coords, about = file["feats"][:], file["coords"][:], dict(file.attrs)
    assert (feats.dtype, coords.dtype) == (np.float16, np.float32)
    for row, (top, left, vector) in enumerate(expected(store, 2.0)):
        assert np.array_equal(feats[row], vector)
        assert coords[row].tolist() == [left * 256.0, top * 256.0]
    assert (about["unit"], about["tile_size_um"], about["tile_size_px"]) == ("um", 256.0, TILE)
    assert (about["extractor"], about["feat_type"], about["code_hash"]) == ("bundled", "tile", "01234567")
    assert tuple(map(int, about["stamp_version"].split("."))) >= (2, 1)
    # STAMP finds the cell of a tile as the whole part of its corner over a side.
    assert np.array_equal(np.floor(coords / about["tile_size_um"])[:, ::-1], [one[:2] for one in expected(store, 2.0)])


def test_anndata_has_places_and_embeddings(store: EmbeddingStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "a.h5ad", "anndata")
    read = read_h5ad(tmp_path / "a.h5ad")
    tiles = expected(store, 0.5)
    assert read.shape == (len(tiles), DIM)
    assert np.array_equal(read.X, np.array([vector for *_, vector in tiles], np.float32))
    assert read.obs[["row", "column"]].to_numpy().tolist() == [list(one[:2]) for one in tiles]
    assert np.array_equal(read.obs[["y_um", "x_um"]], [[64.0 * row, 64.0 * column] for row, column, _ in tiles])
    np.testing.assert_allclose(read.obsm["spatial"], read.obs[["x", "y"]] + 32 / 0.2527, atol=0.5)
    assert read.obs_names.is_unique
    assert not read.obs["synthetic"].any()
    about = read.uns["wsi_brush"]
    assert (about["target_mpp"], about["tile_um"], about["encoder"]) == (0.5, 64.0, "bundled")
    assert json.loads(about["about"])["slide"]["name"] == "a b.svs"


def test_parquet_has_a_row_a_tile(store: EmbeddingStore, tmp_path: Path) -> None:
    export_store(store, tmp_path / "a.parquet", "parquet", mpp=8.0)
    table = parquet.read_table(tmp_path / "a.parquet")
    rows, tiles = table.to_pylist(), expected(store, 8.0)
    assert len(rows) == len(tiles)
    for row, (top, left, vector) in zip(rows, tiles, strict=True):
        assert (row["slide"], row["row"], row["column"]) == ("a b.svs", top, left)
        assert (row["y_um"], row["x_um"]) == (1024.0 * top, 1024.0 * left)
        assert (row["y"], row["x"]) == (round(1024 * top / 0.2527), round(1024 * left / 0.2527))
        assert np.array_equal(np.float16(row["embedding"]), vector)
        assert row["synthetic"] is False
    about = json.loads(table.schema.metadata[b"wsi_brush"])
    assert (about["target_mpp"], about["mpp_source"]) == (8.0, "openslide.mpp")


def test_geojson_is_the_tissue(store: EmbeddingStore, tmp_path: Path) -> None:
    from skimage.measure import points_in_poly

    assert export_store(store, tmp_path / "a.geojson", "geojson") > 1
    said = json.loads((tmp_path / "a.geojson").read_text("utf-8"))
    assert said["wsi_brush"]["slide"] == "a b.svs"
    mask, grid = store.tissue.mask, store.tissue.grid
    centres = (np.argwhere(np.ones(mask.shape))[:, ::-1] + 0.5) * grid.mpp / 0.2527
    inside = np.zeros(mask.size, np.bool_)
    for feature in said["features"]:
        outline, *holes = feature["geometry"]["coordinates"]
        inside |= points_in_poly(centres, outline) & ~sum((points_in_poly(centres, h) for h in holes), inside & False)
    assert np.array_equal(inside, mask.ravel())


def marks(path: Path, to: Format) -> list[bool]:
    """Every place where a file says whether it was painted."""
    if to == "geojson":
        said = json.loads(path.read_text("utf-8"))
        return [said["wsi_brush"]["synthetic"], *(one["properties"]["synthetic"] for one in said["features"])]
    if to == "parquet":
        table = parquet.read_table(path)
        return [json.loads(table.schema.metadata[b"wsi_brush"])["synthetic"], *table["synthetic"].to_pylist()]
    if to == "anndata":
        read = read_h5ad(path)
        return [bool(read.uns["wsi_brush"]["synthetic"]), *map(bool, read.obs["synthetic"])]
    with h5py.File(path, "r") as file:
        about = [bool(file.attrs["synthetic"]), json.loads(file.attrs["wsi_brush"])["synthetic"]]
        return about + [bool(one.attrs["synthetic"]) for name, one in file.items() if name != "grid_ij"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_painting_says_so_in_every_format(
    store: EmbeddingStore, painted: EmbeddingStore, tmp_path: Path, to: Format
) -> None:
    for one, synthetic in ((store, False), (painted, True)):
        export_store(one, tmp_path / f"{synthetic}", to)
        assert set(marks(tmp_path / f"{synthetic}", to)) == {synthetic}


@pytest.mark.parametrize("to", FORMATS)
def test_no_tissue_is_a_file_without_tiles(tmp_path: Path, to: Format) -> None:
    empty = make_store(tmp_path / "empty.zarr", absent=1.0, synthetic=True)
    if to != "geojson":
        assert export_store(empty, tmp_path / "out", to) == 0
        assert marks(tmp_path / "out", to)[0] is True


@pytest.mark.parametrize(("to", "other"), [("trident-h5", "stamp-h5"), ("stamp-h5", "trident-h5"), ("geojson", None)])
def test_another_of_our_files_stays_too(
    store: EmbeddingStore, tmp_path: Path, to: Format, other: Format | None
) -> None:
    target = tmp_path / "there"
    if other is None:  # a report says which version wrote it
        target.write_text(json.dumps({"wsi_brush": "0.7.0", "figures": 1}), encoding="utf-8")
    else:
        export_store(store, target, other)
    before = target.read_bytes()
    with pytest.raises(RefusedError, match=f"is no {to} file of wsi-brush"):
        export_store(store, target, to, overwrite=True)
    assert target.read_bytes() == before


@pytest.mark.parametrize("to", FORMATS)
def test_what_stands_there_stays_unless_it_is_ours(store: EmbeddingStore, tmp_path: Path, to: Format) -> None:
    target = tmp_path / "there"
    target.write_bytes(b"precious")
    with pytest.raises(RefusedError, match=f"is no {to} file of wsi-brush"):
        export_store(store, target, to, overwrite=True)
    assert target.read_bytes() == b"precious"
    target.unlink()
    export_store(store, target, to)
    before = target.stat().st_ino
    with pytest.raises(RefusedError, match="exists; choose another name or pass --overwrite"):
        export_store(store, target, to)
    assert target.stat().st_ino == before
    export_store(store, target, to, overwrite=True)
    assert target.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_that_breaks_leaves_nothing(
    store: EmbeddingStore, tmp_path: Path, to: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def broken(source: Any, target: Any) -> None:
        assert Path(source).stat().st_size  # all of it is there, beside the target
        assert Path(source).parent.name.startswith(STAGE)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(MachineError, match="the disk is full"):
        export_store(store, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_a_pitch_that_is_not_there_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no embeddings at 1 µm; --mpp may be 0\.5, 2, 8"):
        export_store(store, tmp_path / "out", "parquet", mpp=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_provenance_is_refused(tmp_path: Path) -> None:
    one = EmbeddingMap(0.5, Grid(64.0, 0, 0, 1, 1), np.zeros((1, 1, 2), np.float16))
    bare = write_store(tmp_path / "s", {0.5: one}, tissue=Tissue.everywhere(Grid(8.0, 0, 0, 8, 8)), about={})
    for to in FORMATS:
        with pytest.raises(UsageError, match="does not say which slide"):
            export_store(bare, tmp_path / "out", to)


@pytest.mark.parametrize("to", FORMATS[:-1])
def test_a_missing_library_is_one_line(
    store: EmbeddingStore, tmp_path: Path, to: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(interchange.importlib, "import_module", missing)
    with pytest.raises(MachineError, match=r'^[a-z0-9-]+: needs \w+, which is not installed; pip install "wsi-brush'):
        export_store(store, tmp_path / "out", to)


def test_pixels_that_are_not_square_are_told_apart(tmp_path: Path) -> None:
    """The plane has square ones; what goes out is counted in those of the file."""
    store = make_store(tmp_path / "s.zarr", mpp=0.25, pixel=[0.2, 0.3125])
    tiles = tiles_of(store)
    assert np.array_equal(tiles.level0 * (0.3125, 0.2), tiles.corners)
    export_store(store, tmp_path / "a.h5", "trident-h5")
    with h5py.File(tmp_path / "a.h5", "r") as file:
        about = dict(file["coords"].attrs)
    assert (about["level0_width"], about["level0_height"]) == (7000 * 0.25 / 0.3125, 9000 * 0.25 / 0.2)


@settings(max_examples=30)
@given(mpp=st.floats(0.1, 1.19))
def test_magnifications_are_the_steps_of_trident(mpp: float) -> None:
    steps = {80: mpp < 0.16, 60: 0.16 <= mpp < 0.2, 40: 0.2 <= mpp < 0.3, 20: 0.3 <= mpp < 0.6, 10: mpp >= 0.6}
    assert steps[int(nominal_magnification(mpp))]
