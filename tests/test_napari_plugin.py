"""The napari plugin: one RGB layer in µm that reads only what is looked at, and hands off foreign folders."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import MadeSlide, make_maps, write_aperio, write_pyramid
from numpy.typing import NDArray

from wsi_brush.grid import Grid
from wsi_brush.pyramid import SHARD, Pyramid
from wsi_brush.slide import open_slide
from wsi_brush.store import write_store
from wsi_brush.tissue import Tissue

layers = pytest.importorskip("napari_wsi_brush.layers", reason="the plugin is not installed")
reader = pytest.importorskip("napari_wsi_brush.reader", reason="the plugin is not installed")

AXES = [
    {"name": "c", "type": "channel"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "micrometer"},
]
CHANNELS = [{"label": name, "color": color} for name, color in zip("RGB", layers.RGB, strict=True)]


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Pink everywhere, with a blue upper left quarter, so that axes and colours cannot be mixed up unseen."""
    pixels = np.full((height, width, 3), (230, 150, 190), np.uint8)
    pixels[: height // 2, : width // 2] = (60, 40, 160)
    return pixels


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """A pyramid of wsi-brush, 600 x 900 pixels of 0.5 µm at (50, 100) µm of its reference."""
    target, grid = tmp_path / "new.ome.zarr", Grid(0.5, 100, 200, 600, 900)
    pyramid = Pyramid(target, grid, about={"seed": 1})
    for part in grid.tiles(SHARD):
        pyramid.write(part, picture(600, 900)[part.within(grid)])
    pyramid.finish()
    return target


def foreign(
    folder: Path, pixels: NDArray[Any], *, colours: bool = True, axes: list[dict[str, str]] | None = None
) -> Path:
    """An OME-Zarr 0.4 image as others write it: one level, a scale, `pixels` in the order of `axes`."""
    root = zarr.create_group(folder, zarr_format=2)
    root.create_array("s0", data=pixels, chunk_key_encoding={"name": "v2", "separator": "/"})
    scale = [1.0] * (pixels.ndim - 2) + [0.25, 0.25]
    dataset = {"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    root.attrs["multiscales"] = [{"version": "0.4", "axes": axes or AXES, "datasets": [dataset]}]
    if colours:
        root.attrs["omero"] = {"channels": CHANNELS}
    return folder


def only_layer(path: Path) -> tuple[Any, dict[str, Any], str]:
    read = reader.get_reader(str(path))
    assert read is not None
    (layer,) = read(str(path))
    return layer


class TestReader:
    def test_a_pyramid_is_one_layer_in_micrometres(self, synthetic: Path) -> None:
        levels, shown, kind = only_layer(synthetic)
        assert kind == "image"
        assert [level.shape for level in levels] == [(600, 900, 3), (300, 450, 3), (150, 225, 3)]
        np.testing.assert_array_equal(np.asarray(levels[0]), picture(600, 900))
        assert (shown["name"], shown["rgb"], shown["multiscale"]) == ("synthetic: new", True, True)
        assert (shown["scale"], shown["translate"]) == ((0.5, 0.5), (50.0, 100.0))
        assert shown["units"] == ("micrometer", "micrometer")
        assert shown["metadata"]["wsi_brush"]["seed"] == 1

    @pytest.mark.parametrize(
        "key",
        [
            np.s_[10:20, 30:40],
            np.s_[5],
            np.s_[5, 7],
            np.s_[..., 0],
            np.s_[10:20, ..., 1],
            np.s_[::7, ::5, :],
            np.s_[-3:, -4, 2],
            np.s_[...],
        ],
        ids=str,
    )
    def test_windows_are_those_of_the_whole(self, synthetic: Path, key: Any) -> None:
        level = only_layer(synthetic)[0][0]
        np.testing.assert_array_equal(level[key], picture(600, 900)[key])

    def test_only_the_window_is_read(self, synthetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With level 0's only shard gone bad, the coarser levels show, and level 0 is stripes, which is said once."""
        (synthetic / "0" / "c" / "0" / "0" / "0").write_bytes(b"rubbish")
        said: list[tuple[str, str]] = []
        monkeypatch.setattr(layers, "say", lambda line, severity="error": said.append((line, severity)))
        levels = only_layer(synthetic)[0]
        np.testing.assert_array_equal(levels[1][:], picture(300, 450))
        assert not said
        stripes = levels[0][:40, :40]
        assert set(np.unique(stripes)) == {150, 200}
        levels[0][500:520, 600:640]
        ((line, severity),) = said
        assert severity == "error"
        assert line.startswith("synthetic: new: damaged, rows 0-40, columns 0-40 of level 0 cannot be read (")

    def test_a_missing_shard_of_ours_is_damage_and_no_white(
        self, synthetic: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (synthetic / "0" / "c" / "0" / "0" / "0").unlink()
        said: list[str] = []
        monkeypatch.setattr(layers, "say", lambda line, severity="error": said.append(line))
        assert set(np.unique(only_layer(synthetic)[0][0][:40, :40])) == {150, 200}
        assert len(said) == 1
        assert "shard 0/0 is missing" in said[0]

    def test_others_are_not_called_synthetic(self, tmp_path: Path) -> None:
        level, shown, _ = only_layer(foreign(tmp_path / "real.zarr", np.moveaxis(picture(90, 70), -1, 0)))
        assert (shown["name"], shown["multiscale"], shown["scale"]) == ("real", False, (0.25, 0.25))
        np.testing.assert_array_equal(level[:], picture(90, 70))

    def test_five_axes_and_millimetres(self, tmp_path: Path) -> None:
        axes = [{"name": "t", "type": "time"}, AXES[0], *({**axis, "unit": "millimeter"} for axis in AXES[1:])]
        axes.insert(1, {"name": "z", "type": "space"})
        pixels = np.moveaxis(picture(90, 70), -1, 0)[None, None]
        level, shown, _ = only_layer(foreign(tmp_path / "x.zarr", pixels, axes=axes))
        np.testing.assert_array_equal(level[:], picture(90, 70))
        assert shown["scale"] == (250.0, 250.0)

    def test_without_a_unit_it_is_pixels(self, tmp_path: Path) -> None:
        axes = [{"name": axis["name"], "type": axis["type"]} for axis in AXES]
        _, shown, _ = only_layer(foreign(tmp_path / "x.zarr", np.zeros((3, 9, 7), np.uint8), axes=axes))
        assert (shown["scale"], shown["units"]) == ((1.0, 1.0), ("pixel", "pixel"))

    def test_what_is_not_for_us(self, tmp_path: Path, synthetic: Path) -> None:
        (tmp_path / "empty.zarr").mkdir()
        (tmp_path / "file.zarr").write_text("no folder")
        (tmp_path / "rubbish.zarr").mkdir()
        (tmp_path / "rubbish.zarr" / "zarr.json").write_text("{")
        zarr.create_array(tmp_path / "array.zarr", shape=(3, 9, 9), dtype="u1")
        zarr.create_group(tmp_path / "group.zarr", attributes={"ome": {"multiscales": "none"}})
        foreign(tmp_path / "deep.zarr", np.zeros((3, 9, 7), np.uint16))
        foreign(tmp_path / "four.zarr", np.zeros((4, 9, 7), np.uint8))
        foreign(tmp_path / "stack.zarr", np.zeros((5, 3, 9, 7), np.uint8), axes=[{"name": "z", "type": "space"}, *AXES])
        foreign(tmp_path / "stain.zarr", np.zeros((3, 9, 7), np.uint8), colours=False)
        folders = sorted(set(tmp_path.glob("*.zarr")) - {synthetic})
        assert len(folders) == 9
        assert [folder.name for folder in folders if reader.get_reader(str(folder)) is not None] == []
        assert reader.get_reader(str(tmp_path / "nowhere.zarr")) is None
        assert reader.get_reader([str(synthetic)]) is None
        with pytest.raises(ValueError, match="another reader"):
            reader.read(str(tmp_path / "deep.zarr"))


class TestSlides:
    """Slides, and what is told of files by more than their names."""

    def test_a_slide_is_one_layer_whose_levels_are_those_of_the_file(self, made_slides: dict[str, MadeSlide]) -> None:
        made = made_slides["aperio.svs"]
        levels, shown, kind = only_layer(made.path)
        assert (kind, shown["name"], shown["rgb"], shown["multiscale"]) == ("image", "aperio.svs", True, True)
        assert (shown["scale"], shown["units"]) == ((made.mpp, made.mpp), ("micrometer", "micrometer"))
        assert "translate" not in shown
        slide = open_slide(made.path)
        for level, own in zip(levels, slide.levels, strict=True):
            assert level.shape == (own.height, own.width, 3)
            grid = Grid(slide.mpp * own.tall, 0, 0, own.height, own.width)
            np.testing.assert_array_equal(level[:], slide.read(grid))
        np.testing.assert_array_equal(levels[0][300:555, 10:700:7, 1], levels[0][:][300:555, 10:700:7, 1])

    def test_levels_that_a_file_lacks_are_made(self, tmp_path: Path) -> None:
        pixels = np.zeros((300, 5000, 3), np.uint8)
        pixels[:, 2500:] = 200
        made = write_aperio(tmp_path / "flat.svs", [pixels])
        levels = only_layer(made)[0]
        assert [level.shape for level in levels] == [(300, 5000, 3), (150, 2500, 3), (75, 1250, 3)]
        assert abs(levels[2][:, :600].astype(int)).max() < 12
        assert abs(levels[2][:, 650:].astype(int) - 200).max() < 12

    def test_windows_are_read_by_threads_at_once(self, made_slides: dict[str, MadeSlide]) -> None:
        level = only_layer(made_slides["aperio.svs"].path)[0][0]
        places = [(top, left) for top in range(0, 500, 100) for left in range(0, 700, 100)] * 2
        whole = level[:]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda place: level[place[0] : place[0] + 90, place[1] : place[1] + 90], places))
        for (top, left), window in zip(places, found, strict=True):
            np.testing.assert_array_equal(window, whole[top : top + 90, left : left + 90])

    def test_without_a_pixel_size_it_is_shown_in_pixels_and_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[tuple[str, str]] = []
        monkeypatch.setattr(layers, "say", lambda line, severity="error": said.append((line, severity)))
        path = write_aperio(tmp_path / "unknown.svs", [picture(600, 900), picture(300, 450)], mpp=None)
        shown = only_layer(path)[1]
        assert (shown["scale"], shown["units"]) == ((1.0, 1.0), ("pixel", "pixel"))
        line = "unknown.svs: no pixel size in the header; shown in pixels, without a scale in µm"
        assert said == [(line, "warning")]
        ((_, shown, _),) = reader.layers_of(path, assume_mpp=0.25)
        assert (shown["scale"], shown["units"]) == ((0.25, 0.25), ("micrometer", "micrometer"))

    def test_which_files_are_ours(self, made_slides: dict[str, MadeSlide], tmp_path: Path) -> None:
        import tifffile

        (tmp_path / "text.svs").write_text("no slide")
        tifffile.imwrite(tmp_path / "plain.tif", picture(600, 900))
        tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 60, 90), np.uint16))
        one = write_pyramid(tmp_path / "one-level.tif", [picture(600, 900)])
        foreign = [made_slides["no-mpp.tif"].path, made_slides["plain.png"].path, one, *tmp_path.glob("[!o]*.*")]
        assert len(foreign) == 6
        assert [path.name for path in foreign if reader.get_reader(str(path)) is not None] == []
        ours = [made_slides[name].path for name in ("deflate.tif", "nested.ome.tif", "ragged.svs")]
        assert [path.name for path in ours if reader.get_reader(str(path)) is None] == []

    def test_a_slide_that_cannot_be_read_is_said_and_gives_no_layer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[str] = []
        monkeypatch.setattr(reader, "say", lambda line, severity="error": said.append(line))
        whole = write_aperio(tmp_path / "whole.svs", [picture(600, 900), picture(300, 450)]).read_bytes()
        (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
        assert reader.read(str(tmp_path / "cut.svs")) == [(None,)]
        (line,) = said
        assert line.startswith(f"{tmp_path / 'cut.svs'}: truncated")


class TestStores:
    """Embeddings as colours."""

    def test_a_layer_a_pitch_in_its_place_and_clear_where_nothing_is(self, tmp_path: Path) -> None:
        maps = make_maps(Grid(0.5, 0, 0, 2048, 2048), dim=6, tile=128)
        about = {"slide": {"name": "lung.svs", "mpp": 0.5}, "synthetic": True}
        path = write_store(
            tmp_path / "lung.zarr", maps, tissue=Tissue.everywhere(Grid(8.0, 0, 0, 9, 9)), about=about
        ).path
        read = reader.get_reader(str(path))
        assert read is not None
        found = read(str(path))
        assert [shown["name"] for _, shown, _ in found] == [
            f"synthetic: lung: embeddings at {mpp} µm" for mpp in ("0.5", "2", "8")
        ]
        assert [shown["visible"] for _, shown, _ in found] == [True, False, False]
        colours, shown, _ = found[0]
        assert (shown["scale"], shown["translate"], shown["units"]) == ((64.0,) * 2, (31.75,) * 2, ("micrometer",) * 2)
        assert colours.shape == (16, 16, 4)
        np.testing.assert_array_equal(colours[..., 3] == 255, maps[0.5].present)
        assert not colours[~maps[0.5].present].any()

    def test_like_embeddings_have_like_colours(self) -> None:
        random = np.random.default_rng(0)
        kinds = random.normal(size=(3, 20)) * 5
        which = random.integers(0, 3, (12, 12))
        values = (kinds[which] + random.normal(size=(12, 12, 20)) * 0.2).astype(np.float16)
        colours = layers.coloured(values)[..., :3].astype(float)
        inside = max(colours[which == kind].std(axis=0)[:2].max() for kind in range(3))
        means = np.stack([colours[which == kind].mean(axis=0) for kind in range(3)])
        apart = min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        assert apart > 5 * inside
        np.testing.assert_array_equal(layers.coloured(values), layers.coloured(values))
        assert (layers.coloured(values[:1, :1])[0, 0] == (128, 128, 128, 255)).all()

    def test_what_is_ours_and_damaged_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr(reader, "say", lambda line, severity="error": said.append(line))
        folder = tmp_path / "a.zarr"
        folder.mkdir()
        (folder / "wsi-brush.json").write_text("{")
        assert reader.read(str(folder)) == [(None,)]
        assert "damaged manifest" in said[-1]
        (folder / "wsi-brush.json").write_text('{"kind": "pyramid"}')
        assert reader.read(str(folder)) == [(None,)]
        assert said[-1] == f"{folder / 'zarr.json'}: missing or damaged; paint it again"
        (folder / "wsi-brush.json").write_text('{"kind": "brush"}')
        assert reader.get_reader(str(folder)) is None


def test_the_reader_imports_little() -> None:
    """Beside NumPy and PyYAML, which napari has: no zarr, no torch, no reader of slides, and no more than 0.2 s."""
    script = """
        import sys, time, json, hashlib, numpy
        start = time.process_time()
        import napari_wsi_brush.reader
        used = time.process_time() - start
        heavy = {"torch", "zarr", "napari", "openslide", "tiffslide", "scipy", "skimage"} & set(sys.modules)
        assert not heavy, heavy
        print(used)
    """
    assert float(ran(script)) < 0.2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of napari's own, once it is imported
def test_the_widget_and_the_words_begin_with_the_same_painting() -> None:
    from napari_wsi_brush.jobs import Wish
    from wsi_brush.cli.painting import synthesize
    from wsi_brush.stages import Painting
    from wsi_brush.stream import CanvasDenoiser

    usual, wish = Painting(), Wish(Path("slide.svs"))
    assert wish.painting == Painting(size=wish.size)
    words = {name: one.default for name, one in inspect.signature(synthesize).parameters.items()}
    for name in ("mpp", "seed", "steps", "guidance"):
        assert words[name] == getattr(usual, name), name
    assert inspect.signature(CanvasDenoiser).parameters["guidance"].default == usual.guidance


def test_the_manifest_is_valid() -> None:
    npe2 = pytest.importorskip("npe2", reason="napari is not installed")
    manifest = npe2.PluginManifest.from_file(Path(reader.__file__).with_name("napari.yaml"))
    manifest.validate_imports()
    assert manifest.name == "wsi-brush"  # npe2 refuses any other name than the distribution's


def registered() -> bool:
    return any(point.name == "napari_wsi_brush" for point in importlib.metadata.entry_points(group="napari.manifest"))


def test_napari_opens_it_with_this_plugin(synthetic: Path) -> None:
    """Through the entry point and napari's model of a viewer, which needs no window."""
    pytest.importorskip("napari", reason="napari is not installed")
    if not registered():
        pytest.skip("the plugin is not installed as a distribution")
    script = """
        import sys
        from napari.components import ViewerModel
        from npe2 import PluginManager
        PluginManager.instance().discover()
        viewer = ViewerModel()
        viewer.open(sys.argv[1], plugin="wsi-brush")
        (layer,) = viewer.layers
        assert (layer.name, layer.rgb, layer.multiscale) == ("synthetic: new", True, True), layer
        assert layer.data[0].shape == (600, 900, 3)
        assert tuple(layer.scale) == (0.5, 0.5) and tuple(layer.translate) == (50.0, 100.0)
        assert str(layer.units[0]) == "micrometer"
        assert "torch" not in sys.modules and "qtpy" not in sys.modules
        print("opened")
    """
    assert ran(script, synthetic).endswith("opened\n")


@pytest.mark.gui
def test_a_real_window_shows_it(synthetic: Path, tmp_path: Path) -> None:
    pytest.importorskip("napari", reason="napari is not installed")
    if not os.environ.get("DISPLAY"):
        pytest.skip("no DISPLAY to open a window on")
    if not registered():
        pytest.skip("the plugin is not installed as a distribution")
    script = """
        import sys
        import napari
        from PIL import Image
        viewer = napari.Viewer(show=True)
        viewer.open(sys.argv[1], plugin="wsi-brush")
        Image.fromarray(viewer.screenshot(canvas_only=True, flash=False)[..., :3]).save(sys.argv[2])
        viewer.close()
        print("shown")
    """
    assert "shown" in ran(script, synthetic, tmp_path / "window.png")
    from PIL import Image

    shot = np.asarray(Image.open(tmp_path / "window.png")).astype(int)
    blue, pink = ((abs(shot - colour) < 12).all(axis=-1) for colour in ((60, 40, 160), (230, 150, 190)))
    assert 0.15 < blue.sum() / (blue | pink).sum() < 0.35
    assert (blue | pink).mean() > 0.3
    rows, columns = np.nonzero(blue)
    assert rows.max() <= np.nonzero(pink)[0].max()
    assert columns.mean() < np.nonzero(pink)[1].mean()


def ran(script: str, *arguments: Path) -> str:
    """What `script` prints in an interpreter of its own: a crash of the graphics costs one test, not the run."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
