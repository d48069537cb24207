"""How soon a pair of paintings is on the screen, and what panning costs: in one run, on one machine.

    xvfb-run -a -s "-screen 0 1600x1000x24" python tests/benchmarks/viewing.py [--size 16384]

The pair is one painting of cheap tiles and a copy of it, in a folder that is removed. It is opened in a window that is
there already, as by File > Open and the widget Real | Synthetic (the first layers of that napari), and by `wsi-brush
view`, which makes a window. Beside the time from paths to pixels stands that of a bare napari window, the floor of the
latter, and the time of a processor that each took. Every window is in a process of its own but "again".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wsi_brush.grid import Grid
from wsi_brush.pyramid import SHARD, Pyramid


def make(folder: Path, size: int) -> list[Path]:
    """A painting of `size` pixels a side whose shards are one noisy tile, and a copy that shares its bytes."""
    grid, path = Grid(0.5, 0, 0, size, size), folder / "new.ome.zarr"
    tile = np.random.default_rng(0).integers(90, 240, (SHARD // 8, SHARD // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pyramid = Pyramid(path, grid, about={"seed": 0})
    for part in grid.tiles(SHARD):
        pyramid.write(part, tile[: part.height, : part.width])
    pyramid.finish()
    return [path, Path(shutil.copytree(path, folder / "old.ome.zarr", copy_function=os.link))]


def shown(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What some work leaves on the screen, and how long it takes to the first frame."""
    from qtpy.QtWidgets import QApplication

    start, used = time.perf_counter(), time.process_time()
    viewer = work()
    for _ in range(5):
        QApplication.processEvents()
    return viewer, {
        "seconds": round(time.perf_counter() - start, 2), "processor": round(time.process_time() - used, 2)
    }  # fmt: skip


def opened(viewer: Any, paths: list[Path]) -> Any:
    """A pair in a window that is there."""
    from wsi_brush.view import PLUGIN, WIDGET

    viewer.open([str(path) for path in paths], plugin=PLUGIN)
    viewer.window.add_plugin_dock_widget(PLUGIN, WIDGET)  # the same one, if it is there
    return viewer


def alone(what: str, paths: list[Path]) -> None:
    """One part of the measurement in this process; prints JSON."""
    import napari  # its import is not what is measured

    from wsi_brush.view import open_viewer

    viewer, figures = shown(napari.Viewer if what != "view" else lambda: open_viewer(paths))
    found = {what: figures}
    if what == "open":
        _, found[what] = shown(lambda: opened(viewer, paths))
        viewer.layers.clear()
        _, found[f"{what}, again"] = shown(lambda: opened(viewer, paths))
    if what == "view":
        found[f"{what}: panning"] = pan(viewer)
    viewer.close()
    again = {"empty": napari.Viewer, "view": lambda: open_viewer(paths)}.get(what)
    if again is not None:
        viewer, found[f"{what}, again"] = shown(again)
        viewer.close()
    print(json.dumps(found))


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--alone", choices=("empty", "open", "view"))
    parser.add_argument("paths", type=Path, nargs="*")
    given = parser.parse_args()
    if given.alone:
        alone(given.alone, given.paths)
        return
    figures: dict[str, Any] = {"size": given.size}
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), given.size)
        for what in ("empty", "open", "view"):
            command = [sys.executable, __file__, "--alone", what, *map(str, paths)]
            figures |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(figures, indent=1))


def pan(viewer: Any) -> dict[str, float]:
    """Milliseconds a step of 20 pixels of the screen, at level 0."""
    from qtpy.QtWidgets import QApplication

    viewer.scene.camera.zoom = 2.0
    steps = []
    for step in range(60):
        start = time.perf_counter()
        viewer.scene.camera.center = (1000.0 + 10 * step, 1000.0 + 10 * step)
        QApplication.processEvents()
        steps.append(1000 * (time.perf_counter() - start))
    return {"median ms": round(float(np.median(steps)), 1), "worst ms": round(max(steps), 1)}


if __name__ == "__main__":
    main()
