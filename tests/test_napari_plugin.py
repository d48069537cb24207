"""The napari plugin: one RGB layer in µm that reads only what is looked at, and hands off foreign folders."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from wsi_brush.grid import Grid
from wsi_brush.pyramid import SHARD, Pyramid

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
