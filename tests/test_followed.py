"""Embeddings alone paint what their slide would have painted, or one line says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import zarr
from conftest import TileStatistics
from numpy.typing import NDArray

from wsi_brush import commit, encoder, sides
from wsi_brush.brush import Brush, save_brush
from wsi_brush.embed import embed_region, embed_slide, slide_fingerprint
from wsi_brush.encoder import Encoder
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.followed import follow
from wsi_brush.grid import Grid
from wsi_brush.interchange import Format, export_store
from wsi_brush.progress import StoppedError
from wsi_brush.samples import Field
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.store import EmbeddingMap, EmbeddingStore, write_store
from wsi_brush.synthesize import choose_canvas, synthesize_embeddings, synthesize_slide
from wsi_brush.tissue import Tissue, find_tissue

h5py = pytest.importorskip("h5py")

CANARY = "Ramona^Testcase"
ENCODER = cast(Encoder, TileStatistics())
PAINTING = Painting(size=96, seed=2, steps=5)
Words = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def slide(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue slide, with a patient's name in the name of its file."""
    return Path(shutil.copy(tissue_slide, tmp_path_factory.mktemp("slides") / f"{CANARY}.tif"))


@pytest.fixture(scope="module")
def store(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    report = embed_slide(slide, tmp_path_factory.mktemp("stores"), encoder=ENCODER, name="one")
    return EmbeddingStore.open(report.store)


@pytest.fixture(scope="module")
def others(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """A store of the same places, with the embeddings of each pitch the other way round."""
    return again(store, tmp_path_factory.mktemp("stores") / "others.zarr", turned=True)


def again(
    store: EmbeddingStore, path: Path, *, turned: bool = False, pitches: tuple[float, ...] = (0.5, 2.0, 8.0),
    tissue: Tissue | None = None, **about: Any,
) -> EmbeddingStore:  # fmt: skip
    """A copy of a store in which something is otherwise; what is None is left out."""
    maps = {mpp: store.maps[mpp] for mpp in pitches}
    if turned:
        maps = {mpp: replace(one, values=one.values[..., ::-1].copy()) for mpp, one in maps.items()}
    told = {name: value for name, value in (store.about | about).items() if value is not None}
    return write_store(path, maps, tissue=tissue or store.tissue, about=told)


def exported(store: EmbeddingStore, folder: Path, to: Format = "trident-h5") -> list[Path]:
    paths = [folder / f"{to}-{mpp:g}.h5" for mpp in store.maps]
    for mpp, path in zip(store.maps, paths, strict=True):
        export_store(store, path, to, mpp=mpp)
    return paths


def write_trident(folder: Path, *, mpp: float = 0.25, dim: int = ENCODER.dim) -> list[Path]:
    """What TRIDENT would write of a slide of 4 x 4 mm: neither pixel size nor weights; tissue in its last quarter."""
    random, paths = np.random.default_rng(0), []
    for pitch in (0.5, 2.0, 8.0):
        side = round(pitch * ENCODER.tile / mpp)
        rows, columns = np.mgrid[: round(4000 / mpp / side), : round(4000 / mpp / side)]
        cells = np.stack([columns.ravel(), rows.ravel()], 1)
        cells = cells[(cells >= len(rows) // 2).all(1)]
        paths.append(folder / f"theirs-{pitch:g}.h5")
        with h5py.File(paths[-1], "w") as file:
            file["features"] = random.normal(size=(len(cells), dim)).astype(np.float32)
            file["coords"] = cells * side
            file["coords"].attrs.update({"patch_size": ENCODER.tile, "patch_size_level0": side, "overlap": 0})
    return paths


def pixels_of(path: Path) -> NDArray[np.uint8]:
    slide = open_slide(path)
    return slide.read(slide.grid)


def corner_of(path: Path) -> Any:
    """Where a pyramid lies, µm."""
    ome: Any = zarr.open_group(path, mode="r").attrs["ome"]
    return ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][1]["translation"]


def about_of(path: Path) -> dict[str, Any]:
    about: Any = zarr.open_group(path, mode="r").attrs["wsi_brush"]
    return dict(about)


def same(one: dict[float, EmbeddingMap], other: dict[float, EmbeddingMap]) -> None:
    assert list(one) == list(other)
    for mpp, mine in one.items():
        assert (mine.mpp, mine.lattice) == (other[mpp].mpp, other[mpp].lattice)
        assert np.array_equal(mine.values, other[mpp].values, equal_nan=True)


# -- what is followed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "area", [Grid(0.5, 300, 280, 512, 512), Grid(0.5, 700, 400, 512, 512), Grid(1.0, 0, 0, 512, 512)], ids=str
)
def test_maps_of_a_store_are_those_of_its_slide(store: EmbeddingStore, slide: Path, brush: Brush, area: Grid) -> None:
    followed = follow([store.path], brush=brush)
    same(followed.maps(area), embed_region(open_slide(slide), area, encoder=ENCODER))
    assert followed.maps(area)[0.5].present.any()
    assert followed.grid == open_slide(slide).grid
    assert np.array_equal(followed.tissue.mask, find_tissue(open_slide(slide)).mask)


@pytest.mark.parametrize("to", ["trident-h5", "stamp-h5"])
def test_maps_of_h5_are_those_of_their_store(store: EmbeddingStore, brush: Brush, tmp_path: Path, to: Format) -> None:
    paths, area = exported(store, tmp_path, to), Grid(0.5, 300, 280, 512, 512)
    followed = follow(paths[::-1], brush=brush)
    same(followed.maps(area), follow([store.path], brush=brush).maps(area))
    assert followed.slide is None
    assert followed.about["encoder_named"] is True
    assert followed.digest == follow(paths, brush=brush).digest  # the order says nothing
    finest = store.maps[0.5]
    assert np.array_equal(followed.tissue.mask, finest.present[followed.tissue.grid.within(finest.lattice)])


def test_what_lies_far_from_every_tile_is_absent(brush: Brush, tmp_path: Path) -> None:
    followed = follow(write_trident(tmp_path), brush=brush, slide_mpp=0.25, same_encoder=True)
    near, far = (followed.maps(Grid(0.5, corner, corner, 256, 256)) for corner in (4096, 128))
    assert [one.present.all() for one in near.values()] == [True] * 3
    assert [one.values.shape for one in far.values()] == [(2, 2, 24), (1, 1, 24), (1, 1, 24)]
    assert not any(one.present.any() for one in far.values())


def test_a_square_is_chosen_where_tiles_are(brush: Brush, tmp_path: Path) -> None:
    followed = follow(write_trident(tmp_path), brush=brush, slide_mpp=0.25, same_encoder=True)
    assert followed.about["encoder_named"] is False
    canvas = choose_canvas(followed, Painting(size=512), followed.tissue)
    assert min(canvas.extent[:2]) >= 31 * 64  # of 62 tiles of 64 µm the last 31 a side
    assert canvas.clip(Grid(0.5, 0, 0, 62 * 128, 62 * 128)) == canvas
    with pytest.raises(UsageError, match=r"7936 x 7936 pixels at 0\.5 µm, too small for 8000 x 8000; give --size 7936"):
        choose_canvas(followed, Painting(size=8000), followed.tissue)


# -- what is painted -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "painting",
    [PAINTING, replace(PAINTING, region=(600, 700, 200, 324)), replace(PAINTING, mpp=2.0, size=128)],
    ids=["size", "region", "coarse"],
)
def test_a_store_paints_what_its_slide_does(
    store: EmbeddingStore, slide: Path, others: EmbeddingStore, brush: Brush, tmp_path: Path, painting: Painting
) -> None:
    theirs = synthesize_slide(slide, tmp_path / "slide", painting, brush=brush, encoder=ENCODER)
    ours = synthesize_embeddings(store.path, tmp_path / "store", painting, brush=brush)
    assert (ours.region, ours.shape, ours.cosine) == (theirs.region, theirs.shape, {})
    assert corner_of(ours.path) == corner_of(theirs.path)
    assert np.array_equal(pixels_of(ours.path), pixels_of(theirs.path))  # stores and regions are both float16
    synthesize_embeddings(others.path, tmp_path / "others", painting, brush=brush)
    assert (pixels_of(tmp_path / "others") != pixels_of(ours.path)).mean() > 0.1


@pytest.mark.usefixtures("one_thread")
def test_a_painting_says_that_it_was_made_after_embeddings(
    store: EmbeddingStore, slide: Path, brush: Brush, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painting = replace(PAINTING, region=(600, 500, 64, 96))
    painted = synthesize_embeddings(follow([store.path], brush=brush), tmp_path / "new", painting, brush=brush).path
    about, digest = about_of(painted), commit.sha256_of(store.path / commit.MANIFEST)[:16]
    assert (about["synthetic"], about["encoder"], about["encoder_fingerprint"]) == (True, "statistics", "none")
    assert about["embeddings"] == {"kind": "store", "fingerprint": digest, "synthetic": False}
    assert about["reference"] == {
        "mpp": 0.5, "mpp_source": "tiff resolution", "region": [600, 500, 64, 96],
        "fingerprint": slide_fingerprint(slide)[:16],
    }  # fmt: skip
    assert CANARY in json.dumps(store.about)
    for path in [path for path in painted.rglob("*") if path.is_file()]:
        assert not any(word.encode() in path.read_bytes() for word in CANARY.split("^"))
    assert open_slide(painted).synthetic
    # So `evaluate` knows which slide it follows; the tissue of this brush is none to look at.
    all_of = np.ones((1, 1), np.bool_)
    monkeypatch.setattr(sides, "field_of", lambda slide, area=None, **_: Field("", slide, area or slide.grid, all_of))
    (pair,) = sides.open_sides([slide], [painted]).pairs
    assert (pair.down, pair.right) == (300.0, 250.0)


@pytest.mark.usefixtures("one_thread")
def test_terms_of_the_encoder_and_a_painted_slide_are_said(store: EmbeddingStore, brush: Brush, tmp_path: Path) -> None:
    terms = {"licence": "CC-BY-NC-ND-4.0", "outputs": None}
    made = again(store, tmp_path / "s.zarr", encoder_terms=terms, synthetic=True)
    about = follow([made.path], brush=brush).about
    assert (about["encoder_terms"], about["synthetic"]) == ({"licence": "CC-BY-NC-ND-4.0"}, True)
    assert follow(exported(made, tmp_path), brush=brush).about["synthetic"] is True


@pytest.mark.usefixtures("one_thread")
def test_stopped_it_goes_on_after_the_same_embeddings_only(
    store: EmbeddingStore, others: EmbeddingStore, brush: Brush, tmp_path: Path
) -> None:
    heard: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        heard.append(done)
        if done > total / 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        synthesize_embeddings(store.path, tmp_path / "new", PAINTING, brush=brush, tell=stop)
    with pytest.raises(RefusedError, match=r"embeddings .* -> .*--overwrite"):
        synthesize_embeddings(others.path, tmp_path / "new", PAINTING, brush=brush)
    told: list[int] = []
    synthesize_embeddings(
        store.path, tmp_path / "new", PAINTING, brush=brush, tell=lambda what, done, total: told.append(done)
    )
    assert told[0] > heard[0]
    synthesize_embeddings(store.path, tmp_path / "whole", PAINTING, brush=brush)
    assert np.array_equal(pixels_of(tmp_path / "new"), pixels_of(tmp_path / "whole"))


# -- what is refused -----------------------------------------------------------------------------------------


def refused(paths: list[Path], brush: Brush, said: str, error: type[Exception] = UsageError, **options: Any) -> None:
    with pytest.raises(error, match=said) as found:
        follow(paths, brush=brush, **options)
    assert "\n" not in str(found.value)


def test_a_store_that_the_brush_does_not_follow(store: EmbeddingStore, brush: Brush, tmp_path: Path) -> None:
    parameters = store.about["parameters"]
    other = again(store, tmp_path / "uni.zarr", parameters=parameters | {"encoder": "uni", "encoder_weights": "1234"})
    refused([other.path], brush, r"embeddings of uni \(1234\), the brush was trained on those of statistics \(none\)")
    refused([again(store, tmp_path / "p.zarr", pitches=(0.5, 8.0)).path], brush, r"0\.5, 8 µm, .* follows also 2")
    blank = Tissue(np.zeros_like(store.tissue.mask), store.tissue.grid)
    refused([again(store, tmp_path / "blank.zarr", tissue=blank).path], brush, "no tile of its slide holds tissue")
    few = again(store, tmp_path / "few.zarr", tiles={"0.5": 0, "2": 0, "8": 0})
    refused([few.path], brush, "no tile of its slide holds tissue")
    refused([again(store, tmp_path / "old.zarr", slide=None).path], brush, "does not say which slide and encoder")
    followed = follow([store.path], brush=brush)
    uni = replace(brush, about=brush.about | {"encoder": "uni", "fingerprint": "1234"})
    with pytest.raises(UsageError, match=r"trained on those of uni \(1234\)"):
        synthesize_embeddings(followed, tmp_path / "new", PAINTING, brush=uni)
    more = replace(brush, about=brush.about | {"embeddings": brush.about["embeddings"] | {"32": {}}})
    with pytest.raises(UsageError, match="follows also 32"):
        synthesize_embeddings(followed, tmp_path / "new", PAINTING, brush=more)


def test_what_is_neither_and_what_is_too_much(
    store: EmbeddingStore, others: EmbeddingStore, brush: Brush, tmp_path: Path
) -> None:
    refused([], brush, "no embeddings to follow; give a store")
    refused([tmp_path / "nowhere.zarr"], brush, "no such file or folder; expected a store")
    refused([store.path, others.path], brush, r"one\.zarr: .*followed alone, here beside another store")
    paths = exported(store, tmp_path)
    refused([paths[0], store.path], brush, r"one\.zarr: .*followed alone, here beside h5")
    refused(paths[:2], brush, "no file at 8 µm")
    refused([*paths, paths[0]], brush, "which another file has already")
    refused([tmp_path], brush, "so it is no finished embedding store", RefusedError)
    (tmp_path / "notes.txt").write_text("notes")
    refused([tmp_path / "notes.txt"], brush, "no HDF5 of embeddings", RefusedError)
    (tmp_path / "mine").mkdir()
    parameters = others.about["parameters"] | {"slide": "0" * 32}
    mine = again(others, tmp_path / "mine.zarr", parameters=parameters, parameters_fingerprint="0" * 16)
    refused([*exported(mine, tmp_path / "mine")[:1], *paths[1:]], brush, "of another store than the file beside it")
    for path in paths:
        with h5py.File(path, "r+") as file:
            for name in ("features", "coords", "grid_ij"):
                about = dict(file[name].attrs)
                kept = file[name][:0]
                del file[name]
                file[name] = kept
                file[name].attrs.update(about)
    refused(paths, brush, "holds no tile")


def test_files_that_do_not_say_enough(brush: Brush, tmp_path: Path) -> None:
    paths = write_trident(tmp_path)
    refused(paths, brush, "does not say the slide's pixel size; give --assume-mpp", same_encoder=True)
    refused(paths, brush, "give --same-encoder", slide_mpp=0.25)
    refused(write_trident(tmp_path, dim=7), brush, "7 numbers each", slide_mpp=0.25, same_encoder=True)


def test_a_chunk_that_is_damaged(store: EmbeddingStore, brush: Brush, tmp_path: Path) -> None:
    made = shutil.copytree(store.path, tmp_path / "s.zarr")
    chunk = next(path for path in (made / "embeddings" / "0.5" / "c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(RefusedError, match=r"s\.zarr: damaged"):
        synthesize_embeddings(made, tmp_path / "new", PAINTING, brush=brush)
    assert not (tmp_path / "new").exists()


# -- the words -----------------------------------------------------------------------------------------------


@pytest.fixture
def words(words: Words, brush: Brush, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Those of `synthesize` with a small brush. An encoder is not to be loaded."""
    save_brush(brush, tmp_path / "small.brush")

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(encoder, "load_encoder", load)
    return partial(words, "synthesize", "--brush", tmp_path / "small.brush", "--steps", 5, "--seed", 2)


@pytest.mark.usefixtures("one_thread")
def test_a_store_is_painted_and_said(store: EmbeddingStore, brush: Brush, tmp_path: Path, words: Words) -> None:
    command, target = ("--embeddings", store.path, "--size", 96), tmp_path / "new.ome.zarr"
    canvas = choose_canvas(followed := follow([store.path], brush=brush), PAINTING, followed.tissue)
    code, out, _ = words(*command, "-o", target, "--dry-run", "--json")
    assert (code, target.exists()) == (0, False)
    plan = json.loads(out)
    assert plan["canvas"] == "96 x 96 pixels at 0.5 µm"
    assert plan["corner"] == f"row {canvas.top}, column {canvas.left} (pixels at 0.5 µm)"
    code, out, _ = words(*command, "-o", target, "--json")
    said = json.loads(out)
    assert (code, said["synthetic"], said["height"], "cosine" in said) == (0, True, 96, False)
    assert said["region"] == [canvas.top, canvas.left, 96, 96]
    assert said["embeddings"] == about_of(target)["embeddings"]["fingerprint"]
    synthesize_embeddings(store.path, tmp_path / "same", PAINTING, brush=brush)
    assert np.array_equal(pixels_of(target), pixels_of(tmp_path / "same"))
    code, out, err = words(*command, "-o", target)
    assert (code, out, len(err.splitlines()), "exists" in err) == (4, "", 1, True)
    code, out, _ = words(*command, "-o", target, "--overwrite")
    assert f"after embeddings {said['embeddings']}, region {canvas.top},{canvas.left},96,96 (level-0" in out
    assert "cosine" not in out


@pytest.mark.usefixtures("one_thread")
def test_all_of_a_store_is_its_slide(store: EmbeddingStore, tmp_path: Path, words: Words) -> None:
    code, out, _ = words("--embeddings", store.path, "--region", "all", "--mpp", 8, "-o", tmp_path / "new", "--json")
    assert code == 0
    assert json.loads(out)["region"] == [0, 0, 1024, 1024]
    assert open_slide(tmp_path / "new").grid.shape == (64, 64)


@pytest.mark.usefixtures("one_thread")
def test_files_of_others_are_painted_with_what_they_do_not_say(tmp_path: Path, words: Words) -> None:
    target, paths = tmp_path / "new.ome.zarr", write_trident(tmp_path)
    command = [*(word for path in paths for word in ("--embeddings", path)), "-o", target, "--size", 64, "--json"]
    code, out, err = words(*command, "--same-encoder")
    assert (code, out, "give --assume-mpp" in err) == (1, "", True)
    code, out, _ = words(*command, "--same-encoder", "--assume-mpp", 0.25)
    said, about = json.loads(out), about_of(target)
    assert (code, said["height"], "region" in said) == (0, 64, False)
    assert ("reference" in about, about["encoder"]) == (False, "statistics")
    assert about["embeddings"] == {
        "kind": "h5", "fingerprint": said["embeddings"], "synthetic": False, "encoder_named": False, "slide_mpp": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--ref", "a.svs"], 1, "--ref and --embeddings exclude each other"),
        (["--label", "a", "--canvas", "b"], 1, "--embeddings, --label and --canvas exclude each other"),
        (["--png", "a.png"], 1, "--png: is for a reference, and embeddings alone have none; leave it out"),
        (["--encoder", "uni"], 1, "--encoder: is for a reference, and embeddings alone have none"),
        (["--region", "0,0,9,9", "--size", "9"], 1, "--region and --size exclude each other"),
        (["--region", "0,0,9,1025"], 1, "one.zarr: region 0,0,9,1025 is not inside the slide; level 0 is 1024 x 1024"),
        (["--size", "4096"], 1, "one.zarr: 1024 x 1024 pixels at 0.5 µm, too small for 4096 x 4096; give --size 1024"),
        (["--mpp", "0.7", "--size", "64"], 1, "paints at 0.5, 1, 2, 4, 8"),
        (["--brush", "bundled"], 1, "embeddings of statistics (none), the brush was trained on those of bundled"),
        (["--embeddings", "nowhere.h5"], 1, "nowhere.h5: no such file or folder"),
        (["SLIDE"], 4, "no HDF5 of embeddings that can be read"),
        (["FOLDER"], 4, "so it is no finished embedding store"),
        (["H5", "--region", "all"], 1, "an h5 does not say how large its slide is, so it has no regions; give --size"),
        (["H5", "--region", "0,0,9,9"], 1, "an h5 does not say how large its slide is"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    store: EmbeddingStore, slide: Path, tmp_path: Path, words: Words, arguments: list[str], code: int, line: str
) -> None:
    first, *more = arguments
    given: list[object] = ["--embeddings", store.path, *arguments]
    if first in ("SLIDE", "FOLDER", "H5"):
        paths = {"SLIDE": [slide], "FOLDER": [tmp_path], "H5": exported(store, tmp_path)}[first]
        given = [*(word for path in paths for word in ("--embeddings", path)), *more]
    for extra in ([], ["--dry-run"]):
        found, out, err = words(*given, "-o", tmp_path / "new.ome.zarr", *extra)
        assert (found, out, len(err.strip().splitlines())) == (code, "", 1)
        assert line in err
    assert not (tmp_path / "new.ome.zarr").exists()


def test_what_is_for_embeddings_alone(slide: Path, tmp_path: Path, words: Words) -> None:
    code, _, err = words("--ref", slide, "--same-encoder", "-o", tmp_path / "new")
    assert (code, "--same-encoder: is for --embeddings" in err) == (1, True)
