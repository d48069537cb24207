"""Painting on a GPU: nothing is left on the CPU by mistake, which needs none; and what one paints, where there is one.

Without a GPU its tensors are fake: they have a shape, a type and a device, no values, and refuse to meet those of
another device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import TileStatistics, make_brush, make_maps
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wsi_brush import machine, paint, stream, synthesize
from wsi_brush.baselines import build
from wsi_brush.baselines.mollified import Mollified, _left
from wsi_brush.baselines.patches import Patches, own
from wsi_brush.baselines.points import Domain
from wsi_brush.brush import Brush
from wsi_brush.denoiser import NODE, node_mass
from wsi_brush.diffusion import Ladder
from wsi_brush.encoder import Encoder
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.estimate import painting_seconds
from wsi_brush.field import NoiseField, mollify
from wsi_brush.grid import Grid
from wsi_brush.objective import mollified_at
from wsi_brush.paint import Run, paint_canvas
from wsi_brush.scenes import Images, Scenes, square
from wsi_brush.splat import nodes
from wsi_brush.stages import Painting, Stage, stages, wants_before, whole
from wsi_brush.stream import CanvasDenoiser
from wsi_brush.synthesize import synthesize_slide

DIM, SIDE = 6, 32
CANVAS = Grid(0.5, 96, 32, 192, 160)
QUICK = Painting(steps=6, guidance=2.0, tile=64)
FUNCTIONS = {"width": 8, "kernel": 5, "grid": 8, "node": 8, "heads": 2}
RIVALS: dict[str, dict[str, Any]] = {
    "infty-diff": FUNCTIONS,
    "infty-brush": FUNCTIONS,
    "infty-brush-no-cross": FUNCTIONS,
    "patches": {"side": 32, "width": 8, "levels": 2, "blocks": 1, "heads": 2},
    "fixed": {"size": 32, "width": 8, "levels": 2, "blocks": 1, "heads": 2, "tokens": 2},
}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def brush() -> Brush:
    return cast(Brush, make_brush(dim=DIM, tile=SIDE))


maps_on = partial(make_maps, dim=DIM, tile=SIDE)


def rival_brush(brush: Brush, name: str) -> Brush:
    """A rival that was never trained; no weight of it is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        system = build(name, {"dim": DIM, **RIVALS[name]})
        with torch.no_grad():
            for parameter in system.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return replace(brush, network=system.eval().requires_grad_(False))


# -- a GPU that is not there ------------------------------------------------------------------------------


def in_turn(
    work: Callable[[Grid], Any], items: Iterable[Grid], *, threads: int | None = None
) -> Iterator[tuple[Grid, Any]]:
    """`side_by_side` without threads, which would know nothing of fake tensors."""
    assert threads == 1
    for item in items:
        yield item, work(item)


def fetched(values: Tensor) -> NDArray[np.float32]:
    """`on_host`: what comes back from a fake GPU has a shape."""
    assert values.device.type == "cuda"
    assert values.dtype == torch.float32
    return np.ones(tuple(values.shape), np.float32)


def made_there(brush: Brush, device: torch.device) -> Brush:
    """The same sizes with fake weights: what is real is not moved to a device that is not there."""
    with torch.device(device):
        network: Any = type(brush.network)(brush.network.config)
    return replace(brush, network=network.eval().requires_grad_(False))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    device = torch.device("cuda", 0)
    for width in (0.5, 1.0):
        mollify(torch.zeros(1, 1, 16, 16), width)  # its taps are numbers, and are made once
        _left(width)
    monkeypatch.setattr(stream, "_to", lambda place, values: values.to(place))
    for module in (stream, paint):
        monkeypatch.setattr(module, "side_by_side", in_turn)
        monkeypatch.setattr(module, "on_host", fetched)
    monkeypatch.setattr(Ladder, "coefficients", lambda self, sigma, mpp: (0.1, 0.2, 0.3))  # numbers, not tensors
    monkeypatch.setattr(paint, "find_device", lambda name: device if name == "cuda" else torch.device(name))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield device


def test_the_fake_gpu_refuses_what_the_cpu_made(fake: torch.device) -> None:
    """The control: else the tests below could not fail."""
    there = torch.ones(3, device=fake)
    with pytest.raises(RuntimeError, match="device"):
        there + torch.ones(3)
    assert (there + torch.tensor(1.0)).device == fake  # a number is everywhere


