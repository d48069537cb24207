"""A user's own SDXL (Podell et al. 2023) in the harness: a folder in the layout of the diffusers library.

It is painted with, not trained here, and it reads a prompt instead of embeddings: the same words for every canvas. One
image goes up to `size` pixels a side; a larger canvas is one image enlarged, or images side by side that know nothing
of each other. Nothing is fetched, no pickle is read, and no code that a folder brings along is run.

What it needs is known from the headers of its safetensors files before they are loaded, and asked of the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from ..condition import ConditionMap
from ..diffusion import Ladder
from ..errors import MachineError, RefusedError, UsageError
from ..field import NoiseField
from ..grid import Grid
from ..machine import find_device, free_memory
from ..objective import Drawing
from ..progress import Tell, Told
from ..scenes import Scenes
from . import System

PIPELINE = "StableDiffusionXLPipeline"
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_CELL = 8  # pixels that a side is a multiple of
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SdxlConfig:
    """Which checkpoint, what it is asked for, and how it is run; `dim` is the embeddings', which it does not read.

    folder: has `model_index.json`; size: of one image, pixels, a multiple of 8; beyond: what a larger canvas is, one
    image enlarged or tiles; dtype: of weights and features; device: as PyTorch names it.
    """

    dim: int
    folder: str
    prompt: str = ""
    negative: str = ""
    size: int = 1024
    beyond: Literal["enlarged", "tiles"] = "enlarged"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises:
        ValueError: if a size is not what it has to be.
        """
        if self.size < 64 or self.size % _CELL:
            raise ValueError(f"size {self.size}; expected a multiple of {_CELL} pixels, from 64 on")
        if self.beyond not in ("enlarged", "tiles") or self.dtype not in _TYPES:
            raise ValueError(
                f"beyond {self.beyond!r}, dtype {self.dtype!r}; expected enlarged or tiles, and one of "
                f"{', '.join(_TYPES)}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, for the brush's JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Needs:
    """Bytes: `weights` as they are held, `file` the largest of the checkpoint's while it is read, `features` of one
    image on its way through the networks, which is an estimate."""

    parameters: int
    weights: int
    file: int
    features: int

    @property
    def total(self) -> int:
        """The most that is held at once: files are read before an image is made."""
        return self.weights + max(self.file, self.features)

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("its largest file", self.file), ("an image's features", self.features))
        said = ", ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts)
        return f"{self.parameters / 1e6:.0f} M parameters need {self.total / 1e9:.2f} GB ({said})"


