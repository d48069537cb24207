"""Neural operators: maps between functions, given by their values at points.

Every operator here is written once for features `(..., channels)` and knows two kinds of domain:

* a **lattice**: `(n, rows, columns, channels)`, every point present (a window of a canvas), and
* a **scatter**: `(points, channels)` at any subset of a lattice (`Scatter` below).

Kernels are normalised by the neighbours that are present, so the same weights approximate the same
integral at any density, and both domains give equal results where both apply. Nothing depends on
statistics over space: an operator is pointwise, or has a stated reach, or is a sum over points (the
splat, attention) that may be taken in any order. That is what lets a canvas be painted tile by tile.

Sources: kernel-integral operators on sparse points, Bond-Taylor and Willcocks, "∞-Diff" (2024);
heterogeneous normalised linear attention, Hao et al., "GNOT" (2023); both joined in "∞-Brush" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

REACH = 1  # cells to either side that a kernel-integral operator reads
_BAND = 192 * 1024  # features of a band: with those that it becomes, about two megabytes
_ROOM = 1 << 20  # cells on a side that a scatter's keys can tell apart


@dataclass(frozen=True)
class Cells:
    """The occupied cells of one pitch: who lives next door, and who lives inside.

    keys: (cells,) sorted, one integer a cell; neighbours: (cells, 9) index or -1;
    children: (points below, ) -> cell; slots: (points below,) the child's place in its cell, 0 to 3.
    """

    keys: Tensor
    neighbours: Tensor
    children: Tensor
    slots: Tensor

    @property
    def rows(self) -> Tensor:
        """Row of every cell at its own pitch."""
        return (self.keys // _ROOM) % _ROOM

    @property
    def columns(self) -> Tensor:
        """Column of every cell at its own pitch."""
        return self.keys % _ROOM

    @property
    def scene(self) -> Tensor:
        """Which scene of the batch every cell belongs to."""
        return self.keys // (_ROOM * _ROOM)


@dataclass(frozen=True)
class Scatter:
    """Scattered points of several scenes, and their cells at 2, 4, 8, ... times the pitch."""

    scene: Tensor  # (points,)
    rows: Tensor  # (points,)
    columns: Tensor  # (points,)
    levels: tuple[Cells, ...]

    @staticmethod
    def of(scene: Tensor, rows: Tensor, columns: Tensor, *, levels: int) -> Scatter:
        """Index the points of a batch; at most one point a place."""
        cells: list[Cells] = []
        below = (scene.long() * _ROOM + rows.long()) * _ROOM + columns.long()
        for _ in range(levels):
            r, c = (below // _ROOM) % _ROOM, below % _ROOM
            above = ((below // (_ROOM * _ROOM)) * _ROOM + r // 2) * _ROOM + c // 2
            keys, children = torch.unique(above, return_inverse=True)
            cells.append(Cells(keys, _neighbours(keys), children, (r % 2) * 2 + c % 2))
            below = keys
        return Scatter(scene, rows, columns, tuple(cells))


def _neighbours(keys: Tensor) -> Tensor:
    down, right = (torch.arange(9, device=keys.device) // 3 - 1, torch.arange(9, device=keys.device) % 3 - 1)
    wanted = keys[:, None] + down * _ROOM + right
    inside = ((keys // _ROOM) % _ROOM)[:, None] + down >= 0
    inside &= (keys % _ROOM)[:, None] + right >= 0
    index = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return torch.where(inside & (keys[index] == wanted), index, -1)


class KernelIntegral(nn.Module):
    """(K u)(x) = mean over the present y near x of k(y - x) u(y), times the kernel's size: depthwise, 3 x 3 cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, 1, 3, 3) / 9)
        self.bias = nn.Parameter(torch.zeros(channels))
        with torch.no_grad():
            self.kernel[:, 0, 1, 1] += 1

    def forward(self, u: Tensor, cells: Cells | None = None) -> Tensor:
        """(n, rows, columns, c) on a lattice, (cells, c) on a scatter; the same shape comes back."""
        if cells is not None:
            present = cells.neighbours >= 0
            near = rows_of(u, cells.neighbours.clamp_min(0)) * present[..., None]
            total = (near * self.kernel.flatten(1).T).sum(1)
            return total * (9.0 / present.sum(1, keepdim=True)) + self.bias
        planes = u.permute(0, 3, 1, 2)
        if u.device.type == "cuda" and not torch.is_grad_enabled():
            planes = planes.contiguous()  # of features side by side cuDNN, in float32, makes a hundred times as long
        total = functional.conv2d(planes, self.kernel, padding=REACH, groups=u.shape[-1])
        return torch.addcmul(self.bias, total.permute(0, 2, 3, 1), _border(u))

    def band(self, u: Tensor, *, first: bool, last: bool) -> Tensor:
        """The same for the rows of u but its first and last, which are neighbours only, and zeros where the lattice
        ends; the cells with fewer neighbours are put right afterwards. (1, rows + 2, columns, c)."""
        total = functional.conv2d(
            u.permute(0, 3, 1, 2), self.kernel, self.bias, padding=(0, REACH), groups=u.shape[-1]
        ).permute(0, 2, 3, 1)  # fmt: skip
        edges = [total[:, index] for index, here in ((0, first), (-1, last)) if here]
        for edge in (*edges, total[:, :, :: u.shape[2] - 1]):  # the first column and the last
            torch.lerp(self.bias, edge, 1.5, out=edge)
        return total