def test_noise_is_read_there(fake: torch.device) -> None:
    assert NoiseField(3).read(CANVAS, stream=2, device=fake).device == fake
    assert NoiseField(3).read_mollified(CANVAS, width=1.0, device=fake).shape == (3, *CANVAS.shape)


def test_scenes_and_their_noise_are_read_there(fake: torch.device) -> None:
    """Where both are, and the addresses: nothing is sent to the device that waits."""
    table, lines = torch.zeros(64 * 64, 3, dtype=torch.uint8, device=fake), torch.zeros(2, 3, device=fake).long()
    windows, points = torch.zeros(2, 2, device=fake).long(), torch.zeros(2, 5, 2, device=fake).long()
    scenes = Scenes(0.5, 64, Images([table.view(64, 64, 3)], table), lines, {}, windows, 32, points)
    window, around = scenes.seen(2)
    noise = NoiseField(torch.randint(1 << 62, (2,), device=fake)).read_at(*square(points - 2, 5))
    smooth = mollified_at(around + noise, points, 64, 0.5)
    for found in (window, around, noise, smooth, scenes.whole()):
        assert found.device == fake
    assert (window.shape, noise.shape, smooth.shape) == ((2, 32, 32, 3), (2, 5, 5, 5, 3), (2, 5, 3))


