"""Forward process, objective, noise levels and solvers.

The state is x_σ = u_0 + σ ξ with white ξ: the paper's u_t = √ᾱ A u_0 + √(1-ᾱ) A ξ is √ᾱ A x_σ at
σ² = (1-ᾱ)/ᾱ, since A acts on signal and noise alike. So the state that is stored stays white (local to
a tile, exact across resolutions) and the operator is *fed* A x. Log-SNR is -2 ln σ.

**Progressive resolution.** The mean over 2 x 2 pixels of x_σ is u_0's mean plus noise of σ/2: an
orthonormal Haar level of the state is itself a diffusion, of the block-mean image. So a canvas starts
at a coarse pitch, and a finer one takes over when its detail rises above the noise (`Ladder`).

Solvers see only `denoise(x, sigma)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import UsageError

Objective = Literal["v", "x0"]
_DENSITY = (0.7, 2.0, 4.0)  # steps a pitch, finest first, over its part of all; the last for all others
SIGMA_DATA = 0.5  # root mean square of an H&E image in [-1, 1], every pitch


def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(skip, out, in) with which D(x, σ) = skip x + out F(in A x, σ): Karras et al. (2022), Table 1.

    With these, F's target is the velocity v of Salimans and Ho (2022), in units of the data.
    """
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), 1 / total.sqrt()


