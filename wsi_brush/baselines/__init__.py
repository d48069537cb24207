"""The systems of the paper's tables, trained and used as a brush is: `system` in a recipe, `--brush` to paint with it.

Each is one module with one class, a `System`. They hold the canvas in memory, as their authors do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..condition import ConditionMap
from ..coordinates import Scenes
from ..diffusion import Ladder
from ..grid import Grid
from ..objective import Drawing
from ..progress import Tell


class System(nn.Module, ABC):
    """A rival of the brush's denoiser.

    `config`: its sizes, a frozen dataclass that has `dim` (of the embeddings) and `to_json`. `name`: what `system` in a
    recipe and in `brush.json` says.
    """

    name: ClassVar[str]
    config: Any

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
        at the canvas's pitch."""
        ...

    @abstractmethod
    def bytes_for(self, canvas: Grid) -> int:
        """What `paint` holds at most, beside the process itself."""
        ...
