"""The finite-dimensional rivals: they learn, they paint as their papers say, and they say what they need."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsi_brush.baselines import System
from wsi_brush.baselines import sdxl as sdxl_module
from wsi_brush.baselines.fixed import Fixed, FixedConfig, enlarged
from wsi_brush.baselines.patches import Patches, PatchesConfig, embedding_at, own, slerp
from wsi_brush.baselines.sdxl import Sdxl, SdxlConfig
from wsi_brush.condition import ConditionMap
from wsi_brush.coordinates import CoordinateSampler, TrainingPack, build_pack
from wsi_brush.diffusion import Ladder, coefficients, moves, solve
from wsi_brush.errors import MachineError, RefusedError, UsageError, WsiBrushError
from wsi_brush.field import NoiseField
from wsi_brush.grid import Grid
from wsi_brush.machine import free_memory
from wsi_brush.recipe import Optimisation, TrainConfig, read_config
from wsi_brush.scenes import Scenes
from wsi_brush.slide import open_slide
from wsi_brush.train import Training

pytestmark = pytest.mark.usefixtures("one_thread")
LADDER = Ladder((0.5, 1.0, 2.0, 4.0, 8.0), (0.1, 0.1, 0.1, 0.1))
DIM = 6


class Colours:
    """An encoder: mean and spread of a tile's colours."""

    name, dim, tile, fingerprint = "colours", DIM, 32, "c0ffee"

    def __call__(self, tiles: NDArray[np.uint8], /) -> NDArray[np.float32]:
        plain = tiles.astype(np.float32) / 255
        return np.concatenate([plain.mean((1, 2)), plain.std((1, 2))], 1)


