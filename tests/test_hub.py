"""Weights: from the cache alone, in the layout that their authors publish; fetched when asked, from a real server."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from test_backbone import stirred
from torch import nn
from torchvision import transforms

import wsi_brush.encoder
from wsi_brush import hub
from wsi_brush.backbone import build
from wsi_brush.encoder import About, Encoder, load_encoder
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.zoo import Entry, entries, find

NO_COMMIT = "0" * 40
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALLER: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
    "resnet": {"layers": (1, 1, 1, 1)},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(wsi_brush.encoder, "MICRO_BATCH", 2)  # for time; it is only how many are seen at once
    return tmp_path / "home"


def known(name: str) -> Entry:
    found = find(name)
    assert found is not None
    return found


def lay(cache: Path, repository: str, revision: str | None, files: dict[str, bytes]) -> Path:
    """Files in the hub's cache, as a download leaves them: a snapshot of a commit, and what main is."""
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / (revision or NO_COMMIT)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision or NO_COMMIT)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def tiles(count: int, side: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(3).integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def shrunk(entry: Entry, width: int = 32) -> Entry:
    """The same layout with fewer and narrower blocks."""
    kind = next((kind for kind in SMALLER if kind in str(entry.architecture)), None)
    if kind is not None:
        return dataclasses.replace(
            entry, kwargs={**entry.kwargs, **SMALLER[kind]}, dim=entry.dim if kind == "resnet" else 32
        )
    more = {"mlp_ratio": 5.5 if entry.mlp == "swiglu" or "giant" in str(entry.architecture) else 4.0}
    return dataclasses.replace(
        entry, kwargs={**entry.kwargs, **VIT, **more}, dim=2 * width if entry.pooling == "cls+mean" else width
    )


def as_published(entry: Entry, rgb: NDArray[np.uint8]) -> torch.Tensor:
    """The transform of an entry by Pillow and torchvision, as peers write it."""
    steps: list[Any] = []
    modes = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}
    if entry.resize is not None:
        steps.append(transforms.Resize(entry.resize, modes[entry.filter]))
    if entry.crop is not None:
        steps.append(transforms.CenterCrop(entry.crop))
    chain = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(entry.mean, entry.std)])
    return torch.stack([chain(Image.fromarray(tile)) for tile in rgb])


def cosines(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.floating]:
    product: NDArray[np.floating] = (one * other).sum(1)
    return product / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@torch.inference_mode()