class Sdxl(System):
    """Its weights are in the user's folder, and held while it paints; of its own it has the digest of `config`, by
    which a brush with another prompt is another brush."""

    name = "sdxl"
    precisions = ()
    sizes = SdxlConfig
    config: SdxlConfig

    def __init__(self, config: SdxlConfig) -> None:
        super().__init__()
        self.config = config
        asked = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).digest()
        self.register_buffer("asked", torch.tensor(list(asked), dtype=torch.uint8))

    def losses(
        self, ladder: Ladder, scenes: Scenes, about: dict[str, Any], drawing: Drawing, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Raises:
        UsageError: always.
        """
        raise UsageError("sdxl: a checkpoint of your own is painted with, not trained here; train `fixed` instead")

    def needs(self) -> Needs:
        """What the checkpoint needs, from its files' headers.

        Raises:
            UsageError, RefusedError: as `networks_in`.
        """
        folder, config = Path(self.config.folder), self.config
        size = _TYPES[config.dtype].itemsize
        networks, _ = networks_in(folder)
        count = {name: sum(_parameters(path) for path in files) for name, files in networks.items()}
        vae, unet = (json.loads((folder / name / "config.json").read_text("utf-8")) for name in ("vae", "unet"))
        wide = 4 if config.dtype == "float16" and vae.get("force_upcast", True) else size
        pixels, channels = config.size**2, [*vae["block_out_channels"], vae["block_out_channels"][-1]]
        # Of the decoder's last level, measured: four times the channels that come in, three times its own; of the
        # U-Net, asked with and without the prompt, what it keeps at its first level and in a block.
        decoded = wide * pixels * (4 * channels[1] + 3 * channels[0])
        noised = 2 * size * pixels // 64 * 16 * unet["block_out_channels"][0]
        weights = size * sum(count.values()) + (wide - size) * count["vae"]
        largest = max(path.stat().st_size for files in networks.values() for path in files)
        return Needs(sum(count.values()), weights, largest, max(decoded, noised))

    @torch.no_grad()
    def paint(
        self, condition: list[ConditionMap], canvas: Grid, ladder: Ladder, *, seed: int, steps: int, guidance: float,
        tell: Tell | None = None,
    ) -> Tensor:  # fmt: skip
        """(3, height, width). Embeddings and ladder are not read; `guidance` 1 is the prompt alone, as the brush's.

        Raises:
            UsageError, RefusedError: if the folder is no SDXL of safetensors.
            MachineError: if a package or memory is missing.
        """
        pipeline, config, device = self._pipeline(), self.config, self._place
        cell = pipeline.vae_scale_factor
        field = NoiseField(seed, channels=pipeline.unet.config.in_channels)
        factor = max(1.0, max(canvas.shape) / config.size) if config.beyond == "enlarged" else 1.0
        height, width = (math.ceil(round(length / factor, 6)) for length in canvas.shape)
        small = Grid(canvas.mpp * factor, 0, 0, height, width)
        told = Told(tell, "painting", steps * small.height * small.width)
        image = torch.empty(3, *small.shape)
        for tile in small.tiles(config.size):
            height, width = (-(-length // cell) for length in tile.shape)
            noise = field.read(Grid(1.0, tile.top // cell, tile.left // cell, height, width))

            def count(
                pipeline: Any, step: int, time: Any, state: dict[str, Any], *, tile: Grid = tile
            ) -> dict[str, Any]:
                if step < steps:
                    told.add(tile.height * tile.width)
                return state

            found = pipeline(
                config.prompt,
                negative_prompt=config.negative or None,
                height=height * cell,
                width=width * cell,
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=noise[None].to(device, _TYPES[config.dtype]),
                generator=torch.Generator(device).manual_seed(seed),
                output_type="pt",
                callback_on_step_end=count,
            ).images[0]
            image[:, *tile.within(small)] = found[:, : tile.height, : tile.width].float().cpu() * 2 - 1
        if factor == 1:
            return image
        grown = functional.interpolate(
            image[None], scale_factor=factor * (1 + 1e-9), mode="bicubic", recompute_scale_factor=False
        )
        return grown[0, :, : canvas.height, : canvas.width]

    def bytes_for(self, canvas: Grid) -> int:
        """The canvas, and what the checkpoint needs."""
        return 12 * canvas.height * canvas.width + self.needs().total

    def _pipeline(self) -> Any:
        """The checkpoint, loaded.

        Raises:
            UsageError, RefusedError, MachineError: as `paint`.
        """
        try:
            import accelerate  # noqa: F401
            import transformers  # noqa: F401
            from diffusers import StableDiffusionXLPipeline
        except ImportError as error:
            raise MachineError(
                f"the system `sdxl` needs {error.name}, which is not installed; install wsi-brush with the extra [sdxl]"
            ) from None
        config, needs = self.config, self.needs()
        _, variant = networks_in(Path(config.folder))
        _check(needs, config, self._place)
        try:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                config.folder,
                dtype=_TYPES[config.dtype],
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                add_watermarker=False,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            line = str(error).strip().splitlines()[0]
            raise RefusedError(f"{config.folder}: cannot be loaded ({line}); save the checkpoint again") from None
        there = sum(weight.numel() for name in NETWORKS for weight in getattr(pipeline, name).parameters())
        if there > needs.parameters:  # what a file lacks is drawn at random, and only logged
            raise RefusedError(
                f"{config.folder}: {there - needs.parameters} of {there} parameters are not in its files; save the "
                "checkpoint again"
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self._place)

    @property
    def _place(self) -> str:
        """The device of its configuration; or a GPU, where it was taken there."""
        return self.config.device if self.device.type == "cpu" else str(self.device)


def networks_in(folder: Path) -> tuple[dict[str, list[Path]], str | None]:
    """The safetensors files of every network of an SDXL folder, and the variant they are named by.

    Raises:
        UsageError: if it is no such folder, has no vocabulary, or has its weights as pickles only.
        RefusedError: if it asks for code that is neither diffusers' nor transformers'.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        kind = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder}: no checkpoint here; expected a folder in the layout of diffusers, with model_index.json"
        ) from None
    if kind != PIPELINE:
        raise UsageError(f"{folder}: a {kind}; expected a {PIPELINE}")
    for name, part in index.items():
        if isinstance(part, list) and part[0] not in (None, "diffusers", "transformers"):
            raise RefusedError(
                f"{folder}: {name} is code of {part[0]}, which is not run; expected diffusers' own parts"
            )
    for name in ("tokenizer", "tokenizer_2"):  # without them transformers would go on with a vocabulary of no words
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise UsageError(f"{folder / name}: no vocabulary; expected tokenizer.json, or vocab.json and merges.txt")
    found, variants = {}, set[str | None]()
    for name in NETWORKS:
        files = sorted((folder / name).glob("*.safetensors"))
        plain = [path for path in files if "." not in path.stem]
        if not files:
            raise UsageError(f"{folder / name}: no safetensors file; pickles are not read, save the checkpoint anew")
        if not plain:  # NAME.fp16.safetensors, or NAME.fp16-00001-of-00002.safetensors
            first = files[0].stem.split(".")[-1].split("-")[0]
            plain = [path for path in files if path.stem.split(".")[-1].split("-")[0] == first]
            variants.add(first)
        else:
            variants.add(None)
        found[name] = plain
    if len(variants) > 1:
        raise UsageError(f"{folder}: its networks are of several variants; expected one for all of them")
    return found, variants.pop()


def _parameters(path: Path) -> int:
    """How many numbers a safetensors file has, from its header.

    Raises:
        RefusedError: if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RefusedError(f"{path}: damaged ({error}); copy it again") from None


def _check(needs: Needs, config: SdxlConfig, device: str) -> None:
    """Whether the machine has what is needed.

    Raises:
        MachineError: if not, in one line with both figures.
    """
    cuda = find_device(device).type == "cuda"
    advice = "float16 halves it" if config.dtype == "float32" else "a smaller `size` needs less"
    places = [("memory", free_memory(), needs.weights + needs.file if cuda else needs.total)]
    if cuda:
        places.append((device, torch.cuda.mem_get_info(device)[0], needs.weights + needs.features))
    for place, free, wanted in places:
        if free is not None and free < wanted:
            raise MachineError(
                f"{config.folder}: {needs} in {config.dtype}; {place} has {free / 1e9:.2f} GB free; {advice}"
            )
