"""Verb: slides -> brush. Resumable; a step is a pure function of the weights, its number and the rate.

The first run decodes and embeds the slides into a training pack in the work folder; the same command again goes on
from the newest checkpoint that verifies.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .baselines import System, build
from .brush import Brush, load_brush, save_brush
from .checkpoint import Checkpoints
from .commit import check_target, fingerprint, read_manifest
from .coordinates import KIND as PACK
from .coordinates import LADDER, TRAIN_UNTIL, CoordinateSampler, TrainingPack, build_pack, check_room
from .denoiser import NODE, Denoiser, DenoiserConfig
from .diffusion import Ladder
from .embed import terms_of
from .encoder import Encoder, load_encoder
from .errors import MachineError, RefusedError, UsageError
from .field import mollifier_radius
from .labels import LABELS, Labels
from .machine import check_precision, find_device, name_of, products
from .objective import losses
from .optimiser import optimisers
from .recipe import Data, Model, Rival, TrainConfig
from .scenes import Scenes
from .scratch import hold
from .slide import Slide, open_slide
from .zoo import terms_line

Tell = Callable[[str], None]
CPU = torch.device("cpu")
_OF_A_PACK = {"everywhere": False, "until": TRAIN_UNTIL, "stains": 0}  # and what one says that does not say it
_SOMETIMES = ("labels", "everywhere", "encoder_terms")  # what only some packs say, and older ones do not


def train_brush(
    config: TrainConfig, target: Path, *, work: Path, slides: Path = Path(), device: str = "cpu",
    overwrite: bool = False, tell: Tell = print,
) -> Brush:  # fmt: skip
    """Train a brush into the folder `target`; pack and checkpoints live in `work`. Paths are relative to `slides`.

    device: as PyTorch names it; on a GPU matrix products are TF32, and the images are held there.

    Raises:
        UsageError, SlideError, RefusedError, MachineError: one line each.
    """
    check_target(target, kind="brush", overwrite=overwrite)
    place = find_device(device)
    lock = hold(work, target)
    try:
        return _trained(config, target, work, slides, place, overwrite=overwrite, tell=tell)
    except SafetensorError as error:
        raise MachineError(f"{work}: cannot be written to ({error}); free some space and run again") from None
    finally:
        os.close(lock)


def _trained(
    config: TrainConfig, target: Path, work: Path, slides: Path, device: torch.device, *, overwrite: bool, tell: Tell
) -> Brush:
    if config.optimisation.threads:
        torch.set_num_threads(config.optimisation.threads)
    check_precision(config.optimisation.precision, device)
    pack = training_pack(config.data, work, slides, tell, device, partial(_begun, config))
    run = Training(config, pack, work, device)
    run.resume(tell)
    while not run.over:
        value = run.step()
        if run.number in (1, 10) or run.number % 50 == 0:
            tell(f"step {run.number} {run.seconds / 60:.1f} min loss {value:.4f} rate {run.rate:.2e}")
        if run.due:
            run.checkpoint()
        if run.number % 500 == 0 and config.data.until < 1:
            tell(f"step {run.number} held-out {run.held_out()}")
    run.checkpoint()
    brush = run.brush()
    save_brush(brush, target, overwrite=overwrite)
    return brush


def check_training(config: TrainConfig, *, work: Path, slides: Path = Path(), device: str = "cpu") -> None:
    """What `train_brush` looks at before hours of work: device, encoder, the brush to start from, the slides' headers,
    and whether scenes have room on them; or pack and checkpoints, where they are made. Nothing is written or fetched.

    Raises:
        UsageError, SlideError, RefusedError, MachineError: one line each, as `train_brush`.
    """
    place = find_device(device)
    check_precision(config.optimisation.precision, place)
    *_, opened = _inputs(config.data, work / "pack", slides, place, partial(_begun, config))
    if opened is None:
        Training(config, TrainingPack(work / "pack"), work, place).resume(lambda line: None)


def training_pack(
    data: Data, work: Path, slides: Path, tell: Tell = print, device: torch.device = CPU,
    begun: Callable[[int], object] = lambda dim: None,
) -> TrainingPack:  # fmt: skip
    """The pack of the slides of a recipe in the folder `work`, made where there is none. `begun`: tried with the length
    of an embedding, before hours of work.

    Raises:
        UsageError, SlideError, RefusedError, MachineError: one line each.
    """
    path = work / "pack"
    sources, labels, encoder, opened = _inputs(data, path, slides, device, begun)
    if (line := terms_line(encoder.name, **terms_of(encoder))) is not None:
        tell(line)
    if opened is not None:
        times = f", each in {1 + data.stains} stains," if data.stains else ""
        tell(f"decoding and embedding {len(opened)} slide{'s' if len(opened) > 1 else ''}{times} into {path}")
        work.mkdir(parents=True, exist_ok=True)
        build_pack(opened, path, encoder=encoder, sources=sources, labels=labels, **data.packing)
    kept = data.in_memory and device.type != "cpu"
    return TrainingPack(path, in_memory=data.in_memory, device=device if kept else None)


def _inputs(
    data: Data, path: Path, slides: Path, device: torch.device, begun: Callable[[int], object]
) -> tuple[list[dict[str, Any]], list[str], Encoder | Labels, list[Slide] | None]:
    """Sources, labels, encoder, and the slides where there is no pack yet. `begun`: tried with the length of an
    embedding."""
    named, opened = data.sources(slides), None
    sources = [source.model_dump() for source in named]
    labels = [source.label for source in named if source.label is not None]
    encoder = Labels.of(labels) if data.encoder == LABELS else load_encoder(data.encoder, device=str(device))
    begun(encoder.dim)
    found = read_manifest(path) if path.is_dir() else None
    if found is None:
        opened = [open_slide(slides / source.path, assume_mpp=source.assume_mpp) for source in named]
        check_room(opened, shares=data.shares, sizes=data.sizes, until=data.until)
    elif found.get("kind") != PACK or found["fingerprint"] != encoder.fingerprint or found.get("sources") != sources:
        raise RefusedError(f"{path}: made with another encoder or other slides; remove it or choose another --work")
    elif any(found.get(name, usual) != data.packing[name] for name, usual in _OF_A_PACK.items()):
        raise RefusedError(
            f"{path}: made with another `tissue`, `until` or `stains`; remove it or choose another --work"
        )
    return sources, labels, encoder, opened


def _network(model: Model | Rival, dim: int) -> Denoiser | System:
    if isinstance(model, Rival):
        return build(model.system, {"dim": dim, **model.sizes})
    return Denoiser(DenoiserConfig(dim=dim, **model.model_dump()))


def _begun(config: TrainConfig, dim: int) -> Denoiser | System:
    """The network as its training begins; `dim` is the encoder's.

    Raises:
        UsageError, RefusedError: if there is no brush to start from, or it has other sizes; if scenes are too small.
        MachineError: if a package that it needs is not installed.
    """
    torch.manual_seed(config.optimisation.seed)
    network = _network(config.model, dim)
    for mpp, size, share in zip(LADDER, config.data.sizes, config.data.shares, strict=True):
        if share and size < _least(network):
            raise UsageError(
                f"[data] sizes: scenes of {size} pixels at {mpp:g} µm are too small to be trained on; expected "
                f"{_least(network)} or more, or no share of them"
            )
    if config.optimisation.start is not None:
        _start_from(load_brush(config.optimisation.start), network)
    return network


def _least(network: Denoiser | System) -> int:
    return network.least if isinstance(network, System) else NODE


def _losses(network: Denoiser | System, *given: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(network, System):
        return losses(network, *given)
    with network.device:  # theirs make their tensors where they are told to
        return network.losses(*given)


def _start_from(brush: Brush, denoiser: Denoiser | System) -> None:
    """Give `denoiser` the weights of a brush of the same sizes.

    Raises:
        UsageError: if the sizes differ.
    """
    if brush.network.config != denoiser.config:
        theirs, ours = brush.network.config, denoiser.config
        raise UsageError(f"start: that brush has other sizes ({theirs}) than [model] and the encoder ask for ({ours})")
    denoiser.load_state_dict(brush.network.state_dict())
    denoiser.requires_grad_(True)


class Training:
    """Weights, their average, the optimiser, and the clock of a training run."""

    def __init__(self, config: TrainConfig, pack: TrainingPack, work: Path, device: torch.device = CPU) -> None:
        self.config, self.pack, self.work, self.device = config, pack, work, device
        o = config.optimisation
        if device.type == "cuda":  # gradients are noisier than that; whoever asks for a device is given float32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        self.denoiser = _begun(config, pack.about["dim"]).to(device)
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.optimisers = optimisers(self.denoiser, rate=o.rate, decay=o.decay)
        pitches, details = (tuple(pack.about[name]) for name in ("pitches", "details"))
        self.ladder = Ladder(pitches, details, o.tolerance, sigma_min=o.sigma_min, retained=o.retained)
        sizes = {"shares": config.data.shares, "sizes": config.data.sizes, "window": config.data.window}
        sizes |= {"points": config.data.points, "symmetries": config.data.symmetries}
        sizes |= {"reach": mollifier_radius(config.model.mollifier) if isinstance(config.model, Model) else None}
        self.sampler = CoordinateSampler(pack, **sizes, seed=o.seed, device=device)  # type: ignore[arg-type]
        self._side_by_side: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Scenes]] | None = None
        if device.type != "cpu":  # it waits for nothing while the next scenes are drawn
            self._drawing = ThreadPoolExecutor(1)
        elif o.shards > 1:  # tensors are small: threads inside an operator would wait for each other more than work
            self._side_by_side = ThreadPoolExecutor(o.shards, initializer=torch.set_num_threads, initargs=(1,))
        self.number, self.seconds, self.saved, self.rate = 0, 0.0, 0.0, 0.0
        self._clock = time.monotonic()
        self._checkpoints = Checkpoints(work)
        self._legs = [self._leg]

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
        if self._side_by_side is None:
            shards = [self._shard(index) for index in range(o.shards)]
        else:
            shards = list(self._side_by_side.map(self._shard, range(o.shards)))
        value = sum(window for window, _ in shards) / o.shards
        for parameter, *parts in zip(self.denoiser.parameters(), *(gradient for _, gradient in shards), strict=True):
            there = [part for part in parts if part is not None]  # what no shard used is left alone
            if o.shards == 1:
                (parameter.grad,) = parts
            else:
                parameter.grad = torch.stack(there).sum(0) / o.shards if there else None
        norm = torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), o.clip)
        if not torch.isfinite(norm):  # a finite loss can have such a gradient; every weight would be lost, then saved
            raise MachineError(
                f"step {self.number}: the gradient is {norm.item()}; lower `rate` and run again from the checkpoint"
            )
        left = max(0.0, 1 - self.progress)
        self.rate = o.rate * min(1.0, (self.number + 1) / o.warmup) * min(1.0, left / 0.6)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.rate
            optimiser.step()
        self.number += 1
        keep = min(o.average, (self.number + 1) / (self.number + 10))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, [weight.detach() for weight in self.denoiser.parameters()], 1 - keep)
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return value

    def _shard(self, shard: int) -> tuple[float, tuple[Tensor | None, ...]]:
        """Loss on the windows and gradient of one batch: a pure function of the weights, the step and the shard."""
        o = self.config.optimisation
        place = self.number * o.shards + shard
        generator = torch.Generator(self.device).manual_seed(o.seed * 1_000_003 + place)
        scenes = self._scenes(place)
        with products(o.precision, self.device):
            window, scattered = _losses(self.denoiser, self.ladder, scenes, self.pack.about, o, generator)
        total = window + o.scattered * scattered
        gradient = torch.autograd.grad(total, list(self.denoiser.parameters()), allow_unused=True)
        if not torch.isfinite(total):  # only now: a GPU is given all its work before it is waited for
            raise MachineError(
                f"step {self.number}: the loss is {total.item()}; lower `rate` and run again from the checkpoint"
            )
        return window.item(), gradient

    def _scenes(self, place: int) -> Scenes:
        batch = self.config.optimisation.batch
        if self.device.type == "cpu":
            return self.sampler.draw(place, batch)
        if self._ahead is None or self._ahead[0] != place:
            self._ahead = place, self._drawing.submit(self.sampler.draw, place, batch)
        scenes = self._ahead[1].result()
        self._ahead = place + 1, self._drawing.submit(self.sampler.draw, place + 1, batch)
        return scenes

    @torch.no_grad()
    def held_out(self, batches: int = 2) -> str:
        """Loss of the averaged weights on the held-out part of the slides, by pitch: of the largest scenes there."""
        o, found = self.config.optimisation, []
        for level, mpp in enumerate(self.ladder.pitches):
            sampler = self._held_out(level)
            if sampler is None:
                continue
            values = []
            for batch in range(batches):
                generator = torch.Generator(self.device).manual_seed(batch)
                scenes = sampler.draw(batch, 8, mpp=mpp)
                values.append(_losses(self.average, self.ladder, scenes, self.pack.about, o, generator)[0].item())
            found.append(f"{mpp:g} µm {sum(values) / len(values):.4f}")
        self._clock = time.monotonic()  # judging is not training
        return ", ".join(found)

    def _held_out(self, level: int) -> CoordinateSampler | None:
        data = self.config.data
        pitches = len(self.ladder.pitches)
        for size in (one for one in (256, 128, 64, 32) if one >= _least(self.denoiser)):
            side = min(size, data.window)
            try:
                return CoordinateSampler(
                    self.pack, shares=[float(index == level) for index in range(pitches)], sizes=[size] * pitches,
                    window=side, points=min(data.points, size**2 - side**2), seed=1, held_out=True,
                    symmetries=data.symmetries, device=self.device,
                )  # fmt: skip
            except UsageError:  # no room there
                continue
        return None

    def brush(self) -> Brush:
        """The averaged weights as a brush."""
        about = {name: self.pack.about[name] for name in ("encoder", "fingerprint", "tile", "embeddings")}
        about |= {name: self.pack.about[name] for name in _SOMETIMES if name in self.pack.about}
        own = {} if isinstance(self.denoiser, System) else {"objective": self.config.optimisation.objective}
        about |= own | self.config.card
        about |= {"training": {"steps": self.number, "minutes": round(self.seconds / 60, 1)}}
        about["training"]["device"] = name_of(self.device)
        about["training"] |= self.config.model_dump(mode="json", exclude={"card": True, "data": {"slides"}})
        about["training"] |= {"legs": self._legs} if len(self._legs) > 1 else {}  # one recipe did not do all of it
        about["training"] |= {"slides": self.pack.about["origins"]} if "origins" in self.pack.about else {}
        average = copy.deepcopy(self.average).eval().requires_grad_(False)
        return Brush(average, self.ladder, about)

    # -- checkpoints -----------------------------------------------------------------------------------

    @property
    def _leg(self) -> dict[str, Any]:
        """From which step on it is trained to which end: the rate falls towards that."""
        ends = self.config.optimisation.model_dump(mode="json", include={"steps", "minutes"})
        return {"from": self.number, **ends}

    @property
    def _identity(self) -> str:
        """What must not change between a run and its resumption."""
        changeable = {"minutes", "steps", "threads", "checkpoint_minutes", "retained"}
        plain = self.config.model_dump(
            mode="json", exclude={"optimisation": changeable, "card": True, "data": {"in_memory"}}
        )
        elsewhere = {} if self.device.type == "cpu" else {"device": self.device.type}  # another noise is drawn there
        return fingerprint({"config": plain, "encoder": self.pack.about["fingerprint"], **elsewhere})

    def checkpoint(self) -> None:
        """Write the state as the newest generation."""
        tensors: dict[str, Tensor] = {}
        for prefix, state in (("weights", self.denoiser.state_dict()), ("average", self.average.state_dict())):
            tensors |= {f"{prefix}.{name}": value.detach() for name, value in state.items()}
        for which, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{which}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        facts = {"step": self.number, "seconds": self.seconds, "identity": self._identity, "legs": self._legs}
        self._checkpoints.write(tensors, facts)
        self.saved = self.seconds

    def resume(self, tell: Tell) -> None:
        """Go on from the newest generation that verifies, if there is one.

        Raises:
            RefusedError: as `Checkpoints.read`, or if it has taken more steps than are asked for.
        """
        found = self._checkpoints.read(self._identity, tell)
        if found is None:
            return
        facts, tensors = found
        if facts["step"] > (steps := self.config.optimisation.steps):
            raise RefusedError(
                f"{self.work}: is at step {facts['step']}, [optimisation] steps is {steps}; raise it, or choose "
                "another --work"
            )
        for prefix, module in (("weights.", self.denoiser), ("average.", self.average)):
            part = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            module.load_state_dict(part)
        for which, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"{which}."):
                    _, index, field = name.split(".")
                    state.setdefault(int(index), {})[field] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.number, self.seconds = facts["step"], facts["seconds"]
        self.saved, self._clock = self.seconds, time.monotonic()
        self._legs = facts.get("legs", [])
        if not self._legs or {**self._legs[-1], "from": 0} != {**self._leg, "from": 0}:
            self._legs = [*self._legs, self._leg]
        tell(f"going on from step {self.number}")
