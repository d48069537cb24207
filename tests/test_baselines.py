"""The rivals: each trains, is saved, paints and is marked as our brush is; its mathematics is its papers'."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zarr
from conftest import TileStatistics
from torch import Tensor
from torch.nn import functional

from wsi_brush import train
from wsi_brush.baselines import SYSTEMS, System, build, system_class
from wsi_brush.baselines.infty_brush import CrossOperator, thumbnail
from wsi_brush.baselines.infty_diff import InftyDiffConfig
from wsi_brush.baselines.mollified import Cosine, Mollified, _places, _response, wiener
from wsi_brush.baselines.points import Domain, Neighbours, PointKernel
from wsi_brush.brush import Brush, load_brush, save_brush
from wsi_brush.cli.plans import plan_painting
from wsi_brush.commit import MANIFEST, sha256_of, verify
from wsi_brush.condition import ConditionMap
from wsi_brush.coordinates import CoordinateSampler, TrainingPack, build_pack
from wsi_brush.diffusion import Ladder
from wsi_brush.encoder import Encoder
from wsi_brush.errors import RefusedError, UsageError, WsiBrushError
from wsi_brush.field import NoiseField, mollify
from wsi_brush.grid import Grid
from wsi_brush.operators import TokenSet, attend
from wsi_brush.recipe import Optimisation, Rival, TrainConfig, read_config
from wsi_brush.slide import open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide
from wsi_brush.train import train_brush

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODER = cast(Encoder, TileStatistics())
LADDER = Ladder((0.5, 1.0, 2.0, 4.0, 8.0), (0.15, 0.12, 0.1, 0.1))
FUNCTIONS = ("infty-diff", "infty-brush", "infty-brush-no-cross")
SMALL = {"width": 8, "kernel": 5, "grid": 8, "node": 8, "heads": 2}


@pytest.fixture(scope="module")
def pack(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingPack:
    target = tmp_path_factory.mktemp("train") / "pack"
    build_pack([open_slide(tissue_slide)], target, encoder=ENCODER)
    return TrainingPack(target, in_memory=True)


@pytest.fixture(scope="module")
def brushes(pack: TrainingPack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A brush of every system, trained for three steps by the verb."""
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "training_pack", lambda *given: pack)
        for name in FUNCTIONS:
            folder = tmp_path_factory.mktemp(name)
            made = train_brush(config_of(name), folder / "brush", work=folder / "work", tell=lambda line: None)
            assert isinstance(made.network, system_class(name))
            found[name] = folder / "brush"
    return found


def config_of(system: str, **sizes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "data": {"slides": [{"path": "t.tif"}], "sizes": (64, 64, 64, 64, 32), "window": 32, "points": 16},
            "model": {"system": system, **SMALL, **sizes},
            "optimisation": {"steps": 3, "batch": 2, "warmup": 2},
        }
    )


def shaken(name: str, **sizes: Any) -> Any:
    """A system with no weight zero, so that every part of it has its say."""
    torch.manual_seed(0)
    found = build(name, {"dim": 5, **SMALL, **sizes})
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return found


def maps_of(n: int, *, value: float | None = None) -> list[ConditionMap]:
    values = torch.randn(n, 3, 3, 5) if value is None else torch.full((n, 3, 3, 5), value)
    return [ConditionMap(values, torch.ones(n, 3, 3), torch.zeros(n, 2), 40.0)]


