"""CLIP FID and Crop FID: the networks, the figures and the weights, with untrained stand-ins in the published layout.

What stands in for the weights is random, so no figure here says anything of a painting: only that the right bytes go
through the right layers, and that the figures are the library's.
"""

from __future__ import annotations

import io
import json
import math
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TileStatistics, write_pyramid
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from typer.testing import CliRunner

from wsi_brush import likeness, published
from wsi_brush.cli import app
from wsi_brush.commit import sha256_of
from wsi_brush.distances import Vectors, frechet, kernel_distance
from wsi_brush.errors import MachineError, RefusedError
from wsi_brush.evaluate import evaluate_slides
from wsi_brush.grid import Grid
from wsi_brush.likeness import thumbnail
from wsi_brush.published import Networks, find_networks, image_side, load_clip, load_inception
from wsi_brush.report import write_report
from wsi_brush.samples import Codec, Field
from wsi_brush.sides import Sides, open_sides
from wsi_brush.slide import open_slide

PLAIN = Codec("none")


class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The library's network before it has weights."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of the hub (`hub`) and of torch (`torch`) as they are on a machine that has both files."""
    folder = tmp_path_factory.mktemp("caches")
    home = (
        folder / "hub" / f"models--{published.CLIP_HOME[0].replace('/', '--')}" / "snapshots" / published.CLIP_HOME[1]
    )
    torch_home = folder / "torch" / "hub" / "checkpoints"
    home.mkdir(parents=True)
    torch_home.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {
            # OpenAI's weights are halves, and the library makes them so
            name: value.half().float().contiguous()
            for name, value in CLIPVisual(16, 224, 2, 64, 32).state_dict().items()
        }
        words = {"positional_embedding": (5, 8), "text_projection": (8, 16), "transformer.resblocks.0.ln_1.bias": (8,)}
        save_file(tensors | {n: torch.randn(shape) for n, shape in words.items()}, home / published.CLIP_FILE)
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        network = Untrained("untrained", ["2048"], feature_extractor_weights_path=nothing)
        torch.save(network.state_dict(), torch_home / published.INCEPTION_FILE)
    return folder


@pytest.fixture(scope="module")
def digests(caches: Path) -> dict[str, str]:
    files = {"CLIP_SHA256": published.CLIP_FILE, "INCEPTION_SHA256": published.INCEPTION_FILE}
    return {name: sha256_of(next(caches.rglob(file))) for name, file in files.items()}


