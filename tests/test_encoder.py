"""Encoders: one path for every name, the same bits whatever the company, nothing damaged or pickled is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from wsi_brush.backbone import ConvolutionalStem
from wsi_brush.commit import sha256_of
from wsi_brush.encoder import BUNDLED, JUDGE, MICRO_BATCH, Encoder, load_encoder
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.machine import on_cores

SIDE = 48


def write_encoder(folder: Path, *, architecture: str = "mobilenetv3_small_050", standard: bool = True) -> Path:
    """A tiny untrained encoder with its description; each call makes the same."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, num_classes=0)
    tensors = {name: value.half() for name, value in network.state_dict().items() if value.is_floating_point()}
    with torch.inference_mode():
        dim = network.eval()(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
    if standard:
        tensors |= {"embedding.mean": torch.full((dim,), 0.25), "embedding.std": torch.full((dim,), 2.0)}
    path = folder / "tiny.safetensors"
    save_file(tensors, path)
    describe(path, architecture=architecture, dim=dim)
    return path


def describe(path: Path, **changes: object) -> None:
    about = {
        "name": "tiny",
        "kwargs": {"num_classes": 0},
        "tile": SIDE,
        "mean": [0.7, 0.5, 0.6],
        "std": [0.2, 0.25, 0.2],
        "sha256": sha256_of(path),
        "licence": "none",
        "training": {},
    }
    path.with_suffix(".json").write_text(json.dumps(about | changes))


def tiles(count: int, side: int = SIDE) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(str(write_encoder(tmp_path_factory.mktemp("encoder"))))


def test_it_says_what_it_is(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    encoder = load_encoder(str(path))
    assert (encoder.name, encoder.tile, encoder.fingerprint) == ("tiny", SIDE, sha256_of(path))
    assert encoder(tiles(2)).shape == (2, encoder.dim)
    assert encoder(tiles(2)).dtype == np.float32
    assert encoder.about.licence == "none"


def test_it_is_the_network_on_normalised_pixels_standardised(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    tensors = {name: value.float() for name, value in load_file(path).items() if not name.startswith("embedding.")}
    network = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=0)
    network.load_state_dict(tensors)
    rgb = tiles(5)
    mean, std = np.array([0.7, 0.5, 0.6]), np.array([0.2, 0.25, 0.2])
    pixels = torch.from_numpy(((rgb / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = (network.eval()(pixels).numpy() - 0.25) / 2.0
    np.testing.assert_allclose(load_encoder(str(path))(rgb), expected, atol=1e-4)


def test_without_statistics_it_returns_what_the_network_returns(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = load_encoder(str(write_encoder(tmp_path / "a", standard=False)))(tiles(2))
    standardised = load_encoder(str(write_encoder(tmp_path / "b")))(tiles(2))
    np.testing.assert_allclose((plain - 0.25) / 2.0, standardised, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, MICRO_BATCH, MICRO_BATCH + 1])
def test_a_tile_has_the_same_bits_whatever_its_company(tiny: Encoder, count: int) -> None:
    rgb = tiles(2 * MICRO_BATCH + 3)
    whole = tiny(rgb)
    np.testing.assert_array_equal(tiny(rgb[:count]), whole[:count])
    np.testing.assert_array_equal(tiny(rgb[::-1])[::-1], whole)


def test_a_tile_has_the_same_bits_on_one_thread_and_two(tiny: Encoder) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tiny(tiles(5))
        torch.set_num_threads(2)
        two = tiny(tiles(5))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(one, two)


def test_two_calls_at_once_where_there_are_two_cores(tiny: Encoder) -> None:
    for cores in (1, 2):
        with on_cores(cores):
            assert tiny.at_once == cores


def test_it_reads_views_that_are_not_contiguous_and_leaves_them_alone(tiny: Encoder) -> None:
    rgb = tiles(3)
    turned = np.rot90(rgb, axes=(1, 2))
    kept = turned.copy()
    np.testing.assert_array_equal(tiny(turned), tiny(np.ascontiguousarray(turned)))
    np.testing.assert_array_equal(turned, kept)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((1, SIDE, SIDE + 1, 3), np.uint8), np.zeros((1, SIDE, SIDE, 3))],
)
def test_other_shapes_and_types_are_refused(tiny: Encoder, wrong: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=rf"\(n, {SIDE}, {SIDE}, 3\) in uint8"):
        tiny(wrong)


# what a user can do wrong -------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_known_forms() -> None:
    with pytest.raises(UsageError, match=r"bundled, .*timm:NAME, hf-hub:ORG/NAME or PATH\.safetensors"):
        load_encoder("oracle")
    with pytest.raises(UsageError, match=r"did you mean phikon-v2\?"):
        load_encoder("phikon-v3")


def test_an_unknown_timm_model_is_a_usage_error() -> None:
    for name in ("timm:resnet_of_dreams", "timm:resnet10t.no_such_tag"):
        with pytest.raises(UsageError, match="no such model"):
            load_encoder(name)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_encoder(str(tmp_path / "none.safetensors"))


def test_a_missing_description_is_refused(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(RefusedError, match=r"tiny\.json is missing"):
        load_encoder(str(path))


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "tiny"}'])
def test_a_useless_description_is_refused(tmp_path: Path, text: str) -> None:
    path = write_encoder(tmp_path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(RefusedError, match=r"tiny\.json"):
        load_encoder(str(path))


def test_one_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RefusedError, match="sha256"):
        load_encoder(str(path))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    describe(path, architecture="resnet10t", dim=512)
    with pytest.raises(RefusedError, match="do not fit resnet10t"):
        load_encoder(str(path))


def test_an_architecture_that_timm_does_not_know_is_refused(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    describe(path, architecture="resnet_of_dreams", dim=512)
    with pytest.raises(RefusedError, match="do not fit resnet_of_dreams"):
        load_encoder(str(path))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(b"not tensors at all")
    describe(path, architecture="mobilenetv3_small_050", dim=8)
    with pytest.raises(RefusedError, match="do not fit"):
        load_encoder(str(path))


def test_an_absent_or_unknown_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="CUDA"):
        load_encoder(device="cuda")
    with pytest.raises(UsageError, match="no device"):
        load_encoder(device="abacus")


@pytest.mark.parametrize("name", ["timm:resnet10t.c3_in1k", "hf-hub:someone/some-model"])
def test_without_network_and_cache_the_message_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match=f"not in the local cache; .* wsi-brush models fetch {name}") as caught:
        load_encoder(name)
    assert "\n" not in str(caught.value)


# the bundled one ----------------------------------------------------------------------------------


def test_the_bundled_encoder_is_small_and_loads() -> None:
    encoder = load_encoder()
    assert encoder.name == "bundled"
    assert BUNDLED.stat().st_size <= 8e6
    parameters = sum(value.numel() for value in load_file(BUNDLED).values())
    assert parameters <= 6e6
    assert encoder(tiles(1, encoder.tile)).shape == (1, encoder.dim)


def likeness(
    one: tuple[tuple[int, int, int], int], other: tuple[tuple[int, int, int], int], encoder: str = "bundled"
) -> float:
    """Cosine of an encoder's embeddings of two synthetic tiles: (colour of the ground, px a cell)."""
    spots = []
    for seed, (colour, coarseness) in enumerate((one, other)):
        cells = np.random.default_rng(seed).random((128 // coarseness, 128 // coarseness)) < 0.3
        cover = np.kron(cells, np.ones((coarseness, coarseness)))[..., None]
        spots.append((cover * np.array([90, 40, 120]) + (1 - cover) * np.array(colour)).astype(np.uint8))
    first, second = load_encoder(encoder)(np.stack(spots))
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


PINK, GREY = (230, 150, 190), (200, 190, 215)


def test_the_bundled_encoder_tells_colours_apart() -> None:
    assert likeness((PINK, 8), (PINK, 8)) > likeness((PINK, 8), (GREY, 8)) + 0.1


@pytest.mark.xfail(
    reason="this encoder weighs colour far more than texture: its card, 'It sees colour more than layout'"
)
def test_the_bundled_encoder_tells_textures_of_one_colour_apart() -> None:
    assert likeness((PINK, 8), (PINK, 8)) > likeness((PINK, 8), (PINK, 2)) + 0.1


def test_the_judge_tells_textures_and_colours_apart_and_is_another() -> None:
    same = likeness((PINK, 8), (PINK, 8), "judge")
    assert same > likeness((PINK, 8), (PINK, 2), "judge") + 0.1
    assert same > likeness((PINK, 8), (GREY, 8), "judge") + 0.1
    assert load_encoder("judge").fingerprint != load_encoder().fingerprint


@pytest.mark.parametrize("weights", [BUNDLED, JUDGE])
def test_what_is_bundled_has_its_card(weights: Path) -> None:
    card = weights.with_suffix(".md").read_text(encoding="utf-8")
    for word in ("Balci", "CC BY 4.0", "not for diagnosis", sha256_of(weights)[:12]):
        assert word in card


# the encoders of the paper's data ------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "uni": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "ctranspath": {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pipelines/paper_data/weights.py, for tiny networks of the published kinds."""
    path = Path(__file__).parents[1] / "pipelines" / "paper_data" / "weights.py"
    spec = importlib.util.spec_from_file_location("paper_data_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, sizes in TINY.items():
        about = module.ENCODERS[name]
        changed = {"kwargs": about["kwargs"] | sizes, "dim": 32}
        monkeypatch.setitem(module.ENCODERS, name, about | changed)
    return module


def published(script: Any, name: str, path: Path) -> nn.Module:
    """A network as its authors would publish it: UNI's tensors alone, CTransPath's with the names of an older timm."""
    torch.manual_seed(1)
    about = script.ENCODERS[name]
    stem = {"embed_layer": ConvolutionalStem} if name == "ctranspath" else {}
    network: nn.Module = timm.create_model(about["architecture"], pretrained=False, **about["kwargs"], **stem)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.02, 0.2)
    tensors = dict(network.state_dict())
    if name == "uni":
        torch.save(tensors, path)
        return network.eval()
    tensors = {key.replace("layers.1.downsample", "layers.0.downsample"): value for key, value in tensors.items()}
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    tensors["head.weight"] = torch.zeros(5, 32)
    torch.save({"model": tensors}, path)
    return network.eval()


@pytest.mark.parametrize("name", ["uni", "ctranspath"])
def test_published_weights_become_an_encoder(script: Any, name: str, tmp_path: Path) -> None:
    network = published(script, name, tmp_path / "published.pth")
    script.convert(name, tmp_path / "published.pth", tmp_path / f"{name}.safetensors")
    encoder = load_encoder(str(tmp_path / f"{name}.safetensors"))
    about = script.ENCODERS[name]
    assert (encoder.name, encoder.tile, encoder.dim) == (name, {"uni": 256, "ctranspath": 224}[name], 32)
    rgb = tiles(2, encoder.tile)
    small = np.stack([np.asarray(Image.fromarray(one).resize((224, 224), Image.Resampling.BILINEAR)) for one in rgb])
    mean, std = (np.array(about[key]) for key in ("mean", "std"))
    pixels = torch.from_numpy(((small / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network(pixels).numpy()
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(encoder(rgb), expected, atol=5e-3 if name == "uni" else 1e-3)  # Pillow rounds twice
    with pytest.raises(RefusedError, match="exists"):
        script.convert(name, tmp_path / "published.pth", tmp_path / f"{name}.safetensors")


def test_weights_of_another_encoder_leave_nothing_behind(script: Any, tmp_path: Path) -> None:
    published(script, "uni", tmp_path / "uni.bin")
    with pytest.raises(RefusedError, match="do not fit swin_tiny_patch4_window7_224"):
        script.convert("ctranspath", tmp_path / "uni.bin", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["uni.bin"]


def test_a_pickle_that_would_run_code_is_not_read(script: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UsageError, match="no file of tensors that is safe to read") as found:
        script.convert("uni", tmp_path / "trap.pth", tmp_path / "out.safetensors")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "text.bin").write_text("no tensors")
    with pytest.raises(UsageError, match="no file of tensors"):
        script.convert("uni", tmp_path / "text.bin", tmp_path / "out.safetensors")


def test_an_unknown_stem_is_refused(tmp_path: Path) -> None:
    path = write_encoder(tmp_path)
    describe(path, architecture="mobilenetv3_small_050", dim=1024, stem="woven")
    with pytest.raises(RefusedError, match="stem 'woven' is not known; expected plain, convolutional"):
        load_encoder(str(path))