def one_line(found: pytest.ExceptionInfo[WsiBrushError], *words: str) -> None:
    message = str(found.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# -- as a brush ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_saved_and_found_again(brushes: dict[str, Path], name: str, tmp_path: Path) -> None:
    assert verify(brushes[name]) == []
    about = json.loads((brushes[name] / "brush.json").read_text("utf-8"))
    assert about["system"] == name
    assert about["training"]["model"] == {"system": name, "mollifier": 1.0, **SMALL} | (
        {"weighting": "plain"} if name != "infty-diff" else {}
    )
    assert "objective" not in about
    brush = load_brush(brushes[name])
    assert brush.rival is not None
    assert brush.rival.name == name
    with pytest.raises(TypeError, match=name):
        _ = brush.denoiser
    save_brush(brush, tmp_path / "again")
    again = load_brush(tmp_path / "again")
    assert (again.fingerprint, again.sha256) == (brush.fingerprint, brush.sha256)
    assert again.rival is not None
    assert again.rival.config == brush.rival.config


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_paints_a_slide_that_is_marked(
    brushes: dict[str, Path], name: str, tissue_slide: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    painting = Painting(region=(300, 280, 70, 100), steps=5, guidance=1.5)
    brush = load_brush(brushes[name])
    made = synthesize_slide(
        tissue_slide, tmp_path / "new.ome.zarr", painting, brush=brush, encoder=ENCODER,
        tell=lambda what, done, total: heard.append(what),
    )  # fmt: skip
    assert made.shape == (70, 100)
    assert verify(made.path) == []
    group = zarr.open_group(made.path, mode="r")
    marks = next(value for value in dict(group.attrs).values() if isinstance(value, dict) and "synthetic" in value)
    assert marks["synthetic"] is True
    assert marks["system"] == name
    assert "solver" not in marks
    pixels = np.asarray(cast(Any, group["0"])[...])
    assert pixels.std() > 3
    assert f"painting with {name} (interrupted, it begins anew)" in heard


@pytest.mark.parametrize(("name", "sizes"), [(n, {}) for n in FUNCTIONS] + [("infty-brush", {"weighting": "theorem1"})])
def test_the_loss_of_one_batch_falls(pack: TrainingPack, name: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    system = build(name, {"dim": ENCODER.dim, **SMALL, "kernel": 3, **sizes})
    sampler = CoordinateSampler(pack, shares=(1, 0, 0, 0, 0), sizes=(64,) * 5, window=32, points=16)
    scenes, drawing = sampler.draw(0, 2), Optimisation(unconditional=0.0)
    optimiser = torch.optim.Adam(system.parameters(), 1e-2)
    values = []
    for _ in range(20):
        value, none = system.losses(LADDER, scenes, pack.about, drawing, torch.Generator().manual_seed(1))
        assert none.item() == 0
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.6 * values[0], values


def test_every_system_is_its_name_and_fits_a_large_canvas() -> None:
    for name in SYSTEMS:
        assert system_class(name).name == name
    for name in FUNCTIONS:
        default = build(name, {"dim": 192})
        assert default.bytes_for(Grid(0.5, 7, 9, 4096, 4096)) < 12e9


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("system = 'infty-dif'", ["model", "'infty-dif'", "ours", "infty-diff"]),
        ("system = 3", ["model", "system 3", "infty-diff"]),
        ("system = 'infty-diff'\nwidht = 8", ["model", "widht", "no size of infty-diff", "did you mean width?"]),
        ("system = 'infty-diff'\nxyz = 8", ["model", "xyz", "it has width, kernel"]),
        ("system = 'infty-diff'\ndim = 8", ["model", "dim", "no size"]),
        ("system = 'infty-diff'\nweighting = 'plain'", ["weighting", "no size of infty-diff"]),
        ("system = 'infty-brush'\nweighting = 'theorem2'", ["model.weighting", "'plain' or 'theorem1'"]),
        ("system = 'infty-brush'\nwidth = 'wide'", ["model.width", "integer"]),
        ("system = 'infty-diff'\nheads = 5", ["model", "heads 5"]),
        ("system = 'infty-diff'\nkernel = 4", ["model", "kernel 4", "odd"]),
        ("system = 'ours'\nkernel = 3", ["model.kernel", "Extra inputs"]),
    ],
)
def test_a_wrong_size_is_one_line(tmp_path: Path, model: str, words: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[data]\nslides = [{{path='a'}}]\n[model]\n{model}\n", encoding="utf-8")
    with pytest.raises(UsageError) as found:
        read_config(path)
    one_line(found, "run.toml", *words)


def test_a_recipe_of_ours_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    text = "[data]\nslides = [{path='a'}]\n[model]\nwidth = 24\n"
    path.write_text(text, encoding="utf-8")
    plain = read_config(path)
    path.write_text(f"{text}system = 'ours'\n", encoding="utf-8")
    assert read_config(path) == plain
    assert "system" not in plain.model_dump()["model"]
    rival = config_of("infty-brush", width=16).model
    assert isinstance(rival, Rival)
    assert (rival.system, rival.sizes["width"], rival.sizes["weighting"]) == ("infty-brush", 16, "plain")


def test_what_it_cannot_do_is_one_line(brushes: dict[str, Path], tissue_slide: Path, tmp_path: Path) -> None:
    brush, slide = load_brush(brushes["infty-brush"]), open_slide(tissue_slide)
    little = Painting(region=(0, 0, 900, 900), memory=1_250_000_000)
    with pytest.raises(UsageError) as found:
        synthesize_slide(tissue_slide, tmp_path / "new.ome.zarr", little, brush=brush, encoder=ENCODER)
    one_line(found, "infty-brush", "900 x 900", "--max-memory is 1.25GB", "or paint less")
    with pytest.raises(UsageError) as found:
        plan_painting(brush, ENCODER, slide, tmp_path / "new.ome.zarr", little)
    one_line(found, "--max-memory")
    with pytest.raises(UsageError) as found:
        synthesize_slide(
            tissue_slide, tmp_path / "new.ome.zarr", Painting(), brush=brush, encoder=ENCODER, client=cast(Any, 1)
        )
    one_line(found, "--scheduler", "infty-brush", "leave it out")
    assert list(tmp_path.iterdir()) == []
    plan = plan_painting(brush, ENCODER, slide, tmp_path / "new.ome.zarr", Painting(size=128))
    assert plan["time"] == "not known for infty-brush"
    assert plan["canvas"].startswith("128 x 128")
    with pytest.raises(UsageError, match=r"not at 0\.3"):
        plan_painting(brush, ENCODER, slide, tmp_path / "new.ome.zarr", Painting(size=128, mpp=0.3))


@pytest.mark.parametrize("change", [{"system": "infty-brsh"}, {"system": "infty-diff"}, {"denoiser": {"dim": "x"}}])
def test_a_brush_that_is_not_known_is_refused(brushes: dict[str, Path], tmp_path: Path, change: dict[str, Any]) -> None:
    brush = load_brush(brushes["infty-brush"])
    save_brush(brush, tmp_path / "brush")
    path, manifest = tmp_path / "brush" / "brush.json", tmp_path / "brush" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), encoding="utf-8")
    facts = json.loads(manifest.read_text("utf-8"))
    facts["files"]["brush.json"]["sha256"] = sha256_of(path)
    manifest.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(RefusedError) as found:
        load_brush(tmp_path / "brush")
    one_line(found, "another version")


