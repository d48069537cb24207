"""How unlike two sets of vectors are: the figures of merit of generative models, in any encoder's space.

All are functions of two arrays (n, dim); none looks at where a vector comes from. Rows are drawn again and again for an
interval (`interval`), and a figure says little without that of two sets of real vectors beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]
Groups = NDArray[np.intp]
Figure = Callable[[Vectors, Vectors], Any]  # a number, or an array of several
_ROWS = 1024  # of a distance matrix that is held at once


def cosine(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Of each vector of one with that of the other at its place: (..., dim), (..., dim) -> (...)."""
    first, second = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.asarray((first * second).sum(-1) / np.maximum(lengths, 1e-12))


def frechet(real: Vectors, other: Vectors) -> float:
    """|m - m'|² + tr(C + C' - 2 (C C')^½): the Fréchet distance of two Gaussians, after Heusel et al. (2017), Eq. 6.

    Raises:
        ValueError: if a set has fewer vectors than they have numbers, so that its covariance is singular.
    """
    for vectors in (real, other):
        if len(vectors) <= vectors.shape[1]:
            raise ValueError(f"{len(vectors)} vectors of {vectors.shape[1]} numbers have no covariance; give more")
    means = [vectors.mean(0) for vectors in (real, other)]
    # C = R'R with R triangular, also where bootstrapped rows make C singular; of (C C')^½ the trace is the sum of the
    # singular values of R R'^T
    apart = [(v - mean) / np.sqrt(len(v) - 1) for v, mean in zip((real, other), means, strict=True)]
    roots: list[Any] = [np.linalg.qr(one, mode="r") for one in apart]
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    total = sum(float((one**2).sum()) for one in apart)
    return float(((means[0] - means[1]) ** 2).sum() + total - 2 * shared)


def kernel_distance(real: Vectors, other: Vectors) -> float:
    """Squared maximum mean discrepancy under (x·y / dim + 1)³, without bias: Bińkowski et al. (2018), over all pairs.

    Raises:
        ValueError: if a set has fewer than two vectors.
    """
    if min(len(real), len(other)) < 2:
        raise ValueError("a kernel distance needs two vectors of each set")

    def mean(one: Vectors, two: Vectors, *, same: bool) -> float:
        total, own = 0.0, 0.0
        for start in range(0, len(one), _ROWS):
            part = one[start : start + _ROWS]
            kernel = part @ two.T / one.shape[1] + 1
            total += float((kernel * kernel * kernel).sum())  # as ** 3 it takes ten times longer
            own += float((((part**2).sum(1) / one.shape[1] + 1) ** 3).sum()) if same else 0.0
        pairs = len(one) * (len(one) - 1) if same else len(one) * len(two)
        return (total - own) / pairs

    return mean(real, real, same=True) + mean(other, other, same=True) - 2 * mean(real, other, same=False)


class Overlap(NamedTuple):
    """Where two sets lie in each other's neighbourhoods.

    precision: part of the others that lie in the real ones' neighbourhoods; recall: the reverse (Kynkäänniemi et al.
    2019); density: how many real neighbourhoods hold another, over k; coverage: part of the real neighbourhoods that
    hold one (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(real: Vectors, other: Vectors, *, k: int = 5) -> Overlap:
    """Overlap of balls that reach to the k-th neighbour in the own set.

    Raises:
        ValueError: if a set has no k neighbours.
    """
    if min(len(real), len(other)) <= k:
        raise ValueError(f"neighbourhoods of {k} need more than {k} vectors of each set")
    reach, reach_other = (np.concatenate([np.partition(d, k, 1)[:, k] for d in _squares(v, v)]) for v in (real, other))
    held, holds, covered, start = np.zeros(len(other), np.int64), np.zeros(len(real), np.bool_), 0, 0
    for squares in _squares(real, other):
        rows = slice(start, start + len(squares))
        inside = squares < reach[rows, None]
        held += inside.sum(0)
        covered += int(inside.any(1).sum())
        holds[rows] = (squares < reach_other).any(1)
        start = rows.stop
    return Overlap(float((held > 0).mean()), float(holds.mean()), float(held.mean() / k), covered / len(real))


def _squares(one: Vectors, two: Vectors) -> Iterator[Vectors]:
    """Squared distances of some rows of one from all of two."""
    lengths = (two**2).sum(1)
    for start in range(0, len(one), _ROWS):
        part = one[start : start + _ROWS]
        yield ((part**2).sum(1)[:, None] + lengths - 2 * part @ two.T).clip(0)


def interval(
    figure: Figure, real: Vectors, other: Vectors, *, draws: int = 100, seed: int = 0, level: float = 0.95,
    groups: tuple[Groups, Groups] | None = None, together: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """A bootstrap interval of a figure, or of each of several: the rows of both sets are drawn again, with replacement.

    `groups`: a number for each row of both sets; rows of one number are drawn together, since neighbours that share
    pixels are no independent witnesses. `together`: also those of one number in both sets, which are places and what
    was painted there; what differs from place to place is then no doubt about what differs between the sets. Drawn
    again, a set has fewer distinct vectors, which makes it look further away: the interval is moved so that its middle
    (median) is the figure itself.
    """
    random, found, sets = np.random.default_rng(seed), [], (real, other)
    numbers = groups or tuple(np.arange(len(vectors)) for vectors in sets)
    names = [np.unique(np.concatenate(numbers))] * 2 if together else [np.unique(one) for one in numbers]
    members = [[np.flatnonzero(one == k) for k in some] for one, some in zip(numbers, names, strict=True)]
    for _ in range(draws):
        if together:
            chosen = random.integers(len(names[0]), size=len(names[0]))
            rows = [np.concatenate([one[k] for k in chosen]) for one in members]
        else:
            rows = [_drawn(random, one, len(vectors)) for one, vectors in zip(members, sets, strict=True)]
        found.append(figure(real[rows[0]], other[rows[1]]))
    low, middle, high = np.quantile(found, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
    value = figure(real, other)
    return value + (low - middle), value + (high - middle)


def _drawn(random: np.random.Generator, members: list[Groups], count: int) -> Groups:
    """`count` rows in groups that are drawn with replacement, the last one cut."""
    rows: list[Groups] = []
    while sum(map(len, rows)) < count:
        rows.append(members[random.integers(len(members))])
    return np.concatenate(rows)[:count]