def test_the_operator_stays_there(brush: Brush, fake: torch.device) -> None:
    """By its parts, in one piece."""
    made = made_there(brush, fake)
    net, condition = made.denoiser, made.condition(maps_on(CANVAS), CANVAS, 0.5)
    level = torch.full((1,), 1.3, device=fake)
    corner = torch.zeros(1, device=fake), torch.zeros(1, device=fake)
    origin = torch.zeros(1, 2, dtype=torch.float64, device=fake)
    x = NoiseField(0).read(CANVAS, device=fake)[None]
    with torch.no_grad():
        setting = net.at(net.setting(level, 0.5, condition, origin=origin, known=level), level)
        mass = node_mass(1, CANVAS.height // NODE, CANVAS.width // NODE).to(fake)
        grid, tokens = net.layout(nodes(net.sketch(x, setting)), mass, setting)
        memory = net.memory(tokens, setting)
        said = net.paint(x, setting, grid, memory, corner=corner)
        fine, mid, deep = net.descend(x, setting)
        risen = net.rise(mid, deep, setting, grid, memory, corner=corner)
        again = net.retouch(x, setting, net.keep(mid, risen, (0, 0, 0, 0)), around=(0, 0, 0, 0))
    for found in (said, net.finish(fine, risen, setting), again):
        assert found.device == fake
        assert found.shape == x.shape


@pytest.mark.parametrize("solver", ["2m", "ancestral"])
def test_every_stage_of_a_painting_stays_there(brush: Brush, fake: torch.device, solver: Any) -> None:
    """Noise, moves with history and fresh noise, guidance, retouches, finer pitches; tiles go there and come back."""
    painting = replace(QUICK, device="cuda", solver=solver, mpp=2.0, tile=128)
    ladder = brush.ladder.starting_at(2.0)
    area = whole(Grid(2.0, 96, 32, 128, 96), ladder)
    run = Run(made_there(brush, fake), maps_on(area), area, painting, None)
    planes, seen = dict[str, Any](), set[str]()
    todo = stages(ladder, painting)
    for number, stage in enumerate(todo, 1):
        keep = number < len(todo) and wants_before(todo[number])
        planes = run.after(stage, planes, None, keep=keep)
        seen.update(kind_of(stage))
        assert planes["x"].shape == (3, *area.level(stage.level).shape)
        assert np.all(planes["x"] == 1)  # every tile of it
    assert seen >= {"entry", "move", "retouch", "history" if solver == "2m" else "fresh"}


def kind_of(stage: Stage) -> Iterator[str]:
    yield "entry" if stage.move is None else "move"
    if stage.retouches:
        yield "retouch"
    if stage.move is not None and stage.move.old:
        yield "history"
    if stage.move is not None and stage.move.fresh:
        yield "fresh"


@pytest.mark.parametrize("name", ["infty-diff", "infty-brush", "infty-brush-no-cross"])
def test_rivals_on_points_stay_there(brush: Brush, fake: torch.device, name: str) -> None:
    made = made_there(rival_brush(brush, name), fake)
    system, condition = cast(Mollified, made.rival), made.condition(maps_on(CANVAS), CANVAS, 0.5)
    state = NoiseField(0).read_mollified(CANVAS, width=1.0, device=fake)
    origin = torch.zeros(1, 2, dtype=torch.float64, device=fake)
    domain = Domain.lattice(CANVAS.shape, 0.5, origin)
    with torch.no_grad():
        said = system._guided(state, domain, 1.3, condition, 2.0)
    assert said.device == fake
    assert said.shape == state.shape


def test_patches_stay_there(brush: Brush, fake: torch.device) -> None:
    made = made_there(rival_brush(brush, "patches"), fake)
    system, condition = cast(Patches, made.rival), made.condition(maps_on(CANVAS), CANVAS, 0.5)
    canvas = Grid(0.5, 96, 32, 40, 72)
    image = system.paint(condition, canvas, made.ladder, seed=0, steps=2, guidance=2.0)
    assert own(condition, 32).values.device == fake
    assert image.device == fake
    assert image.shape == (3, *canvas.shape)


def test_the_unet_stays_there(brush: Brush) -> None:
    pytest.importorskip("diffusers")
    here = rival_brush(brush, "fixed")
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = made_there(here, torch.device("cuda", 0))
        condition = made.condition(maps_on(CANVAS), CANVAS, 0.5)
        system: Any = made.rival
        one = torch.ones(1, device="cuda")
        with torch.no_grad():
            tokens = system.tokens_of(condition, 192, one)
            said = system.velocity(torch.ones(1, 3, 32, 32, device="cuda"), one, 0.5, tokens)
    assert tokens.device.type == said.device.type == "cuda"


# -- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "error", "said"),
    [
        ("gpu", "float32", UsageError, "expected cpu, cuda or cuda:N"),
        ("meta", "float32", UsageError, "expected cpu, cuda or cuda:N"),
        ("cpu", "float16", UsageError, "expected float32 or bfloat16"),
        ("cuda:99", "float32", MachineError, "^cuda:99: "),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    tissue_slide: Path, tmp_path: Path, device: str, precision: Any, error: type[Exception], said: str
) -> None:
    encoder = cast(Encoder, TileStatistics())
    brush = make_brush(dim=encoder.dim, tile=encoder.tile)
    painting = replace(QUICK, size=64, device=device, precision=precision)
    for work in (
        lambda: synthesize_slide(tissue_slide, tmp_path / "new", painting, brush=brush, encoder=encoder),
        lambda: paint_canvas(brush, {}, CANVAS, painting),
        lambda: painting_seconds(brush, CANVAS, painting),
    ):
        with pytest.raises(error, match=said) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_asked_of_what_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    machine.check_precision("bfloat16", cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    machine.check_precision("float32", cpu)
    with pytest.raises(MachineError, match="no bfloat16"):
        machine.check_precision("bfloat16", cpu)


def test_a_painting_does_not_go_on_in_other_arithmetic(
    tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with one precision it is refused with another; what stands on it says which it was."""
    encoder = cast(Encoder, TileStatistics())
    brush = make_brush(dim=encoder.dim, tile=encoder.tile)
    monkeypatch.setattr(paint, "SAVE_EVERY", -1.0)
    for module in (paint, synthesize):
        monkeypatch.setattr(module, "check_precision", lambda precision, device: None)
    painting = replace(QUICK, size=64)

    def stop(what: str, done: int, total: int) -> None:
        if what == "painting" and done > total / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        synthesize_slide(tissue_slide, tmp_path / "new", painting, brush=brush, encoder=encoder, tell=stop)
    other = replace(painting, precision="bfloat16")
    with pytest.raises(RefusedError, match="precision float32 -> bfloat16"):
        synthesize_slide(tissue_slide, tmp_path / "new", other, brush=brush, encoder=encoder)
    synthesize_slide(tissue_slide, tmp_path / "new", painting, brush=brush, encoder=encoder)
    said = (tmp_path / "new" / "zarr.json").read_text("utf-8")
    assert '"device": "cpu"' in said
    assert '"precision": "float32"' in said


def test_rivals_paint_in_float32(brush: Brush, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paint, "check_precision", lambda precision, device: None)
    with pytest.raises(UsageError, match="paints in float32"):
        paint_canvas(rival_brush(brush, "patches"), {}, CANVAS, replace(QUICK, precision="bfloat16"))


def test_bfloat16_is_nearly_float32(brush: Brush) -> None:
    """On a CPU, which is slow at it but can."""
    state = (1.3 * NoiseField(1).read(CANVAS)).contiguous()
    exact, near = (
        CanvasDenoiser(brush, maps_on(CANVAS), CANVAS, mpp=0.5, guidance=2.0, tile=64, precision=precision)(state, 1.3)
        for precision in ("float32", "bfloat16")
    )
    assert near.dtype == torch.float32
    error = (near - exact).std() / exact.std()
    assert 0 < error < 0.03


def test_a_full_gpu_is_given_smaller_tiles(brush: Brush, monkeypatch: pytest.MonkeyPatch) -> None:
    """The painting is the same, since tiles do not matter; where even small ones do not fit, it is said."""
    expected, sides, most = np.asarray(paint_canvas(brush, maps_on(CANVAS), CANVAS, QUICK)), set[int](), [128]
    plain = CanvasDenoiser.image

    def image(self: CanvasDenoiser, x: Any, tile: Grid, *, keep: bool = False) -> Any:
        sides.add(max(tile.shape))
        if max(tile.shape) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")
        return plain(self, x, tile, keep=keep)

    monkeypatch.setattr(CanvasDenoiser, "image", image)
    monkeypatch.setattr(paint, "CHUNK", 32)
    found = paint_canvas(brush, maps_on(CANVAS), CANVAS, replace(QUICK, tile=128))
    np.testing.assert_array_equal(found, expected)
    assert max(sides) > most[0]
    most[0] = 8
    with pytest.raises(MachineError, match=r"^cpu: CUDA out of memory; tiles of \d+ pixels .* or use cpu$"):
        paint_canvas(brush, maps_on(CANVAS), CANVAS, replace(QUICK, tile=128))


# -- a GPU that is there ----------------------------------------------------------------------------------


@GPU
def test_noise_has_the_same_integers_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_brush import field

    grid, seed = Grid(0.5, -70, 2**31 - 40, 200, 160), 2**62 + 12345
    here, there = NoiseField(seed).read(grid, stream=7), NoiseField(seed).read(grid, stream=7, device="cuda")
    assert (here - there.cpu()).abs().max() < 1e-6  # the same but for the last digit of cosine and logarithm
    monkeypatch.setattr(field, "_normal", lambda bits: bits)
    here, there = NoiseField(seed).read(grid, stream=7), NoiseField(seed).read(grid, stream=7, device="cuda")
    assert torch.equal(here, there.cpu())


@GPU
@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("solver", ["2m", "ancestral"])
def test_a_gpu_paints_nearly_the_same(brush: Brush, precision: Any, limit: float, solver: Any) -> None:
    """RMS of the difference over that of the painting; and the tile makes no more of a difference."""
    painting = replace(QUICK, steps=8, solver=solver)
    here = np.asarray(paint_canvas(brush, maps_on(CANVAS), CANVAS, painting))
    there = replace(painting, device="cuda", precision=precision)
    for tile in (64, 256):
        found = np.asarray(paint_canvas(brush, maps_on(CANVAS), CANVAS, replace(there, tile=tile)))
        assert np.sqrt(((found - here) ** 2).mean()) < limit * here.std(), tile
    assert brush.device.type == "cpu"


@GPU
@pytest.mark.parametrize("name", list(RIVALS))
def test_rivals_paint_there(brush: Brush, name: str) -> None:
    if name == "fixed":
        pytest.importorskip("diffusers")
    made, painting = rival_brush(brush, name), replace(QUICK, steps=5, memory=8 * 10**9)
    here, there = (
        np.asarray(paint_canvas(made, maps_on(CANVAS), CANVAS, replace(painting, device=device)))
        for device in ("cpu", "cuda")
    )
    assert np.sqrt(((here - there) ** 2).mean()) < 2e-3 * here.std()


@GPU
def test_a_run_on_disk_goes_on_there(brush: Brush, tissue_slide: Path, tmp_path: Path) -> None:
    """By the verb, with the estimate before it."""
    encoder = cast(Encoder, TileStatistics())
    made = make_brush(dim=encoder.dim, tile=encoder.tile)
    painting = replace(QUICK, size=256, tile=128, device="cuda")
    assert painting_seconds(made, Grid(0.5, 0, 0, 256, 256), painting) > 0
    done = synthesize_slide(tissue_slide, tmp_path / "new", painting, brush=made, encoder=encoder)
    assert done.shape == (256, 256)
    assert '"device": "cuda"' in (tmp_path / "new" / "zarr.json").read_text("utf-8")


def test_the_network_is_copied_only_where_it_has_to_be(brush: Brush) -> None:
    assert brush.on(torch.device("cpu")) is brush
    assert brush.device.type == "cpu"