def use(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cache, and no network."""
    use(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))


@pytest.fixture
def here(caches: Path, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins are in the caches, and are what was published."""
    use(monkeypatch, caches)
    for name, digest in digests.items():
        monkeypatch.setattr(published, name, digest)
    return caches


@pytest.fixture(scope="module")
def pixels(tissue_slide: Path) -> NDArray[np.uint8]:
    """2048 x 2048 pixels: the middle of a slide, turned over again and again, with grain of one pixel."""
    slide = open_slide(tissue_slide)
    middle = slide.read(Grid(0.5, 256, 256, 512, 512))
    row = np.concatenate([middle, middle[:, ::-1]] * 2, 1)
    whole = np.concatenate([row, row[::-1]] * 2)
    grain = np.random.default_rng(0).normal(0, 12, whole.shape[:2])[..., None]
    return np.clip(whole + grain, 0, 255).astype(np.uint8)


def squares(pixels: NDArray[np.uint8], count: int, side: int) -> NDArray[np.uint8]:
    corners = np.random.default_rng(1).integers(0, len(pixels) - side, (count, 2))
    return np.stack([pixels[row : row + side, column : column + side] for row, column in corners])


# -- the networks --------------------------------------------------------------------------------------


def test_clip_is_what_timm_makes_of_the_same_file(here: Path, pixels: NDArray[np.uint8]) -> None:
    """Another implementation of the network, of reading the file, and of the protocol's resizing."""
    import timm
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
    from torchvision import transforms

    path = next(here.rglob(published.CLIP_FILE))
    other = timm.create_model(
        "vit_base_patch32_clip_quickgelu_224", pretrained=False, embed_dim=64, depth=2, num_heads=1, num_classes=16
    ).eval()
    assert isinstance(other, VisionTransformer)
    tensors = {name: value for name, value in load_file(path).items() if name.startswith("visual.")}
    other.load_state_dict(checkpoint_filter_fn(tensors, other))
    protocol = transforms.Compose([
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    images = squares(pixels, 3, 700)
    with torch.inference_mode():
        expected = other(torch.stack([protocol(Image.fromarray(image)) for image in images])).numpy()
    found = load_clip(path)(images)
    assert found.shape == (3, 16)
    assert expected.std(0).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).min() > 0.05  # not normalised


def test_the_library_finds_the_same_kernel_distance_in_inception(here: Path, pixels: NDArray[np.uint8]) -> None:
    """End to end: its own reading of images, weights and features, and its own figure."""
    from torch_fidelity import calculate_metrics

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, tiles: NDArray[np.uint8]) -> None:
            self._tiles = torch.from_numpy(tiles).permute(0, 3, 1, 2)

        def __len__(self) -> int:
            return len(self._tiles)

        def __getitem__(self, number: int) -> torch.Tensor:
            if number >= len(self):
                raise IndexError
            return self._tiles[number]

    path = next(here.rglob(published.INCEPTION_FILE))
    one, other = squares(pixels, 4, 256), squares(255 - pixels, 4, 256)
    options: dict[str, Any] = {"feature_extractor_weights_path": path, "cuda": False, "cache": False, "verbose": False}
    theirs = calculate_metrics(
        input1=Images(one), input2=Images(other), kid=True, kid_subset_size=4, kid_subsets=1, save_cpu_ram=True,
        **options,
    )[KEY_METRIC_KID_MEAN]  # fmt: skip
    network = load_inception(path)
    vectors = [network(tiles).astype(np.float64) for tiles in (one, other)]
    assert vectors[0].shape == (4, 2048)
    assert kernel_distance(*vectors) == pytest.approx(theirs, rel=1e-3)
    assert theirs > 0


@pytest.mark.parametrize(("name", "load"), [("CLIP_FILE", load_clip), ("INCEPTION_FILE", load_inception)])
def test_one_changed_byte_is_noticed_before_anything_is_read(here: Path, tmp_path: Path, name: str, load: Any) -> None:
    file = next(here.rglob(getattr(published, name)))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / file.name
    damaged.write_bytes(content)
    with pytest.raises(RefusedError, match=rf"{file.name}: damaged or exchanged .* --download"):
        load(damaged)


def test_the_stand_ins_are_not_the_published_files(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, caches)
    with pytest.raises(RefusedError, match=r"the published file has e6d1bd7789aa"):
        find_networks()


# -- the figures ---------------------------------------------------------------------------------------


def drawn(n: int, dim: int, seed: int, mean: float = 0.0) -> Vectors:
    mixed = np.random.default_rng(0).normal(size=(dim, dim))
    found: Vectors = np.random.default_rng(seed).normal(mean, 1, (n, dim)) @ mixed
    return found


def test_our_frechet_distance_is_the_librarys() -> None:
    one, other = drawn(300, 40, 1), drawn(280, 40, 2, mean=0.3)
    statistics = [fid_features_to_statistics(torch.from_numpy(vectors)) for vectors in (one, other)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet(one, other) == pytest.approx(theirs, rel=1e-6)


def test_the_librarys_frechet_distance_is_that_of_two_known_gaussians() -> None:
    """Of those that share their axes it is the sum of (m - m')² + (s - s')² along them."""
    spreads = [np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 1.0])]
    means = [np.zeros(3), np.array([1.0, 2.0, 2.0])]
    statistics = [{"mu": mean, "sigma": np.diag(s**2)} for mean, s in zip(means, spreads, strict=True)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert theirs == pytest.approx(9 + 1 + 0 + 4)


def test_our_kernel_distance_is_the_librarys() -> None:
    one, other = drawn(150, 24, 1), drawn(150, 24, 2, mean=0.2)
    features = [torch.from_numpy(vectors) for vectors in (one, other)]
    theirs = kid_features_to_metric(*features, kid_subset_size=150, kid_subsets=1, verbose=False)
    assert kernel_distance(one, other) == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)


