"""The systems of the paper's tables, trained and used as a brush is: `system` in a recipe, `--brush` to paint with it.

Each is one module with one class, a `System`, which is imported when its name is asked for. They hold the canvas in
memory, as their authors do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ..condition import ConditionMap
from ..diffusion import Ladder
from ..grid import Grid
from ..objective import Drawing
from ..progress import Tell
from ..scenes import Scenes

OURS = "ours"
"""What `system` says where the network is the brush's own denoiser."""
SYSTEMS = {
    "infty-diff": "infty_diff.InftyDiff",
    "infty-brush": "infty_brush.InftyBrush",
    "infty-brush-no-cross": "infty_brush.InftyBrushNoCross",
    "patches": "patches.Patches",
    "fixed": "fixed.Fixed",
    "sdxl": "sdxl.Sdxl",
}
"""Module and class of every rival, by name."""


_MOST = 2**20


class System(nn.Module, ABC):
    """A rival of the brush's denoiser, made of its `config`.

    `sizes`: the type of `config`, a frozen dataclass that has `dim` (of the embeddings) and `to_json`. `name`: what
    `system` in a recipe and in `brush.json` says.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")  # that it can be trained in; none: it is not
    sizes: ClassVar[type[Any]]
    config: Any

    @property
    def least(self) -> int:
        """Pixels of a side of the smallest scene that it can be trained on."""
        return 1

    @abstractmethod
    def losses(
        self, ladder: Ladder, scenes: Scenes, about: dict[str, Any], drawing: Drawing, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What a training step minimises, of windows and of scattered points, as `objective.losses`."""
        ...

    @abstractmethod
    def paint(
        self, condition: list[ConditionMap], canvas: Grid, ladder: Ladder, *, seed: int, steps: int, guidance: float,
        tell: Tell | None = None,
    ) -> Tensor:  # fmt: skip
        """A canvas, (3, height, width) in about [-1, 1], in its own sampler; `condition` as `Brush.condition` gives it
        at the canvas's pitch. All of it on `device`, the condition too."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are, and it paints."""
        return next((torch.as_tensor(one) for one in self.state_dict().values()), torch.zeros(())).device

    @abstractmethod
    def bytes_for(self, canvas: Grid) -> int:
        """What `paint` holds at most, beside the process itself."""
        ...


def system_class(name: str) -> type[System]:
    """A rival's class; its module is imported here.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in tuple(SYSTEMS):  # of a recipe, it may be anything
        raise ValueError(f"system {name!r}; expected one of {', '.join((OURS, *SYSTEMS))}")
    module, found = SYSTEMS[name].split(".")
    kind: type[System] = getattr(import_module(f".{module}", __name__), found)
    return kind


def check_counts(config: Any) -> None:
    """Whether the whole numbers of a configuration can be counts.

    Raises:
        ValueError: if one is below 1.
    """
    for name, value in asdict(config).items():
        if isinstance(value, int) and not 1 <= value <= _MOST:
            raise ValueError(f"{name} {value}; expected a number from 1 to {_MOST}")


def build(name: str, sizes: Mapping[str, Any]) -> System:
    """A rival with new weights, of sizes from a recipe or from `brush.json`.

    Raises:
        ValueError: if there is none of that name, or a size is not what it has to be.
    """
    kind = system_class(name)
    return kind(TypeAdapter(kind.sizes).validate_python(dict(sizes)))