@pytest.fixture(scope="module")
def pack(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingPack:
    target = tmp_path_factory.mktemp("rivals") / "pack"
    build_pack([open_slide(tissue_slide)], target, encoder=Colours())
    return TrainingPack(target, in_memory=True)


def scenes_of(pack: TrainingPack, *, batch: int = 2, mpp: float = 0.5) -> Scenes:
    sampler = CoordinateSampler(pack, shares=(1,) * 5, sizes=(64, 64, 64, 64, 32), window=32, points=4)
    return sampler.draw(0, batch, mpp=mpp)


def fitted(system: System, pack: TrainingPack, steps: int, *, rate: float = 4e-3) -> tuple[float, float]:
    """Loss of one batch with one draw of noise, before and after so many steps on it."""
    scenes, drawing = scenes_of(pack), Optimisation(unconditional=0.0)
    optimiser = torch.optim.Adam(system.parameters(), lr=rate)
    found = []
    for _ in range(steps + 1):
        window, scattered = system.losses(LADDER, scenes, pack.about, drawing, torch.Generator().manual_seed(0))
        found.append(window.item())
        assert scattered.item() == 0
        optimiser.zero_grad()
        window.backward()
        optimiser.step()
    return found[0], found[-1]


def lattice(values: Tensor, cell: float, *, present: Tensor | None = None, corner: float = 0.0) -> ConditionMap:
    """One scene's map of embeddings (rows, columns, dim)."""
    there = torch.ones(values.shape[:2]) if present is None else present
    return ConditionMap(values[None], there[None], torch.full((1, 2), corner), cell)


def one_line(found: pytest.ExceptionInfo[WsiBrushError], *words: str) -> None:
    message = str(found.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def stirred(system: nn.Module) -> None:
    """No weight is zero, so every part has its say."""
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


# -- patches -----------------------------------------------------------------------------------------------

SMALL = PatchesConfig(dim=DIM, side=16, width=8, levels=2, blocks=1, heads=2)


def test_patches_learn(pack: TrainingPack) -> None:
    torch.manual_seed(0)
    before, after = fitted(Patches(SMALL), pack, 25, rate=8e-3)
    assert after < 0.6 * before, (before, after)


def test_patches_hear_their_embedding_and_their_pitch_and_no_condition_is_none() -> None:
    torch.manual_seed(0)
    system = Patches(SMALL).eval()
    stirred(system)
    x, sigma = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    one, other = torch.randn(2, 1, DIM)

    def said(embedding: Tensor, known: float, *, mpp: float = 0.5, present: float = 1.0) -> Tensor:
        told = system.tell_of(embedding, torch.tensor([float(present)]), torch.tensor([float(known)]))
        return system(x, sigma, mpp, told)

    assert not torch.allclose(said(one, 1), said(other, 1), atol=1e-3)
    assert not torch.allclose(said(one, 1), said(one, 1, mpp=2.0), atol=1e-3)
    assert not torch.allclose(said(one, 1, present=0), said(one, 0), atol=1e-4)
    assert torch.equal(said(one, 0), said(other, 0))
    assert torch.equal(said(one, 1, present=0), said(other, 1, present=0))


def test_a_patch_is_never_larger_than_a_scene(pack: TrainingPack, tmp_path: Path) -> None:
    """A quarter of 1024 pixels at 0.5 µm has room for 64 at 2 µm and not at 4."""
    given: dict[str, Any] = {"data": {"slides": [{"path": "tissue.tif"}], "sizes": [64] * 5, "window": 64, "points": 0}}
    given["data"]["shares"] = [1, 1, 0, 0, 0]
    given |= {"model": {"system": "patches", "side": 64, "width": 8, "levels": 2, "blocks": 1}}
    judged = Training(TrainConfig.model_validate(given), pack, tmp_path).held_out(1)
    assert [part.split(" µm")[0] for part in judged.split(", ")] == ["0.5", "1", "2"]
    given["data"] |= {"window": 32, "sizes": [64] * 4 + [32], "shares": [1] * 5}
    with pytest.raises(UsageError) as found:
        Training(TrainConfig.model_validate(given), pack, tmp_path)
    one_line(found, "[data] sizes", "32 pixels at 8 µm", "64 or more")
    given["data"] |= {"shares": [1, 0, 0, 0, 0]}
    assert Training(TrainConfig.model_validate(given), pack, tmp_path).number == 0
    for wrong in ({"side": 30}, {"apart": 0}, {"width": 12}, {"apart": 5}):
        with pytest.raises(ValueError, match="expected"):
            PatchesConfig(dim=DIM, **wrong)


def test_patches_are_cut_from_their_scenes(pack: TrainingPack, monkeypatch: pytest.MonkeyPatch) -> None:
    """At noise that cannot be seen, what the network is given are parts of the scenes, all of them different."""
    system, scenes, heard = Patches(SMALL), scenes_of(pack), list[Tensor]()
    monkeypatch.setattr(system, "forward", lambda x, *told: heard.append(x) or torch.zeros_like(x))
    quiet = Ladder(LADDER.pitches, LADDER.details, sigma_min=1e-5, sigma_max=1.1e-5)
    system.losses(quiet, scenes, pack.about, Optimisation(), torch.Generator().manual_seed(0))
    (patches,) = heard
    corners = set()
    for number, patch in enumerate(patches / coefficients(torch.tensor(1e-5))[2]):
        every = scenes.whole()[number // 4].unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4)
        off = (every - patch).abs().amax((2, 3, 4))
        assert off.min() < 1e-3
        corners.add((number // 4, int(off.argmin())))
    assert len(patches) == 8
    assert len(corners) > 4


def test_slerp_keeps_length_and_turns_evenly() -> None:
    first = torch.tensor([[1.0, 0, 0]]).expand(5, -1)
    angle = 2.0
    second = torch.tensor([[math.cos(angle), math.sin(angle), 0]]).expand(5, -1)
    weight = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    expected = torch.stack([(weight * angle).cos(), (weight * angle).sin(), 0 * weight], 1)
    torch.testing.assert_close(slerp(first, second, weight), expected)
    near = torch.tensor([[1.0, 0.01, 0]]).expand(5, -1)  # cosine 0.99995
    torch.testing.assert_close(slerp(first, near, weight), torch.lerp(first, near, weight[:, None]), rtol=0, atol=0)
    opposite = slerp(first, -first, weight)
    torch.testing.assert_close(opposite, first * (1 - 2 * weight[:, None]))


def test_an_embedding_is_read_by_its_patchs_corner_two_across_then_down() -> None:
    values = torch.nn.functional.normalize(torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = lattice(values, 16.0)
    corner = torch.tensor([[0.0, 0], [16, 32], [4, 8], [20, 44], [-50, -50], [99, 99]])
    embedding, present = embedding_at(found, torch.zeros(6, dtype=torch.long), corner + 8)
    assert torch.equal(present, torch.ones(6))
    torch.testing.assert_close(embedding[:2], torch.stack([values[0, 0], values[1, 2]]))
    torch.testing.assert_close(embedding[4:], torch.stack([values[0, 0], values[2, 3]]))
    for index, (row, column, down, across) in enumerate([(0, 0, 0.25, 0.5), (1, 2, 0.25, 0.75)], 2):
        pairs = [
            slerp(values[r, column][None], values[r, column + 1][None], torch.tensor([across])) for r in (row, row + 1)
        ]
        torch.testing.assert_close(embedding[index], slerp(*pairs, torch.tensor([down]))[0])


def test_an_absent_cell_gives_no_direction_and_takes_its_part_of_the_presence() -> None:
    values = torch.zeros(1, 2, DIM)
    values[0, 0, 0] = 2.0
    found = lattice(values, 16.0, present=torch.tensor([[1.0, 0.0]]))
    corner = torch.tensor([[0.0, 0], [0, 4], [0, 12], [0, 16]])
    embedding, present = embedding_at(found, torch.zeros(4, dtype=torch.long), corner + 8)
    torch.testing.assert_close(embedding[:3], values[0, :1].expand(3, -1))
    torch.testing.assert_close(present, torch.tensor([1.0, 0.75, 0.25, 0.0]))


def test_the_set_is_the_one_whose_tiles_are_as_large_as_a_patch() -> None:
    sets = [lattice(torch.randn(2, 2, DIM), cell) for cell in (32.0, 128.0, 512.0)]
    assert [own(sets, side).cell for side in (16, 64, 128, 300)] == [32, 32, 128, 512]
    torch.testing.assert_close(own(sets, 16).values.norm(dim=-1), torch.full((1, 2, 2), math.sqrt(DIM)))


Exact = Callable[..., Tensor]


def gaussian(mean: float, spread: float) -> Exact:
    """What the image is thought to be where every value is drawn from N(mean, spread²)."""

    def image(x: Tensor, sigma: float, *given: Any, **named: Any) -> Tensor:
        return (spread**2 * x + sigma**2 * mean) / (spread**2 + sigma**2)

    return image


def patches_that_know(image: Exact, monkeypatch: pytest.MonkeyPatch) -> Patches:
    system = Patches(SMALL).eval()
    monkeypatch.setattr(system, "image", image)
    return system


ONE = [lattice(torch.ones(1, 1, DIM), 16.0)]


@pytest.mark.parametrize("shape", [(37, 50), (5, 9), (16, 16)])
def test_windows_of_a_constant_are_that_constant(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a canvas that windows do not fill, and on one smaller than a window."""
    system = patches_that_know(lambda x, *given, **named: torch.full_like(x, 0.3), monkeypatch)
    heard = list[tuple[str, int, int]]()
    canvas = Grid(0.5, 3, -7, *shape)
    found = system.paint(ONE, canvas, LADDER, seed=0, steps=3, guidance=2, tell=lambda *told: heard.append(told))
    assert found.shape == (3, *shape)
    torch.testing.assert_close(found, torch.full_like(found, 0.3), rtol=0, atol=1e-6)
    assert heard[-1][1] == heard[-1][2]


def test_exact_patches_paint_what_the_whole_canvas_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pointwise posterior does not know of windows: with the same noise, the canvas in one piece comes out."""
    system = patches_that_know(gaussian(0.2, 0.4), monkeypatch)
    canvas, field, steps = Grid(0.5, 10, 20, 40, 56), NoiseField(7), 12
    found = system.paint(ONE, canvas, LADDER, seed=7, steps=steps, guidance=1)
    sigmas = [80 * (0.02 / 80) ** (index / (steps - 1)) for index in range(steps)]
    whole = solve(
        gaussian(0.2, 0.4), 80 * field.read(canvas), moves([*sigmas, 0.0], "ancestral"),
        noise=lambda stream: field.read(canvas, stream=stream),
    )  # fmt: skip
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_exact_patches_end_in_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of the end follows from the moves; with steps enough it is that of the data."""
    mean, spread, steps = 0.2, 0.4, 40
    sigmas = [80 * (0.02 / 80) ** (index / (steps - 1)) for index in range(steps)]
    middle, variance = 0.0, 80.0**2
    for move in moves([*sigmas, 0.0], "ancestral"):
        trust = spread**2 / (spread**2 + move.sigma**2)
        middle = (move.keep + move.new * trust) * middle + move.new * (1 - trust) * mean
        variance = (move.keep + move.new * trust) ** 2 * variance + move.fresh**2
    assert middle == pytest.approx(mean, abs=1e-3)
    assert math.sqrt(variance) == pytest.approx(spread, rel=0.1)
    system = patches_that_know(gaussian(mean, spread), monkeypatch)
    found = system.paint(ONE, Grid(0.5, 0, 0, 32, 64), LADDER, seed=1, steps=steps, guidance=1)
    error = math.sqrt(variance / found.numel())
    assert abs(found.mean().item() - middle) < 4 * error
    assert abs(found.std().item() - math.sqrt(variance)) < 4 * error / math.sqrt(2)


def test_there_is_no_seam_between_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where windows show their embedding, neighbouring pixels differ by a quarter of what tiles side by side would."""

    def image(x: Tensor, sigma: float, mpp: float, embedding: Tensor, *given: Any, **named: Any) -> Tensor:
        return embedding[:, :3, None, None].expand_as(x)

    turn = 0.3 * (torch.arange(4.0)[:, None] + torch.arange(4.0))
    values = torch.stack([turn.cos(), turn.sin(), *[0 * turn] * (DIM - 2)], -1)
    system, canvas = patches_that_know(image, monkeypatch), Grid(0.5, 0, 0, 64, 64)
    found = system.paint([lattice(values, 16.0)], canvas, LADDER, seed=0, steps=2, guidance=1)
    tiles = 2 * math.sin(0.15) * math.sqrt(DIM)
    for axis in (1, 2):
        jumps = found.diff(dim=axis).norm(dim=0)
        assert 0.2 * tiles < jumps.max().item() < 0.26 * tiles


def test_a_canvas_is_a_function_of_its_place_and_seed() -> None:
    torch.manual_seed(0)
    system = Patches(SMALL).eval()
    stirred(system)
    condition = [lattice(torch.randn(4, 4, DIM), 16.0)]
    first, again, other, moved = (
        system.paint(condition, Grid(0.5, top, 0, 24, 32), LADDER, seed=seed, steps=2, guidance=1.5)
        for top, seed in ((0, 0), (0, 0), (0, 1), (8, 0))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    assert not torch.allclose(first, moved, atol=0.1)


def test_guidance_is_theirs_with_w_one_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """ε = (1 + w) ε_c - w ε_u; at w = 0 the unconditional model is not asked at all."""
    torch.manual_seed(0)
    system = Patches(SMALL).eval()
    stirred(system)
    x, sigma, embedding, present = torch.randn(2, 3, 16, 16), 0.7, torch.randn(2, DIM), torch.ones(2)
    told = list[Tensor]()
    plain = system.tell_of

    def tell_of(embedding: Tensor, present: Tensor, known: Tensor) -> Tensor:
        told.append(known)
        return plain(embedding, present, known)

    monkeypatch.setattr(system, "tell_of", tell_of)
    conditional = system.image(x, sigma, 0.5, embedding, present, guidance=1)
    assert [known.tolist() for known in told] == [[1, 1]]
    unconditional = system.image(x, sigma, 0.5, embedding, present, guidance=0)
    guided = system.image(x, sigma, 0.5, embedding, present, guidance=4)
    noise = [(x - image) / sigma for image in (conditional, unconditional, guided)]
    torch.testing.assert_close(noise[2], 4 * noise[0] - 3 * noise[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)


def test_patches_state_their_memory() -> None:
    system = Patches(SMALL)
    small, large = (system.bytes_for(Grid(0.5, 0, 0, side, side)) for side in (1024, 2048))
    assert 12 * 2048**2 < large < 3.9 * small
    assert PatchesConfig(**system.config.to_json()) == system.config  # type: ignore[arg-type]


# -- fixed -------------------------------------------------------------------------------------------------

TINY = FixedConfig(dim=DIM, size=32, width=8, levels=2, blocks=1, heads=2, tokens=2)
THREE = [
    lattice(torch.randn(4, 4, DIM, generator=torch.Generator().manual_seed(2)), cell) for cell in (16.0, 64.0, 256.0)
]


def test_fixed_learns(pack: TrainingPack) -> None:
    torch.manual_seed(0)
    before, after = fitted(Fixed(TINY), pack, 15, rate=8e-3)
    assert after < 0.6 * before, (before, after)


def test_fixed_hears_its_tokens_and_the_size_of_its_pixels() -> None:
    torch.manual_seed(0)
    system = Fixed(TINY).eval()
    stirred(system)
    x, time = torch.randn(1, 3, 32, 32), torch.tensor([300])
    yes, no = torch.ones(1), torch.zeros(1)
    other = [lattice(one.values[0].flip(0), one.cell) for one in THREE]
    with torch.no_grad():
        plain = system.velocity(x, time, 8.0, system.tokens_of(THREE, 64, yes))
        assert not torch.allclose(plain, system.velocity(x, time, 8.0, system.tokens_of(other, 64, yes)), atol=1e-4)
        assert not torch.allclose(plain, system.velocity(x, time, 1.0, system.tokens_of(THREE, 64, yes)), atol=1e-4)
    assert torch.equal(system.tokens_of(THREE, 64, no), system.tokens_of(other, 64, no))


def test_a_token_is_the_mean_of_the_cells_in_its_part_that_are_there() -> None:
    system = Fixed(TINY)
    with torch.no_grad():
        for project in system.embed:
            project.weight.zero_()[:DIM].fill_diagonal_(1)
            project.bias.zero_()
        system.place.zero_()
        system.absent.fill_(9)
    values = torch.arange(4.0)[:, None, None] + torch.zeros(4, 4, DIM)
    here = torch.ones(4, 4)
    here[:, 2:] = 0
    sets = [lattice(values * here[..., None], 16.0, present=here), *THREE[1:]]
    found = system.tokens_of(sets, 64, torch.ones(1))[0, :4, :DIM]
    # Eight readings a side, every half cell from -0.25 on; beyond the outer centres the edge goes on.
    upper, lower = (0 + 0.25 + 0.75 + 1.25) / 4, (1.75 + 2.25 + 2.75 + 3) / 4
    there, beyond = (1 + 1 + 1 + 0.75) / 4, 0.25 / 4
    for token, mean, present in ((0, upper, there), (1, upper, beyond), (2, lower, there), (3, lower, beyond)):
        torch.testing.assert_close(found[token], torch.full((DIM,), present * mean + (1 - present) * 9))


def test_fixed_paints_the_posterior_of_a_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sampler is deterministic: every pixel ends at mean + spread x its noise."""
    system = Fixed(TINY).eval()
    mean, spread = 0.2, 0.4

    def velocity(x: Tensor, time: Tensor, *given: Any) -> Tensor:
        kept = system.schedule.alphas_cumprod[time]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        image = (spread**2 * alpha * x + sigma**2 * mean) / (spread**2 * alpha**2 + sigma**2)
        return (alpha * x - image) / sigma

    monkeypatch.setattr(system, "velocity", velocity)
    found = system.paint(THREE, Grid(0.5, 0, 0, 32, 32), LADDER, seed=3, steps=30, guidance=1)
    noise = NoiseField(3).read(Grid(0.5, 0, 0, 32, 32))
    torch.testing.assert_close(found, mean + spread * noise, rtol=0, atol=0.06)
    assert found.std().item() == pytest.approx(spread * noise.std().item(), rel=0.03)


def test_fixed_guides_as_the_brush_does(monkeypatch: pytest.MonkeyPatch) -> None:
    system, asked = Fixed(TINY).eval(), list[float]()

    def velocity(x: Tensor, time: Tensor, mpp: float, tokens: Tensor) -> Tensor:
        asked.append(tokens.sum().item())
        return torch.full_like(x, asked[-1])

    monkeypatch.setattr(system, "velocity", velocity)
    monkeypatch.setattr(system, "tokens_of", lambda condition, side, known: known[:, None, None])
    canvas = Grid(0.5, 0, 0, 32, 32)
    once = system.paint(THREE, canvas, LADDER, seed=0, steps=2, guidance=1)
    assert set(asked) == {1}
    none = system.paint(THREE, canvas, LADDER, seed=0, steps=2, guidance=0)
    thrice = system.paint(THREE, canvas, LADDER, seed=0, steps=2, guidance=3)
    torch.testing.assert_close(thrice, 3 * once - 2 * none, rtol=1e-3, atol=1e-3)


def test_fixed_is_told_the_size_of_the_small_images_pixels(pack: TrainingPack, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 pixels of 1 µm for a scene of 64 of 0.5 µm from which it learns, and of 2 µm for a canvas of 128."""
    system, told = Fixed(TINY).eval(), list[float]()
    velocity = system.velocity

    def noted(x: Tensor, time: Tensor, mpp: float, tokens: Tensor) -> Tensor:
        told.append(mpp)
        return velocity(x, time, mpp, tokens)

    monkeypatch.setattr(system, "velocity", noted)
    system.losses(LADDER, scenes_of(pack), pack.about, Optimisation(), torch.Generator().manual_seed(0))
    assert told == [1.0]
    system.paint(THREE, Grid(0.5, 0, 0, 96, 128), LADDER, seed=0, steps=2, guidance=2)
    assert set(told[1:]) == {2.0}


@pytest.mark.parametrize("shape", [(300, 300), (96, 300), (300, 31), (4096, 4090)])
def test_an_image_is_enlarged_as_a_whole_and_cut(shape: tuple[int, int]) -> None:
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))[:1]
    found = enlarged(image, Grid(0.5, 0, 0, *shape))
    assert found.shape == (1, *shape)
    whole = torch.nn.functional.interpolate(image[None], (max(shape),) * 2, mode="bicubic")[0]
    torch.testing.assert_close(found, whole[:, : shape[0], : shape[1]], rtol=0, atol=2e-3)


def test_a_canvas_smaller_than_the_image_is_the_image_made_smaller() -> None:
    found = enlarged(torch.full((3, 32, 32), 0.5), Grid(0.5, 0, 0, 10, 20))
    torch.testing.assert_close(found, torch.full((3, 10, 20), 0.5))


def test_fixed_paints_any_canvas_and_states_its_memory() -> None:
    torch.manual_seed(0)
    system = Fixed(TINY).eval()
    canvas, heard = Grid(0.5, 8, 8, 40, 100), list[tuple[str, int, int]]()
    found = system.paint(THREE, canvas, LADDER, seed=0, steps=3, guidance=2, tell=lambda *told: heard.append(told))
    assert found.shape == (3, 40, 100)
    assert torch.isfinite(found).all()
    assert heard[-1][1] == heard[-1][2]
    assert system.bytes_for(Grid(0.5, 0, 0, 4096, 4096)) - system.bytes_for(Grid(0.5, 0, 0, 0, 0)) == 12 * 4096**2
    assert FixedConfig(**system.config.to_json()) == system.config  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size 30"):
        FixedConfig(dim=DIM, size=30)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MachineError) as found:
        Fixed(TINY)
    one_line(found, "diffusers", "[baselines]")


# -- a checkpoint of the user's ----------------------------------------------------------------------------


def save_pipeline(folder: Path, *, variant: str | None = None) -> Any:
    """An SDXL of a few thousand numbers, in the layout of the real one; its words are spelt letter by letter."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    spelling = folder.with_name(f"{folder.name}-words")
    spelling.mkdir(parents=True)
    (spelling / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}), "utf-8")
    (spelling / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(spelling / "vocab.json"), merges=str(spelling / "merges.txt"), model_max_length=16
    )
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 2), norm_num_groups=4, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), latent_channels=4, norm_num_groups=2, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if variant == "fp16":
        pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True, variant=variant)
    return pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sdxl") / "checkpoint"
    return folder, save_pipeline(folder)


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network."""

    def connect(*given: Any) -> None:
        raise AssertionError(f"asks the network: {given}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def sdxl_of(folder: Path, **changed: Any) -> Sdxl:
    return Sdxl(SdxlConfig(**{"dim": DIM, "folder": str(folder), "prompt": "tumour", "size": 64} | changed))


def painted(system: Sdxl, shape: tuple[int, int], *, seed: int = 0, guidance: float = 5.0) -> Tensor:
    return system.paint([], Grid(0.5, 40, 8, *shape), LADDER, seed=seed, steps=2, guidance=guidance)


@pytest.mark.usefixtures("cut_off")
def test_a_checkpoint_is_loaded_and_painted_with(checkpoint: tuple[Path, Any]) -> None:
    folder, pipeline = checkpoint
    heard = list[tuple[str, int, int]]()
    system = sdxl_of(folder)
    found = system.paint(
        [], Grid(0.5, 40, 8, 64, 64), LADDER, seed=0, steps=2, guidance=5, tell=lambda *told: heard.append(told)
    )
    noise = NoiseField(0, channels=4).read(Grid(1.0, 0, 0, 8, 8))[None]
    said = pipeline(
        "tumour", height=64, width=64, num_inference_steps=2, guidance_scale=5.0, latents=noise, output_type="pt"
    )
    torch.testing.assert_close(found, said.images[0] * 2 - 1)
    assert [done for _, done, _ in heard] == [64 * 64, 2 * 64 * 64]
    assert not torch.allclose(found, painted(system, (64, 64), seed=1), atol=1e-3)
    assert not torch.allclose(found, painted(sdxl_of(folder, prompt="fat"), (64, 64)), atol=1e-5)
    assert not torch.allclose(found, painted(system, (64, 64), guidance=1), atol=1e-5)


@pytest.mark.usefixtures("cut_off")
def test_beyond_its_size_an_image_is_enlarged_or_stands_beside_others(checkpoint: tuple[Path, Any]) -> None:
    folder, _ = checkpoint
    small, large = painted(sdxl_of(folder), (48, 64)), painted(sdxl_of(folder), (150, 200))
    assert large.shape == (3, 150, 200)
    expected = torch.nn.functional.interpolate(small[None], (150, 200), mode="bicubic")[0]
    torch.testing.assert_close(large, expected, rtol=0, atol=1e-3)
    tiles = painted(sdxl_of(folder, beyond="tiles"), (64, 100))
    assert tiles.shape == (3, 64, 100)
    torch.testing.assert_close(tiles[:, :, :64], painted(sdxl_of(folder), (64, 64)))
    assert not torch.allclose(tiles[:, :, 64:], tiles[:, :, :36], atol=1e-3)


@pytest.mark.usefixtures("cut_off")
def test_what_a_checkpoint_needs_is_said_before_it_is_loaded(
    checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = checkpoint
    networks = [getattr(pipeline, name) for name in sdxl_module.NETWORKS]
    count = sum(weight.numel() for network in networks for weight in network.state_dict().values())
    needs, half = sdxl_of(folder).needs(), sdxl_of(folder, dtype="bfloat16").needs()
    assert needs.parameters == half.parameters == count
    assert (needs.weights, half.weights) == (4 * count, 2 * count)
    assert needs.file == max(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert sdxl_of(folder, size=128).needs().features == 4 * needs.features
    assert sdxl_of(folder).bytes_for(Grid(0.5, 0, 0, 100, 100)) == 120_000 + needs.total
    monkeypatch.setattr(sdxl_module, "free_memory", lambda: needs.total - 1)
    monkeypatch.setattr(type(pipeline), "from_pretrained", lambda *given, **named: pytest.fail("it was loaded"))
    with pytest.raises(MachineError) as found:
        painted(sdxl_of(folder), (64, 64))
    one_line(found, str(folder), "weights", "float32", "GB free", "float16")


@pytest.mark.usefixtures("cut_off")
def test_a_variant_is_found_by_its_files(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half").rglob("*model.safetensors"))
    system = sdxl_of(tmp_path / "half", dtype="bfloat16")
    assert torch.isfinite(painted(system, (64, 64))).all()
    needs = sdxl_of(tmp_path / "half", dtype="float16").needs()
    vae = sum(sdxl_module._parameters(path) for path in (tmp_path / "half" / "vae").glob("*.safetensors"))
    assert needs.weights == 2 * needs.parameters + 2 * vae  # decoded in float32, where float16 overflows


def broken(folder: Path, how: str) -> None:
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "nothing":
        shutil.rmtree(folder)
    elif how == "another pipeline":
        index["_class_name"] = "FluxPipeline"
    elif how == "code":
        index["unet"] = ["my_unet", "Unet"]
    elif how == "pickles":
        weights.rename(weights.with_suffix(".bin"))
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "a weight less":
        tensors = load_file(weights)
        tensors.pop("conv_out.bias")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    else:
        shutil.rmtree(folder / "scheduler")
    if folder.exists():
        (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


@pytest.mark.usefixtures("cut_off")
@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("nothing", UsageError, ("model_index.json",)),
        ("another pipeline", UsageError, ("FluxPipeline", "StableDiffusionXLPipeline")),
        ("code", RefusedError, ("my_unet",)),
        ("pickles", UsageError, ("unet", "pickles")),
        ("cut", RefusedError, ("unet", "damaged")),
        ("no tokenizer", UsageError, ("tokenizer", "vocabulary")),
        ("no scheduler", RefusedError, ("cannot be loaded",)),
        ("a weight less", RefusedError, ("not in its files",)),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    checkpoint: tuple[Path, Any], tmp_path: Path, how: str, error: type[WsiBrushError], words: tuple[str, ...]
) -> None:
    shutil.copytree(checkpoint[0], tmp_path / "copy")
    broken(tmp_path / "copy", how)
    with pytest.raises(error) as found:
        painted(sdxl_of(tmp_path / "copy"), (64, 64))
    one_line(found, str(tmp_path / "copy"), *words)


def test_a_checkpoint_is_not_trained_and_its_configuration_is_checked(
    checkpoint: tuple[Path, Any], pack: TrainingPack
) -> None:
    system = sdxl_of(checkpoint[0])
    with pytest.raises(UsageError) as found:
        system.losses(LADDER, scenes_of(pack), pack.about, Optimisation(), torch.Generator())
    one_line(found, "not trained", "fixed")
    assert SdxlConfig(**system.config.to_json()) == system.config  # type: ignore[arg-type]
    digests = [sdxl_of(checkpoint[0], prompt=prompt).state_dict()["asked"] for prompt in ("tumour", "tumour", "fat")]
    assert torch.equal(digests[0], digests[1])
    assert not torch.equal(digests[0], digests[2])
    for wrong in ({"size": 100}, {"beyond": "stretched"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="expected"):
            sdxl_of(checkpoint[0], **wrong)


def test_without_transformers_the_extra_is_named(checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MachineError) as found:
        painted(sdxl_of(checkpoint[0]), (64, 64))
    one_line(found, "transformers", "[sdxl]")


def test_free_memory_is_what_programs_get() -> None:
    free = free_memory()
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux says")
    assert free is not None
    assert 2**26 < free < 2**46


# -- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "precision", "words"),
    [
        ("infty-diff", "bfloat16", "infty-diff is trained in float32, not in bfloat16"),
        ("infty-brush", "bfloat16", "infty-brush is trained in float32, not in bfloat16"),
        ("sdxl", "float32", "sdxl is painted with, not trained"),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(tmp_path: Path, system: str, precision: str, words: str) -> None:
    recipe = tmp_path / "recipe.toml"
    folder = 'folder = "x"' if system == "sdxl" else ""
    recipe.write_text(
        f'[data]\nslides = [{{ path = "a.tif" }}]\n[model]\nsystem = "{system}"\n{folder}\n'
        f'[optimisation]\nprecision = "{precision}"\n'
    )
    with pytest.raises(UsageError, match=words):
        read_config(recipe)
