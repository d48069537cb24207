"""Verb: is this machine, are these weights fit? (Of slides: `headers`.) Nothing heavy is loaded.

torch is not imported: its version is that of the installed package.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .commit import sha256_of, verify
from .errors import MachineError, RefusedError, WsiBrushError
from .headers import Examined, Finding, reason_of, shown_bytes
from .hub import state_of, weights_of
from .info import BUNDLED, describe
from .machine import free_memory, lent_cores, shown_cores
from .zoo import HERE, entries

_PACKAGE = "wsi-brush"
_MEMORY, _PAINTING = 1e9, 4e9  # bytes: of embedding, and what a painting takes at most by default
_DISK, _FULL = 2e9, 0.1e9  # bytes left, below which a painting's state or even a store may not fit


def free_disk(out: Path) -> int:
    """Bytes that are free where `out` is, or will be."""
    return shutil.disk_usage(_there(out)).free


def exit_code(machine: list[Finding], slides: list[Examined]) -> int:
    """0 fine, 2 the machine or the weights are unfit, 3 a slide that cannot be read as asked."""
    if any(one.status == "bad" for one in machine):
        return 2
    return 3 if any(one.status == "bad" for slide in slides for one in slide.findings) else 0


def check_machine(out: Path = Path()) -> Iterator[Finding]:
    """Python, packages, OpenSlide, cores, memory, the disk at `out`, GPUs, extras and the cache of encoders."""
    yield Finding("OK", "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield from _packages()
    yield _openslide()
    yield _cores()
    yield _memory()
    yield _disk(out)
    yield from _gpus()
    yield from _extras()
    yield _cache()


def check_weights() -> Iterator[Finding]:
    """The bundled weights by their digests, and which encoders of the table are in the cache."""
    digests: dict[str, str] = {}
    again = "install wsi-brush again"
    for name, file in HERE.items():
        path = BUNDLED.with_name(file)
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            digests[name], licence = str(about["sha256"]), str(about["licence"])
            found = sha256_of(path.with_suffix(".safetensors"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            yield Finding("bad", f"encoder {name}", f"{path.parent}: cannot be read ({reason_of(error)}); {again}")
            continue
        if found != digests[name]:
            said = f"{path.with_suffix('.safetensors')}: damaged or exchanged (sha256 {found[:12]}, expected "
            yield Finding("bad", f"encoder {name}", f"{said}{digests[name][:12]}); {again}")
        else:
            yield Finding("OK", f"encoder {name}", f"whole (sha256 {found[:12]}), licence {licence}")
    yield _brush(digests.get("bundled"), again)
    yield from _zoo()


# the machine --------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Whether the packages that wsi-brush needs are here, in the versions that it names."""
    from packaging.version import Version

    try:
        needed = [one for one in _requirements() if one.marker is None or one.marker.evaluate({"extra": ""})]
    except metadata.PackageNotFoundError:
        yield Finding("look", "packages", 'not installed, so not checked; python -m pip install -c constraints.txt "."')
        return
    wrong = []
    for one in needed:
        version = _version(one.name)
        if version is None:
            wrong.append(Finding("bad", one.name, f'not installed; python -m pip install "{one}"'))
        elif not one.specifier.contains(Version(version), prereleases=True):
            said = f'{version}, expected {one.specifier}; python -m pip install "{one}"'
            wrong.append(Finding("look", one.name, said))
    yield from wrong
    if not wrong:
        shown = ", ".join(f"{name} {_version(name)}" for name in ("torch", "timm", "zarr"))
        yield Finding("OK", "packages", f"all {len(needed)} that are needed; {shown}")


