"""A Brush: a trained denoiser and all it needs to paint, as safetensors and JSON.

On disk a brush is a folder: `brush.safetensors` (the weights), `brush.json` (sizes of the operator, the ladder, which
encoder's embeddings it understands and their moments, how it was trained; `system` where it is one of `baselines`;
`labels` where classes are its condition; `everywhere` where it was shown pictures that are no H&E), and the manifest of
`commit` with the SHA-256 of both.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .baselines import OURS, System, build
from .commit import fingerprint, read_manifest, sha256_of, staged, write_json
from .condition import ConditionMap
from .denoiser import Denoiser, DenoiserConfig
from .diffusion import Ladder
from .errors import RefusedError, UsageError
from .grid import Grid
from .labels import Labels
from .store import EmbeddingMap
from .tissue import PITCH, Tissue, find_tissue

if TYPE_CHECKING:
    from .slide import Slide

KIND = "brush"
BUNDLED = Path(__file__).parent / "weights" / "brush"
_WEIGHTS, _ABOUT = "brush.safetensors", "brush.json"


@dataclass(frozen=True)
class Brush:
    """A trained network, its ladder of pitches, and what it understands.

    `about`: encoder (name), fingerprint (of the encoder), tile (pixels), pitches (of embeddings, µm), embeddings
    (moments by pitch), objective, and the facts of its training.
    """

    network: Denoiser | System
    ladder: Ladder
    about: dict[str, Any]
    sha256: str = ""

    @property
    def rival(self) -> System | None:
        """The network, where it is one of `baselines`."""
        return self.network if isinstance(self.network, System) else None

    @property
    def denoiser(self) -> Denoiser:
        """The network, where it is ours.

        Raises:
            TypeError: if not.
        """
        if isinstance(self.network, System):
            raise TypeError(f"{self.network.name} is no Denoiser")
        return self.network

    @property
    def device(self) -> torch.device:
        """Where its weights are, and it computes."""
        return torch.as_tensor(next(iter(self.network.state_dict().values()))).device

    def on(self, device: torch.device) -> Brush:
        """The same brush on a device; a copy, where it is on another."""
        if self.device == device:
            return self
        return replace(self, network=copy.deepcopy(self.network).to(device))

    @property
    def fingerprint(self) -> str:
        """A short digest of all that decides what it paints: weights, ladder, and what it knows of its embeddings."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
        return fingerprint({"weights": digest.hexdigest(), "ladder": self.ladder.to_json(), "about": self.about})

    @property
    def pitches(self) -> tuple[float, ...]:
        """Pitches of the embeddings it is conditioned on, µm, finest first."""
        return tuple(sorted(float(pitch) for pitch in self.about["embeddings"]))

    @property
    def labels(self) -> Labels | None:
        """The classes that it is asked for, where they are its condition."""
        return Labels(tuple(self.about["labels"])) if "labels" in self.about else None

    @property
    def everywhere(self) -> bool:
        """Whether it looks at all of a slide, as it was trained to; else at its tissue."""
        return bool(self.about.get("everywhere", False))

    def tissue_of(self, slide: Slide) -> Tissue:
        """Where it looks at a slide."""
        return Tissue.everywhere(slide.grid.at(PITCH)) if self.everywhere else find_tissue(slide)

    def standardised(self, mpp: float, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings (..., dim) of a pitch in units of their spread over the training data, within its `limit` where it
        has one (trained by 0.7.0 or later, and the bundled one, which was given it afterwards)."""
        moments = self.about["embeddings"][f"{mpp:g}"]
        mean, std = (np.asarray(moments[name], np.float32) for name in ("mean", "std"))
        limit = np.float32(moments.get("limit", np.inf))
        return np.asarray(np.clip((values - mean) / std, -limit, limit), np.float32)

    def condition(self, maps: Mapping[float, EmbeddingMap], canvas: Grid, pitch: float) -> list[ConditionMap]:
        """Embedding maps as the denoiser reads them on a canvas: one scene, in pixels of `pitch` µm from its corner; on
        the brush's device.

        Raises:
            UsageError: if a pitch is missing or the dimension is another encoder's.
        """
        found, device = [], self.device
        for mpp in self.pitches:
            if mpp not in maps:
                raise UsageError(f"the brush needs embeddings at {mpp:g} µm; the reference has {sorted(maps)}")
            lattice, values = maps[mpp].lattice, maps[mpp].values.astype(np.float32)
            if values.shape[-1] != self.network.config.dim:
                raise UsageError(
                    f"the brush was trained on embeddings of {self.about['encoder']} "
                    f"({self.network.config.dim} numbers), the reference has {values.shape[-1]}; "
                    "embed it again with that encoder"
                )
            present = np.isfinite(values[..., 0])
            values = np.where(present[..., None], self.standardised(mpp, values), 0)
            corner = (np.array(lattice.extent[:2]) - canvas.extent[:2]) / pitch
            found.append(
                ConditionMap(
                    torch.from_numpy(values.astype(np.float32))[None].to(device),
                    torch.from_numpy(present.astype(np.float32))[None].to(device),
                    torch.from_numpy(corner.astype(np.float32))[None].to(device),
                    lattice.mpp / pitch,
                )
            )
        return found


def save_brush(brush: Brush, target: Path, *, overwrite: bool = False) -> None:
    """Write a brush folder, whole or not at all.

    Raises:
        RefusedError, MachineError: as `commit.staged`.
    """
    about = {"denoiser": brush.network.config.to_json(), "ladder": brush.ladder.to_json(), **brush.about}
    about |= {"system": brush.rival.name} if brush.rival is not None else {}
    with staged(target, kind=KIND, about={"format": 1}, overwrite=overwrite) as stage:
        state = {name: value.detach().contiguous().cpu() for name, value in brush.network.state_dict().items()}
        save_file(state, stage / _WEIGHTS)
        write_json(stage / _ABOUT, about)


def load_brush(name: str | Path = "bundled", *, device: str = "cpu") -> Brush:
    """The bundled brush, or one in a folder.

    Raises:
        UsageError: if there is none.
        RefusedError: if its files are not what its manifest says.
    """
    folder = BUNDLED if str(name) == "bundled" else Path(name)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.get("kind") != KIND:
        raise UsageError(
            f"{folder}: no brush here; expected a folder with {_WEIGHTS} and {_ABOUT}, or the name 'bundled'"
        )
    for file, expected in manifest["files"].items():
        if file in (_WEIGHTS, _ABOUT) and (
            not (folder / file).is_file() or sha256_of(folder / file) != expected["sha256"]
        ):
            raise RefusedError(
                f"{folder / file}: missing or damaged (its SHA-256 is not the manifest's); copy the brush again"
            )
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        system, sizes = about.pop("system", OURS), about.pop("denoiser")
        network: Denoiser | System
        if system == OURS:
            network = Denoiser(DenoiserConfig(**{**sizes, "depth": tuple(sizes["depth"])}))
        else:
            network = build(system, sizes)
        network.load_state_dict(load_file(folder / _WEIGHTS, device="cpu"))
        kept: dict[str, Any] = dict(about.pop("ladder"))
        kept |= {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
        ladder = Ladder(**kept)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        line = str(error).splitlines()[0]
        raise RefusedError(
            f"{folder}: made by another version of wsi-brush ({line}); train or fetch it again"
        ) from None
    network.eval().requires_grad_(False).to(device)
    return Brush(network, ladder, about, manifest["files"][_WEIGHTS]["sha256"])
