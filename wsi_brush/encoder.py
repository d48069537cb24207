"""A tile becomes a vector.

One path for every encoder: `load_encoder` turns a name into weights, a description and a timm network, and an
`Encoder` is all three. Two small ones are bundled and need no download; those of the table (`zoo`) are known by name;
others come from timm, from the Hugging Face hub, or from a local safetensors file with a description (JSON) of the same
layout beside it:

    {"name": ..., "architecture": timm's name, "kwargs": {...}, "tile": pixels, "mean": [3], "std": [3],
     "dim": ..., "sha256": of the safetensors file, "licence": ..., "training": {...}}

It may also say `stem`, `mlp` and `pooling` (see `backbone`), and `resize`, `filter` and `crop` (see `zoo`).
Two tensors of such a file may describe the embedding itself, `embedding.mean` and `embedding.std`: where they are,
the encoder standardises what it returns, so that a cosine of 0 means "no more alike than any two tiles".
Weights are safetensors only: a pickle can run code. What is not here is not fetched: `hub` does that, when asked.
Networks compute in float32, whatever precision their authors run them in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import hub
from .backbone import Pooled, build, from_transformers, without_head
from .commit import sha256_of
from .errors import MachineError, RefusedError, UsageError
from .machine import find_device
from .zoo import HERE, Entry, find, nearest

BUNDLED = Path(__file__).parent / "weights" / "encoder.safetensors"
JUDGE = BUNDLED.with_name("judge.safetensors")
"""Another small encoder, which no bundled brush is conditioned on, to judge their paintings with."""
MICRO_BATCH = 32
"""Tiles seen at once, always: an embedding then never depends on which tiles came along."""


@dataclass(frozen=True)
class About:
    """What must be known of an encoder beside its weights: tile in px, `mean` and `std` of the 0..1 pixels.

    A tile is resized to `resize` px a side (antialiased, by `filter`, to whole levels as an image library does) and its
    middle cut to `crop` px, where they are given. `outputs`: what its terms ask of what is made from its embeddings.
    """

    name: str
    tile: int
    dim: int
    fingerprint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str = "unknown"
    training: Mapping[str, Any] = field(default_factory=dict)
    resize: int | None = None
    filter: str = "bilinear"
    crop: int | None = None
    outputs: str | None = None


@final
class Encoder:
    """A tile becomes a vector: (n, tile, tile, 3) uint8 -> (n, dim) float32.

    Tiles go through the network `MICRO_BATCH` at a time, the last ones filled up with blank ones, so that
    convolutional encoders give on a CPU the same bits for a tile whatever its company.
    """

    def __init__(self, network: nn.Module, about: About, *, device: str = "cpu") -> None:
        self.about = about
        self._device = find_device(device)
        std = getattr(network, "embedding_std", torch.ones(about.dim))
        mean = getattr(network, "embedding_mean", torch.zeros(about.dim))
        self._spread, self._centre = std.to(self._device), mean.to(self._device)
        self._scale = (1 / (255 * torch.tensor(about.std))).view(1, 3, 1, 1).to(self._device)
        self._shift = (-torch.tensor(about.mean) / torch.tensor(about.std)).view(1, 3, 1, 1).to(self._device)
        self._network = network.eval().requires_grad_(False)
        self._network.to(device=self._device, dtype=torch.float32).to(memory_format=torch.channels_last)

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, dim={self.dim}, tile={self.tile})"

    @property
    def name(self) -> str:
        """The word that `load_encoder` was given, our name for it, or that in the description of a local file."""
        return self.about.name

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.about.dim

    @property
    def tile(self) -> int:
        """Side of the square it sees, px, at any pitch."""
        return self.about.tile

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights; of those of the table together with pooling and what is done to a tile."""
        return self.about.fingerprint

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def at_once(self) -> int:
        """Calls that it gains by being given at once: cores do not wait for one another, a GPU not for copies."""
        return 2 if self._device.type == "cuda" or torch.get_num_threads() > 1 else 1

    @property
    def terms(self) -> dict[str, str | None]:
        """Its licence, and what its terms ask of what is made from its embeddings: it stands in stores and brushes."""
        return {"licence": self.about.licence, "outputs": self.about.outputs}

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed tiles: (n, tile, tile, 3) uint8 -> (n, dim) float32.

        Raises:
            ValueError: if the tiles have another shape or type.
        """
        if tiles.ndim != 4 or tiles.shape[1:] != (self.tile, self.tile, 3) or tiles.dtype != np.uint8:
            raise ValueError(
                f"{self.name} takes tiles of shape (n, {self.tile}, {self.tile}, 3) in uint8, "
                f"not {tiles.shape} in {tiles.dtype}"
            )
        embeddings = np.empty((len(tiles), self.dim), np.float32)
        for start in range(0, len(tiles), MICRO_BATCH):
            part = tiles[start : start + MICRO_BATCH]
            pinned = self._device.type == "cuda"  # a GPU fetches it by itself; torch keeps such memory for the next
            batch = torch.zeros((MICRO_BATCH, *tiles.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
            batch.numpy()[: len(part)] = part
            embeddings[start : start + len(part)] = self._embed(batch)[: len(part)].numpy()
        return embeddings

    @torch.inference_mode()
    def _embed(self, batch: Tensor) -> Tensor:
        # A permuted (n, y, x, c) array is channels-last already: no copy.
        levels = batch.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        pixels = self._resized(levels) * self._scale + self._shift
        pooled: Tensor = self._network(pixels)
        return ((pooled - self._centre) / self._spread).float().cpu()

    def _resized(self, levels: Tensor) -> Tensor:
        side, crop = self.about.resize, self.about.crop
        if side is not None and side != self.tile:
            levels = nn.functional.interpolate(levels, (side, side), mode=self.about.filter, antialias=True)
            levels = levels.round().clamp(0, 255)
        if crop is not None:
            start = (levels.shape[-1] - crop) // 2
            levels = levels[..., start : start + crop, start : start + crop]
        return levels


def load_encoder(name: str = "bundled", *, device: str = "cpu") -> Encoder:
    """Load an encoder of the table (`bundled`, `judge`, `uni`, ..., also as peers call them), `timm:NAME`,
    `hf-hub:ORG/NAME[@REVISION]` or `PATH.safetensors`. No network: `hub.fetch` gets what is not in the cache.

    Raises:
        UsageError: if there is no such encoder or device.
        MachineError: if weights or a package are not here, or the device is not there.
        RefusedError: if weights are damaged, pickled, or do not fit their description.
    """
    find_device(device)  # before minutes of loading
    if name.startswith(("timm:", "hf-hub:")):
        return _load_timm(name, device=device)
    if name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such file; expected the weights of an encoder")
        return _load_file(Path(name), name=None, device=device)
    entry = find(name)
    if entry is None:
        near = nearest(name)
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(
            f"{name!r} is no encoder{hint}; expected bundled, another name of `wsi-brush models list`, timm:NAME, "
            "hf-hub:ORG/NAME or PATH.safetensors"
        )
    if entry.id in HERE:
        path = BUNDLED.with_name(HERE[entry.id]).with_suffix(".safetensors")
        if not path.is_file():
            raise MachineError(f"{path}: it should be bundled and is missing; install wsi-brush again")
        return _load_file(path, name=entry.id, device=device)
    return _load_entry(entry, device=device)


# a description and its weights ---------------------------------------------------------------------


def _load_file(path: Path, *, name: str | None, device: str) -> Encoder:
    described = _read_description(path)
    digest = _checked(path, described)
    if described.get("package") == "conch":
        return _load_conch(described, path, device=device)
    return _assemble(described | {"name": name or described["name"]}, path, device=device, digest=digest)


def _load_entry(entry: Entry, *, device: str) -> Encoder:
    path, described = hub.weights_of(entry), entry.description
    if path == hub.converted(entry):
        _checked(path, _read_description(path))
        load = _assemble if entry.package is None else _load_conch
        return load(described, path, device=device)
    if entry.architecture is None:
        published = _read_json(path.with_name("config.json"))
        given = {key: value for key, value in published.get("model_args", {}).items() if key != "global_pool"}
        described |= {"architecture": published.get("architecture"), "kwargs": given | described["kwargs"]}
    return _assemble(described, path, device=device, layout=entry.layout)


def _assemble(
    described: dict[str, Any], path: Path, *, device: str, digest: str | None = None, layout: str = "timm"
) -> Encoder:
    """The encoder that is described, with the weights in `path`; `digest`: what to call them, by default that of the
    network and all that is done around it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    dim = int(described["dim"])
    try:
        tensors = load_file(path)
        network = build(
            described["architecture"], described["kwargs"], stem=described.get("stem", "plain"),
            mlp=described.get("mlp", "plain"),
        )  # fmt: skip
        standard = {
            key: tensors.pop(f"embedding.{key}").float() for key in ("mean", "std") if f"embedding.{key}" in tensors
        }
        if layout == "transformers":
            tensors = from_transformers(tensors, network)
        network.load_state_dict(tensors if digest else without_head(tensors))
        pooled = Pooled(network, described.get("pooling", "own"))
    except KeyError as error:
        raise RefusedError(f"{path}: {error.args[0]}") from None
    except (SafetensorError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"{path}: the weights do not fit {described['architecture']} ({reason})") from None
    for key, value in standard.items():
        if value.shape != (dim,):
            raise RefusedError(f"{path}: embedding.{key} has shape {tuple(value.shape)}, expected ({dim},)")
        pooled.register_buffer(f"embedding_{key}", value)
    around = {key: described.get(key) for key in ("pooling", "tile", "resize", "filter", "crop", "mean", "std")}
    return Encoder(pooled, _about(described, digest or _hash_state(network, around)), device=device)


