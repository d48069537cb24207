"""What is written appears whole or not at all.

One protocol for stores, brushes and pyramids: everything is written into a stage beside the target
(same file system), then a manifest with the size and SHA-256 of every file, and one `os.replace`
makes it appear. *Exists* never means *done*: done is a manifest that verifies. A killed run leaves
only a stage, which the next run of the same command removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import MachineError, RefusedError

MANIFEST = "wsi-brush.json"
STAGE = ".wsi-brush-stage-"
_ASIDE = "old"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short, stable digest of anything JSON can hold: the same parameters, the same digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(made: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What of parameters is asked otherwise than something was made with, in words."""
    return [
        f"{key} was {made.get(key)}, is {asked.get(key)}"
        for key in sorted(made.keys() | asked.keys())
        if made.get(key) != asked.get(key)
    ]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artefact, or None where there is none of ours.

    Raises:
        RefusedError: if a manifest is there but cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: damaged manifest ({error}); remove {folder} and make it again") from None
    return manifest if isinstance(manifest, dict) else None


def verify(folder: Path) -> list[str]:
    """What is wrong with a finished artefact: missing, changed and added files, one line each."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder}: no {MANIFEST}, so it was never finished"]
    files: Mapping[str, Mapping[str, Any]] | None = manifest.pop("files", None)
    if files is None or manifest.pop("seal", None) != _seal(manifest, files):
        return [f"{MANIFEST}: changed since it was written"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
            problems.append(f"{name}: changed since it was written")
    added = {_name(path, folder) for path in _files(folder)} - set(files) - {MANIFEST}
    return problems + [f"{name}: not in the manifest" for name in sorted(added)]


def check_target(target: Path, *, kind: str, overwrite: bool) -> None:
    """Whether something may be written at `target`; call before hours of work.

    Raises:
        RefusedError: if something is there that is not ours, or is ours and `overwrite` is off.
        MachineError: if the folder around it is missing or cannot be written to.
    """
    if target.exists() or target.is_symlink():
        plain = target.is_dir() and not target.is_symlink()
        if not plain or (read_manifest(target) or {}).get("kind") != kind:
            raise RefusedError(
                f"{target}: exists and is no {kind} of wsi-brush; it stays as it is, choose another name"
            )
        if not overwrite:
            raise RefusedError(f"{target}: exists; choose another name or pass --overwrite")
    probe = target.parent / _stage_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise MachineError(f"{target.parent}: cannot be written to ({error.strerror}); choose another output") from None


@contextlib.contextmanager
def staged(target: Path, *, kind: str, about: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success seal it with a manifest and move it there.

    `about` goes into the manifest; the caller may go on filling it until the block ends. On any
    error, Ctrl-C included, the stage is removed and `target` is as it was before.

    Raises:
        RefusedError, MachineError: as `check_target`, and when the disk is full.
    """
    sweep(target)
    check_target(target, kind=kind, overwrite=overwrite)
    stage = target.parent / _stage_name(target)
    try:
        with full_disk_said(target):
            stage.mkdir()
            yield stage
            _seal_and_move(stage, target, kind=kind, about=about, overwrite=overwrite)
    finally:
        if stage.exists():
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def staged_file(target: Path, *, kind: str, ours: Callable[[Path], bool], overwrite: bool = False) -> Iterator[Path]:
    """Yield a path to write one file at; on success it is at `target`, on any error that is as it was before.

    A single file has no manifest; `ours` says of what stands at `target` whether it is a `kind` that wsi-brush wrote.

    Raises:
        RefusedError: if something is there that is not ours, or is ours and `overwrite` is off.
        MachineError: if the folder around it cannot be written to, or the disk is full.
    """
    if target.exists() or target.is_symlink():
        plain = target.is_file() and not target.is_symlink()
        if not plain or not ours(target):
            raise RefusedError(f"{target}: exists and is no {kind} of wsi-brush; it stays, choose another name")
        if not overwrite:
            raise RefusedError(f"{target}: exists; choose another name or pass --overwrite")
    sweep(target)
    stage = target.parent / _stage_name(target)
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise MachineError(f"{target.parent}: cannot be written to ({error.strerror}); choose another output") from None
    try:
        with full_disk_said(target):
            yield stage / target.name
            _sync(stage / target.name)
            os.replace(stage / target.name, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def full_disk_said(path: Path) -> Iterator[None]:
    """What writes to `path` says in one line that the disk is full.

    Raises:
        MachineError: then.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"{path}: the disk is full; free some space and run the same command again") from error
        raise


def _seal_and_move(stage: Path, target: Path, *, kind: str, about: dict[str, Any], overwrite: bool) -> None:
    files = {_name(path, stage): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in _files(stage)}
    sync_tree(stage)
    manifest = {"kind": kind, **about}
    write_json(stage / MANIFEST, {**manifest, "seal": _seal(manifest, files), "files": files})
    mode = (stage / MANIFEST).stat().st_mode
    for path in _files(stage):  # as the user's umask has it: safetensors leaves its files to their owner alone
        path.chmod(mode)
    _sync(stage)
    check_target(target, kind=kind, overwrite=overwrite)
    if target.exists():
        _swap(stage, target)
    else:
        os.replace(stage, target)
    _sync(target.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old text or the new one, also after a crash."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_tree(folder: Path) -> None:
    """Have the disk hold everything in a folder before anything says that it is finished."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def sweep(target: Path) -> None:
    """Remove the stages that killed runs on this host left for `target`.

    Where the file system cannot swap two folders, a run killed between its two renames leaves the
    old artefact aside and nothing at `target`; it is put back.
    """
    for stage in sorted(target.parent.glob(f"{glob.escape(_stage_prefix(target))}*")):
        pid, _, rest = stage.name.removeprefix(_stage_prefix(target)).partition("-")
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if rest == _ASIDE and not target.exists():
            os.replace(stage, target)
        else:
            shutil.rmtree(stage, ignore_errors=True)


def _stage_prefix(target: Path) -> str:
    return f"{STAGE}{target.name}-{socket.gethostname()}-"


def _stage_name(target: Path) -> str:
    return f"{_stage_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(stage: Path, target: Path) -> None:
    """Put `stage` at `target`; what stood there is removed, at the latest by the next `sweep`."""
    if _exchange(stage, target):
        return  # the old artefact is the stage now
    aside = target.parent / f"{_stage_prefix(target)}{os.getpid()}-{_ASIDE}"
    os.replace(target, aside)
    try:
        os.replace(stage, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system can (Linux, most file systems)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _seal(manifest: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """A digest of the manifest itself, so that a changed seed is found as a changed pixel is."""
    return fingerprint(json.loads(json.dumps({**manifest, "files": files})))  # as it will be read: keys are text there


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
