"""∞-Brush as printed (Le et al., ECCV 2024): one vector for a whole image, attention at every point.

The order of its point level: sparse operator, cross-attention neural operator, self-attention neural operator; three
such blocks, the grid level, three more. Condition sets are the noise level (one token), the image's embedding (one
token) and the place (two, its row and its column). A set of one token gives its value at every point, whatever query
and key, so only the places are attended to.

The image's embedding is the mean of the coarsest set over the scene or the canvas, which is what the paper's thumbnail
of a 4096 x 4096 image shows. It is also added at the grid level's bottleneck, where attention to one token is that too.
Without the cross-attention neural operator that is its only way in (the ablation of the paper's tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..condition import ConditionMap
from ..operators import SelfAttention
from .infty_diff import InftyDiffConfig
from .mollified import Mollified, Weighting
from .points import AXIS, SIGNAL, Domain, GridLevel, PointBlock, PointLevel, Signal


@dataclass(frozen=True)
class InftyBrushConfig(InftyDiffConfig):
    """Sizes as ∞-Diff's, `heads` at points too; `weighting` of the loss over noise levels: plain, or as Theorem 1."""

    weighting: Weighting = "plain"


class CrossOperator(nn.Module):
    """q + (1/L) Σ_l (q S_l) / (q n_l) over noise level, embedding and place: ∞-Brush, Eq. 10, after GNOT.

    The set of places is another at every point. The other two have one token, so that (q S) / (q n) is its value.
    """

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.values = nn.ModuleList(nn.Linear(channels, channels) for _ in range(2))
        self.place = nn.Linear(AXIS, channels)
        self.key, self.value = nn.Linear(channels, channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, u: Tensor, domain: Domain, tokens: list[Tensor]) -> Tensor:
        """Features (n, rows, columns, c) and the sets of one token each, (n, 1, c)."""
        query = self._heads(self.query(functional.layer_norm(u, u.shape[-1:]))).softmax(-1)
        alike = sum(value(token) for value, token in zip(self.values, tokens, strict=True))
        total = self._at_place(query, domain) + self._heads(torch.as_tensor(alike))[:, :, None]
        change: Tensor = self.out((query + total / (1 + len(tokens))).flatten(-2))
        return u + change

    def _at_place(self, query: Tensor, domain: Domain) -> Tensor:
        mass, total = query.new_zeros(()), query.new_zeros(())
        for axis in domain.axes():
            token = self.place(axis)
            weight = (query * self._heads(self.key(token)).softmax(-1)).sum(-1, keepdim=True)
            mass, total = mass + weight, total + weight * self._heads(self.value(token))
        found: Tensor = total / mass
        return found

    def _heads(self, u: Tensor) -> Tensor:
        found: Tensor = u.unflatten(-1, (self.heads, -1))
        return found


class BrushBlock(PointBlock):
    """Sparse operator, cross-attention (if `cross`), self-attention, two matrices."""

    def __init__(self, channels: int, side: int, *, heads: int, cross: bool) -> None:
        super().__init__(channels, side)
        self.cross = CrossOperator(channels, heads=heads) if cross else None
        self.attention = SelfAttention(channels, heads=heads)

    def far(self, u: Tensor, domain: Domain, signal: Tensor, tokens: list[Tensor]) -> Tensor:
        """Cross-attention to the sets of `tokens`, self-attention over all points, and on."""
        if self.cross is not None:
            cross = self.cross
            u = domain.over(lambda part, features: cross(features, part, tokens), u, onto=u)
        sums = domain.total(self._part, u).float()
        return domain.over(lambda _, features: self._attended(features, sums, signal), u, onto=u)

    def _part(self, u: Tensor) -> Tensor:
        return self.attention.part(u, torch.zeros_like(u), torch.ones_like(u[..., 0]))

    def _attended(self, u: Tensor, sums: Tensor, signal: Tensor) -> Tensor:
        found: Tensor = self.feed(self.attention(u, torch.zeros_like(u), sums), signal)
        return found


class InftyBrush(Mollified):
    """The conditional model."""

    name: ClassVar[str] = "infty-brush"
    sizes = InftyBrushConfig
    cross: ClassVar[bool] = True

    def __init__(self, config: InftyBrushConfig) -> None:
        super().__init__()
        self.config, self.weighting = config, config.weighting
        self.signal = Signal()

        def block() -> PointBlock:
            return BrushBlock(config.width, config.kernel, heads=config.heads, cross=self.cross)

        grid = GridLevel(config.width, config.grid, heads=config.heads)
        self.level = PointLevel(block, config.width, grid, config.node, config.kernel)
        self.embed = nn.Linear(config.dim, grid.width)
        self.absent = nn.Parameter(torch.randn(grid.width) * 0.02)  # no tissue
        self.unknown = nn.Parameter(torch.randn(grid.width) * 0.02)  # no condition: classifier-free guidance
        if self.cross:
            self.tokens = nn.ModuleList(nn.Linear(side, config.width) for side in (SIGNAL, grid.width))

    def noise(
        self, values: Tensor, domain: Domain, sigma: Tensor, condition: list[ConditionMap], known: Tensor
    ) -> Tensor:
        """A ξ at a domain, told the noise level, the image's embedding and the place."""
        signal = self.signal(sigma, domain.mpp)
        mean, there = thumbnail(condition[-1], domain.shape)
        told = torch.lerp(self.unknown, torch.lerp(self.absent, self.embed(mean), there[:, None]), known[:, None])
        tokens = [make(u)[:, None] for make, u in zip(self.tokens, (signal, told), strict=True)] if self.cross else []
        found: Tensor = self.level(values, domain, signal, tokens, told)
        return found


class InftyBrushNoCross(InftyBrush):
    """The same without the cross-attention neural operator."""

    name: ClassVar[str] = "infty-brush-no-cross"
    cross: ClassVar[bool] = False


def thumbnail(lattice: ConditionMap, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One vector for a scene of `shape` pixels: the mean of the embeddings over it, (n, dim), and whether there is one.

    Every cell counts by how much of it lies in the scene.
    """
    overlaps = []
    for centres, side in zip(lattice.centres(), shape, strict=True):
        ends = [(centres + half * lattice.cell).clamp(0, side) for half in (-0.5, 0.5)]
        overlaps.append(ends[1] - ends[0])
    weight = overlaps[0][:, :, None] * overlaps[1][:, None] * lattice.present
    mass = weight.sum((1, 2))
    mean = (lattice.values * weight[..., None]).sum((1, 2)) / mass.clamp_min(1e-6)[:, None]
    return mean, (mass > 0).float()