def _border(u: Tensor) -> Tensor:
    """9 / (number of neighbours present) on a lattice: 1 inside, more along its edges. (rows, columns, 1)."""
    counts = []
    for length in u.shape[1:3]:
        count = torch.full((length,), 3.0, device=u.device)
        count[0] -= 1
        count[-1] -= 1
        counts.append(count)
    return (9.0 / (counts[0][:, None] * counts[1]))[..., None].to(u.dtype)


class Coarsen(nn.Module):
    """To twice the pitch: each child has its own matrix; a mean over the present children times four."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.mix = nn.Linear(4 * channels, out)

    def forward(self, u: Tensor, cells: Cells | None = None) -> Tensor:
        """(n, 2 rows, 2 columns, c) -> (n, rows, columns, out), or (points, c) -> (cells, out)."""
        if cells is not None:
            room = u.new_zeros(4 * len(cells.keys), u.shape[-1])
            room = room.index_copy(0, cells.children * 4 + cells.slots, u).unflatten(0, (-1, 4))
            count = torch.zeros(len(cells.keys), device=u.device).index_add(
                0, cells.children, torch.ones(len(u), device=u.device)
            )
            children = room * (4.0 / count)[:, None, None]
            found: Tensor = self.mix(children.flatten(1))
            return found
        return by_bands(self._on_lattice, u.shape[1] // 2, u)

    def _on_lattice(self, u: Tensor) -> Tensor:
        n, rows, columns, c = u.shape
        children = u.reshape(n, rows // 2, 2, columns // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        found: Tensor = self.mix(children.reshape(n, rows // 2, columns // 2, 4 * c))
        return found


class Refine(nn.Module):
    """To half the pitch: each child of a cell has its own matrix."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, 4 * out)

    def forward(
        self, u: Tensor, cells: Cells | None = None, onto: Tensor | float = 0.0, *, in_place: bool = False
    ) -> Tensor:
        """(n, rows, columns, c) -> (n, 2 rows, 2 columns, out), or (cells, c) -> (points, out), added to `onto`, which
        without gradients may become the result where it is given up `in_place`."""
        if cells is not None:
            children: Tensor = self.mix(u)
            return onto + rows_of(children.unflatten(-1, (4, -1)).flatten(0, 1), cells.children * 4 + cells.slots)
        if isinstance(onto, Tensor):
            return by_bands(self._on_lattice, u.shape[1], u, onto, into=onto if in_place else None)
        return by_bands(self._on_lattice, u.shape[1], u)

    def _on_lattice(self, u: Tensor, onto: Tensor | None = None) -> Tensor:
        children: Tensor = self.mix(u.contiguous())  # else a product for every row
        n, rows, columns, c = children.shape
        children = children.reshape(n, rows, columns, 2, 2, c // 4).permute(0, 1, 3, 2, 4, 5)
        if onto is not None:  # in one pass over memory
            children = onto.unflatten(2, (columns, 2)).unflatten(1, (rows, 2)) + children
        return children.reshape(n, 2 * rows, 2 * columns, c // 4)


class Block(nn.Module):
    """A residual local operator: kernel integral, channel norm, modulation by noise level and pitch, two matrices."""

    def __init__(self, channels: int, *, signal: int, expand: int = 2) -> None:
        super().__init__()
        self.kernel = KernelIntegral(channels)
        self.modulate = nn.Linear(signal, 2 * channels)
        self.widen = nn.Linear(channels, expand * channels)
        self.narrow = nn.Linear(expand * channels, channels)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, u: Tensor, signal: Tensor, cells: Cells | None = None) -> Tensor:
        """`signal`: (n, signal), one row a scene. Operator by operator, each over all points."""
        scale, shift = _spread(self.modulate(signal), cells).chunk(2, -1)
        h = functional.layer_norm(self.kernel(u, cells), u.shape[-1:])
        h = functional.gelu(self.widen(torch.addcmul(shift, h, 1 + scale)))
        change: Tensor = self.narrow(h)
        return u + change

    def in_place(self, u: Tensor, signal: Tensor) -> Tensor:
        """The same for one scene on a lattice, without gradients, in bands of rows; u becomes the result.

        Twice as fast as operator by operator over a large window, whose features go to memory and back for each.
        """
        _, height, width, channels = u.shape
        scale, shift = self.modulate(signal)[0].chunk(2)
        widen, narrow = self.widen.weight.T, self.narrow.weight.T
        beyond = u.new_zeros(1, REACH, width, channels)
        step, above = max(1, _BAND // (width * channels)), beyond
        for top in range(0, height, step):
            bottom = min(top + step, height)
            last = bottom == height
            band = torch.cat([above, u[:, top:bottom], beyond if last else u[:, bottom : bottom + REACH]], 1)
            above = u[:, bottom - REACH : bottom].clone()  # as it was, for the next band
            h = self.kernel.band(band, first=top == 0, last=last)
            h = functional.layer_norm(h, (channels,), 1 + scale, shift).flatten(0, 2)
            h = functional.gelu(torch.addmm(self.widen.bias, h, widen))
            here = u[:, top:bottom]
            here.copy_(torch.addmm((here + self.narrow.bias).view(-1, channels), h, narrow).view_as(here))
        return u


def through(blocks: Iterable[nn.Module], u: Tensor, signal: Tensor, cells: Cells | None = None) -> Tensor:
    """u after some `Block`s, one after another; without gradients u itself may become the result."""
    banded = cells is None and len(u) == 1 and min(u.shape[1:3]) > 1 and _banded(u)
    for block in blocks:
        u = cast(Block, block).in_place(u, signal) if banded else block(u, signal, cells)
    return u


def by_bands(
    work: Callable[..., Tensor], rows: int, *lattices: Tensor, halo: int = 0, into: Tensor | None = None
) -> Tensor:
    """`work` on lattices (n, rows or a multiple of it, columns, c), which says of a row what rows within `halo` decide.

    Without gradients in bands of rows that fit a core's cache, so that what is between is never a whole lattice; then
    `into`, one of the lattices or another of the result's shape, may become the result.
    """
    size = max(lattice.numel() for lattice in lattices)
    step = max(1, rows * _BAND // max(size, 1))
    if step >= rows or not _banded(lattices[0]):
        return work(*lattices)
    times = [lattice.shape[1] // rows for lattice in lattices]
    found = into
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        start, stop = max(top - halo, 0), min(bottom + halo, rows)
        part = work(*(u[:, start * k : stop * k] for u, k in zip(lattices, times, strict=True)))
        k = part.shape[1] // (stop - start)
        if found is None:
            found = part.new_empty(len(part), rows * k, *part.shape[2:])
        found[:, top * k : bottom * k] = part[:, (top - start) * k : (bottom - start) * k]
    return torch.as_tensor(found)


def _banded(u: Tensor) -> bool:
    return not torch.is_grad_enabled() and u.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _spread(signal: Tensor, cells: Cells | None) -> Tensor:
    return signal[:, None, None, :] if cells is None else rows_of(signal, cells.scene)


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index] whose gradient is an `index_add`: on CPUs many times faster than that of indexing."""
    found: Tensor = table.index_select(0, index.flatten()).unflatten(0, index.shape)
    return found


class TokenSet(nn.Module):
    """One condition set as keys and values: what cross-attention remembers of it is a sum over its tokens.

    S = Σ_j w_j k_j v_jᵀ and n = Σ_j w_j k_j with k = softmax over features (GNOT, Eq. 9), so a query costs the
    same whatever the number of tokens, and a quadrature weight w_j makes the sum an integral.
    """

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, c) -> (n, heads, d, d + 1): S beside n."""
        return self.part(tokens).float()

    def part(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """What some of the tokens, (n, tokens, c), with weights (n, tokens), add to S beside n; float64."""
        key = self.key(tokens).unflatten(-1, (self.heads, -1)).softmax(-1)
        value = self.value(tokens).unflatten(-1, (self.heads, -1))
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        if weights is not None:
            key = key * weights[..., None, None]
        return _sum_outer(key, value)


def _sum_outer(key: Tensor, value: Tensor) -> Tensor:
    """Σ_j k_j v_jᵀ over tokens, (n, tokens, heads, ...), in float64 over fixed blocks of 64 and then pair by pair.

    A fixed order of addition, so the sum does not depend on the number of threads.
    """
    pad = -key.shape[1] % 64
    key, value = (functional.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, 64)).double() for t in (key, value))
    total = torch.einsum("nbjhd,nbjhe->bnhde", key, value)
    while len(total) > 1:
        if len(total) % 2:
            total = torch.cat([total, torch.zeros_like(total[:1])])
        total = total[0::2] + total[1::2]
    return total[0]


class CrossAttention(nn.Module):
    """The cross-attention neural operator: q + (1/L) Σ_l (q S_l) / (q n_l), every set normalised on its own.

    ∞-Brush, Eq. 10, after GNOT. A set of one token gives its value at every point, whatever the query.
    """

    def __init__(self, channels: int, *, heads: int, sets: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.sets = nn.ModuleList(TokenSet(channels, heads=heads) for _ in range(sets))
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def remember(self, tokens: list[Tensor]) -> list[Tensor]:
        """The sums of each set, for tokens (n, tokens, c) that do not change while a canvas is painted."""
        return [remember(t) for remember, t in zip(self.sets, tokens, strict=True)]

    def forward(self, u: Tensor, place: Tensor, memory: list[Tensor], cells: Cells | None = None) -> Tensor:
        """Features u and positional features `place`, both (..., c); `memory` from `remember`. Without gradients u may
        become the result."""
        if cells is None:
            return by_bands(partial(self._attend, memory=memory), u.shape[1], u, place, into=u)
        return self._attend(u, place, memory, cells)

    def _attend(self, u: Tensor, place: Tensor, memory: list[Tensor], cells: Cells | None = None) -> Tensor:
        query = self.query(functional.layer_norm(u, u.shape[-1:]) + place)
        query = query.unflatten(-1, (self.heads, -1)).softmax(-1)
        total = query
        for sums in memory:
            total = total + attend(query, sums, cells) / len(memory)
        change: Tensor = self.out(total.flatten(-2))
        return u + change


def attend(query: Tensor, sums: Tensor, cells: Cells | None = None) -> Tensor:
    """(q S) / (q n) for softmaxed queries (n, ..., heads, d) of a lattice or (points, heads, d) of a scatter."""
    if cells is not None:
        count = torch.bincount(cells.scene, minlength=len(sums))  # cells are sorted by scene
        row = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[cells.scene]
        size = int(count.max())
        room = query.new_zeros(len(sums) * size, *query.shape[1:]).index_copy(0, cells.scene * size + row, query)
        found = torch.einsum("nphd,nhde->nphe", room.unflatten(0, (len(sums), size)), sums).flatten(0, 1)
        found = rows_of(found, cells.scene * size + row)
    else:
        found = torch.einsum("n...hd,nhde->n...he", query, sums)
    return found[..., :-1] / found[..., -1:]


class SelfAttention(nn.Module):
    """The self-attention neural operator, linear in points: cross-attention whose one set is the function itself."""

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(channels, heads=heads, sets=1)

    def part(self, u: Tensor, place: Tensor, weights: Tensor) -> Tensor:
        """What some of the points, (n, rows, columns, c) with quadrature weights (n, rows, columns), add to the sums.

        Float64, to be added up over all points in a fixed order and then made float32 for `forward`.
        """
        tokens = (functional.layer_norm(u, u.shape[-1:]) + place).flatten(1, 2)
        return cast(TokenSet, self.attention.sets[0]).part(tokens, weights.flatten(1))

    def forward(self, u: Tensor, place: Tensor, sums: Tensor) -> Tensor:
        """Any of the points, (n, rows, columns, c), given the sums over all of them."""
        attended: Tensor = self.attention(u, place, [sums])
        return attended
