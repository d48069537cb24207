"""A tile becomes a vector.

One path for every encoder: `load_encoder` turns a name into weights, a description and a timm network, and an
`Encoder` is all three. The bundled one is small and needs no download; others come from timm, from the Hugging Face
hub, or from a local safetensors file with a description (JSON) of the same layout beside it:

    {"name": ..., "architecture": timm's name, "kwargs": {...}, "tile": pixels, "mean": [3], "std": [3],
     "dim": ..., "sha256": of the safetensors file, "licence": ..., "training": {...}}

With `"stem": "convolutional"` a Swin of timm sees its patches through a `ConvolutionalStem` (CTransPath does).
Two tensors of such a file may describe the embedding itself, `embedding.mean` and `embedding.std`: where they are,
the encoder standardises what it returns, so that a cosine of 0 means "no more alike than any two tiles".
Weights are safetensors only: a pickle can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .commit import sha256_of
from .errors import MachineError, RefusedError, UsageError, WsiBrushError
from .machine import find_device

BUNDLED = Path(__file__).parent / "weights" / "encoder.safetensors"
JUDGE = BUNDLED.with_name("judge.safetensors")
"""Another small encoder, which no bundled brush is conditioned on, to judge their paintings with."""
MICRO_BATCH = 32
"""Tiles seen at once, always: an embedding then never depends on which tiles came along."""


@dataclass(frozen=True)
class About:
    """What must be known of an encoder beside its weights: tile in px, `mean` and `std` of the 0..1 pixels."""

    name: str
    tile: int
    dim: int
    fingerprint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str = "unknown"
    training: Mapping[str, Any] = field(default_factory=dict)


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
        """The word that `load_encoder` was given, or the name in the description of a local file."""
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
        """SHA-256 of the weights."""
        return self.about.fingerprint

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
            batch = np.zeros((MICRO_BATCH, *tiles.shape[1:]), np.uint8)
            batch[: len(part)] = part
            embeddings[start : start + len(part)] = self._embed(torch.from_numpy(batch))[: len(part)].numpy()
        return embeddings

    @torch.inference_mode()
    def _embed(self, batch: Tensor) -> Tensor:
        # A permuted (n, y, x, c) array is channels-last already: no copy.
        pixels = batch.to(self._device).permute(0, 3, 1, 2).float() * self._scale + self._shift
        pooled: Tensor = self._network(pixels)
        return ((pooled - self._centre) / self._spread).float().cpu()


def load_encoder(name: str = "bundled", *, device: str = "cpu") -> Encoder:
    """Load the encoder called `bundled`, `judge`, `timm:NAME`, `hf-hub:ORG/NAME[@REVISION]` or `PATH.safetensors`.

    Only `timm:` and `hf-hub:` may use the network, and only for what is not in the Hugging Face cache.

    Raises:
        UsageError: if there is no such encoder or device.
        MachineError: if weights have to be fetched and cannot be, or the device is not there.
        RefusedError: if weights are damaged, pickled, or do not fit their description.
    """
    find_device(device)  # before minutes of downloading
    if name in ("bundled", "judge"):
        path = BUNDLED if name == "bundled" else JUDGE
        if not path.is_file():
            raise MachineError(f"{path}: it should be bundled and is missing; install wsi-brush again")
        return _load_file(path, name=name, device=device)
    if name.startswith("timm:"):
        return _load_timm(name, name.removeprefix("timm:"), device=device)
    if name.startswith("hf-hub:"):
        return _load_timm(name, name, device=device)
    if name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such file; expected the weights of an encoder")
        return _load_file(Path(name), name=None, device=device)
    raise UsageError(f"{name!r} is no encoder; expected bundled, judge, timm:NAME, hf-hub:ORG/NAME or PATH.safetensors")


# a file and its description -----------------------------------------------------------------------


def _load_file(path: Path, *, name: str | None, device: str) -> Encoder:
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = _read_description(path)
    digest = sha256_of(path)
    if digest != described["sha256"]:
        raise RefusedError(
            f"{path}: damaged or exchanged (sha256 {digest[:12]}, its description says "
            f"{str(described['sha256'])[:12]}); get both files again"
        )
    about = About(
        name=name or str(described["name"]),
        tile=int(described["tile"]),
        dim=int(described["dim"]),
        fingerprint=digest,
        mean=_three(described["mean"]),
        std=_three(described["std"]),
        licence=str(described.get("licence", "unknown")),
        training=described.get("training", {}),
    )
    try:
        tensors = load_file(path)
        kwargs = dict(described["kwargs"])
        if described.get("stem", "plain") != "plain":
            kwargs["embed_layer"] = _STEMS[described["stem"]]
        network = timm.create_model(described["architecture"], pretrained=False, **kwargs)
        standard = {
            key: tensors.pop(f"embedding.{key}").float() for key in ("mean", "std") if f"embedding.{key}" in tensors
        }
        network.load_state_dict(tensors)
    except KeyError:
        raise RefusedError(f"{path}: stem {described['stem']!r} is not known; expected {', '.join(_STEMS)}") from None
    except (SafetensorError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"{path}: the weights do not fit {described['architecture']} ({reason})") from None
    for key, value in standard.items():
        if value.shape != (about.dim,):
            raise RefusedError(f"{path}: embedding.{key} has shape {tuple(value.shape)}, expected ({about.dim},)")
        network.register_buffer(f"embedding_{key}", value)
    return Encoder(network, about, device=device)


class ConvolutionalStem(nn.Module):
    """Patches of 4 pixels through convolutions (Xiao et al. 2021), as CTransPath has them (Wang et al. 2022): two of
    stride 2, each with batch normalisation and ReLU, and a linear layer. (n, 3, h, w) -> (n, h / 4, w / 4, embed_dim).
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int,
        norm_layer: Callable[[int], nn.Module], **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if patch_size != 4:
            raise TypeError(f"a convolutional stem has patches of 4 pixels, not of {patch_size}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size, self.grid_size = (height, width), (4, 4), (height // 4, width // 4)
        layers: list[nn.Module] = []
        channels = (in_chans, embed_dim // 8, embed_dim // 4)
        for inner, outer in pairwise(channels):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """What it says of each patch."""
        found: Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 1))
        return found