def target(image: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """What F should say: (image - skip x) / out. `sigma` broadcasts against the images."""
    skip, out, _ = coefficients(sigma)
    return (image - skip * noisy) / out


def loss(said: Tensor, image: Tensor, noisy: Tensor, sigma: Tensor, *, objective: Objective = "v") -> Tensor:
    """Squared error at every value. `v`: flat over noise levels; `x0`: of the image itself, in units of the data."""
    error = (said - target(image, noisy, sigma)) ** 2
    if objective == "v":
        return error
    _, out, _ = coefficients(sigma)
    return error * (out / SIGMA_DATA) ** 2


@dataclass(frozen=True)
class Rung:
    """One pitch of the ladder: the noise levels (in its own block-mean image) at which the solver works there."""

    mpp: float
    sigmas: tuple[float, ...]  # decreasing; the last is where the rung ends: 0, or the hand-over


@dataclass(frozen=True)
class Ladder:
    """Which pitch works at which noise, from the spectrum of the data.

    pitches: µm, finest first, each twice the last; details: standard deviation, finest first, of what the mean over
    2 x 2 pixels of each pitch loses; tolerance: a pitch takes over when (detail / σ)² reaches it, one number or one for
    each of `details`; sigma_max: where the coarsest pitch starts; sigma_min: where the finest ends; retained: the part
    of the noise that is left in every estimate, finest pitch first, none where it is not said. A network that has not
    seen its own errors takes detail for noise: Ning et al. (2024) scale the noise that it says by 1 - that.
    """

    pitches: tuple[float, ...]
    details: tuple[float, ...]
    tolerance: float | tuple[float, ...] = 0.005
    sigma_max: float = 80.0
    sigma_min: float = 0.02
    retained: tuple[float, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values, for the brush's JSON."""
        return asdict(self)

    def starting_at(self, mpp: float) -> Ladder:
        """The same ladder with `mpp` as its finest pitch.

        Raises:
            UsageError: if it has no such pitch.
        """
        for level, pitch in enumerate(self.pitches):
            if math.isclose(pitch, mpp, rel_tol=1e-6):
                tolerance = self.tolerance[level:] if isinstance(self.tolerance, tuple) else self.tolerance
                kept = {
                    "pitches": self.pitches[level:],
                    "details": self.details[level:],
                    "retained": self.retained[level:],
                }
                return replace(self, tolerance=tolerance, **kept)  # type: ignore[arg-type]
        known = ", ".join(f"{pitch:g}" for pitch in self.pitches)
        raise UsageError(f"the brush paints at {known} µm per pixel, not at {mpp:g}")

    def coefficients(self, sigma: float, mpp: float) -> tuple[float, float, float]:
        """`coefficients` at a noise level and a pitch, as numbers, with what is retained there: nothing at noise that a
        coarser pitch works at, which only a solver without the ladder sees here."""
        skip, out, into = (value.item() for value in coefficients(torch.tensor(sigma)))
        level = self.pitches.index(mpp)
        left = self.retained[level] if level < len(self.retained) and sigma <= self.entry(level) else 0.0
        return left + (1 - left) * skip, (1 - left) * out, into

    def entry(self, level: int) -> float:
        """σ, in the image of pitch `level`, at which it takes over from the coarser one."""
        if level == len(self.pitches) - 1:
            return self.sigma_max
        tolerance = self.tolerance[level] if isinstance(self.tolerance, tuple) else self.tolerance
        return self.details[level] / math.sqrt(tolerance)

    def span(self, level: int) -> tuple[float, float]:
        """The noise levels (low, high) that the solver visits at a pitch."""
        return (self.entry(level - 1) / 2 if level else self.sigma_min), self.entry(level)

    def budget(self) -> list[str]:
        """What each hand-over may cost, in words: detail is drawn, of which little more than its variance is known.

        Its divergence from the truth is at most log(1 + SNR) / 2 nats for each of its values, three for every four
        pixels.
        """
        found = []
        for level in range(len(self.pitches) - 2, -1, -1):
            ratio = 4 / 3 * (self.details[level] / self.entry(level)) ** 2
            found.append(
                f"{self.pitches[level + 1]:g} -> {self.pitches[level]:g} µm at σ {self.entry(level):.2f}: detail "
                f"{100 * ratio:.1f} % of its noise, at most {math.log1p(ratio) / 2:.4f} nats a value"
            )
        return found

    def rungs(self, steps: int, *, progressive: bool = True) -> list[Rung]:
        """Where the solver evaluates, evenly spaced in log-SNR at each pitch; coarsest pitch first.

        The finest pitch has 0.7 of its part of `steps` over the whole range, the next twice its part, all others four
        times: there an evaluation costs a quarter, a sixteenth, ..., and layout and nuclei are decided there.
        Not progressive: the finest pitch does all of it, in `steps` evaluations from the same start.
        """
        top = len(self.pitches) - 1
        if not progressive:
            start = self.sigma_max * 2.0**top
            return [Rung(self.pitches[0], (*_geometric(start, self.sigma_min, steps), 0.0))]
        spans = [self.span(level) for level in range(top + 1)]
        total = sum(math.log(high / low) for low, high in spans)
        rungs = []
        for level in range(top, -1, -1):
            low, high = spans[level]
            count = max(1, round(_DENSITY[min(level, 2)] * steps * math.log(high / low) / total))
            ends = (*_geometric(high, low, count), 0.0) if level == 0 else _geometric(high, low, count + 1)
            rungs.append(Rung(self.pitches[level], ends))
        return rungs


def _geometric(high: float, low: float, count: int) -> tuple[float, ...]:
    """`count` levels from high to low, both included (only `high` where count is 1)."""
    return tuple(high * (low / high) ** (index / max(count - 1, 1)) for index in range(count))


def finer(x: Tensor, sigma: float, detail: float, noise: Tensor, image: Tensor) -> Tensor:
    """The state at half the pitch: (c, h, w) at `sigma` -> (c, 2h, 2w) at 2 sigma.

    Each pixel becomes four with the same mean; their differences are the noise's own (white of variance (2σ)² overall)
    plus the data's mean detail power, so that marginal variances are right from the start (moment matching), plus the
    detail that the coarser image foretells: that of `image`, which `ramped` makes of the last evaluation. `noise` is
    white, (c, 2h, 2w); `detail` is the standard deviation of the data's detail at the finer pitch.
    """
    # differences from the mean of four keep 3/4 of white noise's variance: 4σ² x 3/4 of noise, and detail² of data
    new = image + noise * math.sqrt((2 * sigma) ** 2 + detail**2 * 4 / 3)
    return _repeated(x - block_means(new)) + new


def block_means(x: Tensor) -> Tensor:
    """The mean over 2 x 2 pixels: (c, 2h, 2w) -> (c, h, w)."""
    c, height, width = x.shape
    return x.reshape(c, height // 2, 2, width // 2, 2).mean((2, 4))


def _repeated(x: Tensor) -> Tensor:
    return x[:, :, None, :, None].expand(-1, -1, 2, -1, 2).flatten(3, 4).flatten(1, 2)


def ramped(image: Tensor) -> Tensor:
    """An image at half the pitch, every pixel with the slope to its neighbours: (c, h + 2, w + 2) -> (c, 2h, 2w).

    It keeps the means over 2 x 2 pixels: the (1, 3) spline wavelet of Cohen, Daubechies and Feauveau (1992) without its
    details. Detail and slope of the block means belong together; where a hand-over draws the detail alone, 2 to 10 % of
    the variance of an octave is lost (exact Gaussian fields, tolerances from 0.005 to 0.03).
    """
    for dim in (1, 2):
        size = image.shape[dim] - 2
        inner = image.narrow(dim, 1, size)
        slope = (image.narrow(dim, 2, size) - image.narrow(dim, 0, size)) / 8
        image = torch.stack([inner - slope, inner + slope], dim + 1).flatten(dim, dim + 1)
    return image


Denoise = Callable[[Tensor, float], Tensor]
Solver = Literal["2m", "ddim", "heun", "ancestral"]


class Move(NamedTuple):
    """One evaluation of a solver, D = denoise(x, sigma), and the state after it.

    x <- keep x + new D + old D' + fresh z, where D' is the evaluation before and z white noise of stream `stream`. All
    our solvers are such sums, so a canvas moves tile by tile, and a run is a list of moves that goes on at any of them.
    `coarse`: D' is of the coarser pitch and knows block means only, so what is finer in it is taken from D.
    """

    sigma: float
    keep: float
    new: float
    old: float = 0.0
    fresh: float = 0.0
    stream: int = 0
    coarse: bool = False

    def of(self, x: Tensor, image: Tensor, before: Tensor | None, noise: Tensor | None) -> Tensor:
        """The state after the move; `before` and `noise` are only read where their weights are not zero.

        Raises:
            ValueError: if one is needed and not given.
        """
        found = x * self.keep + image * self.new
        if self.coarse and before is not None:
            before = image + _repeated(block_means(before - image))
        for other, weight, name in ((before, self.old, "the evaluation before"), (noise, self.fresh, "noise")):
            if weight:
                if other is None:
                    raise ValueError(f"this move needs {name}")
                found += other * weight
        return found


def moves(
    sigmas: Sequence[float], solver: Solver = "2m", *, stream: int = 1000, before: float | None = None
) -> list[Move]:
    """The moves of a solver from sigmas[0] to sigmas[-1]; `before`: the noise of the last evaluation of the coarser
    pitch, in this one's image, so that a multistep solver goes on from it.

    2m: DPM-Solver++(2M), Lu et al. (2022), Alg. 2; ddim: its first order; heun: Karras et al. (2022), Alg. 2, whose
    second evaluation moves by (1 - r) / 2r of the difference of both, r = following / sigma; ancestral: DDIM with
    η = 1, whose fresh noise is of the streams from `stream` on.
    """
    found: list[Move] = []
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        keep = following / sigma
        if following == 0:
            found.append(Move(sigma, 0.0, 1.0))
        elif solver == "2m" and (last := sigmas[index - 1] if index else before or 0) > sigma:
            # half of h / h', where h is this step in log σ and h' the one before; far beyond it nothing is foretold
            extra = min(math.log(sigma / following) / math.log(last / sigma) / 2, 1.0)
            found.append(Move(sigma, keep, (1 - keep) * (1 + extra), -(1 - keep) * extra, coarse=not index))
        elif solver == "heun":
            turn = (1 - keep) / (2 * keep)
            found += [Move(sigma, keep, 1 - keep), Move(following, 1.0, turn, -turn)]
        elif solver == "ancestral":
            fresh = following * math.sqrt(1 - keep**2)
            keep = keep**2  # = sqrt(following² - fresh²) / sigma
            found.append(Move(sigma, keep, 1 - keep, fresh=fresh, stream=stream + index))
        else:
            found.append(Move(sigma, keep, 1 - keep))
    return found


def solve(
    denoise: Denoise, x: Tensor, steps: Sequence[Move], *, noise: Callable[[int], Tensor] | None = None
) -> Tensor:
    """Carry the state x through the moves; `noise(stream)` is white noise of the state's shape."""
    before: Tensor | None = None
    for move in steps:
        image = denoise(x, move.sigma)
        x = move.of(x, image, before, noise(move.stream) if move.fresh and noise else None)
        before = image
    return x
