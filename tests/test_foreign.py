"""Embeddings in the files of others become the maps of a brush, or one line says why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_interchange import DIM, TILE, make_store

from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.foreign import read_conditions, read_h5
from wsi_brush.grid import Grid
from wsi_brush.interchange import export_store
from wsi_brush.store import EmbeddingStore

h5py = pytest.importorskip("h5py")

PITCHES = (0.5, 2.0, 8.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("stores") / "real.zarr")


def write_trident(
    path: Path, coords: NDArray[np.int64], *, side: int = 256, level0: int = 512, dim: int = DIM, **more: Any
) -> Path:
    """As TRIDENT writes a slide: the magnification is nominal, a pixel size is not said."""
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(len(coords), dim)).astype(np.float32)
        file["coords"] = coords
        about = {"patch_size": side, "patch_size_level0": level0, "level0_magnification": 40, "overlap": 0}
        file["coords"].attrs.update(about | {"target_magnification": 20, "name": "s"} | more)
    return path


def write_stamp(path: Path, coords: NDArray[np.float32], **more: Any) -> Path:
    """As STAMP writes a slide: places in µm."""
    with h5py.File(path, "w") as file:
        file["feats"] = np.random.default_rng(0).normal(size=(len(coords), DIM)).astype(np.float16)
        file["coords"] = coords
        about = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "uni2", "feat_type": "tile"}
        file.attrs.update({name: value for name, value in (about | more).items() if value is not None})
    return path


@pytest.mark.parametrize("to", ["trident-h5", "stamp-h5"])
@pytest.mark.parametrize("mpp", PITCHES)
def test_out_and_in_again(store: EmbeddingStore, tmp_path: Path, to: Any, mpp: float) -> None:
    export_store(store, tmp_path / "a.h5", to, mpp=mpp)
    one = read_h5(tmp_path / "a.h5")
    assert one.map.lattice == store.maps[mpp].lattice
    assert one.map.mpp == mpp
    assert np.array_equal(one.map.values, store.maps[mpp].values, equal_nan=True)
    assert (one.encoder, one.weights, one.synthetic) == ("bundled", "f" * 64, False)


@settings(max_examples=6, deadline=None)
@given(mpp=st.floats(0.1, 4.0), down=st.floats(0.1, 4.0))
def test_rounded_corners_find_their_cell(tmp_path_factory: pytest.TempPathFactory, mpp: float, down: float) -> None:
    """TRIDENT's corners are whole level-0 pixels, whatever the pixel size, also where height and width differ."""
    folder = tmp_path_factory.mktemp("s")
    store = make_store(folder / "s.zarr", mpp=2.0, pixel=[down, mpp])
    export_store(store, folder / "a.h5", "trident-h5", mpp=2.0)
    again = read_h5(folder / "a.h5").map
    assert np.array_equal(again.values, store.maps[2.0].values, equal_nan=True)


def test_a_painting_is_known_as_one(tmp_path: Path) -> None:
    painted = make_store(tmp_path / "p.zarr", synthetic=True)
    for to in ("trident-h5", "stamp-h5"):
        export_store(painted, tmp_path / to, to)  # type: ignore[arg-type]
        assert read_h5(tmp_path / to).synthetic is True


