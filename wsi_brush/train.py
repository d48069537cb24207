"""Verb: slides -> brush. Resumable; a step is a pure function of the weights and its number.

The first run decodes and embeds the slides into a training pack in the work folder; the same command again goes on
from the newest checkpoint that verifies. Two checkpoints are kept, each safetensors and JSON with its SHA-256.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .brush import Brush, save_brush
from .commit import check_target, fingerprint, read_manifest, sha256_of, write_json
from .coordinates import KIND as PACK
from .coordinates import CoordinateSampler, Scenes, TrainingPack, build_pack
from .denoiser import ConditionMap, Denoiser, DenoiserConfig, Setting
from .diffusion import Ladder, Objective, coefficients, loss
from .encoder import load_encoder
from .errors import MachineError, RefusedError, UsageError
from .field import mollifier, mollifier_radius
from .operators import Scatter, nodes, splat
from .slide import open_slide

Tell = Callable[[str], None]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SlideSource(_Strict):
    """A slide to train on; `assume_mpp` where its header has no pixel size."""

    path: str
    assume_mpp: float | None = None


class Data(_Strict):
    """What is trained on."""

    slides: list[SlideSource] = Field(min_length=1)
    encoder: str = "bundled"
    in_memory: bool = True
    shares: tuple[float, ...] = (0.42, 0.2, 0.15, 0.12, 0.11)  # of the pitches 0.5, 1, 2, 4, 8 µm
    sizes: tuple[int, ...] = (384, 384, 384, 256, 128)  # of a scene, pixels
    window: int = 128
    points: int = 256


class Model(_Strict):
    """The operator's sizes; see `denoiser.DenoiserConfig`."""

    width: int = 48
    depth: tuple[int, int, int] = (1, 2, 4)
    layout: int = 4
    heads: int = 6
    tokens: int = 16
    mollifier: float = 0.5


class Optimisation(_Strict):
    """How it is trained. It ends after `steps`, or `minutes` if they are over first; the rate falls to zero by then."""

    steps: int = 100_000
    minutes: float = math.inf
    batch: int = 8
    rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.01
    clip: float = 1.0
    average: float = 0.999
    objective: Objective = "v"
    scattered: float = 0.1  # weight of the scattered points' loss beside the windows'
    unconditional: float = 0.1
    full_range: float = 0.1  # part of the scenes whose noise is drawn from the whole range, whatever their pitch
    margin: float = 1.5  # noise levels are drawn this factor beyond those that the solver visits
    seed: int = 0
    threads: int = 0
    checkpoint_minutes: float = 3.0


class TrainConfig(_Strict):
    """A training run: [data], [model], [optimisation]."""

    data: Data
    model: Model = Model()
    optimisation: Optimisation = Optimisation()
    card: dict[str, Any] = {}


def read_config(path: Path) -> TrainConfig:
    """A TOML file as a checked configuration.

    Raises:
        UsageError: naming the key that is wrong, and the nearest that exists.
    """
    try:
        return TrainConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = [name for part in (Data, Model, Optimisation, SlideSource) for name in part.model_fields]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"; did you mean {near[0]}?" if near and first["type"] == "extra_forbidden" else ""
        raise UsageError(f"{path}: {key}: {first['msg']}{hint}") from None


def train_brush(
    config: TrainConfig, target: Path, *, work: Path, slides: Path = Path(), overwrite: bool = False, tell: Tell = print
) -> Brush:
    """Train a brush into the folder `target`; pack and checkpoints live in `work`. Paths are relative to `slides`.

    Raises:
        UsageError, SlideError, RefusedError, MachineError: one line each.
    """
    check_target(target, kind="brush", overwrite=overwrite)
    if config.optimisation.threads:
        torch.set_num_threads(config.optimisation.threads)
    pack = _pack(config.data, work, slides, tell)
    run = _Run(config, pack, work)
    run.resume(tell)
    while not run.over:
        value = run.step()
        if run.number in (1, 10) or run.number % 50 == 0:
            tell(f"step {run.number} {run.seconds / 60:.1f} min loss {value:.4f} rate {run.rate:.2e}")
        if run.due:
            run.checkpoint()
        if run.number % 500 == 0:
            tell(f"step {run.number} held-out {run.held_out()}")
    run.checkpoint()
    brush = run.brush()
    save_brush(brush, target, overwrite=overwrite)
    return brush


