"""A finite-dimensional diffusion model of one resolution: the place of SDXL in the paper's tables.

A conditional U-Net of the diffusers library makes images of `size` x `size` pixels, whatever they show; a canvas is one
such image, enlarged. It is told how large a pixel of it is, as SDXL is told the size of the original (Podell et al.
2023, section 2.2), and attends to the embeddings as a set of tokens. Forward process and objective are the library's:
cosine schedule (Nichol and Dhariwal 2021), velocity (Salimans and Ho 2022); it is sampled by DPM-Solver++(2M) (Lu et
al. 2022). The ladder of pitches is not used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..condition import ConditionMap
from ..diffusion import Ladder
from ..errors import MachineError
from ..field import NoiseField
from ..grid import Grid
from ..objective import Drawing, conditions
from ..progress import Tell, Told
from ..scenes import Scenes
from ..splat import interpolate
from . import System, check_counts

_OCTAVES = 8
_INSIDE = 4  # readings of a set of embeddings a token, each way
_BEYOND = 3  # pixels of the small image that bicubic interpolation reads beyond an edge
_LEAST_LOG_SNR = -5.1  # half of it; the cosine schedule has no end, and a solver in log-SNR needs one


@dataclass(frozen=True)
class FixedConfig:
    """Sizes; `dim` is the encoder's, `sets` how many pitches of embeddings there are.

    size: of the image, pixels, a multiple of 2^(levels - 1); width: channels at its pitch, doubled twice at most;
    blocks: residual blocks a level; heads: of the attention, at the two coarsest levels; tokens: of each set, a side.
    """

    dim: int
    sets: int = 3
    size: int = 256
    width: int = 32
    levels: int = 4
    blocks: int = 2
    heads: int = 8
    tokens: int = 8

    def __post_init__(self) -> None:
        """Raises:
        ValueError: if a size is not what it has to be.
        """
        check_counts(self)
        if self.levels < 2 or self.size < 8 or self.size % (1 << self.levels - 1):
            raise ValueError(
                f"size {self.size}, levels {self.levels}; expected 2 levels or more, and a size from 8 on that "
                f"halves {max(self.levels - 1, 1)} times"
            )
        if self.width % 8 or self.width % self.heads:
            raise ValueError(f"width {self.width}, heads {self.heads}; expected a width that 8 and heads divide")

    def to_json(self) -> dict[str, object]:
        """Plain values, for the brush's JSON."""
        return asdict(self)


