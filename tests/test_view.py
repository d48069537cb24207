"""The verb: what would be shown, and what is said where nothing can be. Windows are tested in `test_viewer`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_maps

from wsi_brush import view
from wsi_brush.errors import MachineError, SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.store import write_store
from wsi_brush.tissue import Tissue


def said(*words: object, display: str | None = None) -> subprocess.CompletedProcess[str]:
    """What `wsi-brush view` does where no screen is, or only one that does not answer."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    kept |= {} if display is None else {"DISPLAY": display}
    command = [sys.executable, "-m", "wsi_brush", "view", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=kept)


def test_the_plan_names_both_sides(tissue_slide: Path) -> None:
    done = said(tissue_slide, tissue_slide, "--heat", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    one = {"path": str(tissue_slide), "mpp": 0.5, "height": 1024, "width": 1024, "synthetic": False}
    assert json.loads(done.stdout) == {"real": one, "synthetic": one, "heat": "2 µm"}


@pytest.mark.parametrize(("display", "found"), [(None, "no DISPLAY"), (":98765", "nothing answers at DISPLAY=:98765")])
def test_without_a_screen_one_line_says_so(tissue_slide: Path, display: str | None, found: str) -> None:
    pytest.importorskip("napari", reason="napari is not installed")
    done = said(tissue_slide, display=display)
    assert done.returncode == 2
    assert done.stderr == (f"wsi-brush: no screen to open a window on ({found}); on a server: xvfb-run -a, or ssh -X\n")
    assert done.stdout == ""


def test_without_napari_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r'napari is not installed; .* -c constraints\.txt "\.\[napari\]"') as caught:
        view.check_window()
    assert caught.value.exit_code == 2


def test_a_screen_is_one_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not view.has_screen({})
    assert not view.has_screen({"DISPLAY": "rubbish"})
    assert view.has_screen({"WAYLAND_DISPLAY": "wayland-0"})
    if not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's")
    number = 20000 + os.getpid() % 10000
    with socket.socket(socket.AF_UNIX) as server:
        assert not view.has_screen({"DISPLAY": f":{number}.0"})
        server.bind(f"\0/tmp/.X11-unix/X{number}")
        server.listen()
        assert view.has_screen({"DISPLAY": f":{number}.0"})
    with socket.socket(socket.AF_INET) as server:
        server.bind(("127.0.0.1", 6000 + number))
        server.listen()
        assert view.has_screen({"DISPLAY": f"127.0.0.1:{number}.0"})


def test_what_is_not_shown(tissue_slide: Path, tmp_path: Path) -> None:
    maps = {0.5: make_maps(Grid(0.5, 0, 0, 256, 256), dim=4, tile=128)[0.5]}
    store = write_store(tmp_path / "a.zarr", maps, tissue=Tissue.everywhere(Grid(8.0, 0, 0, 16, 16)), about={}).path
    assert view.plan_view([store]) == {"path": {"path": str(store), "kind": "embedding store"}}
    with pytest.raises(UsageError, match=r"no picture \(embedding store of wsi-brush\)"):
        view.plan_view([store, tissue_slide])
    with pytest.raises(UsageError, match="--heat compares two"):
        view.plan_view([tissue_slide], heat=True)
    with pytest.raises(UsageError, match="3 paths"):
        view.plan_view([tissue_slide] * 3)
    with pytest.raises(SlideError, match="a folder, but no OME-Zarr"):
        view.plan_view([tmp_path])