def embedded(entry: Entry, network: nn.Module, rgb: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Pooled by hand from what the network says of each token."""
    seen, made = as_published(entry, rgb), network
    if entry.pooling == "own":
        return np.asarray(made(seen).numpy())
    if entry.pooling == "layer3":
        options = {**entry.kwargs, "features_only": True, "out_indices": [3]}
        stages = timm.create_model(str(entry.architecture), pretrained=False, **options)
        stages.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("layer4")})
        return np.asarray(stages.eval()(seen)[0].numpy().mean((2, 3)))
    tokens = made.forward_features(seen).numpy()  # type: ignore[operator]
    patches = tokens[:, -made.patch_embed.num_patches :]  # type: ignore[union-attr]
    parts = [tokens[:, 0]] + ([patches.mean(1)] if entry.pooling == "cls+mean" else [])
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("entry", [known("uni"), known("gigapath"), known("conch")], ids=lambda entry: entry.id)
def test_a_tile_is_resized_cut_and_normalised_as_by_an_image_library(entry: Entry) -> None:
    """Against Pillow, which rounds between its two passes: by a level or so at most, hardly in the mean."""
    side = entry.crop or entry.resize or entry.tile
    about = About(
        "probe", entry.tile, 3 * side**2, "none", entry.mean, entry.std, resize=entry.resize, filter=entry.filter,
        crop=entry.crop,
    )  # fmt: skip
    rgb = tiles(2, entry.tile)
    found = Encoder(nn.Flatten(), about)(rgb).reshape(2, 3, side, side)
    differences = np.abs(found - as_published(entry, rgb).numpy()) * np.array(entry.std)[:, None, None] * 255
    assert differences.max() < (0.01 if entry.resize == entry.tile else 1.6)
    assert differences.mean() < 0.1
    assert np.ptp(found) > 2


SAFE = [
    e
    for e in entries()
    if e.file and not e.pickled and e.layout == "timm" and e.architecture and e.id not in ("lunit-swav", "lunit-mocov2")
]


@pytest.mark.parametrize("entry", SAFE, ids=lambda entry: entry.id)
def test_an_encoder_is_loaded_by_name_from_the_cache(
    entry: Entry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shrunk(entry)
    network = stirred(
        build(str(small.architecture), {**small.kwargs, "num_classes": 3}, stem=small.stem, mlp=small.mlp)
    )
    save_file(network.state_dict(), tmp_path / "weights")
    lay(cache, str(entry.repository), entry.revision, {str(entry.file): (tmp_path / "weights").read_bytes()})
    network.reset_classifier(0)  # type: ignore[operator]
    monkeypatch.setattr(wsi_brush.encoder, "find", lambda name: small if find(name) is entry else None)
    encoder = load_encoder(entry.aliases[0] if entry.aliases else entry.id.upper())
    assert (encoder.name, encoder.tile, encoder.dim) == (entry.id, entry.tile, small.dim)
    assert encoder.terms == {"licence": entry.licence, "outputs": entry.outputs}
    rgb = tiles(2, entry.tile)
    expected = embedded(small, network, rgb)
    found = encoder(rgb)
    assert found.shape == expected.shape == (2, small.dim)
    assert expected.std() > 1e-3
    assert cosines(found, expected).min() > 0.9999
    assert np.allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-2)


def test_pooling_and_transform_are_part_of_the_fingerprint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shrunk(known("virchow2"))
    save_file(build(str(small.architecture), small.kwargs, mlp=small.mlp).state_dict(), tmp_path / "weights")
    lay(cache, str(small.repository), small.revision, {"model.safetensors": (tmp_path / "weights").read_bytes()})
    cls = dataclasses.replace(small, pooling="cls", dim=32)
    found = set()
    for one in (small, cls, dataclasses.replace(small, mean=(0.5, 0.5, 0.5)), dataclasses.replace(cls, resize=112)):
        monkeypatch.setattr(wsi_brush.encoder, "find", lambda name, one=one: one)
        if one.resize is None:
            found.add(load_encoder("virchow2").fingerprint)
    assert len(found) == 3


def test_h0_mini_takes_its_sizes_from_its_repository(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of which only its config.json says how large it is."""
    entry = known("h0-mini")
    sizes = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.5, **VIT}
    network = stirred(build("vit_base_patch14_reg4_dinov2", sizes | {"num_classes": 0}, mlp="swiglu"))
    save_file(network.state_dict(), tmp_path / "weights")
    config = {"architecture": "vit_base_patch14_reg4_dinov2", "model_args": sizes | {"global_pool": ""}}
    files = {"model.safetensors": (tmp_path / "weights").read_bytes(), "config.json": json.dumps(config).encode()}
    lay(cache, str(entry.repository), entry.revision, files)
    small = dataclasses.replace(entry, dim=32)
    monkeypatch.setattr(wsi_brush.encoder, "find", lambda name: small)
    rgb = tiles(1, 224)
    assert cosines(load_encoder("h0-mini")(rgb), embedded(small, network, rgb)).min() > 0.9999
    mean = dataclasses.replace(known("h0-mini-mean"), dim=64)
    monkeypatch.setattr(wsi_brush.encoder, "find", lambda name: mean)
    assert cosines(load_encoder("h0-mini-mean")(rgb), embedded(mean, network, rgb)).min() > 0.9999


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "hibou-b", "midnight"])
def test_transformers_weights_are_loaded_by_name(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    kind = {"phikon": "ViT", "hibou-b": "Dinov2WithRegisters"}.get(name, "Dinov2")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224}
    sizes["patch_size"] = 16 if "phikon" in name else 14
    sizes |= {"intermediate_size": 128} if kind == "ViT" else {"use_swiglu_ffn": "phikon" not in name}
    options = {"add_pooling_layer": False} if kind == "ViT" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    published = stirred(getattr(transformers, f"{kind}Model")(config, **options))
    published.save_pretrained(tmp_path)  # type: ignore[operator]
    small = shrunk(known(name))
    lay(
        cache,
        str(small.repository),
        small.revision,
        {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()},
    )
    monkeypatch.setattr(wsi_brush.encoder, "find", lambda name: small)
    rgb = tiles(1, 224)
    with torch.inference_mode():
        tokens = published(pixel_values=as_published(small, rgb)).last_hidden_state.numpy()
    patches = tokens[:, -((224 // sizes["patch_size"]) ** 2) :]
    parts = [tokens[:, 0]] + ([patches.mean(1)] if small.pooling == "cls+mean" else [])
    assert cosines(load_encoder(name)(rgb), np.concatenate(parts, 1)).min() > 0.9999


PICKLED = [e for e in entries() if e.pickled and e.package is None]


@pytest.mark.parametrize("entry", PICKLED, ids=lambda entry: entry.id)
def test_a_published_pickle_is_converted_once_and_then_found_by_name(
    entry: Entry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = weights_script()
    small = shrunk(entry)
    network = stirred(
        build(str(small.architecture), {**small.kwargs, "num_classes": 0}, stem=small.stem, mlp=small.mlp)
    )
    torch.save({"model": network.state_dict()}, tmp_path / "published")
    monkeypatch.setitem(script.ENCODERS, entry.id, small.description)
    monkeypatch.setattr(wsi_brush.encoder, "find", lambda name: small)
    if entry.repository:
        lay(cache, entry.repository, entry.revision, {str(entry.file): (tmp_path / "published").read_bytes()})
        with pytest.raises(MachineError, match=rf"is a pickle, .*weights.py {entry.id} ") as found:
            load_encoder(entry.id)
    else:
        with pytest.raises(RefusedError, match=f"not on the hub; get {entry.file} from https") as found:
            load_encoder(entry.id)
    assert "\n" not in str(found.value)
    assert str(hub.converted(small)) in str(found.value)
    assert hub.state_of(small) == ("to convert" if entry.repository else "absent")
    script.convert(entry.id, tmp_path / "published", hub.converted(small))
    assert hub.state_of(small) == "ready"
    rgb = tiles(2, entry.tile)
    expected = embedded(small, network, rgb)
    encoder = load_encoder(entry.id)
    assert cosines(encoder(rgb), expected).min() > 0.9999
    np.testing.assert_allclose(load_encoder(str(hub.converted(small)))(rgb), encoder(rgb), atol=1e-6)


def weights_script() -> Any:
    path = Path(__file__).parents[1] / "pipelines" / "paper_data" / "weights.py"
    spec = importlib.util.spec_from_file_location("zoo_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# what is missing or wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [e.id for e in entries() if e.repository])
def test_without_weights_one_line_says_what_to_do(name: str) -> None:
    with pytest.raises(MachineError, match=f"not in the local cache; .* wsi-brush models fetch {name}") as found:
        load_encoder(name)
    assert "\n" not in str(found.value)
    assert hub.state_of(known(name)) in ("absent", "no package")


def test_conch_needs_its_package(cache: Path) -> None:
    if importlib.util.find_spec("conch") is not None:
        pytest.skip("it is installed here")
    entry = known("conch")
    assert hub.state_of(entry) == "no package"
    path = hub.converted(entry)
    path.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, path)
    about = entry.description | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(MachineError, match="needs its authors' package conch"):
        load_encoder("conch")


def test_weights_of_another_network_are_refused(cache: Path, tmp_path: Path) -> None:
    save_file({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "weights")
    entry = known("lunit-vits16")
    lay(cache, str(entry.repository), entry.revision, {"model.safetensors": (tmp_path / "weights").read_bytes()})
    with pytest.raises(RefusedError, match="do not fit vit_small_patch16_224"):
        load_encoder("lunit-vits16")


def test_a_published_file_is_held_against_its_digest(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"other")
    with pytest.raises(RefusedError, match=r"damaged or exchanged.*expected 8d6cea947eb2"):
        hub.check(known("virchow2"), tmp_path / "weights")
    hub.check(known("virchow"), tmp_path / "weights")  # no digest is known


def test_timm_and_hub_names_come_from_the_cache_too(cache: Path, tmp_path: Path) -> None:
    network = stirred(timm.create_model("resnet10t", pretrained=False))
    save_file(network.state_dict(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    lay(cache, "timm/resnet10t.c3_in1k", None, {"model.safetensors": content})
    about = {"input_size": [3, 64, 64], "first_conv": "conv1.0", "classifier": "fc", "license": "mit"}
    config = {"architecture": "resnet10t", "num_classes": 1000, "pretrained_cfg": about}
    lay(cache, "lab/tiny", "1" * 40, {"model.safetensors": content, "config.json": json.dumps(config).encode()})
    by_timm, by_hub = load_encoder("timm:resnet10t.c3_in1k"), load_encoder(f"hf-hub:lab/tiny@{'1' * 40}")
    assert by_timm.fingerprint == by_hub.fingerprint
    assert (by_hub.tile, by_hub.about.licence) == (64, "mit")
    network.reset_classifier(0)
    rgb = tiles(1, 64)
    config_mean, config_std = by_hub.about.mean, by_hub.about.std
    seen = torch.from_numpy(((rgb / 255 - config_mean) / config_std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert cosines(by_hub(rgb), network(seen).numpy()).min() > 0.9999


def test_names_that_are_none() -> None:
    with pytest.raises(UsageError, match="is no encoder on the hub"):
        hub.fetch("oracle")
    with pytest.raises(RefusedError, match="nothing to fetch"):
        hub.fetch("bundled")
    with pytest.raises(RefusedError, match=r"not on the hub; get ctranspath\.pth"):
        hub.fetch("ctranspath")
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        hub.fetch("midnight")


# fetching: `wsi-brush models` against a server that answers as the hub does -------------------------

WEIGHTS = b"weights that nobody loads"
COMMIT = str(known("virchow").revision)


class Hub(BaseHTTPRequestHandler):
    """Two repositories: one is gated, of the other only one file is there."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        gated, there = "MahmoodLab" in self.path, self.path.endswith(f"/resolve/{COMMIT}/model.safetensors")
        code = 403 if gated else 200 if there else 404
        content = WEIGHTS if code == 200 else b""
        self.send_response(code)
        if code != 200:
            self.send_header("X-Error-Code", "GatedRepo" if gated else "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def models(*words: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    given |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-m", "wsi_brush", "models", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=given, check=False)


def test_fetch_is_a_command_and_the_only_one_that_asks_the_hub(tmp_path: Path, endpoint: str) -> None:
    home = tmp_path / "fetched"
    ran = models("fetch", "virchow", "--json", home=home, HF_ENDPOINT=endpoint)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["left"] is None
    assert Path(told["path"]).read_bytes() == WEIGHTS
    listed = models("list", "--json", home=home, HF_ENDPOINT="http://127.0.0.1:9")
    here = {one["id"]: one["here"] for one in json.loads(listed.stdout)}
    assert (here["virchow"], here["virchow2"], here["bundled"]) == ("ready", "absent", "bundled")


def test_gated_absent_and_offline_are_one_line_each(tmp_path: Path, endpoint: str) -> None:
    for name, environment, line in (
        ("uni", {"HF_ENDPOINT": endpoint}, "uni: access is gated; ask for it on https://huggingface.co/MahmoodLab/uni"),
        ("phikon-v2", {"HF_ENDPOINT": endpoint}, "phikon-v2: owkin/phikon-v2 has no model.safetensors"),
        ("virchow", {"HF_HUB_OFFLINE": "1"}, "cannot be fetched (HF_HUB_OFFLINE is set)"),
    ):
        ran = models("fetch", name, home=tmp_path / name, **environment)
        assert ran.returncode in (2, 4), ran
        assert ran.stdout == ""
        (said,) = ran.stderr.splitlines()
        assert said.startswith("wsi-brush: ")
        assert line in said


def test_the_list_is_a_table_that_names_licence_access_and_state(tmp_path: Path) -> None:
    ran = models("list", home=tmp_path / "none")
    assert ran.returncode == 0, ran.stderr
    rows = {line.split()[1]: line for line in ran.stdout.splitlines() if line.startswith("│")}
    assert {entry.id for entry in entries()} <= set(rows)
    for word in ("CC-BY-NC-ND-4.0 *", "gated", "absent", "1024"):
        assert word in rows["uni"]
    assert "not known" in rows["h-optimus-0"]
    assert "* uni: models trained on its outputs" in ran.stdout
