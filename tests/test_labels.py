"""Labels: a class as condition, from a recipe through training to a painting; and the other pictures of the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from wsi_brush.brush import Brush, load_brush
from wsi_brush.commit import sha256_of
from wsi_brush.coordinates import CoordinateSampler, TrainingPack
from wsi_brush.errors import RefusedError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.labels import Labels
from wsi_brush.recipe import Data, SlideSource, TrainConfig, read_config
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_label
from wsi_brush.tissue import Tissue, find_tissue
from wsi_brush.train import train_brush, training_pack

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 512
HAIR = {"black": (40, 30, 30), "blond": (220, 190, 110)}
RECIPE = """
[data]
encoder = "labels"
slides = [
  { path = "black/*.jpg", label = "black", assume_mpp = 0.5 },
  { path = "blond/*.jpg", label = "blond", assume_mpp = 0.5 },
]
until = 1.0
symmetries = "mirror"
shares = [0.2, 0.2, 0.2, 0.2, 0.2]
sizes = [64, 64, 64, 64, 32]
window = 32
points = 16
[model]
width = 16
depth = [1, 1, 2]
layout = 2
heads = 2
tokens = 4
[optimisation]
steps = 4
batch = 2
warmup = 2
"""


def face(colour: tuple[int, int, int], number: int) -> NDArray[np.uint8]:
    """Skin below, hair above, on grey: nothing of it is H&E."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle = SIDE // 2 + 8 * number
    picture = np.full((SIDE, SIDE, 3), (120, 130, 120), np.uint8)
    picture[np.hypot(rows - 200, columns - middle) < 170] = colour
    picture[np.hypot(rows - 280, columns - middle) < 140] = (230, 190, 160)
    return picture


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    for name, colour in HAIR.items():
        (folder / name).mkdir()
        for number in range(2):
            Image.fromarray(face(colour, number)).save(folder / name / f"{number}.jpg", quality=95)
        (folder / name / "notes.txt").write_text("no picture")
    (folder / "hair.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def brush(faces: Path, work: Path) -> Path:
    """Trained on the faces for a few steps."""
    torch.set_num_threads(1)
    train_brush(read_config(faces / "hair.toml"), work / "brush", work=work, slides=faces, tell=lambda line: None)
    return work / "brush"


# -- the condition -----------------------------------------------------------------------------------------


def test_a_label_is_one_vector_at_every_pitch_and_place() -> None:
    labels = Labels.of(["grey", "black", "grey", "blond"])
    assert (labels.names, labels.dim, labels.name) == (("black", "blond", "grey"), 3, "labels")
    region = Grid(0.5, 100, 900, 700, 300)
    maps = labels.maps("blond", region)
    assert set(maps) == {0.5, 2.0, 8.0}
    for mpp, found in maps.items():
        assert found.lattice == region.at(128 * mpp)
        np.testing.assert_array_equal(
            found.read(region.at(4.0)), np.broadcast_to([0, 1, 0], (*region.at(4.0).shape, 3))
        )
    assert labels.fingerprint == Labels.of(["blond", "grey", "black"]).fingerprint != Labels.of(["blond"]).fingerprint
    with pytest.raises(UsageError, match="'red' is no label of this brush; it knows black, blond, grey"):
        labels.maps("red", region)


def test_the_pack_holds_every_picture_whole_with_its_label(faces: Path, brush: Path, work: Path) -> None:
    pack = TrainingPack(work / "pack", in_memory=True)
    assert (pack.about["labels"], pack.about["dim"], pack.about["slides"]) == (["black", "blond"], 2, 4)
    assert [source["path"] for source in pack.about["sources"]] == [
        *("black/0.jpg", "black/1.jpg", "blond/0.jpg", "blond/1.jpg")
    ]
    for slide, vector in zip(pack.slides, ([1, 0], [1, 0], [0, 1], [0, 1]), strict=True):
        assert slide.tissue.all()
        assert all((values == np.array(vector)).all() for values in slide.embeddings.values())
    assert not find_tissue(open_slide(faces / "black/0.jpg", assume_mpp=0.5)).mask.all()  # it would not have been


def test_scenes_are_turned_only_as_the_recipe_says(brush: Path, work: Path) -> None:
    """Of whole pictures: the picture itself or its mirror image, never upside down."""
    pack = TrainingPack(work / "pack", in_memory=True)
    options: dict[str, Any] = {"shares": (0, 0, 0, 1, 0), "sizes": (64, 64, 64, 64, 32), "window": 32, "points": 4}
    wholes = [np.asarray(image) for image in pack.images[4.0].parts]

    def kinds(symmetries: Any) -> set[str]:
        found = set()
        scenes = CoordinateSampler(pack, **options, symmetries=symmetries).draw(0, 48)
        for image in ((scenes.whole().permute(0, 2, 3, 1) + 1) * 127.5).round().numpy().astype(np.uint8):
            for whole in wholes:
                shown = {"as it is": whole, "mirrored": whole[:, ::-1], "upside down": whole[::-1]}
                found |= {kind for kind, picture in shown.items() if (image == picture).all()}
        return found

    assert kinds("none") == {"as it is"}
    assert kinds("mirror") == {"as it is", "mirrored"}
    assert kinds("square") == {"as it is", "mirrored", "upside down"}


def test_the_brush_knows_its_labels(brush: Path) -> None:
    about = json.loads((brush / "brush.json").read_text("utf-8"))
    assert (about["labels"], about["encoder"], about["everywhere"]) == (["black", "blond"], "labels", True)
    assert "black/0" not in (brush / "brush.json").read_text("utf-8")
    loaded = load_brush(brush)
    assert loaded.labels == Labels(("black", "blond"))
    assert loaded.denoiser.config.dim == 2


# -- painting ----------------------------------------------------------------------------------------------


def pixels_of(path: Path) -> NDArray[np.uint8]:
    slide = open_slide(path)
    return slide.read(slide.grid)


def test_a_label_is_painted_and_said(brush: Path, tmp_path: Path, words: Callable[..., tuple[int, str, str]]) -> None:
    target = tmp_path / "blond.ome.zarr"
    command = ("synthesize", "--label", "blond", "--size", 128, "--steps", 5, "--brush", brush, "-o", target)
    code, out, _ = words(*command, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["canvas"] == "128 x 128 pixels at 0.5 µm"
    assert not target.exists()
    code, out, _ = words(*command, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["label"], result["synthetic"], result["height"], "region" in result) == ("blond", True, 128, False)
    slide = open_slide(target)
    assert (slide.synthetic, slide.mpp, slide.grid.shape) == (True, 0.5, (128, 128))
    about: Any = zarr.open_group(target, mode="r").attrs.asdict()["wsi_brush"]
    assert (about["label"], about["synthetic"], "reference" in about) == ("blond", True, False)
    code, out, _ = words(*command, "--overwrite")
    assert code == 0
    assert "label blond, seed 0" in out


def test_other_labels_are_other_paintings(brush: Path, tmp_path: Path) -> None:
    """The same seed, so the same noise: what differs is what was asked for."""
    loaded, painting = load_brush(brush), Painting(size=64, steps=5, guidance=1.0)
    for name in ("one", "again", "other"):
        label = "black" if name == "other" else "blond"
        done = synthesize_label(label, tmp_path / name, painting, brush=loaded)
        assert (done.region, done.shape, done.cosine) == (None, (64, 64), {})
    one, again, other = (pixels_of(tmp_path / name) for name in ("one", "again", "other"))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--label", "red"], "'red' is no label of this brush; it knows black, blond"),
        ([], "--ref, --embeddings, --label and --canvas are missing; give --ref SLIDE, or --embeddings STORE.zarr, or"),
        (["--label", "blond", "--ref", "REF"], "--ref and --label exclude each other"),
        (
            ["--ref", "REF", "--assume-mpp", "0.5"],
            "this brush follows labels, no reference; give --label, one of black",
        ),
        (["--label", "blond", "--brush", "bundled"], "this brush knows no labels, it follows embeddings of bundled"),
        (["--label", "blond", "--region", "0,0,9,9"], "--region: is for a reference"),
        (["--label", "blond", "--png", "a.png"], "--png: is for a reference"),
        (["--label", "blond", "--size", "0"], "a size of 0 pixels cannot be painted"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(
    brush: Path,
    faces: Path,
    tmp_path: Path,
    words: Callable[..., tuple[int, str, str]],
    arguments: list[str],
    line: str,
) -> None:
    given = [str(faces / "black/0.jpg") if word == "REF" else word for word in arguments]
    brushes = [] if "--brush" in given else ["--brush", brush]
    code, out, err = words("synthesize", *given, *brushes, "-o", tmp_path / "new.ome.zarr")
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert line in err
    assert not (tmp_path / "new.ome.zarr").exists()


# -- recipes -----------------------------------------------------------------------------------------------


def test_a_changed_folder_is_another_pack(faces: Path, brush: Path, work: Path) -> None:
    data = read_config(faces / "hair.toml").data
    again: list[str] = []
    training_pack(data, work, faces, again.append)
    assert again == []
    Image.fromarray(face((40, 30, 30), 3)).save(faces / "black" / "2.jpg")
    try:
        with pytest.raises(RefusedError, match="other slides"):
            training_pack(data, work, faces, again.append)
    finally:
        (faces / "black" / "2.jpg").unlink()
    for change in ({"until": 0.75}, {"tissue": "found"}, {"stains": 1}):
        with pytest.raises(RefusedError, match="another `tissue`, `until` or `stains`"):
            training_pack(data.model_copy(update=change), work, faces, again.append)
    for slides in (data.slides[:1], [data.slides[0], data.slides[1].model_copy(update={"label": "black"})]):
        with pytest.raises(RefusedError, match="another encoder or other slides"):
            training_pack(data.model_copy(update={"slides": slides}), work, faces, again.append)


def test_patterns_are_files_by_name(tmp_path: Path) -> None:
    for name in ("b.svs", "a.svs", ".hidden.svs", "deep/c.svs", "odd[1].svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*sources: SlideSource) -> list[tuple[str, float | None]]:
        return [(one.path, one.assume_mpp) for one in Data(slides=list(sources)).sources(tmp_path)]

    assert found(SlideSource(path="[ab].svs", assume_mpp=0.5)) == [("a.svs", 0.5), ("b.svs", 0.5)]
    assert found(SlideSource(path="**/*.svs")) == [
        *(("a.svs", None), ("b.svs", None), ("deep/c.svs", None), ("odd[1].svs", None))
    ]
    assert found(SlideSource(path="odd[1].svs")) == [("odd[1].svs", None)]  # a file of that very name
    assert found(SlideSource(path="none.svs")) == [("none.svs", None)]  # said by who opens it
    absolute = str(tmp_path / "a*.svs")
    assert found(SlideSource(path=absolute)) == [(str(tmp_path / "a.svs"), None)]
    with pytest.raises(UsageError, match=r"tif: no file fits this pattern; see --slides"):
        found(SlideSource(path="*.tif"))
    with pytest.raises(UsageError, match=r"a\.svs: named by two"):
        found(SlideSource(path="a.svs"), SlideSource(path="*.svs"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[data]\nencoder='labels'\nslides=[{path='a', label='x'}, {path='b'}]", "data: b has no label"),
        ("[data]\nslides=[{path='a', label='x'}]", "a has a label, the encoder is bundled; expected 'labels'"),
        ("[data]\nslides=[{path='a'}]\nuntil = 0", "data.until"),
        ("[data]\nslides=[{path='a'}]\nsymmetries = 'all'", "data.symmetries"),
        ("[data]\nslides=[{path='a'}]\ntissue = 'none'", "data.tissue"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UsageError) as found:
        read_config(tmp_path / "run.toml")
    assert line in str(found.value)
    assert "\n" not in str(found.value)


def test_what_came_later_is_left_out_where_it_says_nothing() -> None:
    """Packs and checkpoints that were made before are still known."""
    config = TrainConfig.model_validate({"data": {"slides": [{"path": "a.svs"}]}})
    assert config.data.slides[0].model_dump() == {"path": "a.svs", "assume_mpp": None}
    plain = config.model_dump(mode="json", exclude={"data": {"in_memory"}})["data"]
    assert plain.keys() == {"slides", "encoder", "shares", "sizes", "window", "points"}
    other = config.data.model_copy(update={"until": 1.0, "symmetries": "none"})
    assert other.model_dump().keys() - plain.keys() == {"in_memory", "until", "symmetries"}


# -- the recipes that are shipped --------------------------------------------------------------------------

SHIPPED = Path(__file__).parents[1] / "pipelines" / "paper_data"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_a_recipe_and_says_that_it_was_not_run(path: Path) -> None:
    read_config(path)
    text = path.read_text("utf-8")
    assert "NOT run" in text
    assert f"wsi-brush train pipelines/paper_data/{path.name}" in text


def shrunk(name: str, **changed: Any) -> TrainConfig:
    """A shipped recipe with its own data, and a model and scenes that train in seconds."""
    plain = read_config(SHIPPED / name).model_dump()
    plain["data"] |= {"sizes": (64, 64, 64, 64, 32), "window": 32, "points": 16, **changed}
    plain["model"] = {"width": 16, "depth": (1, 1, 2), "layout": 2, "heads": 2, "tokens": 4}
    plain["optimisation"] |= {"steps": 3, "batch": 2, "shards": 1, "warmup": 2, "precision": "float32"}
    return TrainConfig.model_validate(plain)


def test_the_recipe_of_faces_trains_on_stand_ins(faces: Path, tmp_path: Path) -> None:
    for name in ("brown", "gray"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(face((90, 60, 50), 0)).save(tmp_path / "data" / name / "0.jpg")
    for name in HAIR:
        (tmp_path / "data" / name).symlink_to(faces / name)
    made = train_brush(
        shrunk("celeba_hq.toml"), tmp_path / "brush", work=tmp_path / "work", slides=tmp_path / "data",
        tell=lambda line: None,
    )  # fmt: skip
    assert made.labels == Labels(("black", "blond", "brown", "gray"))


def test_the_recipe_of_aerial_images_trains_on_stand_ins(
    tmp_path: Path, words: Callable[..., tuple[int, str, str]]
) -> None:
    """Four bands, tiled, no pixel size in µm: fields in squares, and none of it H&E. A painting follows one of them."""
    rng = np.random.default_rng(0)
    for number in range(2):
        fields = rng.integers(40, 200, (8, 8, 4), dtype=np.uint8).repeat(96, 0).repeat(96, 1)
        fields += rng.integers(0, 20, fields.shape, dtype=np.uint8)
        tifffile.imwrite(
            tmp_path / f"m_{number}.tif", fields, photometric="rgb", extrasamples=["unspecified"], tile=(256, 256)
        )
    slide = open_slide(tmp_path / "m_0.tif", assume_mpp=0.5)
    assert find_tissue(slide).fraction < 1
    made = train_brush(
        shrunk("naip.toml", encoder="bundled"), tmp_path / "brush", work=tmp_path / "work", slides=tmp_path,
        tell=lambda line: None,
    )  # fmt: skip
    assert made.everywhere
    assert TrainingPack(tmp_path / "work" / "pack").slides[0].tissue.all()
    tissue = made.tissue_of(slide)
    assert (tissue.grid, tissue.mask.all()) == (slide.grid.at(8.0), True)
    code, out, err = words(
        *("synthesize", "--ref", tmp_path / "m_0.tif", "--assume-mpp", 0.5, "--size", 128, "--steps", 5, "--json"),
        *("--brush", tmp_path / "brush", "-o", tmp_path / "new.ome.zarr"),
    )
    assert code == 0, err
    assert set(json.loads(out)["cosine"]) == {"0.5"}  # a whole tile of 64 µm, though it is no tissue


@pytest.mark.parametrize("name", ["uni", "ctranspath"])
def test_the_recipes_of_tissue_train_after_a_local_encoder(
    name: str, tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    """The recipe's own words: a pattern, and the encoder's file by its name in the folder where it is run."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 0, "img_size": 64, "patch_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, **kwargs, init_values=1e-5)
    save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    about = {
        "name": name, "architecture": "vit_tiny_patch16_224", "kwargs": kwargs | {"init_values": 1e-5}, "tile": 64,
        "mean": [0.5] * 3, "std": [0.5] * 3, "dim": 12, "sha256": sha256_of(tmp_path / f"{name}.safetensors"),
    }  # fmt: skip
    (tmp_path / f"{name}.json").write_text(json.dumps(about))
    (tmp_path / "slides").mkdir()
    for letter in "ab":
        (tmp_path / "slides" / f"{letter}.svs").symlink_to(tissue_slide)
    monkeypatch.chdir(tmp_path)
    config = shrunk(f"tcga_brca_{name}.toml")
    made = train_brush(
        config, tmp_path / "brush", work=tmp_path / "work", slides=tmp_path / "slides", tell=lambda line: None
    )
    assert (made.about["encoder"], made.everywhere, made.labels) == (name, False, None)
    sources = TrainingPack(tmp_path / "work" / "pack").about["sources"]
    assert [source["path"] for source in sources] == ["a.svs", "b.svs"]
    code, out, err = words(
        *("synthesize", "--ref", "slides/a.svs", "--size", 128, "--steps", 5, "--brush", "brush", "--json"),
        *("--encoder", f"{name}.safetensors", "-o", "new.ome.zarr"),
    )
    assert code == 0, err
    assert json.loads(out)["height"] == 128


def test_a_brush_of_tissue_looks_at_tissue(tissue_slide: Path) -> None:
    slide, brush = open_slide(tissue_slide), load_brush()
    assert isinstance(brush, Brush)
    assert not brush.everywhere
    assert brush.labels is None
    found = brush.tissue_of(slide)
    assert isinstance(found, Tissue)
    np.testing.assert_array_equal(found.mask, find_tissue(slide).mask)
    assert 0 < found.fraction < 1
