"""Training: it learns, it goes on to the bit where it was stopped, and it leaves no damage behind."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from wsi_brush import train
from wsi_brush.brush import load_brush, save_brush
from wsi_brush.commit import sha256_of, verify
from wsi_brush.condition import ConditionMap
from wsi_brush.coordinates import CoordinateSampler, TrainingPack, build_pack
from wsi_brush.denoiser import Denoiser, DenoiserConfig
from wsi_brush.diffusion import Ladder, coefficients, loss
from wsi_brush.errors import MachineError, RefusedError, UsageError, WsiBrushError
from wsi_brush.field import NoiseField, mollifier_radius, mollify
from wsi_brush.grid import Grid
from wsi_brush.objective import _gathered, _scatter, conditions, draw_sigma, losses, mollified_at
from wsi_brush.recipe import Optimisation, SlideSource, TrainConfig, read_config
from wsi_brush.scenes import Scenes, square
from wsi_brush.slide import open_slide
from wsi_brush.splat import nodes, splat
from wsi_brush.train import Training, train_brush


class Colours:
    """An encoder: mean and spread of a tile's colours."""

    name, dim, tile, fingerprint = "colours", 6, 32, "c0ffee"

    def __call__(self, tiles: NDArray[np.uint8], /) -> NDArray[np.float32]:
        plain = tiles.astype(np.float32) / 255
        return np.concatenate([plain.mean((1, 2)), plain.std((1, 2))], 1)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pack(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingPack:
    target = tmp_path_factory.mktemp("train") / "pack"
    build_pack([open_slide(tissue_slide)], target, encoder=Colours())
    return TrainingPack(target, in_memory=True)


@pytest.fixture
def work(tmp_path: Path, pack: TrainingPack, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder whose pack is made already."""
    monkeypatch.setattr(train, "training_pack", lambda *given: pack)
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def config_of(**changed: Any) -> TrainConfig:
    """A brush that trains in seconds. Changed keys are `section__key`."""
    plain: dict[str, Any] = {
        "data": {"slides": [{"path": "tissue.tif"}], "sizes": (64, 64, 64, 64, 32), "window": 32, "points": 16},
        "model": {"width": 16, "depth": (1, 1, 2), "layout": 2, "heads": 2, "tokens": 4},
        "optimisation": {"steps": 13, "batch": 2, "warmup": 4, "rate": 3e-3, "checkpoint_minutes": 0.0},
        "card": {"licence": "MIT"},
    }
    for name, value in changed.items():
        section, _, key = name.partition("__")
        plain[section][key] = value
    return TrainConfig.model_validate(plain)


def one_line(found: pytest.ExceptionInfo[WsiBrushError], *words: str) -> None:
    message = str(found.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# -- learning ----------------------------------------------------------------------------------------------


def test_the_loss_falls(pack: TrainingPack, tmp_path: Path) -> None:
    run = Training(config_of(optimisation__steps=30, optimisation__rate=4e-3), pack, tmp_path)
    drawing = Optimisation(unconditional=0.0)

    def judged(denoiser: Denoiser) -> float:
        found = []
        with torch.no_grad():
            for batch in range(4):
                scenes = run.sampler.draw(10_000 + batch, 4, mpp=(0.5, 1.0, 2.0, 4.0)[batch])
                generator = torch.Generator().manual_seed(batch)
                found.append(losses(denoiser, run.ladder, scenes, pack.about, drawing, generator)[0].item())
        return sum(found) / len(found)

    before = judged(run.denoiser)
    while not run.over:
        run.step()
    after, average = judged(run.denoiser), judged(run.average)
    assert run.number == 30
    assert after < 0.75 * before, (before, after, average)
    assert average < 0.9 * before, (before, after, average)


def test_the_rate_rises_and_falls_to_zero(pack: TrainingPack, tmp_path: Path) -> None:
    run = Training(config_of(optimisation__steps=10), pack, tmp_path)
    rates = []
    while not run.over:
        run.step()
        rates.append(run.rate / 3e-3)
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rates[5:], [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rtol=1e-6)
    assert run.progress == 1


# -- stopped and resumed -----------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def killed_at(step: int, heard: list[str] | None = None) -> train.Tell:
    def tell(line: str) -> None:
        if heard is not None:
            heard.append(line)
        if line.startswith(f"step {step} "):
            raise Killed

    return tell


def checkpoints(work: Path) -> dict[int, Path]:
    """Checkpoints that verify, by step."""
    found = {}
    for facts_at in work.glob("checkpoint-?.json"):
        facts, path = json.loads(facts_at.read_text("utf-8")), facts_at.with_suffix(".safetensors")
        if path.is_file() and sha256_of(path) == facts["sha256"]:
            found[facts["step"]] = path
    return found


@pytest.fixture(scope="module")
def whole(pack: TrainingPack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights, average and optimiser after 13 steps that nothing interrupted."""
    torch.set_num_threads(1)
    run = Training(config_of(), pack, tmp_path_factory.mktemp("whole"))
    while not run.over:
        run.step()
    run.checkpoint()
    return load_file(run.work / "checkpoint-a.safetensors")


def assert_bits(work: Path, whole: dict[str, Tensor]) -> None:
    found = load_file(checkpoints(work)[13])
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


def test_a_killed_run_goes_on_to_the_same_bits(work: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "brush"
    with pytest.raises(Killed):
        train_brush(config_of(), target, work=work, tell=killed_at(10))
    assert set(checkpoints(work)) == {8, 9}
    assert not target.exists()
    heard: list[str] = []
    made = train_brush(config_of(), target, work=work, tell=heard.append)
    assert heard[0] == "going on from step 9"
    assert_bits(work, whole)
    assert verify(target) == []
    found = load_brush(target)
    for name, value in found.denoiser.state_dict().items():
        assert torch.equal(value, whole[f"average.{name}"]), name
        assert torch.equal(value, made.denoiser.state_dict()[name]), name
    assert found.about["training"]["steps"] == 13
    assert "legs" not in found.about["training"]  # it was interrupted, and not continued to another end
    assert [one["mpp"] for one in found.about["training"]["slides"]] == [0.5]
    assert (target / "brush.safetensors").stat().st_mode == (target / "brush.json").stat().st_mode
    assert {path.stat().st_mode for path in checkpoints(work).values()} == {(target / "brush.json").stat().st_mode}
    assert (found.about["encoder"], found.about["licence"]) == ("colours", "MIT")
    assert "tissue.tif" not in (target / "brush.json").read_text("utf-8")


@pytest.mark.parametrize("how", ["changed", "cut", "gone", "no facts", "half facts", "other facts", "few facts"])
def test_a_damaged_checkpoint_costs_one_generation(
    work: Path, whole: dict[str, Tensor], tmp_path: Path, how: str
) -> None:
    with pytest.raises(Killed):
        train_brush(config_of(), tmp_path / "brush", work=work, tell=killed_at(10))
    newest = checkpoints(work)[9]
    facts = newest.with_suffix(".json")
    data = newest.read_bytes()
    if how == "changed":
        newest.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif how == "cut":
        newest.write_bytes(data[: len(data) // 2])
    elif how == "gone":
        newest.unlink()
    elif how == "no facts":
        facts.unlink()
    elif how == "half facts":
        facts.write_bytes(facts.read_bytes()[:20])
    else:
        facts.write_text("[]" if how == "other facts" else '{"step": 9}', encoding="utf-8")
    heard: list[str] = []
    with pytest.raises(Killed):
        train_brush(config_of(), tmp_path / "brush", work=work, tell=killed_at(10, heard))
    assert "going on from step 8" in heard
    assert ("damaged" in heard[0]) == (how != "no facts")  # which are written last, and so may be missing
    # The good generation was not the one that was written over.
    assert set(checkpoints(work)) == {8, 9}
    if how == "changed":
        train_brush(config_of(), tmp_path / "brush", work=work, tell=heard.append)
        assert_bits(work, whole)


@pytest.mark.parametrize("what", ["*.safetensors", "checkpoint-?.json"])
def test_no_checkpoint_that_is_whole_is_no_new_beginning(work: Path, tmp_path: Path, what: str) -> None:
    with pytest.raises(Killed):
        train_brush(config_of(), tmp_path / "brush", work=work, tell=killed_at(10))
    for path in work.glob(what):
        path.write_bytes(path.read_bytes()[:-9])
    before = {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"}
    with pytest.raises(RefusedError) as found:
        train_brush(config_of(), tmp_path / "brush", work=work, tell=lambda line: None)
    one_line(found, "no checkpoint is whole", "--work")
    assert {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"} == before


def test_a_checkpoint_is_due_so_long_after_the_last(pack: TrainingPack, tmp_path: Path) -> None:
    run, found = Training(config_of(optimisation__checkpoint_minutes=1.0), pack, tmp_path), []
    for run.number, run.seconds in enumerate((59.0, 61.0, 120.0, 122.0)):
        found.append(run.due)
        if run.due:
            run.checkpoint()
    assert found == [False, True, False, True]
    again = Training(run.config, pack, tmp_path)
    again.resume(lambda line: None)
    assert (again.seconds, again.due) == (122.0, False)


def test_shards_are_batches_of_their_own_side_by_side(pack: TrainingPack, tmp_path: Path) -> None:
    """Two shards of a step are the batches that two steps of one shard would draw; their gradients are averaged."""
    double = Training(config_of(optimisation__shards=2, optimisation__clip=1e9), pack, tmp_path)
    (first, one), (second, two) = (double._shard(shard) for shard in range(2))
    value = double.step()
    assert value == pytest.approx((first + second) / 2, rel=1e-5)
    single = Training(config_of(), pack, tmp_path)
    assert single._shard(0)[0] == first
    single.number = 1
    assert single._shard(0)[0] == second
    for weight, parts in zip(double.denoiser.parameters(), zip(one, two, strict=True), strict=True):
        there = [part for part in parts if part is not None]
        assert (weight.grad is None) == (not there)
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, torch.stack(there).sum(0) / 2)
    assert double.number == 1
    again = Training(config_of(optimisation__shards=2, optimisation__clip=1e9), pack, tmp_path)
    again.step()
    states = double.denoiser.state_dict(), again.denoiser.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_run_that_is_over_only_writes_its_brush(work: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    train_brush(config_of(), tmp_path / "one", work=work, tell=lambda line: None)
    train_brush(config_of(), tmp_path / "two", work=work, tell=lambda line: None)
    assert_bits(work, whole)
    assert load_brush(tmp_path / "one").sha256 == load_brush(tmp_path / "two").sha256


@pytest.mark.parametrize(
    "change",
    [{"optimisation__rate": 1e-3}, {"optimisation__seed": 1}, {"data__points": 20}, {"model__tokens": 5}],
    ids=lambda change: next(iter(change)),
)
def test_another_configuration_is_refused(
    pack: TrainingPack, work: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    Training(config_of(), pack, work).checkpoint()
    before = {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"}
    with pytest.raises(RefusedError) as found:
        train_brush(config_of(**change), tmp_path / "brush", work=work, tell=lambda line: None)
    one_line(found, "another configuration", "--work")
    assert {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"} == before


def test_a_longer_budget_is_the_same_run(pack: TrainingPack, tmp_path: Path) -> None:
    run = Training(config_of(), pack, tmp_path)
    run.step()
    run.checkpoint()
    changed = {"steps": 99, "minutes": 5.0, "threads": 1, "checkpoint_minutes": 9.0}
    other = Training(config_of(**{f"optimisation__{name}": value for name, value in changed.items()}), pack, tmp_path)
    other.resume(lambda line: None)
    assert other.number == 1
    assert other.seconds == run.seconds
    other.step()
    other.checkpoint()
    last = Training(other.config, pack, tmp_path)
    last.resume(lambda line: None)
    legs = last.brush().about["training"]["legs"]  # the rate of the first fell towards another end
    assert [(leg["from"], leg["steps"]) for leg in legs] == [(0, 13), (1, 99)]
    assert "legs" not in run.brush().about["training"]
    with pytest.raises(RefusedError) as found:
        Training(config_of(optimisation__steps=1), pack, tmp_path).resume(lambda line: None)
    one_line(found, "is at step 2", "steps is 1", "--work")


def test_a_finished_brush_is_not_written_over(work: Path, tmp_path: Path) -> None:
    (tmp_path / "brush").mkdir()
    with pytest.raises(RefusedError, match="exists"):
        train_brush(config_of(), tmp_path / "brush", work=work, tell=lambda line: None)
    assert list(work.iterdir()) == []  # said before hours of work


def test_a_loss_that_is_no_number_stops_and_leaves_the_checkpoints(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        train_brush(config_of(), tmp_path / "brush", work=work, tell=killed_at(10))
    before = {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"}
    nan = torch.tensor(math.nan, requires_grad=True)
    monkeypatch.setattr(train, "losses", lambda *given: (nan, torch.zeros(())))
    with pytest.raises(MachineError) as found:
        train_brush(config_of(), tmp_path / "brush", work=work, tell=lambda line: None)
    one_line(found, "step 9", "loss is nan", "rate", "checkpoint")
    assert {path.name: path.read_bytes() for path in work.iterdir() if path.name != "lock"} == before
    assert not (tmp_path / "brush").exists()


def test_a_gradient_that_is_no_number_stops_too(
    pack: TrainingPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss can have such a gradient; with it every weight would be lost, and then saved."""
    run = Training(config_of(), pack, tmp_path)

    def steep(denoiser: Denoiser, *given: Any) -> tuple[Tensor, Tensor]:
        return (0 * denoiser.token_score.bias).sum().sqrt(), torch.zeros(())

    monkeypatch.setattr(train, "losses", steep)
    with pytest.raises(MachineError, match="step 0"):
        run.step()
    assert all(torch.isfinite(weight).all() for weight in run.denoiser.parameters())
    assert run.number == 0


def test_pitches_without_room_are_not_judged(pack: TrainingPack, tmp_path: Path) -> None:
    """A quarter of 1024 pixels at 0.5 µm is 32 at 4 µm and 16 at 8: training goes on, the figure is left out."""
    judged = Training(config_of(), pack, tmp_path).held_out(1)
    assert [part.split(" µm")[0] for part in judged.split(", ")] == ["0.5", "1", "2", "4"]


def test_the_average_is_judged_and_not_the_weights(pack: TrainingPack, tmp_path: Path) -> None:
    run = Training(config_of(), pack, tmp_path)
    run.step()
    before = run.held_out(1)
    for network, same in ((run.denoiser, True), (run.average, False)):
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.1)
        assert (run.held_out(1) == before) == same


# -- the pack and the configuration ------------------------------------------------------------------------


def test_the_first_run_makes_the_pack_and_the_next_uses_it(
    tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_encoder", lambda name, device: Colours())
    data, heard = config_of().data, list[str]()
    first = train.training_pack(data, tmp_path / "work", tissue_slide.parent, heard.append)
    assert len(heard) == 1
    assert first.about["encoder"] == "colours"
    again = train.training_pack(data, tmp_path / "work", tissue_slide.parent, heard.append)
    assert len(heard) == 1
    assert again.about == first.about
    monkeypatch.setattr(Colours, "fingerprint", "decaf")
    with pytest.raises(RefusedError) as found:
        train.training_pack(data, tmp_path / "work", tissue_slide.parent, heard.append)
    one_line(found, "another encoder", "--work")


def test_a_pack_has_the_stains_that_the_recipe_asks_for(
    tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_encoder", lambda name, device: Colours())
    data, heard = config_of().data, list[str]()
    stained = data.model_copy(update={"stains": 2})
    made = train.training_pack(stained, tmp_path / "stained", tissue_slide.parent, heard.append)
    assert (made.about["slides"], len(made.slides)) == (3, 3)
    assert "1 slide, each in 3 stains," in heard[0]
    assert train.training_pack(stained, tmp_path / "stained", tissue_slide.parent, heard.append).about == made.about
    assert train.training_pack(data, tmp_path / "plain", tissue_slide.parent, heard.append).about["slides"] == 1
    for asked, work in ((data, "stained"), (data.model_copy(update={"stains": 1}), "stained"), (stained, "plain")):
        with pytest.raises(RefusedError) as found:
            train.training_pack(asked, tmp_path / work, tissue_slide.parent, heard.append)
        one_line(found, "`stains`", "--work")


def test_the_terms_of_the_encoder_are_said_and_stay_with_the_brush(
    tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = {"licence": "CC-BY-NC-ND-4.0", "outputs": "no commercial use"}
    monkeypatch.setattr(train, "load_encoder", lambda name, device: Colours())
    monkeypatch.setattr(Colours, "terms", terms, raising=False)
    heard: list[str] = []
    made = train.training_pack(config_of().data, tmp_path / "work", tissue_slide.parent, heard.append)
    (line,) = [line for line in heard if "CC-BY-NC-ND-4.0" in line]
    assert line.startswith("encoder colours: ")
    assert "no commercial use" in line
    about = Training(config_of(), made, tmp_path).brush().about
    assert about["encoder_terms"] == terms
    assert about["licence"] == "MIT"  # the brush's own, as its card has it


def test_a_pack_of_other_slides_is_refused(tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_encoder", lambda name, device: Colours())
    data = config_of().data
    train.training_pack(data, tmp_path, tissue_slide.parent, lambda line: None)
    for slide in ({"path": "other.tif"}, {"path": "tissue.tif", "assume_mpp": 0.25}):
        other = data.model_copy(update={"slides": [SlideSource(**slide)]})
        with pytest.raises(RefusedError) as found:
            train.training_pack(other, tmp_path, tissue_slide.parent, lambda line: None)
        one_line(found, "other slides", "--work")


def test_a_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\nslides = [{ path = "a.svs", assume_mpp = 0.5 }]\n[model]\nwidth = 24\n', encoding="utf-8")
    config = read_config(path)
    assert config.data.slides[0].assume_mpp == 0.5
    assert (config.model.width, config.model.heads, config.optimisation) == (24, 6, Optimisation())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data]\nslides = [{path='a'}]\nwindw = 3", ["data.windw", "did you mean window"]),
        ("[data]\nslides = [{path='a', asume_mpp = 1}]", ["data.slides.0.asume_mpp", "did you mean assume_mpp"]),
        ("[data]\nslides = [{path='a'}]\n[optimisation]\nminuts = 3", ["optimisation.minuts", "did you mean minutes"]),
        ("[data]\nslides = [{path='a'}]\n[optimization]\nminutes = 3", ["optimization", "did you mean optimisation"]),
        ("[data]\nslides = []", ["data.slides", "at least 1"]),
        ("[data]\nslides = [{path='a'}]\n[optimisation]\nobjective = 'w'", ["optimisation.objective", "'v' or 'x0'"]),
        ("", ["data", "required"]),
        ("[data", ["not TOML"]),
        ("[data]\nslides = [{path='a'}]\nsizes = [256, 256]", ["data", "2 sizes", "expected 5"]),
        ("[data]\nslides = [{path='a'}]\nshares = [0, 0, 0, 0, 0]", ["data", "not all of them 0"]),
        ("[data]\nslides = [{path='a'}]\nwindow = 160", ["data", "window 160", "no size below"]),
        ("[data]\nslides = [{path='a'}]\nwindow = 100", ["data", "multiples of 32"]),
        ("[data]\nslides = [{path='a'}]\npoints = 60000", ["data", "60000 points", "expected 0 to 49152"]),
        ("[data]\nslides = [{path='a'}]\n[optimisation]\nshards = 0", ["optimisation.shards", "greater than"]),
        ("[data]\nslides = [{path='a'}]\n[optimisation]\nwarmup = 0", ["optimisation.warmup", "greater than 0"]),
        ("[data]\nslides = [{path='a'}]\n[optimisation]\ntolerance = [0.1, 0.1]", ["optimisation", "or 4 of them"]),
        ("[data]\nslides = [{path='a'}]\n[model]\nheads = 5", ["model", "width 48, heads 5"]),
        ("[data]\nslides = [{path='a'}]\n[card]\nday = 2026-11-25", ["card.day"]),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as found:
        read_config(path)
    one_line(found, "run.toml", *words)


def test_what_is_no_text_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as found:
        read_config(tmp_path / "none.toml")
    one_line(found, "none.toml", "No such file")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe[data]")
    with pytest.raises(UsageError) as found:
        read_config(tmp_path / "bytes.toml")
    one_line(found, "bytes.toml", "not TOML")


# -- the objective -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.0, 0.5, 1.3])
def test_mollifying_at_points_is_mollifying(width: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    points = torch.randint(16, (2, 60, 2), generator=generator)
    points[:, :4] = torch.tensor([[0, 0], [0, 15], [15, 0], [15, 15]])
    smooth = mollify(image, width)
    expected = torch.stack([smooth[s, :, points[s, :, 0], points[s, :, 1]].T for s in range(2)])
    radius = mollifier_radius(width)
    rows, columns = square(points - radius, 2 * radius + 1)
    beyond = (rows != rows.clamp(0, 15)) | (columns != columns.clamp(0, 15))
    scene = torch.arange(2)[:, None, None, None]
    near = image.permute(0, 2, 3, 1)[scene, rows.clamp(0, 15), columns.clamp(0, 15)] + 1e6 * beyond[..., None]
    torch.testing.assert_close(mollified_at(near, points, 16, width), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mpp", "width"), [(0.5, 0.5), (1.0, 1.3), (8.0, 0.5)])
def test_what_is_read_here_and_there_is_what_whole_scenes_say(pack: TrainingPack, mpp: float, width: float) -> None:
    """Losses once more from all pixels of the scenes and of their noise, mollified whole; at 8 µm there are no points.

    Points are dense, so that many lie within A's reach of the window and of the border.
    """
    sampler = CoordinateSampler(pack, shares=(1,) * 5, sizes=(64, 64, 64, 64, 32), window=32, points=400)
    torch.manual_seed(0)
    sizes = DenoiserConfig(dim=6, width=8, depth=(1, 1, 2), layout=2, heads=2, tokens=2, mollifier=width)
    denoiser, ladder = Denoiser(sizes), Ladder(tuple(pack.about["pitches"]), tuple(pack.about["details"]))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        scenes, drawing = sampler.draw(2, 3, mpp=mpp), Optimisation(unconditional=0.5)
        found = losses(denoiser, ladder, scenes, pack.about, drawing, torch.Generator().manual_seed(4))
        torch.testing.assert_close(found, of_whole_scenes(denoiser, ladder, scenes, pack.about, drawing, 4))
    assert (found[1] > 0) == (mpp < 8)


def of_whole_scenes(
    denoiser: Denoiser, ladder: Ladder, scenes: Scenes, about: dict[str, Any], drawing: Optimisation, seed: int
) -> tuple[Tensor, Tensor]:
    """`losses`, the long way."""
    generator, n, size = torch.Generator().manual_seed(seed), len(scenes.lines), scenes.size
    sigma = draw_sigma(ladder, scenes.mpp, n, drawing, generator)
    seeds = torch.randint(1 << 62, (n,), generator=generator).tolist()
    known = (torch.rand(n, generator=generator) >= drawing.unconditional).float()
    origin = torch.rand(n, 2, generator=generator).double() * 8192
    image, wide = scenes.whole(), sigma[:, None, None, None]
    noisy = image + wide * torch.stack([NoiseField(one).read(Grid(1.0, 0, 0, size, size)) for one in seeds])
    given = noisy * coefficients(wide)[2]

    def windows(of: Tensor) -> Tensor:
        parts = zip(of, scenes.windows.tolist(), strict=True)
        return torch.stack([u[:, top : top + scenes.window, left : left + scenes.window] for u, (top, left) in parts])

    setting = denoiser.setting(sigma, scenes.mpp, conditions(scenes, about), origin=origin, known=known)
    scatter = _scatter(scenes.points) if scenes.points.shape[1] else None
    at = [torch.arange(n).repeat_interleave(scenes.points.shape[1]), *scenes.points.flatten(0, 1).T]
    smooth, image_at, noisy_at = (
        of.permute(0, 2, 3, 1)[*at] for of in (mollify(given, denoiser.config.mollifier), image, noisy)
    )
    grid, tokens = denoiser.layout(*_gathered(denoiser, windows(given), setting, scatter, smooth, scenes), setting)
    memory = denoiser.memory(tokens, setting)
    corner = scenes.windows[:, 0], scenes.windows[:, 1]
    said = denoiser.paint(windows(given), setting, grid, memory, corner=corner)
    window = loss(said, windows(image), windows(noisy), wide, objective=drawing.objective).mean()
    if scatter is None:
        return window, torch.zeros(())
    said = denoiser.paint_points(smooth, scatter, setting, grid, memory)
    return window, loss(said, image_at, noisy_at, sigma[at[0]][:, None], objective=drawing.objective).mean()


def test_noise_levels_are_those_that_the_solver_visits() -> None:
    ladder = Ladder((0.5, 1.0, 2.0), (0.1, 0.12))
    generator = torch.Generator().manual_seed(0)
    near = Optimisation(full_range=0.0, margin=1.5)
    for level, mpp in enumerate(ladder.pitches):
        low, high = ladder.span(level)
        low, high = low / 1.5, high * (1.5 if level < 2 else 1)
        found = draw_sigma(ladder, mpp, 4000, near, generator).log()
        assert found.min() >= math.log(low) - 1e-5
        assert found.max() <= math.log(high) + 1e-5
        assert found.mean().item() == pytest.approx(math.log(low * high) / 2, abs=0.02 * math.log(high / low))
    whole = draw_sigma(ladder, 1.0, 4000, Optimisation(full_range=1.0), generator).log()
    assert whole.min().item() == pytest.approx(math.log(0.02), abs=0.05)
    assert whole.max().item() == pytest.approx(math.log(80), abs=0.05)
    some = draw_sigma(ladder, 1.0, 4000, Optimisation(full_range=0.25, margin=1.0), generator)
    low, high = ladder.span(1)
    inside = math.log(high / low) / math.log(80 / 0.02)
    share = ((some >= low) & (some <= high)).float().mean().item()
    assert share == pytest.approx(0.75 + 0.25 * inside, abs=0.03)


def test_the_layout_is_told_the_scene_without_bias(pack: TrainingPack) -> None:
    """Mass of the nodes over many draws, from windows and occupied cells, is that of a scene with every point."""
    sampler = CoordinateSampler(pack, shares=(1, 0, 0, 0, 0), sizes=(128,) * 5, window=32, points=60)
    denoiser = Denoiser(DenoiserConfig(dim=6, width=4, depth=(1, 1, 2), layout=2, heads=2, tokens=2))
    total, count = torch.zeros(5, 5), 0
    with torch.no_grad():
        for step in range(25):
            scenes = sampler.draw(step, 8)
            origin, sigma = torch.zeros(8, 2, dtype=torch.float64), torch.ones(8)
            setting = denoiser.setting(sigma, 0.5, conditions(scenes, pack.about), origin=origin)
            window, values = torch.zeros(8, 3, 32, 32), torch.zeros(8 * 60, 3)
            _, mass = _gathered(denoiser, window, setting, _scatter(scenes.points), values, scenes)
            total, count = total + mass[..., 0].sum(0), count + 8
    expected = nodes(splat(torch.ones(1, 16, 16, 1), 4))[0, ..., 0]
    assert (total / count).sum().item() == pytest.approx(256, rel=0.015)
    torch.testing.assert_close(total / count, expected, rtol=0.2, atol=0)


def test_a_batch_is_a_function_of_its_generator(pack: TrainingPack) -> None:
    sampler = CoordinateSampler(pack, shares=(1, 1, 1, 1, 1), sizes=(64, 64, 64, 64, 32), window=32, points=16)
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(dim=6, width=8, depth=(1, 1, 2), layout=2, heads=2, tokens=2))
    ladder = Ladder(tuple(pack.about["pitches"]), tuple(pack.about["details"]))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def say(scenes: Scenes, seed: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        window, scattered = losses(denoiser, ladder, scenes, pack.about, Optimisation(), generator)
        return window.item(), scattered.item()

    with torch.no_grad():
        scenes = sampler.draw(0, 2, mpp=1.0)
        assert say(scenes, 3) == say(sampler.draw(0, 2, mpp=1.0), 3)
        assert say(scenes, 3) != say(scenes, 4)
        assert say(scenes, 3)[1] > 0
        assert say(sampler.draw(0, 2, mpp=8.0), 3)[1] == 0  # its window is the scene


def test_conditions_are_standardised_and_absent_as_the_brush_reads_them(pack: TrainingPack) -> None:
    scenes = CoordinateSampler(pack, shares=(1, 0, 0, 0, 0), sizes=(128,) * 5, window=32, points=4).draw(0, 3)
    about = copy.deepcopy(pack.about)
    for moments in about["embeddings"].values():
        moments["limit"] = 0.5  # so that it is reached
    maps: list[ConditionMap] = conditions(scenes, about)
    assert [lattice.cell for lattice in maps] == [32.0, 128.0, 512.0]
    assert max(float(lattice.values.abs().max()) for lattice in maps) == 0.5
    for lattice, (pitch, (values, present, corner, _)) in zip(maps, sorted(scenes.maps.items()), strict=True):
        moments = pack.about["embeddings"][f"{pitch:g}"]
        expected = ((values.numpy() - moments["mean"]) / moments["std"]).clip(-0.5, 0.5) * present.numpy()[..., None]
        np.testing.assert_allclose(lattice.values.numpy(), expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(lattice.present.numpy(), present)
        np.testing.assert_array_equal(lattice.corner.numpy(), corner)


def test_a_brush_may_start_from_another(pack: TrainingPack, tmp_path: Path) -> None:
    first = Training(config_of(), pack, tmp_path)
    first.step()
    save_brush(first.brush(), tmp_path / "first")
    second = Training(config_of(optimisation__start=str(tmp_path / "first")), pack, tmp_path)
    weights = first.average.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in second.denoiser.state_dict().items())
    assert all(weight.requires_grad for weight in second.denoiser.parameters())
    with pytest.raises(UsageError) as found:
        Training(config_of(optimisation__start=str(tmp_path / "first"), model__width=32), pack, tmp_path)
    one_line(found, "other sizes")


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_as_the_cpu_does(pack: TrainingPack, tissue_slide: Path, tmp_path: Path) -> None:
    """The same scenes are drawn there; the noise is not, so losses are alike over a few steps, not equal."""
    device = torch.device("cuda")
    build_pack([open_slide(tissue_slide)], tmp_path / "pack", encoder=Colours())
    there = TrainingPack(tmp_path / "pack", device=device)
    one, other = Training(config_of(), pack, tmp_path), Training(config_of(), there, tmp_path / "there", device)
    expected = one.sampler.draw(3, one.config.optimisation.batch).whole()
    torch.testing.assert_close(other._scenes(3).whole().cpu(), expected)
    losses = [[run.step() for _ in range(8)] for run in (one, other)]
    assert sum(losses[1]) == pytest.approx(sum(losses[0]), rel=0.3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cuda: no CUDA device is available to PyTorch here; use cpu"):
        train_brush(config_of(), tmp_path / "brush", work=tmp_path / "work", device="cuda")
    with pytest.raises(UsageError, match=r"'tpu' is no device"):
        train_brush(config_of(), tmp_path / "brush", work=tmp_path / "work", device="tpu")
