"""The figures that papers print: CLIP FID and Crop FID, each beside its floor and beside a thumbnail's.

**CLIP FID** (∞-Diff, ∞-Brush; the protocol of clean-fid): images are shrunk to 224 pixels (uint8, bicubic) and go
through OpenAI's CLIP ViT-B/32; its 512 numbers are not normalised. **Crop FID** (∞-Brush, after MultiDiffusion): crops
of 256 pixels at the finest pitch that all slides show go through the Inception-v3 of Heusel et al. (2017); its 2048
numbers. Of both the Fréchet distance where there are images enough for a covariance, and the kernel distance (KID).

At 224 pixels an image of 4096 shows a twentieth of its bandwidth, so a blurred one scores as well as a sharp one. The
*thumbnail* says how well: the same figure for real images that were shrunk to 256 pixels and enlarged again.

Networks are torch-fidelity's. Weights are two published files, named by their SHA-256, from the user's caches; nothing
is fetched unless `find_networks` is told to.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .commit import sha256_of
from .errors import MachineError, RefusedError
from .likeness import THUMBNAIL, distribution, see, through_thumbnails
from .progress import Tell, Told
from .samples import Codec
from .sides import Sides

CLIP_HOME = ("timm/vit_base_patch32_clip_224.openai", "a6f597a30f7b82c51704746581f9a4e41421e878")
"""Repository on the Hugging Face hub, and its revision."""
CLIP_FILE = "open_clip_model.safetensors"
CLIP_SHA256 = "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_LAYER = "2048"
"""torch-fidelity's name of the last pooling, which is the length of its vectors."""

CROP = 256  # pixels a side
_IMAGES = (4096, 2048, 1024, 512)  # pixels a side that a CLIP FID is taken of: the largest with
_FEWEST = 16  # of them in each real half and among the synthetic ones
_BATCH = 16


# -- networks ------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Network:
    """Squares become vectors: (n, tile, tile, 3) uint8 -> (n, dim) float32; a `TileEncoder`.

    `features` has the preprocessing of the metric in it and takes squares of any side.
    """

    name: str
    dim: int
    fingerprint: str
    features: Callable[[NDArray[np.uint8]], Tensor]
    tile: int = CROP

    def at(self, tile: int) -> Network:
        """The same for squares of another side."""
        return replace(self, tile=tile)

    def __call__(self, tiles: NDArray[np.uint8], /) -> NDArray[np.float32]:
        found = np.empty((len(tiles), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(tiles), _BATCH):
                found[start : start + _BATCH] = self.features(tiles[start : start + _BATCH]).numpy()
        return found


class Networks(NamedTuple):
    """What was found; `missing`: one line on what was not, or nothing."""

    clip: Network | None
    inception: Network | None
    missing: str


def find_networks(*, download: bool = False, tell: Tell | None = None) -> Networks:
    """The two networks, from the caches of the Hugging Face hub (HF_HOME) and of torch.hub (TORCH_HOME).

    `download`: fetch what is not there.

    Raises:
        MachineError: if it cannot be fetched.
        RefusedError: if a file is not the published one.
    """
    clip, inception = _clip_file(), _inception_file()
    if download and clip is None:
        told = Told(tell, f"fetching {CLIP_FILE}, 605 MB", 1)
        told.add(0)
        clip = _fetch_clip()
        told.add()
    if download and not inception.is_file():
        told = Told(tell, f"fetching {INCEPTION_FILE}, 96 MB", 1)
        told.add(0)
        _fetch_inception(inception)
        told.add()
    lacking = []
    if clip is None:
        lacking.append(f"no CLIP FID without {CLIP_FILE} of {CLIP_HOME[0]} in the Hugging Face cache ({_hub()})")
    if not inception.is_file():
        lacking.append(f"no Crop FID without {inception}")
    return Networks(
        None if clip is None else load_clip(clip),
        load_inception(inception) if inception.is_file() else None,
        f"{'; '.join(lacking)}; --download fetches what is missing, once" if lacking else "",
    )


def load_clip(path: Path) -> Network:
    """The image side of a CLIP in OpenAI's layout (safetensors), as `encode_image` of uint8 squares.

    Raises:
        RefusedError: if it is not the published file.
    """
    from safetensors import safe_open
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from torch_fidelity.feature_extractor_clip import build_model
    from torchvision.transforms.functional import normalize

    _check(path, sha256_of(path), CLIP_SHA256)
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("visual.") or name == "text_projection"]  # noqa: SIM118
        visual = build_model({name: file.get_tensor(name) for name in names}, torch.float32).visual
    side = visual.input_resolution
    mean, std = ([255 * value for value in values] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def features(tiles: NDArray[np.uint8]) -> Tensor:
        # squares, so that nothing is left for a crop of the centre
        small = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in tiles]
        found: Tensor = visual(normalize(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float(), mean, std))
        return found

    return Network("CLIP ViT-B/32", visual.output_dim, CLIP_SHA256, features)