def _extras() -> Iterator[Finding]:
    try:
        names = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
        needed = _requirements()
    except metadata.PackageNotFoundError:
        return
    for extra in names:
        if extra == "test":
            continue
        of_it = [one for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
        own = [one.name for one in of_it if not one.marker.evaluate({"extra": ""}) and one.name != _PACKAGE]
        missing = [name for name in own if _version(name) is None]
        said = f"{', '.join(own)} are here" if len(own) > 1 else f"{', '.join(own)} is here"
        if missing:
            said = f'optional, without {", ".join(missing)}; python -m pip install "{_PACKAGE}[{extra}]"'
        yield Finding("OK", f"extra {extra}", said)


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    return [Requirement(line) for line in metadata.requires(_PACKAGE) or []]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _openslide() -> Finding:
    try:
        import openslide
    except (ImportError, OSError) as error:
        said = f"cannot be loaded ({reason_of(error)}); python -m pip install --force-reinstall openslide-bin"
        return Finding("bad", "openslide", said)
    return Finding("OK", "openslide", f"{openslide.__library_version__}, read through {openslide.__version__}")


def _cores() -> Finding:
    """A container may lend fewer cores than it shows, and threads that share one wait for each other."""
    shown, lent, asked = shown_cores(), lent_cores(), os.environ.get("OMP_NUM_THREADS")
    said = f"{shown} core{'s' if shown > 1 else ''}{f', OMP_NUM_THREADS={asked}' if asked else ''}"
    if lent < shown and not asked:
        threads = max(1, int(lent))
        return Finding("look", "cores", f"{said}, of which {lent:g} are lent; pass --threads {threads}")
    return Finding("OK", "cores", said)


def _memory() -> Finding:
    free = free_memory()
    if free is None:
        return Finding("OK", "memory", "unknown, the system does not say")
    said = f"{shown_bytes(free)} free"
    if free < _MEMORY:
        return Finding("bad", "memory", f"{said}, expected at least {shown_bytes(_MEMORY)}; end other programs")
    if free < _PAINTING:
        return Finding("look", "memory", f"{said}; painting takes up to 4 GB, pass --max-memory {free / 2e9:.1f}GB")
    return Finding("OK", "memory", said)


def _disk(out: Path) -> Finding:
    place = _there(out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding("bad", "disk", f"{place}: cannot be written to; give another --out")
    free = free_disk(place)
    said = f"{shown_bytes(free)} free at {out.resolve()}"
    if free < _FULL:
        return Finding("bad", "disk", f"{said}; give another --out")
    if free < _DISK:
        return Finding("look", "disk", f"{said}; a large painting may take more")
    return Finding("OK", "disk", said)


def _there(path: Path) -> Path:
    """The nearest thing on the way to a path that is there."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _gpus() -> Iterator[Finding]:
    command = shutil.which("nvidia-smi")
    if command is None:
        yield Finding("OK", "gpu", "none found; everything runs on CPUs")
        return
    asked = [command, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("look", "gpu", f"nvidia-smi does not answer ({type(error).__name__}); use --device cpu")
        return
    cards = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.strip()]
    for number, (name, total, free) in enumerate(card for card in cards if len(card) == 3):
        yield Finding("OK", "gpu", f"cuda:{number} {name}, {total}, {free} free; synthesize --device cuda:{number}")
    version = _version("torch") or ""
    if cards and version.endswith("+cpu"):
        yield Finding("look", "gpu", f"torch {version} is a build for CPUs and does not see it; install one with CUDA")


def _cache() -> Finding:
    from huggingface_hub import constants

    place = Path(constants.HF_HOME)
    said = f"{place}{'' if place.is_dir() else ' (not there yet)'}, of encoders; HF_HOME moves it"
    if constants.HF_HUB_OFFLINE:
        said += "; HF_HUB_OFFLINE is set, nothing is fetched"
    if place.exists() and not os.access(place, os.R_OK | os.X_OK):
        return Finding("look", "cache", f"{place}: cannot be read; set HF_HOME to another folder")
    return Finding("OK", "cache", said)


# weights ------------------------------------------------------------------------------------------


def _brush(encoder: str | None, again: str) -> Finding:
    try:
        problems, facts = verify(BUNDLED), describe(BUNDLED)
        licence = facts["provenance"].get("licence", "unknown")
    except (WsiBrushError, OSError, LookupError) as error:
        return Finding("bad", "brush", f"{reason_of(error)}; {again}")
    if problems:
        return Finding("bad", "brush", f"{BUNDLED}: {'; '.join(problems)}; {again}")
    if encoder is not None and facts["encoder_sha256"] != encoder:
        return Finding("bad", "brush", f"{BUNDLED}: follows another encoder than the bundled one; {again}")
    return Finding("OK", "brush", f"whole (sha256 {facts['sha256'][:12]}), licence {licence}")


def _zoo() -> Iterator[Finding]:
    try:
        states = [(entry, state_of(entry)) for entry in entries()]
    except (OSError, ValueError, LookupError):
        return  # of a description that is not there; it was said above
    absent = 0
    for entry, state in states:
        licence = f"licence {entry.licence or 'not known'}{f' ({entry.outputs})' if entry.outputs else ''}"
        if state == "ready":
            said = f"in the cache, {licence}; try it with: wsi-brush models verify {entry.id}"
            yield Finding("OK", f"encoder {entry.id}", said)
        elif state == "to convert":
            try:
                weights_of(entry)
            except (MachineError, RefusedError) as error:
                yield Finding("look", f"encoder {entry.id}", str(error).removeprefix(f"{entry.id}: "))
        absent += state in ("absent", "no package")
    yield Finding("OK", "encoders", f"{absent} more of `models list` are not here; wsi-brush models fetch NAME")