class Fixed(System):
    """v(x, t, size of a pixel, tokens) of whole images, and painting by one of them, enlarged."""

    name = "fixed"
    sizes = FixedConfig
    config: FixedConfig

    def __init__(self, config: FixedConfig) -> None:
        """Raises:
        MachineError: if diffusers is not installed.
        """
        super().__init__()
        try:
            from diffusers import DDPMScheduler, UNet2DConditionModel
        except ImportError:
            raise MachineError(
                "the system `fixed` needs diffusers, which is not installed; install wsi-brush with the extra "
                "[baselines]"
            ) from None
        self.config = config
        plain, channels = config.levels - 2, 4 * config.width
        self.schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        self.unet = UNet2DConditionModel(
            sample_size=config.size,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
            block_out_channels=tuple(config.width * min(2**level, 4) for level in range(config.levels)),
            layers_per_block=config.blocks,
            cross_attention_dim=channels,
            attention_head_dim=config.heads,  # the number of heads, by the library's own account
            norm_num_groups=8,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * _OCTAVES,
        )
        self.embed = nn.ModuleList(nn.Linear(config.dim, channels) for _ in range(config.sets))
        self.absent = nn.Parameter(torch.randn(config.sets, channels) * 0.02)  # no tissue there
        self.unknown = nn.Parameter(torch.randn(config.sets, channels) * 0.02)  # no condition
        self.place = nn.Parameter(torch.randn(config.sets, config.tokens**2, channels) * 0.02)

    # -- one image -----------------------------------------------------------------------------------------

    def tokens_of(self, condition: list[ConditionMap], side: float, known: Tensor) -> Tensor:
        """Embeddings over the square of `side` pixels at the scenes' corner: (n, sets x tokens², channels).

        A token is the mean over its part of the square, of the cells that are there; `known` (n,) is 0 where the
        condition is withheld.
        """
        count = self.config.tokens
        at = (torch.arange(count * _INSIDE, device=known.device) + 0.5) * side / (count * _INSIDE)
        found = []
        for index, (project, lattice) in enumerate(zip(self.embed, condition, strict=True)):
            table = torch.cat([lattice.values, lattice.present[..., None]], -1)
            read = interpolate(table, *lattice.in_cells(at[None], at[None]))
            mean = read.unflatten(2, (count, _INSIDE)).unflatten(1, (count, _INSIDE)).mean((2, 4)).flatten(1, 2)
            present = mean[..., -1:].clamp(0, 1)
            token = project(mean[..., :-1] / present.clamp_min(1e-6)).to(present)
            token = torch.lerp(self.absent[index], token, present)
            found.append(torch.lerp(self.unknown[index], token, known[:, None, None]) + self.place[index])
        return torch.cat(found, 1)

    def velocity(self, x: Tensor, time: Tensor, mpp: float, tokens: Tensor) -> Tensor:
        """v of images (n, 3, size, size) at times (n,) of the schedule, whose pixels are `mpp` µm."""
        said: Tensor = self.unet(x, time, tokens, class_labels=_octaves(mpp, x.device).expand(len(x), -1)).sample
        return said

    # -- training ------------------------------------------------------------------------------------------

    def losses(
        self, ladder: Ladder, scenes: Scenes, about: dict[str, Any], drawing: Drawing, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Of whole scenes brought to `size`, at times of the schedule; there are no scattered points.

        The velocity is what is said, whatever `drawing.objective`.
        """
        image, size = scenes.whole(), self.config.size
        n, side = len(image), image.shape[-1]
        image = functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
        time = torch.randint(len(self.schedule.alphas_cumprod), (n,), generator=generator)
        noise = torch.randn(image.shape, generator=generator)
        known = (torch.rand(n, generator=generator) >= drawing.unconditional).float()
        noisy = self.schedule.add_noise(image, noise, time)
        tokens = self.tokens_of(conditions(scenes, about), side, known)
        error = self.velocity(noisy, time, scenes.mpp * side / size, tokens) - self.schedule.get_velocity(
            image, noise, time
        )
        return (error**2).mean(), torch.zeros(())

    # -- painting ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def paint(
        self, condition: list[ConditionMap], canvas: Grid, ladder: Ladder, *, seed: int, steps: int, guidance: float,
        tell: Tell | None = None,
    ) -> Tensor:  # fmt: skip
        """(3, height, width): the upper left part of a square as large as the canvas's longer side."""
        from diffusers import DPMSolverMultistepScheduler

        size, side, device = self.config.size, max(canvas.shape), self.device
        mpp = canvas.mpp * side / size
        tokens = [self.tokens_of(condition, side, torch.full((1,), known, device=device)) for known in (0.0, 1.0)]
        solver = DPMSolverMultistepScheduler.from_config(self.schedule.config, lambda_min_clipped=_LEAST_LOG_SNR)
        solver.set_timesteps(steps, device=device)
        x = NoiseField(seed).read(Grid(mpp, 0, 0, size, size), device=device)[None] * solver.init_noise_sigma
        told = Told(tell, "painting", len(solver.timesteps) * size**2)
        for time in solver.timesteps:
            said = self.velocity(x, time[None], mpp, tokens[1])
            if guidance != 1:
                said = torch.lerp(self.velocity(x, time[None], mpp, tokens[0]), said, guidance)
            x = solver.step(said, time, x).prev_sample
            told.add(size**2)
        return enlarged(x[0], canvas)

    def bytes_for(self, canvas: Grid) -> int:
        """The canvas, and the features of the small image: kept for the way up, joined, and in a block, as measured."""
        features = 4 * self.config.size**2 * self.config.width * 4 * (self.config.blocks + 6)
        return 12 * canvas.height * canvas.width + features


def enlarged(image: Tensor, canvas: Grid) -> Tensor:
    """A square image (3, size, size) brought to the canvas's longer side by bicubic interpolation, and cut to it."""
    size, side = image.shape[-1], max(canvas.shape)
    if side < size:
        return functional.interpolate(image[None], (side, side), mode="bicubic", antialias=True)[
            0, :, : canvas.height, : canvas.width
        ]
    factor = side / size * (1 + 1e-9)  # a whole number of pixels is not to become one less
    rows, columns = (min(size, math.ceil(length / factor) + _BEYOND) for length in canvas.shape)
    found = functional.interpolate(
        image[None, :, :rows, :columns], scale_factor=factor, mode="bicubic", recompute_scale_factor=False
    )
    return found[0, :, : canvas.height, : canvas.width]


def _octaves(mpp: float, device: torch.device) -> Tensor:
    """The size of a pixel as waves of its logarithm: (2 octaves,)."""
    turns = 2 * math.pi * math.log2(mpp) / 2.0 ** torch.arange(1, _OCTAVES + 1, device=device)
    return torch.cat([turns.sin(), turns.cos()])
