"""Scratch: what a painting holds while it is painted, in memory or on disk, and where a killed run goes on.

Beside the target stands a work folder, `.wsi-brush-work-NAME`, held by one process at a time. It has the parameters of
the run and the newest finished generation of the state, `state-N` after N stages: written beside, flushed, renamed. It
is removed when the target is finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from .commit import full_disk_said, sync_tree, write_json
from .errors import MachineError, RefusedError

WORK = ".wsi-brush-work-"
CHUNK = 256  # pixels; workers write tiles that are multiples of it, so no two of them share a chunk
_STATE, _PARTIAL, _FINISHED = "state-", ".partial", "finished"


class Plane(Protocol):
    """An array that is read and written by windows: NumPy's in memory, zarr's on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, window: Any, /) -> Any: ...

    def __setitem__(self, window: Any, values: Any, /) -> None: ...


def new_plane(
    shape: tuple[int, ...], folder: Path | None, name: str = "plane", *, axes: tuple[int, int], chunk: int = CHUNK
) -> Plane:
    """Float32 zeros: in memory, or as a zarr array in `folder` with a checksum on every chunk.

    `axes` are those that a window cuts, into chunks of that side; the others are whole.
    """
    if folder is None:
        return np.zeros(shape, np.float32)
    chunks = tuple(min(chunk, size) if axis in axes else size for axis, size in enumerate(shape))
    plane: Plane = zarr.create_array(
        folder / name, shape=shape, chunks=chunks, dtype="float32", compressors=[Crc32cCodec()],
        config={"write_empty_chunks": True}, fill_value=0,
    )  # fmt: skip
    return plane


def open_plane(path: Path, *, write: bool = False) -> Plane:
    """A plane on disk."""
    plane: Plane = zarr.open_array(path, mode="r+" if write else "r")
    return plane


