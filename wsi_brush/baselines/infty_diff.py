"""∞-Diff (Bond-Taylor and Willcocks, ICLR 2024): unconditional diffusion in function space, at scattered points.

Sparse operators on points around a U-Net on a grid, mollified noise, plain mean squared error, a Wiener read-out; see
`points` and `mollified`. It is the model of the papers' tables, not the one with a latent encoder. What a reference
shows is not told to it, so guidance does nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..condition import ConditionMap
from . import check_counts
from .mollified import Mollified
from .points import Domain, GridLevel, PointBlock, PointLevel, Signal


@dataclass(frozen=True)
class InftyDiffConfig:
    """Sizes: `width` channels at points, `kernel` pixels a side of the sparse operator, `grid` channels at nodes, one
    each `node` pixels, `heads` of the grid's attention; `mollifier`: standard deviation of A, pixels.

    `dim`, of the embeddings, is kept and not used.
    """

    dim: int
    width: int = 32
    kernel: int = 7
    grid: int = 64
    node: int = 8
    heads: int = 4
    mollifier: float = 1.0

    def __post_init__(self) -> None:
        """Raises:
        ValueError: if a size is not what it has to be.
        """
        check_counts(self)
        if 2 * self.grid % self.heads or self.width % self.heads:
            raise ValueError(
                f"width {self.width}, grid {self.grid}, heads {self.heads}; expected heads that divide width and 2 grid"
            )
        if self.kernel not in (1, 3, 5, 7, 9, 11) or self.node not in (2, 4, 8, 16, 32) or not 0 < self.mollifier <= 8:
            raise ValueError(
                f"kernel {self.kernel}, node {self.node}, mollifier {self.mollifier}; expected an odd kernel to 11, a "
                "node of 2, 4, 8, 16 or 32 pixels, a mollifier above 0 and to 8 pixels"
            )

    def to_json(self) -> dict[str, object]:
        """Plain values, for the brush's JSON."""
        return asdict(self)


class InftyDiff(Mollified):
    """The unconditional model."""

    name: ClassVar[str] = "infty-diff"
    sizes = InftyDiffConfig
    conditional = False

    def __init__(self, config: InftyDiffConfig) -> None:
        super().__init__()
        self.config = config
        self.signal = Signal()
        block = partial(PointBlock, config.width, config.kernel)
        grid = GridLevel(config.width, config.grid, heads=config.heads)
        self.level = PointLevel(block, config.width, grid, config.node, config.kernel)

    def noise(
        self, values: Tensor, domain: Domain, sigma: Tensor, condition: list[ConditionMap], known: Tensor
    ) -> Tensor:
        """A ξ at a domain; of the condition nothing is read."""
        found: Tensor = self.level(values, domain, self.signal(sigma, domain.mpp), list[torch.Tensor](), None)
        return found