def test_tridents_own_files_need_the_pixel_size(tmp_path: Path) -> None:
    coords = 512 * np.array([[3, 2], [4, 2], [3, 7]])
    path = write_trident(tmp_path / "t.h5", coords)
    with pytest.raises(UsageError, match="does not say the slide's pixel size"):
        read_h5(path)
    one = read_h5(path, slide_mpp=0.2527)
    assert one.map.mpp == pytest.approx(0.5054)
    assert one.map.lattice == Grid(512 * 0.2527, 2, 3, 6, 2)
    assert one.weights is None
    with h5py.File(path) as file:
        values = file["features"][:]
    for (x, y), vector in zip(coords // 512, values, strict=True):
        assert np.array_equal(one.map.values[y - 2, x - 3], vector)
    assert one.map.present.sum() == 3


def test_stamps_own_files_are_in_micrometres(tmp_path: Path) -> None:
    one = read_h5(write_stamp(tmp_path / "s.h5", np.float32([[256, 512], [99_840, 0]])))
    assert one.map.lattice == Grid(256.0, 0, 1, 3, 390)
    assert one.map.mpp == 256 / 224
    assert one.map.present.tolist()[2][0]
    assert one.encoder == "uni2"


SIDES = np.array([[0, 0], [512, 0], [512, 512]])


@pytest.mark.parametrize(
    ("coords", "more", "said"),
    [
        (SIDES + np.array([[0, 0], [100, 0], [0, 0]]), {}, r"0\.2 of its side beside the lattice"),
        (SIDES + 7, {}, "beside the lattice"),
        (SIDES * [[1, 0]], {}, "stand on one another"),
        (SIDES, {"overlap": 32}, "overlap by 32 pixels"),
        (SIDES * 10**8, {}, "no slide"),
        (SIDES, {"patch_size": 0}, "tiles of 0 pixels"),
        (SIDES, {"patch_size_level0": -512}, "export it again"),
        (SIDES, {"patch_size": "many"}, "can be read"),
        (SIDES[:, :1], {}, "expected a row a tile"),
    ],
)
def test_a_lattice_that_does_not_fit_is_refused(tmp_path: Path, coords: Any, more: dict[str, Any], said: str) -> None:
    path = write_trident(tmp_path / "t.h5", coords, **more)
    with pytest.raises(RefusedError, match=said) as error:
        read_h5(path, slide_mpp=0.25)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with pytest.raises(UsageError, match="no such file"):
        read_h5(path)
    path.write_text("text")
    with pytest.raises(RefusedError, match="no HDF5"):
        read_h5(path)
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(RefusedError, match="holds images; expected features"):
        read_h5(path)
    with h5py.File(path, "w") as file:  # as CLAM writes it
        file["features"], file["coords"] = np.zeros((2, 3), np.float32), np.zeros((2, 2), np.int64)
    with pytest.raises(RefusedError, match="do not say patch_size"):
        read_h5(path)
    with h5py.File(path, "w") as file:
        file.create_group("features")
        file["coords"] = np.zeros((2, 2))
    with pytest.raises(RefusedError, match="can be read"):
        read_h5(path)
    with pytest.raises(RefusedError, match="does not say unit=um"):
        read_h5(write_stamp(path, np.float32([[0, 0]]), unit=None))
    with h5py.File(write_trident(path, SIDES), "r+") as file:
        file["features"][0, 0] = np.nan
    with pytest.raises(RefusedError, match="not finite"):
        read_h5(path, slide_mpp=0.25)


def exported(store: EmbeddingStore, folder: Path) -> list[Path]:
    for pitch in PITCHES:
        export_store(store, folder / f"{pitch:g}.h5", "trident-h5", mpp=pitch)
    return [folder / f"{pitch:g}.h5" for pitch in PITCHES]


BRUSH: dict[str, Any] = {"pitches": PITCHES, "tile": TILE, "dim": DIM, "weights": "f" * 64}


def test_a_brush_paints_after_files_as_after_the_store(store: EmbeddingStore, tmp_path: Path) -> None:
    import torch
    from conftest import make_brush

    from wsi_brush.paint import paint_canvas
    from wsi_brush.stages import Painting

    maps = read_conditions(exported(store, tmp_path), **BRUSH)
    brush, canvas = make_brush(dim=DIM, tile=TILE), Grid(0.5, 512, 512, 64, 64)
    painting = Painting(size=64, steps=5, progressive=True)
    for pitch in (0.5, 2.0):
        for ours, theirs in zip(
            brush.condition(store.maps, canvas, pitch), brush.condition(maps, canvas, pitch), strict=True
        ):
            assert torch.equal(ours.values, theirs.values)
            assert torch.equal(ours.present, theirs.present)
            assert torch.equal(ours.corner, theirs.corner)
    first, second = (np.asarray(paint_canvas(brush, one, canvas, painting)) for one in (store.maps, maps))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": 1024}, "5 numbers each; the brush follows 1024"),
        ({"weights": "e" * 64}, r"bundled \(f{12}\); the brush follows an encoder of weights e{12}"),
        ({"tile": 224}, "tiles of 128 pixels; the brush follows tiles of 224"),
        ({"pitches": (0.5, 2.0)}, r"at 8 µm; the brush follows tiles at 0\.5, 2 µm"),
        ({"pitches": (0.5, 2.0, 8.0, 32.0)}, "no file at 32 µm"),
    ],
)
def test_what_the_brush_does_not_follow_is_refused(
    store: EmbeddingStore, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        read_conditions(exported(store, tmp_path), **(BRUSH | change))
    assert "\n" not in str(error.value)


def test_a_pitch_twice_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    paths = exported(store, tmp_path)
    with pytest.raises(UsageError, match=r"at 0\.5 µm, which another file has already"):
        read_conditions([paths[0], *paths], **BRUSH)


def test_foreign_weights_are_the_callers_word(tmp_path: Path) -> None:
    path = write_trident(tmp_path / "t.h5", SIDES // 2, side=128, level0=256)
    wanted = BRUSH | {"pitches": (0.5,), "slide_mpp": 0.25}
    with pytest.raises(UsageError, match=re.escape("give --same-encoder (in Python same_encoder=True)")):
        read_conditions([path], **wanted)
    assert read_conditions([path], **wanted, same_encoder=True)[0.5].present.sum() == 3
    near = read_conditions([path], **(wanted | {"slide_mpp": 0.2527}), same_encoder=True)[0.5]
    assert near.lattice.mpp == 256 * 0.2527  # nominally 20x, where it is: the lattice keeps its true place
    with pytest.raises(UsageError, match=r"at 0\.6 µm"):
        read_conditions([path], **(wanted | {"slide_mpp": 0.3}), same_encoder=True)
