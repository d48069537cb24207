"""Verb: napari on a slide, or on a painting beside its reference.

What is shown, and how, is the plugin's; it is asked by the names of its manifest, as napari itself does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .commit import read_manifest
from .errors import MachineError, PixelSizeError, UsageError
from .slide import open_slide

PLUGIN, LAYERS, WIDGET = "wsi-brush", "wsi-brush.layers", "Real | Synthetic"
HEAT = 2.0
"""µm a pixel at which tiles are compared, unless another pitch is asked for."""
_SLIDES = ("pyramid", "embedding store")  # kinds that can be shown; the second alone only


def plan_view(paths: Sequence[Path], *, heat: bool = False, assume_mpp: float | None = None) -> dict[str, Any]:
    """What would be shown: each path with its size and pitch, and whether tiles are compared. Opens no window.

    Raises:
        SlideError: if one cannot be read.
        UsageError: if there are more than two, `heat` is asked of one, or one of two is no picture.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"{len(paths)} paths: give one, or a real and a synthetic one")
    if heat and len(paths) < 2:
        raise UsageError("--heat compares two: give a real and a synthetic slide")
    words = ("real", "synthetic") if len(paths) == 2 else ("path",)
    facts: dict[str, Any] = {
        word: _facts(path, len(paths), assume_mpp) for word, path in zip(words, paths, strict=True)
    }
    return facts | ({"heat": f"{HEAT:g} µm"} if heat else {})


def open_viewer(paths: Sequence[Path], *, heat: bool = False, assume_mpp: float | None = None) -> Any:
    """A napari viewer with one path, or with two side by side. Show it with `napari.run()`.

    Raises:
        MachineError: if napari, the plugin or a screen is missing.
        SlideError, UsageError: as `plan_view`.
    """
    plan_view(paths, heat=heat, assume_mpp=assume_mpp)
    check_window()
    import napari
    from napari.layers import Layer
    from npe2 import PluginManager

    viewer = napari.Viewer(title=f"wsi-brush: {' | '.join(path.name for path in paths)}", show=False)
    try:
        ask = PluginManager.instance().commands.execute
        for path in paths:
            for layer in ask(LAYERS, args=(path,), kwargs={"assume_mpp": assume_mpp}):
                viewer.add_layer(Layer.create(*layer))
        if len(paths) == 2:
            _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, WIDGET)
            if heat:
                widget.compare(HEAT)
    except KeyError as error:
        viewer.close()
        raise MachineError(f"napari has no plugin {PLUGIN} ({error}); install wsi-brush again, with [napari]") from None
    except BaseException:
        viewer.close()
        raise
    viewer.window.show()
    return viewer


def check_window() -> None:
    """Whether a window can be opened here.

    Raises:
        MachineError: if napari is not installed, or there is no screen.
    """
    missing = [name for name in ("napari", "qtpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(
            f'{missing[0]} is not installed; from a checkout: python -m pip install -c constraints.txt ".[napari]"'
        )
    if sys.platform.startswith("linux") and not has_screen(os.environ):
        name = os.environ.get("DISPLAY")
        found = f"nothing answers at DISPLAY={name}" if name else "no DISPLAY"
        raise MachineError(f"no screen to open a window on ({found}); on a server: xvfb-run -a, or ssh -X")


def has_screen(environment: Mapping[str, str]) -> bool:
    """Whether an X or Wayland server answers: without one Qt ends the whole process."""
    if environment.get("WAYLAND_DISPLAY"):
        return True
    parts = re.fullmatch(r"(?:unix)?([^:]*):(\d+)(?:\.\d+)?", environment.get("DISPLAY", ""))
    if parts is None:
        return False
    host, number = parts[1], int(parts[2])
    if host:
        return _answers(socket.AF_INET, (host, 6000 + number))
    name = f"/tmp/.X11-unix/X{number}"
    return any(_answers(socket.AF_UNIX, place) for place in (name, f"\0{name}"))


def _answers(family: int, place: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(3)
        return probe.connect_ex(place) == 0


def _facts(path: Path, count: int, assume_mpp: float | None) -> dict[str, Any]:
    """Of one path: what is known from its header."""
    manifest = read_manifest(path) if path.is_dir() else None
    kind = "slide" if manifest is None else str(manifest.get("kind"))
    if manifest is not None and (kind not in _SLIDES or (kind != "pyramid" and count > 1)):
        raise UsageError(f"{path}: no picture ({kind} of wsi-brush); expected a slide or a painting")
    facts: dict[str, Any] = {"path": str(path)}
    if kind == "embedding store":
        return facts | {"kind": kind}
    try:
        slide = open_slide(path, assume_mpp=assume_mpp)
    except PixelSizeError:
        slide = open_slide(path, force_mpp=1.0)
        facts["mpp"] = None
    else:
        facts["mpp"] = slide.mpp
    full = slide.levels[0]
    return facts | {"height": full.height, "width": full.width, "synthetic": slide.synthetic}