# -- points and pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_points_are_the_lattice_in_tiles_or_whole(name: str) -> None:
    """104 x 120 pixels are four tiles; the same comes from the lattice in one piece and from all points of it."""
    system, shape = shaken(name), (104, 120)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, *shape, 3, generator=generator)
    origin = torch.tensor([[0.0, 64.0], [1024.0, 3.0]]).double()
    lattice = Domain.lattice(shape, 0.5, origin)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in shape), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).expand(2, -1, -1)
    points = Domain.scattered(places, shape, 0.5, origin, side=SMALL["kernel"])
    sigma, condition, known = torch.tensor([0.3, 4.0]), maps_of(2), torch.tensor([1.0, 0.0])
    whole = system.noise(values, lattice, sigma, condition, known)
    assert whole.std() > 0.01
    with torch.no_grad():
        tiled = system.noise(values, lattice, sigma, condition, known)
        scattered = system.noise(values.flatten(1, 2)[:, :, None], points, sigma, condition, known)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scattered.view_as(whole), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_kernel_is_a_mean_over_the_points_that_are_there(density: float) -> None:
    """Another way: zeros where no point is, dense convolutions of values and of ones."""
    generator = torch.Generator().manual_seed(3)
    kernel = PointKernel(4, 7)
    with torch.no_grad():
        kernel.bias.normal_(generator=generator)
    there = torch.rand(2, 1, 24, 30, generator=generator) < density
    count = int(there.flatten(1).sum(1).min())
    flat = torch.stack([torch.nonzero(scene.flatten()).flatten()[:count] for scene in there])
    mask = torch.zeros(2, 24 * 30).scatter_(1, flat, 1.0).view(2, 1, 24, 30)
    image = torch.randn(2, 4, 24, 30, generator=generator) * mask
    total = functional.conv2d(image, kernel.kernel, padding=3, groups=4)
    present = functional.conv2d(mask, torch.ones(1, 1, 7, 7), padding=3)
    dense = 49 * total / present.clamp_min(1) + kernel.bias[:, None, None]
    near = Neighbours.of(torch.stack([flat // 30, flat % 30], -1), 7)
    gathered = image.flatten(2).gather(2, flat[:, None].expand(-1, 4, -1)).transpose(1, 2)[:, :, None]
    expected = dense.flatten(2).gather(2, flat[:, None].expand(-1, 4, -1)).transpose(1, 2)
    torch.testing.assert_close(kernel(gathered, near)[:, :, 0], expected, rtol=1e-4, atol=1e-5)


# -- the condition -------------------------------------------------------------------------------------------


def test_a_set_of_one_token_is_its_value_everywhere() -> None:
    """The cross-attention operator as printed, with keys for its sets of one token, says what ours says without."""
    torch.manual_seed(1)
    channels, heads, domain = 8, 2, Domain.lattice((16, 24), 0.5, torch.zeros(2, 2).double())
    operator = CrossOperator(channels, heads=heads)
    with torch.no_grad():
        for weight in operator.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    u, tokens = torch.randn(2, 16, 24, channels), [torch.randn(2, 1, channels) for _ in range(2)]
    query = operator.query(functional.layer_norm(u, (channels,))).unflatten(-1, (heads, -1)).softmax(-1)
    total = operator._at_place(query, domain)
    for value, token in zip(operator.values, tokens, strict=True):
        printed = TokenSet(channels, heads=heads)
        cast(Any, printed.value).load_state_dict(value.state_dict())
        found = attend(query, printed(token))
        torch.testing.assert_close(found, found[:, :1, :1].expand_as(found), rtol=1e-5, atol=1e-5)
        total = total + found
    expected = u + operator.out((query + total / 3).flatten(-2))
    torch.testing.assert_close(operator(u, domain, tokens), expected, rtol=1e-4, atol=1e-5)
    places = operator._at_place(query, domain)
    assert places.std((1, 2)).max() > 0.01  # a set of two is attended to


def test_what_is_told_and_what_is_not() -> None:
    domain = Domain.lattice((32, 32), 0.5, torch.zeros(1, 2).double())
    values, sigma, one = torch.randn(1, 32, 32, 3), torch.ones(1), torch.ones(1)
    for name in FUNCTIONS:
        system = shaken(name)
        first, second, hidden, blind = (
            system.noise(values, domain, sigma, maps_of(1, value=value), known)
            for value, known in ((0.0, one), (2.0, one), (0.0, 0 * one), (2.0, 0 * one))
        )
        torch.testing.assert_close(hidden, blind)
        assert torch.equal(first, second) == (name == "infty-diff")
    with_it, without = (
        {key.split(".")[3] for key in shaken(name).state_dict() if "level.down" in key} for name in FUNCTIONS[1:]
    )
    assert with_it - without == {"cross"}


def test_a_thumbnail_is_a_mean_by_area() -> None:
    values = torch.arange(4.0).view(1, 2, 2, 1)
    lattice = ConditionMap(values, torch.ones(1, 2, 2), torch.tensor([[-8.0, -12.0]]), 16.0)
    mean, there = thumbnail(lattice, (16, 16))  # rows 8 and 8 pixels, columns 4 and 12
    assert mean.item() == pytest.approx((0 * 8 * 4 + 1 * 8 * 12 + 2 * 8 * 4 + 3 * 8 * 12) / 256)
    assert there.item() == 1
    missing = replace(lattice, present=torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    assert thumbnail(missing, (16, 16))[0].item() == pytest.approx(1.0)
    assert thumbnail(replace(lattice, present=torch.zeros(1, 2, 2)), (16, 16))[1].item() == 0


# -- noise and its levels ------------------------------------------------------------------------------------


def test_theorem_1_is_the_divergence_of_a_step() -> None:
    """Of two Gaussians of covariance β̃ 1, the posterior's means under two noises; from q(u_t-1 | u_t, u_0) itself."""
    schedule, generator = Cosine.within(LADDER), torch.Generator().manual_seed(0)
    state, one, two = torch.randn(3, 7, generator=generator).double()
    for time in (2, 10, 300, 700, 990):
        kept, before = schedule.kept[time], schedule.kept[time - 1]
        beta = 1 - kept / before
        variance = beta * (1 - before) / (1 - kept)
        means = []
        for noise in (one, two):
            image = (state - (1 - kept).sqrt() * noise) / kept.sqrt()
            means.append(
                before.sqrt() * beta / (1 - kept) * image + (1 - beta).sqrt() * (1 - before) / (1 - kept) * state
            )
        divergence = ((means[0] - means[1]) ** 2).sum() / (2 * variance)
        weight = schedule.theorem1(torch.tensor([time]))[0]
        torch.testing.assert_close(weight * ((one - two) ** 2).sum(), divergence, rtol=1e-6, atol=0)


def test_the_weighting_is_that_of_the_scenes_own_time(pack: TrainingPack) -> None:
    sampler = CoordinateSampler(pack, shares=(1, 0, 0, 0, 0), sizes=(32,) * 5, window=32, points=0)
    scenes, schedule = sampler.draw(0, 1), Cosine.within(LADDER)
    for seed in range(3):
        plain, weighted = (
            shaken("infty-brush", dim=ENCODER.dim, weighting=weighting)
            .losses(LADDER, scenes, pack.about, Optimisation(), torch.Generator().manual_seed(seed))[0]
            .item()
            for weighting in ("plain", "theorem1")
        )
        drawn = torch.randint(len(schedule.times), (1,), generator=torch.Generator().manual_seed(seed))
        assert weighted / plain == pytest.approx(schedule.theorem1(schedule.times[drawn]).item(), rel=1e-4)


@pytest.mark.parametrize("points", [40, 3072], ids=["some", "all"])
def test_what_is_read_at_points_is_what_whole_scenes_say(pack: TrainingPack, points: int) -> None:
    """The loss once more from all pixels of the scenes and of their noise, mollified whole."""
    sampler = CoordinateSampler(pack, shares=(1, 0, 0, 0, 0), sizes=(64,) * 5, window=32, points=points)
    scenes, system, generator = sampler.draw(0, 2), shaken("infty-diff"), torch.Generator().manual_seed(5)
    with torch.no_grad():
        found = system.losses(LADDER, scenes, pack.about, Optimisation(), torch.Generator().manual_seed(5))[0]
        schedule = Cosine.within(LADDER)
        sigma = schedule.sigmas[schedule.times[torch.randint(len(schedule.times), (2,), generator=generator)]].float()
        seeds = torch.randint(1 << 62, (2,), generator=generator).tolist()
        known = (torch.rand(2, generator=generator) >= Optimisation().unconditional).float()
        origin = torch.rand(2, 2, generator=generator).double() * 8192
        places = _places(2, 1024 + points, 64, int(torch.randint(1 << 62, (), generator=generator)))
        noise = mollify(torch.stack([NoiseField(seed).read(Grid(1.0, 0, 0, 64, 64)) for seed in seeds]), 1.0)
        noisy = mollify(scenes.whole(), 1.0) + sigma[:, None, None, None] * noise
        noisy, noise = (u.permute(0, 2, 3, 1)[torch.arange(2)[:, None], *places.unbind(-1)] for u in (noisy, noise))
        domain = Domain.scattered(places, (64, 64), 0.5, origin, side=SMALL["kernel"])
        said = system.noise(system._scaled(noisy[:, :, None], sigma), domain, sigma, [], known)
    torch.testing.assert_close(found, ((said[:, :, 0] - noise) ** 2).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "count"), [(8, 5), (8, 64), (120, 3000), (4096, 50)])
def test_places_are_distinct_and_uniform_and_in_raster_order(size: int, count: int) -> None:
    places = _places(400 if count < 100 else 20, count, size, 3)
    assert places.shape[1:] == (count, 2)
    flat = places[..., 0] * size + places[..., 1]
    assert (flat.diff(dim=1) > 0).all()
    assert 0 <= flat.min() <= flat.max() < size * size
    for axis in (0, 1):  # in eight equal parts of the square, as many as they should be
        share = torch.bincount(places[..., axis].flatten() * 8 // size, minlength=8) / flat.numel()
        assert (share - 1 / 8).abs().max() < 4.5 / math.sqrt(8 * flat.numel())
    assert torch.equal(_places(3, count, size, 3), places[:3])
    assert torch.equal(_places(3, count, size, 4), places[:3]) == (count == size * size)


def test_a_few_places_among_many_need_no_permutation() -> None:
    tracemalloc.start()
    _places(2, 1000, 1 << 15, 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6 < 8 * (1 << 30)


def test_noise_levels_are_even_in_time_and_inside_the_ladder() -> None:
    schedule = Cosine.within(LADDER)
    path = schedule.path(20)
    assert len(path) == 21
    assert path == sorted(path, reverse=True)
    assert path[-1] == 0
    assert 0.02 <= path[-2] < 0.03
    assert 60 < path[0] <= 80
    # σ = tan(angle) up to the offset, so that angles are evenly spaced
    angles = np.diff([math.atan(sigma) for sigma in path[:-1]])
    np.testing.assert_allclose(angles, angles.mean(), rtol=0.05)
    assert len(schedule.path(5000)) == len(schedule.times) + 1


@pytest.mark.parametrize("frequency", [(0, 0), (3, 5), (16, 9), (40, 30)])
def test_the_read_out_inverts_the_mollifier(frequency: tuple[int, int]) -> None:
    shape, width = (64, 96), 1.0
    rows, columns = (
        torch.cos(math.pi * k / side * (torch.arange(side) + 0.5)) for k, side in zip(frequency, shape, strict=True)
    )
    field = (rows[:, None] * columns).expand(1, 3, -1, -1)
    reflected = torch.from_numpy(np.pad(field.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), mode="symmetric"))
    smooth = mollify(reflected, width)[0, :, 8:-8, 8:-8]
    gain = math.prod(float(_response(side, width)[k]) for k, side in zip(frequency, shape, strict=True))
    torch.testing.assert_close(smooth, gain * field[0], rtol=1e-3, atol=1e-5)
    expected = gain**2 / (gain**2 + 0.05**2) * field[0]
    torch.testing.assert_close(wiener(smooth, width), expected, rtol=1e-3, atol=1e-4)
    if gain > 0.5:  # and with the border of ours, away from it
        inner = (slice(None), slice(20, -20), slice(20, -20))
        torch.testing.assert_close(wiener(mollify(field, width)[0], width)[inner], field[0][inner], rtol=0, atol=0.03)


class Oracle(Mollified):
    """Knows the image, so that the noise of every state is known."""

    name, sizes, conditional = "oracle", InftyDiffConfig, False

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.config, self.image = InftyDiffConfig(dim=1), image

    def noise(
        self, values: Tensor, domain: Domain, sigma: Tensor, condition: list[ConditionMap], known: Tensor
    ) -> Tensor:
        state = values * (values.new_ones(1) / self._scaled(torch.ones(1, 1, 1, 1), sigma))
        return (state - mollify(self.image, 1.0).permute(0, 2, 3, 1)) / sigma


def test_who_knows_the_noise_paints_the_image() -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    image = (0.6 * torch.sin(rows / 5) * torch.cos(columns / 7)).expand(1, 3, -1, -1)
    found = Oracle(image).paint([], Grid(0.5, 3, 5, 64, 80), LADDER, seed=1, steps=10, guidance=1.0)
    assert found.shape == (3, 64, 80)
    torch.testing.assert_close(found, wiener(mollify(image, 1.0)[0], 1.0), rtol=0, atol=1e-3)
    inner = (slice(None), slice(12, -12), slice(12, -12))
    torch.testing.assert_close(found[inner], image[0][inner], rtol=0, atol=0.02)


def test_no_image_on_the_way_goes_beyond_white_or_black() -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    image = (1.6 * torch.sin(rows / 5) * torch.cos(columns / 7)).expand(1, 3, -1, -1)
    found = Oracle(image).paint([], Grid(0.5, 3, 5, 64, 80), LADDER, seed=1, steps=10, guidance=1.0)
    smooth = mollify(image, 1.0)[0]
    assert (smooth.abs() > 1.1).float().mean() > 0.1
    torch.testing.assert_close(found, wiener(smooth.clamp(-1, 1), 1.0), rtol=0, atol=1e-3)


def test_a_canvas_that_is_no_multiple_of_the_nodes_is_painted() -> None:
    brush = Brush(shaken("infty-brush").eval().requires_grad_(False), LADDER, {})
    assert isinstance(brush.network, System)
    condition, found = maps_of(1), []
    with torch.no_grad():
        for seed, guidance in ((0, 2.0), (0, 2.0), (0, 1.0), (1, 2.0)):
            canvas = Grid(0.5, 0, 0, 37, 51)
            found.append(brush.network.paint(condition, canvas, LADDER, seed=seed, steps=3, guidance=guidance))
    assert found[0].shape == (3, 37, 51)
    assert torch.isfinite(found[0]).all()
    assert torch.equal(found[0], found[1])  # the same seed, the same bits
    assert not torch.equal(found[0], found[2])
    assert (found[0] - found[3]).abs().mean() > 0.01
