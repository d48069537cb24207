"""The tiles of a sweep on a Dask cluster that is there already.

A task carries a path, a token and numbers; the brush, the embeddings and the state are files in the work folder, which
every worker must see. Workers write their tiles into the generation themselves: tiles are whole chunks, so no two of
them touch the same one, and a tile that is painted twice is the same bytes. No port is opened here.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from . import __version__
from .brush import Brush, load_brush, save_brush
from .commit import write_json
from .errors import MachineError, RefusedError, UsageError, WsiBrushError
from .grid import Grid
from .paint import Run, write_tile
from .scratch import CHUNK, Plane, open_plane
from .stages import Painting, Stage, stages
from .store import EmbeddingMap
from .stream import CanvasDenoiser

if TYPE_CHECKING:
    from distributed import Client, Future

_BOX = "cluster"
_PATIENCE = 10.0  # seconds to wait for a scheduler


def connect(address: str) -> Client:
    """A client of the scheduler at `address`.

    Raises:
        UsageError: if dask's cluster library is not installed.
        MachineError: if nobody answers there, or there is no worker.
        RefusedError: if a worker has another version of wsi-brush or torch.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--scheduler needs `distributed`; install wsi-brush with the extra [cluster]") from None
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise MachineError(f"{address}: no Dask scheduler answers ({str(error).splitlines()[0]})") from None
    try:
        found = client.run(_versions, on_error="return")
        if not found:
            raise MachineError(f"{address}: the scheduler has no workers; start some and run the same command again")
        for worker, versions in found.items():
            if versions != _versions():
                raise RefusedError(f"worker {worker} has {versions}, here is {_versions()}; install the same there")
    except WsiBrushError:
        client.close()  # type: ignore[no-untyped-call]
        raise
    return client


def _versions() -> dict[str, str]:
    return {"wsi-brush": __version__, "torch": torch.__version__, "numpy": np.__version__}


class Cluster:
    """The hands of a Dask cluster (see `paint.Hands`) for one painting, whose work folder is `folder`."""

    def __init__(
        self, client: Client, folder: Path, *, brush: Brush, maps: dict[float, EmbeddingMap], area: Grid,
        painting: Painting,
    ) -> None:  # fmt: skip
        """Raises:
        UsageError: if the tiles are no whole chunks.
        MachineError: if a worker does not see the folder.
        """
        if painting.tile % CHUNK:
            raise UsageError(
                f"tiles of {painting.tile} pixels, a cluster needs multiples of {CHUNK}; more --max-memory"
            )
        self._client, self._folder, self._token = client, folder.resolve(), uuid.uuid4().hex
        box = self._folder / _BOX
        shutil.rmtree(box, ignore_errors=True)  # of a run before
        box.mkdir()
        save_brush(brush, box / f"brush-{self._token}")
        save_file({f"{mpp:g}": one.values for mpp, one in maps.items()}, box / f"maps-{self._token}.safetensors")
        lattices = {f"{mpp:g}": asdict(one.lattice) for mpp, one in maps.items()}
        facts = {"area": asdict(area), "painting": asdict(painting), "lattices": lattices, "versions": _versions()}
        write_json(box / f"facts-{self._token}.json", facts)
        for worker, sees in client.run(_sees, str(box / f"facts-{self._token}.json")).items():
            if not sees:
                raise MachineError(f"worker {worker} does not see {folder}; write to a folder that all workers share")

    def sketch(self, number: int, tiles: Iterable[Grid]) -> Iterator[tuple[Grid, NDArray[np.float32]]]:
        """Sweep A; nodes come back as they are done."""
        yield from self._map(_sketch, number, tiles)

    def paint(
        self, number: int, tiles: Iterable[Grid], denoiser: CanvasDenoiser | None, folder: Path
    ) -> Iterator[Grid]:
        """Sweep B, or the entry to a pitch; workers write into `folder`."""
        if denoiser is not None:
            denoiser.save_memory(_memory(self._folder, number))
        for tile, _ in self._map(_paint, number, tiles, str(folder.resolve())):
            yield tile
        _memory(self._folder, number).unlink(missing_ok=True)

    def _map(self, work: Any, number: int, tiles: Iterable[Grid], *more: str) -> Iterator[tuple[Grid, Any]]:
        from distributed import as_completed

        given: dict[Future[Any], Grid] = {}
        for tile in tiles:
            place = (tile.top, tile.left, tile.height, tile.width)
            task = self._client.submit(work, str(self._folder), self._token, number, place, *more, pure=False)
            given[task] = tile
        for task in as_completed(list(given), loop=self._client.loop):  # type: ignore[no-untyped-call]
            if task.status != "finished":  # failed for good, or cancelled because the scheduler went away
                error = task.exception() if task.status == "error" else task.status
                if isinstance(error, WsiBrushError):
                    raise error
                raise MachineError(f"the cluster lost a tile ({type(error).__name__}: {error}); run again to go on")
            yield given.pop(task), task.result()