class Work:
    """The work folder of one run; see `working`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> tuple[int, dict[str, Plane]] | None:
        """Stages that are done and the planes after them, or None at the beginning.

        Raises:
            RefusedError: if the generation is damaged.
        """
        found = sorted(self._generations())
        if not found:
            return None
        number, path = found[-1]
        try:
            facts = json.loads((path / "state.json").read_text("utf-8"))
            there = _sizes(path)
            there.pop("state.json")
            if there != facts["files"]:
                raise ValueError("files are missing or cut")
            return number, {name: open_plane(path / name) for name in facts["planes"]}
        except (OSError, ValueError, KeyError) as error:
            raise RefusedError(f"{path}: damaged ({error}); remove {self.folder} to begin anew") from None

    @contextlib.contextmanager
    def generation(self, number: int) -> Iterator[Path]:
        """An empty folder for the planes after `number` stages; when the block ends, it is the newest generation.

        Raises:
            MachineError: if a chunk was never written.
        """
        path = self.folder / f"{_STATE}{number}"
        self._drop_unfinished()
        partial = path.with_name(f"{path.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")  # a stray writer has another's name
        partial.mkdir()
        yield partial
        files, planes = _sizes(partial), sorted(child.name for child in partial.iterdir())
        for name in planes:
            chunks = zarr.open_array(partial / name, mode="r").nchunks
            missing = chunks - sum(file.startswith(f"{name}/c/") for file in files)
            if missing:
                raise MachineError(f"{partial / name}: {missing} chunks were never written; run the same command again")
        write_json(partial / "state.json", {"planes": planes, "files": files})
        sync_tree(partial)
        os.replace(partial, path)
        for older, folder in self._generations():
            if older != number:
                shutil.rmtree(folder, ignore_errors=True)

    def save(self, number: int, planes: Mapping[str, Plane]) -> bool:
        """Write planes that are in memory as a generation, unless it is there; False where the disk has no room."""
        if (self.folder / f"{_STATE}{number}").exists():
            return True
        try:
            with self.generation(number) as folder:
                for name, values in planes.items():
                    plane = new_plane(values.shape, folder, name, axes=(1, 2))
                    for top in range(0, values.shape[1], CHUNK):
                        plane[:, top : top + CHUNK] = values[:, top : top + CHUNK]
        except OSError:
            self._drop_unfinished()
            return False
        return True

    def _drop_unfinished(self) -> None:
        for unfinished in self.folder.glob(f"{_STATE}*{_PARTIAL}*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _generations(self) -> list[tuple[int, Path]]:
        names = [path for path in self.folder.glob(f"{_STATE}*") if path.name.removeprefix(_STATE).isdigit()]
        return [(int(path.name.removeprefix(_STATE)), path) for path in names]


def work_folder(target: Path) -> Path:
    """Where what is begun of `target` is."""
    return target.parent / f"{WORK}{target.name}"


@contextlib.contextmanager
def working(target: Path, parameters: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Work]:
    """The work folder for `target`, ours alone; removed at the end unless an error ends the block.

    `overwrite`: what was begun with other parameters is removed; with the same ones it goes on in any case.

    Raises:
        RefusedError: if another process holds it, or it was begun with other parameters and `overwrite` is off.
        MachineError: if it cannot be made, or the disk is full.
    """
    folder = work_folder(target)
    plain = json.loads(json.dumps(dict(parameters)))
    lock = hold(folder, target)
    try:
        with full_disk_said(folder):
            if (folder / _FINISHED).exists():
                _clear(folder)
            _check(folder, plain, target, overwrite=overwrite)
            yield Work(folder)
            _clear(folder)
    finally:
        if not any(folder.glob(f"{_STATE}*")):
            shutil.rmtree(folder, ignore_errors=True)  # nothing to go on from
        os.close(lock)


def hold(folder: Path, what: Path) -> int:
    """Lock a folder, which is made if need be, for this process: an open file, to be closed when done with it.

    A file system that knows no locks grants every one.

    Raises:
        RefusedError: if another process has it; it is said to make `what`.
        MachineError: if the folder cannot be made.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise MachineError(f"{folder}: cannot be written to ({error.strerror}); choose another output") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RefusedError(f"{what}: another process is making it; wait for it, or choose another name") from None
        except OSError:
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):  # noqa: PTH116
                return lock
        os.close(lock)  # whoever had it has removed the folder meanwhile


def check_room(folder: Path, need: int) -> None:
    """Whether the disk holds a state of so many bytes, besides what a run before left there.

    Raises:
        MachineError: if not.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + there
    if free < need:
        raise MachineError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, the state needs {need / 1e9:.1f} GB; free some space, paint "
            "less, or give more --max-memory"
        )


def _sizes(folder: Path) -> dict[str, int]:
    """The files in a folder, and their bytes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _clear(folder: Path) -> None:
    """Empty a folder; killed in the middle, what is left is known to be no state to go on from."""
    (folder / _FINISHED).touch()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in ("lock", _FINISHED):
            path.unlink()
    (folder / _FINISHED).unlink()


def _check(folder: Path, parameters: dict[str, Any], target: Path, *, overwrite: bool) -> None:
    """Whether the folder was begun with these parameters; they are noted where it is new."""
    path = folder / "parameters.json"
    try:
        before = json.loads(path.read_text("utf-8")) if path.is_file() else None
    except ValueError as error:
        raise RefusedError(f"{path}: damaged ({error}); remove {folder} to begin anew") from None
    if before == parameters:
        return
    if before is None or overwrite:
        _clear(folder)
        write_json(path, parameters)
    else:
        changed = sorted(k for k in before.keys() | parameters.keys() if before.get(k) != parameters.get(k))
        shown = ", ".join(f"{name} {before.get(name)} -> {parameters.get(name)}" for name in changed)
        raise RefusedError(
            f"{target}: begun with other parameters ({shown}); run with the old ones to go on, or with --overwrite to "
            "begin anew"
        )