_STEMS = {"convolutional": ConvolutionalStem}


def _read_description(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    try:
        described = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RefusedError(
            f"{path}: {beside.name} is missing beside it; it says how the weights are to be used"
        ) from None
    except (OSError, ValueError) as error:
        raise RefusedError(f"{beside}: cannot be read ({error}); get it again") from None
    needed = {"name", "architecture", "kwargs", "tile", "mean", "std", "dim", "sha256"}
    missing = needed - set(described) if isinstance(described, dict) else needed
    if missing:
        raise RefusedError(f"{beside}: lacks {', '.join(sorted(missing))}; expected the description of an encoder")
    return dict(described)


# timm and the Hugging Face hub --------------------------------------------------------------------


def _load_timm(name: str, model: str, *, device: str) -> Encoder:
    import timm
    from timm.data.config import resolve_model_data_config

    if model.startswith("hf-hub:"):
        repository, filename = model.removeprefix("hf-hub:"), None
    else:
        repository, filename = _find_repository(name, model)
    try:
        _fetch_safetensors(name, repository, filename)
        network = timm.create_model(model, pretrained=True, num_classes=0)
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"{name}: timm {timm.__version__} cannot build it ({reason})") from None
    except OSError as error:
        raise _explain(name, error) from None
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


def _find_repository(name: str, model: str) -> tuple[str, str | None]:
    """Where on the hub the weights of a timm model are: the repository, and the file if it is not the usual one."""
    import timm

    try:
        known = timm.models.get_pretrained_cfg(model, allow_unregistered=False) if timm.is_model(model) else None
    except RuntimeError:  # a model that timm knows with a tag that it does not
        known = None
    if known is None:
        raise UsageError(f"{name}: timm {timm.__version__} has no such model; see timm.list_models(pretrained=True)")
    if not known.hf_hub_id:
        raise RefusedError(f"{name}: no weights in safetensors are published for it; choose another tag")
    return known.hf_hub_id, known.hf_hub_filename


def _fetch_safetensors(name: str, repository: str, filename: str | None) -> None:
    """Have the weights in the hub's cache as safetensors, so that timm does not fall back to a pickle."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    place, _, revision = repository.partition("@")
    # OSError, and whatever the HTTP library raises that this version of the hub is built on.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    wanted = [f"{Path(filename).stem}.safetensors"] if filename else ["model.safetensors", "pytorch_model.safetensors"]
    for candidate in wanted:
        try:
            hf_hub_download(place, candidate, revision=revision or None)
            return
        except HFValidationError:
            raise UsageError(f"{name}: {place!r} is no name on the hub; expected hf-hub:ORG/NAME[@REVISION]") from None
        except LocalEntryNotFoundError as error:  # the network failed, or is not to be used
            raise _explain(name, error) from None
        except EntryNotFoundError:
            continue
        except unreachable as error:
            raise _explain(name, error) from None
    raise RefusedError(f"{name}: {place} has no {' or '.join(wanted)}; pickled weights are not loaded")


def _explain(name: str, error: BaseException) -> WsiBrushError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return MachineError(
            f"{name}: access is gated; ask for it on the model's page, then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(f"{name}: no such model on the hub, or it is private and you are not logged in")
    return MachineError(
        f"{name}: its weights are not in the local cache and cannot be fetched ({type(error).__name__}); "
        "connect once, copy the cache here and set HF_HOME, or use the bundled encoder"
    )


# pieces -------------------------------------------------------------------------------------------


def _hash_state(network: nn.Module) -> str:
    """SHA-256 of names, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