def _pack(data: Data, work: Path, slides: Path, tell: Tell) -> TrainingPack:
    path = work / "pack"
    encoder = load_encoder(data.encoder)
    found = read_manifest(path) if path.is_dir() else None
    if found is None:
        tell(f"decoding and embedding {len(data.slides)} slides into {path}")
        opened = [open_slide(slides / source.path, assume_mpp=source.assume_mpp) for source in data.slides]
        work.mkdir(parents=True, exist_ok=True)
        build_pack(opened, path, encoder=encoder)
    elif (
        found.get("kind") != PACK or found["fingerprint"] != encoder.fingerprint or found["slides"] != len(data.slides)
    ):
        raise RefusedError(f"{path}: made with another encoder or other slides; remove it or choose another --work")
    return TrainingPack(path, in_memory=data.in_memory)


class _Run:
    """Weights, their average, the optimiser, and the clock of a training run."""

    def __init__(self, config: TrainConfig, pack: TrainingPack, work: Path) -> None:
        self.config, self.pack, self.work = config, pack, work
        o = config.optimisation
        torch.manual_seed(o.seed)
        self.denoiser = Denoiser(DenoiserConfig(dim=pack.about["dim"], **config.model.model_dump()))
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False)
        decayed = [p for p in self.denoiser.parameters() if p.ndim > 1]
        others = [p for p in self.denoiser.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": o.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=o.rate, betas=(0.9, 0.98), foreach=True)
        self.ladder = Ladder(tuple(pack.about["pitches"]), tuple(pack.about["details"]))
        sizes = {"shares": config.data.shares, "sizes": config.data.sizes, "window": config.data.window}
        self.sampler = CoordinateSampler(pack, **sizes, points=config.data.points, seed=o.seed)  # type: ignore[arg-type]
        self.number, self.seconds, self.saved, self.rate = 0, 0.0, 0.0, 0.0
        self._clock = time.monotonic()

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, 0 to 1."""
        o = self.config.optimisation
        return max(self.number / o.steps, self.seconds / 60 / o.minutes)

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.progress >= 1

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.seconds - self.saved > 60 * self.config.optimisation.checkpoint_minutes

    def step(self) -> float:
        """One step of the optimiser; returns the loss on the windows.

        Raises:
            MachineError: if the loss is not a number; the last checkpoint is as it was.
        """
        o = self.config.optimisation
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + self.number)
        scenes = self.sampler.draw(self.number, o.batch)
        window, scattered = losses(self.denoiser, self.ladder, scenes, self.pack.about, o, generator)
        total = window + o.scattered * scattered
        if not torch.isfinite(total):
            raise MachineError(
                f"step {self.number}: the loss is {total.item()}; lower `rate` and run again from the checkpoint"
            )
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), o.clip)
        left = max(0.0, 1 - self.progress)
        self.rate = o.rate * min(1.0, (self.number + 1) / o.warmup) * min(1.0, left / 0.6)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.optimiser.step()
        self.number += 1
        keep = min(o.average, (self.number + 1) / (self.number + 10))
        averages, weights = list(self.average.parameters()), list(self.denoiser.parameters())
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - keep)
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return window.item()

    @torch.no_grad()
    def held_out(self, batches: int = 2) -> str:
        """Loss of the averaged weights on the held-out part of the slides, by pitch that has room there."""
        data, o = self.config.data, self.config.optimisation
        found = []
        for level, mpp in enumerate(self.ladder.pitches[:3]):
            shares = [float(index == level) for index in range(len(self.ladder.pitches))]
            sizes = [min(size, 256) for size in data.sizes]
            sampler = CoordinateSampler(
                self.pack, shares=shares, sizes=sizes, window=data.window, points=data.points, seed=1, held_out=True
            )
            values = []
            for batch in range(batches):
                generator = torch.Generator().manual_seed(batch)
                scenes = sampler.draw(batch, 8, mpp=mpp)
                values.append(losses(self.average, self.ladder, scenes, self.pack.about, o, generator)[0].item())
            found.append(f"{mpp:g} µm {sum(values) / len(values):.4f}")
        self._clock = time.monotonic()  # judging is not training
        return ", ".join(found)

    def brush(self) -> Brush:
        """The averaged weights as a brush."""
        about = {name: self.pack.about[name] for name in ("encoder", "fingerprint", "tile", "embeddings")}
        about |= {"objective": self.config.optimisation.objective, **self.config.card}
        about |= {"training": {"steps": self.number, "minutes": round(self.seconds / 60, 1)}}
        about["training"] |= self.config.model_dump(mode="json", exclude={"card": True, "data": {"slides"}})
        average = copy.deepcopy(self.average).eval().requires_grad_(False)
        return Brush(average, self.ladder, about)

    # -- checkpoints -----------------------------------------------------------------------------------

    @property
    def _identity(self) -> str:
        """What must not change between a run and its resumption."""
        changeable = {"minutes", "steps", "threads", "checkpoint_minutes"}
        plain = self.config.model_dump(
            mode="json", exclude={"optimisation": changeable, "card": True, "data": {"in_memory"}}
        )
        return fingerprint({"config": plain, "encoder": self.pack.about["fingerprint"]})

    def checkpoint(self) -> None:
        """Write the older of the two generations anew."""
        tensors: dict[str, Tensor] = {}
        for prefix, state in (("weights", self.denoiser.state_dict()), ("average", self.average.state_dict())):
            tensors |= {f"{prefix}.{name}": value.detach() for name, value in state.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        generation = min(("a", "b"), key=lambda name: (_read_checkpoint(self.work, name) or {"step": -1})["step"])
        partial, path = self.work / f"{generation}.partial", self.work / f"checkpoint-{generation}.safetensors"
        save_file(tensors, partial)
        os.replace(partial, path)
        facts = {"step": self.number, "seconds": self.seconds, "identity": self._identity, "sha256": sha256_of(path)}
        write_json(self.work / f"checkpoint-{generation}.json", facts)
        self.saved = self.seconds

    def resume(self, tell: Tell) -> None:
        """Go on from the newest generation that verifies.

        Raises:
            RefusedError: if it was made by another configuration.
        """
        for facts in sorted(
            filter(None, (_read_checkpoint(self.work, name) for name in "ab")), key=lambda f: -f["step"]
        ):
            path = self.work / f"checkpoint-{facts['name']}.safetensors"
            if not path.is_file() or sha256_of(path) != facts["sha256"]:
                tell(f"{path}: damaged, trying the generation before")
                continue
            if facts["identity"] != self._identity:
                raise RefusedError(f"{path}: made by another configuration; choose another --work or remove it")
            try:
                tensors = load_file(path)
            except SafetensorError as error:
                raise RefusedError(f"{path}: {error}; remove it and run again") from None
            for prefix, module in (("weights.", self.denoiser), ("average.", self.average)):
                part = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
                module.load_state_dict(part)
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimiser."):
                    _, index, field = name.split(".")
                    state.setdefault(int(index), {})[field] = value
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
            self.number, self.seconds = facts["step"], facts["seconds"]
            self.saved, self._clock = self.seconds, time.monotonic()
            tell(f"going on from step {self.number}")
            return


def _read_checkpoint(work: Path, name: Literal["a", "b"] | str) -> dict[str, Any] | None:
    path = work / f"checkpoint-{name}.json"
    try:
        return {**json.loads(path.read_text(encoding="utf-8")), "name": name}
    except (OSError, ValueError):
        return None


# -- one batch -----------------------------------------------------------------------------------------


def draw_sigma(ladder: Ladder, mpp: float, count: int, o: Optimisation, generator: torch.Generator) -> Tensor:
    """Noise levels for scenes of a pitch: log-uniform over what the solver visits there, some over the whole range."""
    level = ladder.pitches.index(mpp)
    low, high = ladder.span(level)
    low, high = low / o.margin, high * (o.margin if level < len(ladder.pitches) - 1 else 1.0)
    whole = torch.rand(count, generator=generator) < o.full_range
    place = torch.rand(count, generator=generator)
    near = math.log(low) + place * math.log(high / low)
    far = math.log(ladder.sigma_min) + place * math.log(ladder.sigma_max / ladder.sigma_min)
    return torch.where(whole, far, near).exp()


def losses(
    denoiser: Denoiser,
    ladder: Ladder,
    scenes: Scenes,
    about: dict[str, Any],
    o: Optimisation,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean loss over the windows' points and over the scattered points of a batch of scenes.

    Both estimate the scenes' mean loss without bias, so any mixture of them does.
    """
    image = torch.from_numpy(scenes.images)
    n, _, size, _ = image.shape
    sigma = draw_sigma(ladder, scenes.mpp, n, o, generator)
    wide = sigma[:, None, None, None]
    noisy = image + wide * torch.randn(image.shape, generator=generator)
    given = noisy * coefficients(wide)[2]
    known = (torch.rand(n, generator=generator) >= o.unconditional).float()
    origin = torch.rand(n, 2, generator=generator).double() * 8192
    setting = denoiser.setting(sigma, scenes.mpp, _maps(scenes, about), origin=origin, known=known)
    corners = torch.from_numpy(scenes.windows)
    side = scenes.window

    def windows(of: Tensor) -> Tensor:
        cut = [of[s, :, r : r + side, c : c + side] for s, (r, c) in enumerate(corners.tolist())]
        return torch.stack(cut)

    scattered = scenes.weight > 0
    points = torch.from_numpy(scenes.points)
    scatter = _scatter(points) if scattered else None
    values = mollified_at(given, points, denoiser.config.mollifier) if scattered else given
    grid, tokens = denoiser.layout(
        *_gathered(denoiser, windows(given), corners, setting, size, scatter, values, scenes), setting
    )
    memory = denoiser.memory(tokens, setting)
    said = denoiser.paint(windows(given), setting, grid, memory, corner=(corners[:, 0], corners[:, 1]))
    window = loss(said, windows(image), windows(noisy), wide, objective=o.objective).mean()
    if scatter is None:
        return window, torch.zeros(())
    said = denoiser.paint_points(values, scatter, setting, grid, memory)
    scene, rows, columns = scatter.scene, scatter.rows, scatter.columns
    at = loss(
        said,
        image[scene, :, rows, columns],
        noisy[scene, :, rows, columns],
        sigma[scene][:, None],
        objective=o.objective,
    )
    return window, at.mean()


def _scatter(points: Tensor) -> Scatter:
    scene = torch.arange(len(points))[:, None].expand(points.shape[:2]).flatten()
    return Scatter.of(scene, points[..., 0].flatten(), points[..., 1].flatten(), levels=3)


def _maps(scenes: Scenes, about: dict[str, Any]) -> list[ConditionMap]:
    maps = []
    for mpp, (values, present, corner, cell) in sorted(scenes.maps.items()):
        moments = about["embeddings"][f"{mpp:g}"]
        there = torch.from_numpy(present)
        standard = (torch.from_numpy(values) - torch.tensor(moments["mean"])) / torch.tensor(moments["std"])
        maps.append(ConditionMap(standard * there[..., None], there, torch.from_numpy(corner), cell))
    return maps


def _gathered(
    denoiser: Denoiser, window: Tensor, corners: Tensor, setting: Setting, size: int, scatter: Scatter | None, values: Tensor,
    scenes: Scenes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Node sums and their mass of a batch of scenes, from the windows' cells and the scattered points' cells."""
    n, side = len(window), window.shape[2] // 32
    count = size // 32 + 1
    own = nodes(denoiser.sketch(window, setting))
    own = torch.cat([own, nodes(splat(torch.ones(n, side * 4, side * 4, 1), 4))], -1)
    total = torch.zeros(n, count, count, own.shape[-1])
    for scene, (row, column) in enumerate((corners // 32).tolist()):
        total[scene, row : row + side + 1, column : column + side + 1] = own[scene]
    if scatter is not None:
        cells = (size**2 - window.shape[2] ** 2) / 64
        occupied = 1 - (1 - 1 / cells) ** scenes.points.shape[1]  # the chance that a cell holds a point
        total = total + denoiser.sketch_points(values, scatter, 1 / occupied, setting, (size, size))
    return total[..., :-1], total[..., -1:]


def mollified_at(image: Tensor, points: Tensor, width: float) -> Tensor:
    """A x at scattered points only: (n, 3, h, w) and (n, k, 2) -> (n k, 3); equals `field.mollify` there."""
    radius, taps = mollifier_radius(width), mollifier(width)
    n, _, h, w = image.shape
    scene = torch.arange(n)[:, None]
    total = image.new_zeros(n, points.shape[1], image.shape[1])
    mass = image.new_zeros(n, points.shape[1])
    for down, first in zip(range(-radius, radius + 1), taps, strict=True):
        for right, second in zip(range(-radius, radius + 1), taps, strict=True):
            rows, columns = points[..., 0] + down, points[..., 1] + right
            here = ((rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)) * (first * second)
            total = total + image[scene, :, rows.clamp(0, h - 1), columns.clamp(0, w - 1)] * here[..., None]
            mass = mass + here
    return (total / mass[..., None]).flatten(0, 1)