def _about(described: dict[str, Any], digest: str) -> About:
    return About(
        name=str(described["name"]),
        tile=int(described["tile"]),
        dim=int(described["dim"]),
        fingerprint=digest,
        mean=_three(described["mean"]),
        std=_three(described["std"]),
        licence=str(described.get("licence", "unknown")),
        training=described.get("training", {}),
        **{key: described[key] for key in ("resize", "filter", "crop", "outputs") if key in described},
    )


def _checked(path: Path, described: dict[str, Any]) -> str:
    """The digest of a local file, if it is the one in its description."""
    digest, expected = sha256_of(path), str(described["sha256"])
    if digest != expected:
        raise RefusedError(
            f"{path}: damaged or exchanged (sha256 {digest[:12]}, its description says {expected[:12]}); "
            "get both files again"
        )
    return digest


def _read_description(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise RefusedError(f"{path}: {beside.name} is missing beside it; it says how the weights are to be used")
    described = _read_json(beside)
    needed = {"name", "architecture", "kwargs", "tile", "mean", "std", "dim", "sha256"}
    if missing := needed - set(described):
        raise RefusedError(f"{beside}: lacks {', '.join(sorted(missing))}; expected the description of an encoder")
    return described


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be read ({error}); get it again") from None
    return found if isinstance(found, dict) else {}


def _load_conch(described: dict[str, Any], path: Path, *, device: str) -> Encoder:
    """CONCH's picture side, made by its authors' package, before the projection that its texts are compared in."""
    from importlib import import_module

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model = import_module("conch.open_clip_custom.coca_model")
        folder = Path(str(import_module("conch.open_clip_custom.factory").CFG_DIR))
    except ImportError:
        raise MachineError(
            f"{described['name']}: needs its authors' package conch; see https://github.com/mahmoodlab/CONCH"
        ) from None
    sizes = {key: value for key, value in _read_json(folder / "conch_ViT-B-16.json").items() if key != "custom_text"}
    network = model.CoCa(**sizes)
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise RefusedError(f"{path}: the weights do not fit ({' '.join(str(error).split())[:200]})") from None
    return Encoder(_Picture(network), _about(described, _hash_state(network, described)), device=device)


class _Picture(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.network.encode_image(pixels, proj_contrast=False, normalize=False)
        return found


# timm and the Hugging Face hub --------------------------------------------------------------------


def _load_timm(name: str, *, device: str) -> Encoder:
    import timm
    from timm.data.config import resolve_model_data_config

    path = hub.place_of(name).find()
    try:
        if name.startswith("hf-hub:"):
            network = timm.create_model(f"local-dir:{path.parent}", pretrained=True, num_classes=0)
        else:
            network = timm.create_model(
                name.removeprefix("timm:"), pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(path)}
            )
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"{name}: timm {timm.__version__} cannot build it ({reason})") from None
    config = resolve_model_data_config(network)
    tile = int(config["input_size"][-1])
    with torch.inference_mode():
        dim = network.eval()(torch.zeros(1, 3, tile, tile)).shape[1]
    about = About(
        name=name,
        tile=tile,
        dim=int(dim),
        fingerprint=_hash_state(network),
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        licence=str(getattr(network, "pretrained_cfg", {}).get("license") or "unknown"),
    )
    return Encoder(network, about, device=device)


# pieces -------------------------------------------------------------------------------------------


def _hash_state(network: nn.Module, around: Any = None) -> str:
    """SHA-256 of names, shapes and values, in the order of the names, and of what is done `around` the network."""
    digest = hashlib.sha256() if around is None else hashlib.sha256(json.dumps(around, sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