@pytest.fixture(scope="module")
def found(
    caches: Path, digests: dict[str, str], pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sides, Networks, dict[str, Any]]:
    """Both figures of a slide and a paler one, Inception-v3 up to its third layer, for speed."""
    folder = tmp_path_factory.mktemp("sides")
    pale = (255 - (255 - pixels.astype(float)) * 0.8).astype(np.uint8)
    options: dict[str, Any] = {"compression": "zlib", "compressionargs": {}}
    paths = [write_pyramid(folder / f"{name}.tif", [side], **options) for name, side in (("real", pixels), ("p", pale))]
    with pytest.MonkeyPatch.context() as patch:
        use(patch, caches)
        for name, digest in digests.items():
            patch.setattr(published, name, digest)
        patch.setattr(published, "INCEPTION_LAYER", "64")
        patch.setattr(likeness, "_NEIGHBOURS", 12)
        sides, networks = open_sides(paths[:1], paths[1:]), find_networks()
        assert networks.missing == ""
        return sides, networks, published.published(sides, networks, PLAIN, mpp=0.5, most=48, seed=0)


def test_each_stands_beside_its_floor_and_its_thumbnail(found: tuple[Sides, Networks, dict[str, Any]]) -> None:
    figures = found[2]
    assert (figures["image"], figures["thumbnail"], figures["mpp"]) == (512, 256, 0.5)
    for name, side, dim in (("clip", 512, 16), ("crop", 256, 64)):
        one = figures[name]
        assert (one["side"], one["dim"]) == (side, dim)
        assert 12 <= one["n"] <= 32
        assert one["kernel"]["value"] > 10 * abs(one["kernel"]["floor"])
        assert set(one["kernel"]) >= {"value", "floor", "thumbnail", "low", "floor_low", "thumbnail_low"}
    assert figures["crop"]["frechet"] == {
        "missing": f"{figures['crop']['n']} tiles; of 64 numbers 80 are needed for a covariance; "
        "see the kernel distance"
    }
    json.dumps(figures, allow_nan=False)


def test_lost_detail_is_seen_in_crops_and_hardly_in_whole_images(
    found: tuple[Sides, Networks, dict[str, Any]],
) -> None:
    """Every second pixel is lost in a thumbnail of half the side; at 224 pixels it was lost before."""

    def moved(one: dict[str, Any]) -> float:
        """How far the thumbnail is beyond the floor, in units of how far the paler side is."""
        kernel = one["kernel"]
        return float((kernel["thumbnail"] - kernel["floor"]) / (kernel["value"] - kernel["floor"]))

    clip, crop = found[2]["clip"], found[2]["crop"]
    assert abs(moved(clip)) < 0.01
    assert moved(crop) > 4 * abs(moved(clip))
    assert clip["precision"]["thumbnail"] == clip["precision"]["floor"]
    assert crop["precision"]["thumbnail"] < 0.6 * crop["precision"]["floor"]


def test_the_seed_draws_the_images_and_progress_comes_to_its_end(
    found: tuple[Sides, Networks, dict[str, Any]],
) -> None:
    sides, only = found[0], Networks(found[1].clip, None, "")
    told: dict[str, tuple[int, int]] = {}

    def figures(seed: int) -> dict[str, Any]:
        return published.published(
            sides, only, PLAIN, mpp=0.5, most=44, seed=seed, tell=lambda what, *counts: told.update({what: counts})
        )

    one = figures(1)
    assert one == figures(1)
    assert one["clip"]["kernel"] != figures(2)["clip"]["kernel"]
    assert set(told) == {"CLIP ViT-B/32, 512 pixels at 0.5 µm", "CLIP ViT-B/32, thumbnails"}
    assert all(done == total > 0 for done, total in told.values())


