"""What a training run is made of: a TOML file, checked before hours of work."""

from __future__ import annotations

import difflib
import glob
import math
import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from .baselines import OURS, system_class
from .coordinates import LADDER, TRAIN_UNTIL, Symmetries
from .diffusion import Ladder, Objective
from .embed import PITCHES
from .errors import UsageError
from .labels import LABELS
from .machine import Precision

Count = Annotated[int, Field(ge=1, le=2**24)]
"""How many there are of something that is held in memory."""
Part = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _plain(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that came `later` only where they say something, so that packs and checkpoints from before are known."""
        said: dict[str, Any] = dump(self)
        return {name: value for name, value in said.items() if name not in self.later or self._says(name)}

    def _says(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class SlideSource(_Strict):
    """A slide to train on, or several by a pattern (`*.svs`); `assume_mpp` where its header has no pixel size; `label`
    is its class, where classes are the condition."""

    later = frozenset({"label"})
    path: str
    assume_mpp: float | None = Field(default=None, gt=0)
    label: str | None = Field(default=None, min_length=1)

    def found(self, folder: Path) -> list[SlideSource]:
        """It, or one for each file in `folder` that fits its pattern, by name.

        Raises:
            UsageError: if none does.
        """
        if not glob.has_magic(self.path) or (folder / self.path).exists():
            return [self]
        names = sorted(glob.glob(self.path, root_dir=folder, recursive=True))  # noqa: PTH207 (that takes no absolute one)
        if not names:
            raise UsageError(
                f"{folder / self.path}: no file fits this pattern; see --slides and `path` in [data] slides"
            )
        return [self.model_copy(update={"path": name}) for name in names]


class Data(_Strict):
    """What is trained on."""

    later = frozenset({"tissue", "until", "symmetries", "stains"})
    slides: list[SlideSource] = Field(min_length=1)
    encoder: str = "bundled"  # or "labels": the slides' labels are the condition
    in_memory: bool = True  # images; of the device, where that is a GPU
    tissue: Literal["found", "everywhere"] | None = None  # everywhere: for pictures that are no H&E, as of labels
    until: float = Field(default=TRAIN_UNTIL, gt=0, le=1)  # part of a slide's width; what lies right of it is held out
    symmetries: Symmetries = "square"  # what scenes are turned by
    stains: int = Field(default=0, ge=0, le=100)  # how many times more each slide is there, in another stain
    shares: tuple[Annotated[float, Field(ge=0)], ...] = (0.42, 0.2, 0.15, 0.12, 0.11)  # of 0.5, 1, 2, 4, 8 µm
    sizes: tuple[Count, ...] = (256, 256, 256, 256, 128)  # of a scene, pixels
    window: Count = 128
    points: int = Field(default=64, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if not len(self.shares) == len(self.sizes) == len(LADDER):
            found = f"{len(self.shares)} shares and {len(self.sizes)} sizes"
            raise ValueError(f"{found}; expected {len(LADDER)} of each, one a pitch")
        if not 0 < sum(self.shares) < math.inf:
            raise ValueError(f"shares {self.shares}; expected numbers from 0 on, not all of them 0")
        if self.window < 32 or any(size % 32 for size in (self.window, *self.sizes)) or self.window > min(self.sizes):
            raise ValueError(
                f"window {self.window} and sizes {self.sizes}; expected multiples of 32, and no size below the window"
            )
        room = min((size**2 - self.window**2 for size in self.sizes if size > self.window), default=math.inf)
        if self.points > room:
            raise ValueError(f"{self.points} points; expected 0 to {room}, the pixels of a scene outside its window")
        return self

    @model_validator(mode="after")
    def _stained(self) -> Data:
        if self.stains and (self.everywhere or self.encoder == LABELS):
            found = f"stains {self.stains} of pictures that are no H&E"
            raise ValueError(f"{found}; expected 0 with labels, or with tissue = 'everywhere'")
        return self

    @model_validator(mode="after")
    def _labelled(self) -> Data:
        wanted = self.encoder == LABELS
        for source in self.slides:
            if wanted and source.label is None:
                raise ValueError(f"{source.path} has no label; expected one of every slide with encoder = {LABELS!r}")
            if not wanted and source.label is not None:
                raise ValueError(f"{source.path} has a label, the encoder is {self.encoder}; expected {LABELS!r}")
        return self

    @property
    def everywhere(self) -> bool:
        """Whether all of a slide is looked at; else its tissue."""
        return self.tissue == "everywhere" or (self.tissue is None and self.encoder == LABELS)

    @property
    def packing(self) -> dict[str, Any]:
        """What a pack of the slides is built with, as `coordinates.build_pack` takes it."""
        return {"everywhere": self.everywhere, "until": self.until, "stains": self.stains}

    def sources(self, folder: Path) -> list[SlideSource]:
        """The slides, patterns as the files in `folder` that fit them.

        Raises:
            UsageError: if a pattern fits none, or a file is named twice.
        """
        found: dict[str, SlideSource] = {}
        for source in (one for entry in self.slides for one in entry.found(folder)):
            if source.path in found:
                raise UsageError(f"{source.path}: named by two of [data] slides; leave it to one of them")
            found[source.path] = source
        return list(found.values())


_Depth = Annotated[int, Field(ge=0, le=1000)]


class Model(_Strict):
    """The operator's sizes; see `denoiser.DenoiserConfig`."""

    width: int = Field(default=48, ge=2, le=2**15)
    depth: tuple[_Depth, _Depth, _Depth] = (1, 2, 4)
    layout: int = Field(default=4, ge=1, le=1000)
    heads: Count = 6
    tokens: Count = 16
    mollifier: float = Field(default=0.5, ge=0, le=8)

    @model_validator(mode="after")
    def _divides(self) -> Model:
        if 4 * self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width {self.width}, heads {self.heads}; expected an even width, and heads that divide 4 of it"
            )
        return self