def load_inception(path: Path) -> Network:
    """The Inception-v3 of published FIDs, whose own preprocessing enlarges to 299 pixels as TensorFlow 1 did.

    Raises:
        RefusedError: if it is not the published file.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The file is a pickle and the library unpickles it: these very bytes, and only where they are the published ones.
    content = path.read_bytes()
    _check(path, hashlib.sha256(content).hexdigest(), INCEPTION_SHA256)
    module = FeatureExtractorInceptionV3(
        "inception-v3-compat", [INCEPTION_LAYER], feature_extractor_weights_path=io.BytesIO(content)
    ).to(memory_format=torch.channels_last)

    def features(tiles: NDArray[np.uint8]) -> Tensor:
        # contiguous: the library enlarges by fancy indexing, which takes twice as long on a view
        found: Tensor = module(torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous())[0]
        return found

    return Network("Inception-v3", int(INCEPTION_LAYER), INCEPTION_SHA256, features)


def _check(path: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise RefusedError(
            f"{path}: damaged or exchanged (sha256 {digest[:12]}, the published file has {expected[:12]}); "
            "remove it, and fetch it with --download"
        )


# -- weights -------------------------------------------------------------------------------------------


def _hub() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _clip_file() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(CLIP_HOME[0], CLIP_FILE, revision=CLIP_HOME[1])
    return Path(found) if isinstance(found, str) else None


def _inception_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _fetch_clip() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # OSError, and whatever the HTTP library raises that this version of the hub is built on.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        return Path(hf_hub_download(CLIP_HOME[0], CLIP_FILE, revision=CLIP_HOME[1]))
    except unreachable as error:
        raise MachineError(
            f"{CLIP_FILE} of {CLIP_HOME[0]} cannot be fetched ({type(error).__name__}); connect once, or copy it here "
            f"from the cache of another machine ({_hub()})"
        ) from None


def _fetch_inception(path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another digest
        raise MachineError(
            f"{INCEPTION_FILE} cannot be fetched ({type(error).__name__}); connect once, or copy it to {path}"
        ) from None


# -- figures -------------------------------------------------------------------------------------------


def published(
    sides: Sides, networks: Networks, codec: Codec, *, mpp: float, most: int, seed: int, tell: Tell | None = None
) -> dict[str, Any]:
    """CLIP FID and Crop FID of two sides at pitch `mpp`, ready for JSON: under `clip` and `crop` what
    `likeness.distribution` finds, with `thumbnail` beside each `floor`.

    Images and crops are squares half a side apart where there is tissue, at most `most` of a side, drawn by `seed`. An
    image is as large as leaves enough of them, up to 4096 pixels: where the slides are that size, each is one image.

    Raises:
        SlideError: if a network's numbers are not finite.
    """
    image = image_side(sides, mpp)
    found: dict[str, Any] = {"mpp": round(mpp, 5), "thumbnail": THUMBNAIL, "image": image}
    for name, network, side in (("clip", networks.clip, image), ("crop", networks.inception, CROP)):
        if network is None:
            found[name] = {"side": side, "missing": "its weights are not here"}
            continue
        eye = network.at(side)
        words = f"{network.name}, {side} pixels"
        (seen,) = see(sides, mpp, [eye], codec, most=most, seed=seed, tell=tell, words=words)
        shrunk = through_thumbnails(sides, seen, eye, codec, image // THUMBNAIL, tell)
        about = {"network": network.name, "fingerprint": network.fingerprint, "dim": network.dim, "side": side}
        found[name] = about | distribution(sides, seen, seed=seed, thumbnail=shrunk)
    return found


def image_side(sides: Sides, mpp: float) -> int:
    """Side of the images of which a CLIP FID is taken, pixels: it depends on the slides alone."""
    for side in _IMAGES:
        real, other = sides.spots(mpp, side, most=sys.maxsize)
        if min(len(other), *map(len, sides.halves(real)[0])) >= _FEWEST:
            return side
    return _IMAGES[-1]