class TestThumbnail:
    def test_it_keeps_what_is_coarse_and_nothing_else(self, tmp_path: Path) -> None:
        rows, columns = np.mgrid[:512, :512]
        coarse = 128 + 60 * np.sin(rows / 40) * np.cos(columns / 50)
        fine = coarse + 40 * (-1.0) ** (rows + columns)
        slides = [
            open_slide(
                write_pyramid(
                    tmp_path / f"{number}.tif", [np.repeat(one[..., None], 3, 2).astype(np.uint8)],
                    compression="zlib", compressionargs={},
                )
            )
            for number, one in enumerate((coarse, fine))
        ]  # fmt: skip
        grid = Grid(0.5, 128, 64, 256, 256)
        one, other = (thumbnail(slide, grid, 4).astype(float) for slide in slides)
        assert one.shape == (256, 256, 3)
        assert np.abs(one - other).max() <= 1
        assert np.abs(one - slides[0].read(grid)).mean() < 1  # in its place, not half a pixel off

    def test_its_edges_are_those_of_the_whole(self, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
        """A crop of the enlarged image, not an enlarged crop."""
        slide = open_slide(write_pyramid(tmp_path / "one.tif", [pixels], compression="zlib", compressionargs={}))
        whole = thumbnail(slide, Grid(0.5, 0, 0, 1024, 1024), 4)
        part = thumbnail(slide, Grid(0.5, 384, 128, 256, 256), 4)
        assert np.abs(part.astype(int) - whole[384:640, 128:384]).max() <= 1

    @pytest.mark.parametrize("factor", [3, 7, 31])
    def test_it_is_in_its_place_whatever_the_factor(self, tmp_path: Path, factor: int) -> None:
        """Also at the slide's end, where white lies beyond, and where its cells are cut."""
        ramp = np.broadcast_to(np.linspace(20, 230, 500)[None, :, None], (256, 500, 3)).astype(np.uint8)
        slide = open_slide(write_pyramid(tmp_path / "r.tif", [ramp], compression="zlib", compressionargs={}))
        for left in (128, 372):
            grid = Grid(0.5, 64, left, 128, 128)
            apart = thumbnail(slide, grid, factor).astype(float) - slide.read(grid)
            assert abs(apart[:, 8:-factor].mean()) < 1


class _Blank:
    """Of a slide, only what finding spots needs."""

    mpp, grid = 0.5, Grid(0.5, 0, 0, 2**20, 2**20)

    def __init__(self, name: str) -> None:
        self.path = Path(name)


@pytest.mark.parametrize(
    ("count", "side", "expected"), [(32, 4096, 4096), (64, 1024, 1024), (1, 4096, 1024), (1, 300, 512)]
)
def test_images_are_whole_where_there_are_enough(count: int, side: int, expected: int) -> None:
    fields = [
        Field(f"{k}", _Blank(f"{k}"), Grid(0.5, 0, 0, side, side), np.ones((side // 16, side // 16), np.bool_))  # type: ignore[arg-type]
        for k in range(count)
    ]
    assert image_side(Sides(fields, fields, []), 0.5) == expected


# -- without weights -----------------------------------------------------------------------------------


def test_without_weights_one_line_says_which_where_and_how(tmp_path: Path) -> None:
    networks = find_networks()
    assert networks[:2] == (None, None)
    (line,) = networks.missing.splitlines()
    for word in (published.CLIP_FILE, *published.CLIP_HOME[:1], published.INCEPTION_FILE, str(tmp_path), "--download"):
        assert word in line


def test_the_rest_is_evaluated_all_the_same(
    tissue_slide: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    found: tuple[Sides, Networks, dict[str, Any]],
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    networks, target = find_networks(), tmp_path / "report"
    assert networks.clip is not None
    sides, pages = open_sides([tissue_slide], [tissue_slide]), []
    figures = evaluate_slides(sides, encoders=[TileStatistics()], most=200, networks=networks)
    target.mkdir()
    for number, more in enumerate((figures["published"], found[2], None)):
        write_report(target / str(number), sides, figures | {"published": more})
        pages.append((target / str(number) / "report.html").read_text("utf-8"))
    assert "value" in figures["scales"][TileStatistics().name]["0.5"]["kernel"]
    assert [note for note in figures["notes"] if "FID" in note] == [networks.missing]
    assert figures["published"]["crop"]["missing"] == "its weights are not here"
    assert "2 tiles of 256 µm in a half; 8 are needed" in figures["published"]["clip"]["missing"]
    words = [re.findall(r"<small>thumbnail -?[\d.e-]+ ", page) for page in pages]
    assert [len(one) for one in words] == [6, 12, 6]  # of the encoder six, published six
    assert ["The figures that papers print" in page for page in pages] == [True, True, False]
    assert all(text in pages[1] for text in ("512 pixels a side", "kernel distance (KID)", "needed for a covariance"))


class TestDownload:
    def test_inception_is_fetched_once_and_checked(
        self, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch_fidelity import feature_extractor_inceptionv3

        source = next(here.rglob(published.INCEPTION_FILE))
        monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", source.as_uri())
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        told: list[tuple[str, int, int]] = []
        assert find_networks(download=True, tell=lambda *line: told.append(line)).inception is not None
        assert [line[1:] for line in told] == [(0, 1), (1, 1)]
        assert find_networks().inception is not None
        monkeypatch.setattr(published, "INCEPTION_SHA256", "0" * 64)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "again"))
        with pytest.raises(MachineError, match=r"weights-inception.* cannot be fetched \(RuntimeError\)"):
            find_networks(download=True)
        assert not list((tmp_path / "again").rglob("*.pth"))

    def test_clip_that_cannot_be_fetched_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(MachineError, match=r"open_clip_model\.safetensors of timm/.* cannot be fetched") as caught:
            find_networks(download=True)
        assert "\n" not in str(caught.value)


class TestWords:
    def run(self, slide: Path, out: Path, *more: str) -> Any:
        arguments = ["evaluate", "--real", str(slide), "--synthetic", str(slide), "-o", str(out), "--most", "16"]
        return CliRunner().invoke(app, [*arguments, "--threads", str(torch.get_num_threads()), *more])

    def test_off_by_default_and_named_in_the_help(self, tissue_slide: Path, tmp_path: Path) -> None:
        assert "--published" in CliRunner().invoke(app, ["evaluate", "--help"]).stdout
        plan = self.run(tissue_slide, tmp_path / "r", "--dry-run", "--json")
        assert "published" not in json.loads(plan.stdout)
        refused = self.run(tissue_slide, tmp_path / "r", "--download")
        assert refused.exit_code == 1
        assert "--download: nothing is fetched without --published" in refused.stderr

    def test_the_plan_says_what_is_missing_and_fetches_nothing(self, tissue_slide: Path, tmp_path: Path) -> None:
        plan = self.run(tissue_slide, tmp_path / "r", "--published", "--download", "--dry-run", "--json")
        assert plan.exit_code == 0, plan.stderr
        assert "no CLIP FID without" in json.loads(plan.stdout)["published"]

    def test_the_plan_says_how_long_it_takes(self, here: Path, tissue_slide: Path, tmp_path: Path) -> None:
        plan = json.loads(self.run(tissue_slide, tmp_path / "r", "--published", "--dry-run", "--json").stdout)
        minutes = re.fullmatch(r"Crop FID of at most 32 crops: at most ([\d.]+) minutes in .*", plan["published"])
        assert minutes is not None, plan["published"]
        assert math.isfinite(float(minutes[1]))

    def test_both_are_shown(
        self, here: Path, tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(published, "INCEPTION_LAYER", "64")  # for speed
        ran = self.run(tissue_slide, tmp_path / "r", "--published")
        assert ran.exit_code == 0, ran.stderr
        assert re.search(r"CLIP, \d squares of 512 pixels: \d tiles of 256 µm in a half; 8 are needed", ran.stdout)
        assert re.search(r"Crop, \d+ squares of 256 pixels: ", ran.stdout)
        assert json.loads((tmp_path / "r" / "report.json").read_text("utf-8"))["published"]["crop"]["dim"] == 64
