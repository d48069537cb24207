"""Painting from the viewer: a run that is seen, stopped and gone on with; seeds; samples. Windows are real ones."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import make_brush, write_ome_zarr

import wsi_brush
from wsi_brush.brush import save_brush
from wsi_brush.commit import sha256_of, verify
from wsi_brush.errors import MachineError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.progress import StoppedError
from wsi_brush.scratch import WORK
from wsi_brush.slide import open_slide
from wsi_brush.synthesize import as_pixels

jobs = pytest.importorskip("napari_wsi_brush.jobs", reason="the plugin is not installed")
WEIGHTS = Path(wsi_brush.__file__).parent / "weights"
REGION = (400, 352, 200, 160)  # level-0 pixels
LONG = 40  # steps that no machine ends before its window is drawn
STEPS, MPP = 5, 2.0  # so that the canvas is little more than the region


@pytest.fixture(scope="module")
def brush(tiny_brush: Path) -> Path:
    return tiny_brush


@pytest.fixture(scope="module")
def reference(tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue slide as napari opens it."""
    slide = open_slide(tissue_slide)
    levels = [slide.read(Grid(0.5 * factor, 0, 0, 1024 // factor, 1024 // factor)) for factor in (1, 2, 4)]
    path = write_ome_zarr(tmp_path_factory.mktemp("reference") / "tissue.ome.zarr", levels, version="0.5")
    root = zarr.open_group(path, mode="r+")
    channels = [{"color": colour} for colour in ("FF0000", "00FF00", "0000FF")]
    root.attrs["ome"] = {**root.attrs["ome"], "omero": {"channels": channels}}
    return path


@pytest.fixture(scope="module")
def wish(reference: Path, brush: Path) -> Any:
    return jobs.Wish(reference, str(brush), REGION, mpp=MPP, steps=STEPS, seed=3)


@pytest.fixture(scope="module")
def uninterrupted(wish: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nobody stops writes; no test may change it."""
    target = tmp_path_factory.mktemp("painted") / "new.ome.zarr"
    jobs.paint(wish, target)
    return target


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


# -- without a window ----------------------------------------------------------------------------------


class TestJobs:
    @pytest.mark.parametrize(
        ("corners", "region"),
        [
            ([(-0.5, -0.5), (9.5, 19.5)], (0, 0, 10, 20)),
            ([(9.4, 3.6), (3.6, 9.4), (5.0, 5.0)], (4, 4, 6, 6)),
            ([(-50.0, 30.0), (5.0, 200.0)], (0, 30, 6, 70)),
        ],
    )
    def test_a_drawn_shape_is_the_pixels_below_it(self, corners: list[Any], region: tuple[int, ...]) -> None:
        assert jobs.region_of(np.array(corners), (80, 100)) == region

    def test_a_shape_beside_the_slide_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="beside the slide"):
            jobs.region_of(np.array([(-9.0, 5.0), (-2.0, 20.0)]), (80, 100))

    def test_a_plane_lies_where_the_finished_file_has_it(self, uninterrupted: Path) -> None:
        """The pyramid's own place of each level; what is beyond the canvas is cut off."""
        canvas = Grid(MPP, 100, 88, 50, 40)
        ome = zarr.open_group(uninterrupted, mode="r").attrs["ome"]
        (dataset,) = ome["multiscales"][0]["datasets"]
        scale, shift = (step[step["type"]][1:] for step in dataset["coordinateTransformations"])
        random = np.random.default_rng(0).normal(0, 0.7, (3, 512, 512)).astype(np.float32)
        fine = jobs.picture_of(canvas, MPP, random)
        assert ([fine.mpp] * 2, list(fine.corner)) == (scale, shift)
        assert fine.pixels.shape == (50, 40, 3)
        import torch

        np.testing.assert_array_equal(fine.pixels, as_pixels(torch.from_numpy(random[:, :50, :40])))
        coarse = jobs.picture_of(canvas, 8.0, random)
        assert coarse.pixels.shape == (13, 10, 3)
        assert coarse.corner == (200 + 3.0, 176 + 3.0)  # 4 pixels, counted from the middle of the first
        small = jobs.picture_of(canvas, MPP, random, most=25)
        assert (small.mpp, small.corner) == (4.0, fine.corner)
        np.testing.assert_array_equal(small.pixels, fine.pixels[::2, ::2])

    def test_it_is_not_seen_more_often_than_is_cheap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, seen = iter([0.0, 0.1, 0.15, 0.35, 1.0, 1.1]), []
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        show = jobs.shown(Grid(0.5, 0, 0, 8, 8), seen.append)
        for _ in range(4):  # at 0 (takes 0.1, so next from 0.5), 0.15, 0.35, 1
            show(0.5, np.zeros((3, 8, 8), np.float32))
        assert len(seen) == 2

    def test_what_would_be_painted(self, wish: Any, tmp_path: Path) -> None:
        first: list[str] = []
        line = jobs.plan(wish, tmp_path / "x.zarr", seeds=3, look=first.append)
        assert first == ["3 times 50 x 40 pixels, 100 x 80 µm at row 400, column 352"]
        assert line.startswith(f"{first[0]}; about ")
        (tmp_path / "x.zarr").mkdir()
        assert jobs.plan(wish, tmp_path / "x.zarr").endswith("; x.zarr is there already")

    def test_a_brush_of_another_encoder(self, wish: Any, tmp_path: Path) -> None:
        save_brush(make_brush(dim=368, tile=128, encoder="bundled", fingerprint="0" * 64), tmp_path / "other")
        other = jobs.replace(wish, brush=str(tmp_path / "other"))
        with pytest.raises(UsageError, match="another encoder"):
            jobs.paint(other, tmp_path / "x.zarr")
        assert [path.name for path in tmp_path.iterdir()] == ["other"]

    def test_the_reference_is_embedded_once_for_all_seeds(self, wish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from wsi_brush import embed

        calls, real = [], embed.embed_region
        monkeypatch.setattr(embed, "embed_region", lambda *args, **options: calls.append(1) or real(*args, **options))
        seen: list[Any] = []
        told: list[tuple[str, int, int]] = []
        jobs.paint_seeds(wish, range(2, 4), tell=lambda *words: told.append(words), look=seen.append)
        assert len(calls) == 1
        done = [(one.number, one.seed) for one in seen if one.finished]
        assert done == [(0, None), (1, 2), (2, 3)]
        assert told[-1][0] == "painting 2 of 2"
        assert told[-1][1] == told[-1][2]

    def test_and_each_is_what_the_file_would_be(self, wish: Any, uninterrupted: Path) -> None:
        seen: list[Any] = []
        jobs.paint_seeds(wish, range(3, 4), look=seen.append)
        painted = open_slide(uninterrupted)
        np.testing.assert_array_equal(seen[-1].picture.pixels, painted.read(painted.grid))

    def test_stopped_it_goes_on_to_the_same_bytes(self, wish: Any, uninterrupted: Path, tmp_path: Path) -> None:
        target = tmp_path / "new.ome.zarr"

        def stop(what: str, done: int, total: int) -> None:
            if what == "painting" and done > total / 3:
                raise StoppedError

        with pytest.raises(StoppedError):
            jobs.paint(wish, target, tell=stop)
        assert [path.name for path in tmp_path.iterdir()] == [f"{WORK}{target.name}"]
        assert jobs.plan(wish, target).endswith("; begun already, goes on from there")
        told: list[float] = []
        jobs.paint(
            wish, target, tell=lambda what, done, total: told.append(done / total) if what == "painting" else None
        )
        assert min(told) > 0.3
        assert hashes(target) == hashes(uninterrupted)

    def test_names_and_errors(self, tmp_path: Path) -> None:
        assert jobs.free_name(tmp_path).name == "synthetic.ome.zarr"
        (tmp_path / "synthetic.ome.zarr").mkdir()
        assert jobs.free_name(tmp_path).name == "synthetic-2.ome.zarr"
        assert jobs.one_line(MachineError("no\nroom")) == "no room"
        assert jobs.one_line(OSError(28, "No space left", "a")) == "a: No space left"
        assert jobs.one_line(ValueError("ours")) is None


def test_samples_are_small_and_say_what_they_are() -> None:
    from napari_wsi_brush import samples

    (only,), both = samples.reference(), samples.pair()
    assert [shown["name"] for _, shown, _ in both] == ["synthetic: reference", "synthetic: painting"]
    for pixels, shown, kind in both:
        slide = open_slide(shown["metadata"]["path"])
        assert (kind, shown["scale"], slide.mpp) == ("image", (0.5, 0.5), 0.5)
        assert slide.synthetic
        assert shown["metadata"]["synthetic"] is True
        np.testing.assert_array_equal(pixels, slide.read(slide.grid))
    np.testing.assert_array_equal(only[0], both[0][0])
    assert both[1][1]["translate"][1] > 512
    assert sum(path.stat().st_size for path in samples.SAMPLES.iterdir()) < 10**6


# -- windows, each in an interpreter of its own --------------------------------------------------------


def until(what: Callable[[], object], seconds: float = 250) -> None:
    """Windows go on until something is so."""
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while not what():
        QApplication.instance().processEvents()
        time.sleep(0.005)
        assert time.monotonic() < end, "waited in vain"


def layers(viewer: Any, start: str) -> list[Any]:
    return [layer for layer in viewer.layers if layer.name.startswith(start)]


def window(reference: str, brush: str, widget: str, target: str = "") -> tuple[Any, Any]:
    """A viewer with the reference, and a widget whose choices are those of `wish`; the region is drawn."""
    import napari

    viewer = napari.Viewer(show=True)
    viewer.open(reference, plugin="wsi-brush")
    _, choices = viewer.window.add_plugin_dock_widget("wsi-brush", widget)
    choices.draw.native.click()
    shapes = choices.region.value
    assert shapes.mode == "add_rectangle"
    top, left, height, width = (0.5 * edge for edge in REGION)
    corners = np.array([(top, left), (top, left + width), (top + height, left + width), (top + height, left)]) - 0.25
    shapes.add_rectangles(corners)
    choices.brush.value, choices.steps.value, choices.mpp.value = Path(brush), STEPS, MPP
    if target:
        choices.file.value, choices.seed.value = Path(target), 3
    return viewer, choices


def records() -> list[tuple[str, str, bool]]:
    """Notifications of napari: how bad, what, and whether with a traceback."""
    from napari.utils.notifications import notification_manager

    return [(str(one.severity), one.message, hasattr(one, "exception")) for one in notification_manager.records]


def in_synthesize(reference: str, brush: str, target: str) -> None:
    """Seen while it sharpens, stopped, gone on with, opened; and refused."""
    viewer, choices = window(reference, brush, "Synthesize", target)
    choices.steps.value = LONG
    until(lambda: "; about" in choices.said.value)
    assert choices.said.value.startswith("50 x 40 pixels, 100 x 80 µm at row 400, column 352; about")
    preview = "synthetic: being painted"
    choices.run.native.click()
    until(lambda: layers(viewer, preview))
    choices.cancel.native.click()
    until(lambda: choices.job is None)
    assert choices.said.value == "stopped; Run with the same choices goes on from here"
    assert not layers(viewer, "synthetic")
    assert not Path(target).exists()
    assert list((Path(target).parent / f"{WORK}{Path(target).name}").glob("state-*"))
    shares: list[int] = []
    pitches: list[float] = []

    def watched() -> bool:
        shares.append(choices.bar.value)
        for layer in layers(viewer, preview):
            pitch = float(layer.scale[0])
            if pitch not in pitches:
                pitches.append(pitch)
                assert layer.translate.tolist() == [edge + (pitch - MPP) / 2 for edge in (200, 176)]
                assert layer.data.shape == (*(-(-side // round(2 * pitch)) for side in REGION[2:]), 3)
                assert layer.metadata["synthetic"] is True
        return choices.job is None

    choices.run.native.click()
    assert not choices.run.native.isEnabled()
    until(watched)
    assert pitches == sorted(pitches, reverse=True)
    assert len(pitches) > 1
    assert max(shares) > 50
    (painted,) = layers(viewer, "synthetic")
    assert painted.name == "synthetic: new"
    assert (painted.scale.tolist(), painted.translate.tolist()) == ([MPP, MPP], [200.0, 176.0])
    slide = open_slide(target)
    np.testing.assert_array_equal(np.asarray(painted.data), slide.read(slide.grid))
    assert choices.said.value.startswith("took ")
    assert choices.file.value.name == "synthetic.ome.zarr"
    assert records() == []
    choices.file.value = Path(target)
    choices.run.native.click()
    until(lambda: choices.job is None)
    (said,) = records()
    assert said == ("error", f"{target}: exists; choose another name or pass --overwrite", False)
    assert len(layers(viewer, "synthetic")) == 1
    viewer.close()


def in_a_closed_window(reference: str, brush: str, target: str) -> None:
    """Closed by its user while it paints."""
    viewer, choices = window(reference, brush, "Synthesize", target)
    import napari
    from qtpy.QtCore import QThreadPool, QTimer

    choices.run.native.click()
    timer = QTimer()

    def close() -> None:
        if layers(viewer, "synthetic"):
            timer.stop()
            viewer.close()

    timer.timeout.connect(close)
    timer.start(10)
    napari.run()
    assert QThreadPool.globalInstance().waitForDone(20_000)
    assert records() == []


def in_seeds(reference: str, brush: str, target: str) -> None:
    """A strip, one of which is clicked and then painted as a file."""
    viewer, choices = window(reference, brush, "Seeds")
    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest

    choices.first.value, choices.many.value = 3, 2
    choices.run.native.click()
    until(lambda: choices.job is None)
    strip = choices.strip()
    assert [layer.name for layer in strip] == ["seeds: reference", "synthetic: seed 3", "synthetic: seed 4"]
    slide = viewer.layers[0].extent.world
    edges = [(layer.extent.world[0][1], layer.extent.world[1][1]) for layer in strip]
    assert all(right < left for right, left in zip([slide[1][1], *(e[1] for e in edges)], (e[0] for e in edges)))  # noqa: B905
    shown = open_slide(reference).read(Grid(MPP, 100, 88, 50, 40))
    np.testing.assert_array_equal(strip[0].data, shown)
    assert all(layer.metadata["synthetic"] for layer in strip[1:])
    assert abs(strip[1].data.astype(int) - strip[2].data).mean() > 1
    native = viewer.window._qt_viewer.canvas.native
    middle = np.array([native.height(), native.width()]) / 2
    place = middle + (strip[1].extent.world.mean(0) - viewer.camera.center[-2:]) * viewer.camera.zoom
    QTest.mouseClick(native, Qt.LeftButton, pos=QPoint(round(place[1]), round(place[0])))
    until(lambda: "taken over" in choices.said.value, 10)
    other = viewer.window.dock_widgets["Synthesize (wsi-brush)"]
    assert (other.seed.value, other.steps.value, other.region.value) == (3, STEPS, choices.region.value)
    other.file.value = Path(target)
    other.run.native.click()
    until(lambda: other.job is None)
    (painted,) = layers(viewer, "synthetic: new")
    np.testing.assert_array_equal(np.asarray(painted.data), strip[1].data)
    choices.first.value = 7
    choices.run.native.click()
    until(lambda: layers(viewer, "synthetic: seed 8"))
    choices.cancel.native.click()
    until(lambda: choices.job is None)
    assert [layer.name for layer in choices.strip()] == ["seeds: reference", "synthetic: seed 7"]
    for layer in viewer.open_sample("wsi-brush", "pair"):
        assert layer in choices.reference.choices
    assert records() == []
    viewer.close()


def ran(what: Callable[..., None], *arguments: Path) -> None:
    """A crash of the graphics costs one test, not the run."""
    pytest.importorskip("napari", reason="napari is not installed")
    if not os.environ.get("DISPLAY"):
        pytest.skip("no DISPLAY to open a window on")
    if not any(one.name == "napari_wsi_brush" for one in importlib.metadata.entry_points(group="napari.manifest")):
        pytest.skip("the plugin is not installed as a distribution")
    code = f"import sys, test_studio; test_studio.{what.__name__}(*sys.argv[1:]); print('done')"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.endswith("done\n")
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.gui
class TestWindows:
    def test_stopped_and_gone_on_with(self, wish: Any, tmp_path: Path) -> None:
        whole, target = (tmp_path / name / "new.ome.zarr" for name in ("whole", "window"))
        for one in (whole, target):
            one.parent.mkdir()
        jobs.paint(jobs.replace(wish, steps=LONG), whole)
        ran(in_synthesize, wish.reference, Path(wish.brush), target)
        assert hashes(target) == hashes(whole)
        assert [path.name for path in target.parent.iterdir()] == ["new.ome.zarr"]

    def test_closed_in_the_middle(self, wish: Any, uninterrupted: Path, tmp_path: Path) -> None:
        target = tmp_path / "new.ome.zarr"
        ran(in_a_closed_window, wish.reference, Path(wish.brush), target)
        assert [path.name for path in tmp_path.iterdir()] == [f"{WORK}{target.name}"]
        first: list[tuple[str, int, int]] = []
        jobs.paint(wish, target, tell=lambda *words: first.append(words))
        done = next(done for what, done, _ in first if what == "painting")
        assert done > min(done for _, done, _ in first)
        assert verify(target) == []
        assert hashes(target) == hashes(uninterrupted)

    def test_seeds(self, reference: Path, brush: Path, tmp_path: Path) -> None:
        ran(in_seeds, reference, brush, tmp_path / "new.ome.zarr")
