"""How soon a pair of paintings is on the screen, and what panning costs: in one run, on one machine.

    xvfb-run -a -s "-screen 0 1600x1000x24" python tests/benchmarks/viewing.py [--size 16384]

The pair is one painting of cheap tiles and a copy of it, in a folder that is removed. Beside the time from paths to
pixels stands that of a bare napari window, the floor, and the time of a processor that each took.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
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


def shown(paths: list[Path]) -> tuple[Any, dict[str, float]]:
    """A window with a pair, from its paths to the first frame; without paths, an empty one."""
    import napari
    from qtpy.QtWidgets import QApplication

    from wsi_brush.view import open_viewer

    start, used = time.perf_counter(), time.process_time()
    viewer = open_viewer(paths) if paths else napari.Viewer()
    for _ in range(5):
        QApplication.processEvents()
    return viewer, {
        "seconds": round(time.perf_counter() - start, 2), "processor": round(time.process_time() - used, 2)
    }  # fmt: skip


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=16384)
    size = parser.parse_args().size
    import napari  # noqa: F401 - its import is not what is measured

    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder), size)
        figures: dict[str, Any] = {"size": size}
        for name, given in (("empty, first", []), ("empty", []), ("pair", paths), ("pair, again", paths)):
            viewer, figures[name] = shown(given)
            if given:
                figures[f"{name}: panning"] = pan(viewer)
            viewer.close()
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