class Rival(BaseModel):
    """A system of `baselines` and its own sizes, which are checked as its configuration there says."""

    model_config = ConfigDict(extra="allow", frozen=True)
    system: str

    @property
    def sizes(self) -> dict[str, Any]:
        """All but `dim`, which is the encoder's."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict) or "system" not in given:
            raise ValueError(f"{given!r}; expected a table with `system`")
        system, sizes = given["system"], {name: value for name, value in given.items() if name != "system"}
        kind = system_class(system).sizes
        known = [field.name for field in fields(kind) if field.name != "dim"]
        for name in sizes:
            if name not in known:
                hint = _hint(name, known) or f"; it has {', '.join(known)}"
                raise ValueError(f"{name}: is no size of {system}{hint}")
        checked = asdict(TypeAdapter(kind).validate_python({"dim": 1, **sizes}))
        if checked.get("sets", len(PITCHES)) != len(PITCHES):
            raise ValueError(f"sets {checked['sets']}; expected {len(PITCHES)}, the pitches of the embeddings")
        return {"system": system} | {name: checked[name] for name in known}


_Real = Annotated[float, Field(allow_inf_nan=True)]


class Optimisation(_Strict):
    """How it is trained. It ends after `steps`, or `minutes` if they are over first; the rate falls to zero by then."""

    steps: int = Field(default=100_000, gt=0)
    minutes: float = Field(default=math.inf, gt=0, allow_inf_nan=True)
    batch: Count = 8  # scenes of a shard
    shards: Count = 1  # batches a step, each of its own pitch; beyond one, side by side, a thread each
    rate: float = Field(default=1.5e-3, gt=0)
    warmup: int = Field(default=200, gt=0)
    decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    average: Part = 0.999
    objective: Objective = "v"
    scattered: float = Field(default=0.1, ge=0)  # weight of the scattered points' loss beside the windows'
    unconditional: Part = 0.1
    full_range: Part = 0.1  # part of the scenes whose noise is drawn from the whole range, whatever their pitch
    tolerance: _Real | tuple[_Real, ...] = (0.0054, 0.002, 0.005, 0.005)  # of `diffusion.Ladder`, as the next
    sigma_min: float = Field(default=0.02, gt=0, lt=Ladder.sigma_max)
    retained: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    margin: float = Field(default=1.5, ge=1)  # noise levels are drawn this factor beyond those that the solver visits
    seed: int = Field(default=0, ge=0, le=10**12)
    start: str | None = None  # a brush to start from, instead of from nothing: "bundled" or a folder
    precision: Precision = "float32"  # of products
    threads: int = Field(default=0, ge=0, le=1024)  # 0: as many as PyTorch takes
    checkpoint_minutes: float = Field(default=3.0, ge=0, allow_inf_nan=True)  # inf: only at the end

    @model_validator(mode="after")
    def _tolerable(self) -> Optimisation:
        given = self.tolerance if isinstance(self.tolerance, tuple) else (self.tolerance,) * (len(LADDER) - 1)
        if len(given) != len(LADDER) - 1 or not all(0 < one < math.inf for one in given):
            raise ValueError(f"tolerance {self.tolerance}; expected a number above 0, or {len(LADDER) - 1} of them")
        return self


class TrainConfig(_Strict):
    """A training run: [data], [model], [optimisation]."""

    data: Data
    model: Model | Rival = Model()
    optimisation: Optimisation = Optimisation()
    card: dict[str, JsonValue] = {}

    @field_validator("model", mode="before")
    @classmethod
    def _of_its_system(cls, given: Any) -> Any:
        if isinstance(given, Model | Rival):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"{given!r}; expected a table, [model]")
        sizes = {name: value for name, value in given.items() if name != "system"}
        ours = given.get("system", OURS) == OURS
        return Model.model_validate(sizes) if ours else Rival.model_validate(given)

    @model_validator(mode="after")
    def _computed(self) -> TrainConfig:
        if isinstance(self.model, Rival):
            system, asked = self.model.system, self.optimisation.precision
            known = system_class(system).precisions
            if not known:
                raise ValueError(f'{system} is painted with, not trained; see README, "Baselines"')
            if asked not in known:
                raise ValueError(f"{system} is trained in {' or '.join(known)}, not in {asked}")
        return self


def read_config(path: Path) -> TrainConfig:
    """A TOML file as a checked configuration.

    Raises:
        UsageError: naming the key that is wrong, and the nearest that exists.
    """
    return checked(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        UsageError: if there is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from None


def checked(given: dict[str, Any], where: str) -> TrainConfig:
    """What a recipe says as a configuration; `where` it stands begins the line of an error.

    Raises:
        UsageError: naming the key that is wrong, and the nearest that exists.
    """
    try:
        return TrainConfig.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"{where}: {_line(error)}") from None


def _line(error: ValidationError) -> str:
    """Where, what was found, what was expected: of the first that is wrong."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = [name for part in (TrainConfig, Data, Model, Optimisation, SlideSource) for name in part.model_fields]
        said += _hint(str(first["loc"][-1]), known)
    elif said.startswith("Input should be "):
        wanted = said.removeprefix("Input should be ")
        number = "a number " if wanted.startswith(("greater", "less")) else ""
        said = f"{first['input']!r}; expected {number}{wanted}"
    return f"{'.'.join(map(str, first['loc']))}: {said}"


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""