def _memory(folder: Path, number: int) -> Path:
    return folder / _BOX / f"memory-{number}.safetensors"


# -- on the workers ----------------------------------------------------------------------------------------


def _sees(path: str) -> bool:
    return Path(path).is_file()


_LOCK = threading.Lock()


@lru_cache(maxsize=4)
def _run(folder: str, token: str) -> tuple[Run, list[Stage]]:
    box = Path(folder) / _BOX
    facts = json.loads((box / f"facts-{token}.json").read_text("utf-8"))
    if facts["versions"] != _versions():
        raise RefusedError(f"a worker has {_versions()}, the client {facts['versions']}; install the same there")
    brush = load_brush(str(box / f"brush-{token}"))
    values = load_file(box / f"maps-{token}.safetensors")
    maps = {
        float(mpp): EmbeddingMap(float(mpp), Grid(**lattice), values[mpp]) for mpp, lattice in facts["lattices"].items()
    }
    area, painting = Grid(**facts["area"]), Painting(**facts["painting"])
    run = Run(brush, maps, area, painting, Path(folder) / "grid", owner=False)
    return run, stages(brush.ladder.starting_at(area.mpp), painting)


@lru_cache(maxsize=4)
def _planes(folder: str, token: str, number: int) -> dict[str, Plane]:
    """The state before a stage."""
    path = Path(folder) / f"state-{number - 1}"
    return {name: open_plane(path / name) for name in ("x", "image") if (path / name).is_dir()}


@lru_cache(maxsize=4)
def _ready(folder: str, token: str, number: int, laid_out: bool) -> tuple[Run, Stage, dict[str, Plane]]:
    """All that a task needs; the denoiser at the stage's noise level, with its grid level where that is there."""
    run, todo = _run(folder, token)
    stage = todo[number - 1]
    if stage.move is not None:
        denoiser = run.denoiser(stage)
        denoiser.at(stage.sigma)
        if laid_out:
            denoiser.load_memory(_memory(Path(folder), number))
    return run, stage, _planes(folder, token, number)


def _sketch(folder: str, token: str, number: int, place: tuple[int, int, int, int]) -> NDArray[np.float32]:
    torch.set_num_threads(1)
    with _LOCK:
        run, stage, planes = _ready(folder, token, number, False)
    return run.denoiser(stage).sketch(planes["x"], Grid(1.0, *place))


def _paint(folder: str, token: str, number: int, place: tuple[int, int, int, int], target: str) -> None:
    torch.set_num_threads(1)
    with _LOCK:
        run, stage, planes = _ready(folder, token, number, True)
    tile = Grid(1.0, *place)
    kept = {path.name: open_plane(path, write=True) for path in Path(target).iterdir()}
    write_tile(kept, tile, run.tile_after(stage, planes, tile))
