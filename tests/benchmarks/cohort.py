"""A cohort with damaged slides, and a cohort that is killed again and again.

    OMP_WAIT_POLICY=passive python tests/benchmarks/cohort.py [damage] [killed] [--slides 60] [--kills 30] [--encoder N]

Nothing here is a test; a small version of both is (`tests/test_cohort.py`). `damage`: 8 of the slides are damaged in 8
ways; the others' stores are those of a run without the damaged ones, bit for bit, the 8 are named, the exit code is 3.
`killed`: SIGKILL at random moments of the work (loading is none), and the same command again each time; the stores are
those of a clean run. All runs are the command line in processes of its own.
"""

import argparse
import csv
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import tifffile

from wsi_brush.commit import sha256_of

SIDE, TILE, MPP = 768, 128, 0.5


def draw(path: Path, seed: int) -> None:
    """A small slide of mottled pink tissue (synthetic), two levels."""
    random = np.random.default_rng(seed)
    grain = random.normal(0, 1, (SIDE // 8, SIDE // 8, 1)).repeat(8, 0).repeat(8, 1)
    level = (np.array([222, 140, 185]) + np.array([8, 20, 12]) * grain).clip(0, 255).astype(np.uint8)
    with tifffile.TiffWriter(path) as file:
        for number in range(2):
            unit = {"resolution": (1e4 / MPP / 2**number,) * 2, "resolutionunit": "CENTIMETER"}
            file.write(
                level, tile=(TILE, TILE), photometric="rgb", metadata=None, compression="jpeg",
                subfiletype=int(number > 0), **unit,
            )  # fmt: skip
            level = level.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3)).astype(np.uint8) if not number else level


def tags(data: bytearray) -> dict[int, int]:
    """Where the entries of the first directory stand; 0: where the place of the next directory stands."""
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    found = {struct.unpack_from("<H", data, at)[0]: at for at in range(place + 2, place + 2 + 12 * count, 12)}
    return found | {0: place + 2 + 12 * count}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("a letter, not a slide\n" * 200)


def numbers(path: Path, changes: dict[int, int]) -> None:
    data = bytearray(path.read_bytes())
    found = tags(data)
    for tag, value in changes.items():
        struct.pack_into("<HII", data, found[tag] + 2, 4, 1, value)
    path.write_bytes(data)


def absurd(path: Path) -> None:
    numbers(path, {256: 1 << 31, 257: 1 << 31})


def huge_tiles(path: Path) -> None:
    numbers(path, {322: 1 << 30, 323: 1 << 30})


def no_pixel_size(path: Path) -> None:
    numbers(path, {296: 1})  # resolution unit: none


def circle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, tags(data)[0], struct.unpack_from("<I", data, 4)[0])
    path.write_bytes(data)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGE = (cut, empty, text, absurd, huge_tiles, no_pixel_size, circle, link_to_itself)


def command(slides: list[Path], out: Path, encoder: str) -> list[str]:
    words = ["embed", *map(str, slides), "-o", str(out), "--encoder", encoder, "--quiet", "--threads", "1"]
    return [sys.executable, "-m", "wsi_brush", *words]


def stores(out: Path) -> dict[str, str]:
    files = [path for store in out.glob("[!.]*.zarr") for path in store.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): sha256_of(path) for path in files}


def damage(slides: list[Path], folder: Path, encoder: str, clean: dict[str, str]) -> dict[str, object]:
    """What a run over damaged slides leaves, beside a clean one."""
    there = folder / "damaged"
    there.mkdir()
    mixed = [Path(shutil.copy(path, there / path.name)) for path in slides]
    spoilt = mixed[:: len(mixed) // len(DAMAGE)][: len(DAMAGE)]
    for path, spoil in zip(spoilt, DAMAGE, strict=True):
        spoil(path)
    start = time.monotonic()
    ran = subprocess.run(command(mixed, folder / "out", encoder), capture_output=True, text=True, timeout=3600)
    with (folder / "out" / "slides.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    wanted = {name: value for name, value in clean.items() if name.split(".zarr")[0] not in {p.stem for p in spoilt}}
    return {
        "exit code": ran.returncode,
        "tracebacks": ran.stderr.count("Traceback"),
        "same bytes": stores(folder / "out") == wanted,
        "done": sum(row["status"] == "done" for row in rows.values()),
        "failed": {
            f"{path.stem} ({spoil.__name__})": rows[path.stem]["error"]
            for path, spoil in zip(spoilt, DAMAGE, strict=True)
        },
        "seconds": round(time.monotonic() - start, 1),
    }


def begun(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait until a run has loaded what it needs and says in the log that it begins; False if it ends before."""
    while process.poll() is None:
        log = out / "log.jsonl"
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        if any(f'"process": {process.pid},' in line and '"event": "run"' in line for line in lines):
            return True
        time.sleep(0.02)
    return False


def killed(
    slides: list[Path], folder: Path, encoder: str, clean: dict[str, str], kills: int, work: float
) -> dict[str, object]:
    """What is left after so many kills, at moments spread over the `work` seconds that a clean run embeds."""
    chance, out, done = random.Random(0), folder / "killed", []
    start = time.monotonic()
    while len(done) < kills:
        process = subprocess.Popen(command(slides, out, encoder))
        if not begun(process, out):
            break
        try:
            process.wait(chance.uniform(0, 1.5 * work / kills))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done.append(len(list(out.glob("[!.]*.zarr"))))
    last = subprocess.run(command(slides, out, encoder), timeout=3600).returncode
    left = sorted(path.name for path in out.iterdir() if path.name.startswith(".wsi-brush-stage"))
    return {
        "killed": len(done), "stores there at each": done, "exit code": last, "same bytes": stores(out) == clean,
        "stages left": left, "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["damage", "killed"])
    parser.add_argument("--slides", type=int, default=60)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--encoder", default="bundled")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slides").mkdir()
        slides = [folder / "slides" / f"slide{number:02d}.tif" for number in range(arguments.slides)]
        for number, path in enumerate(slides):
            draw(path, number)
        start = time.monotonic()
        subprocess.run(command(slides, folder / "clean", arguments.encoder), check=True, timeout=3600)
        whole, clean = time.monotonic() - start, stores(folder / "clean")
        found: dict[str, object] = {"clean run": {"seconds": round(whole, 1), "files": len(clean)}}
        if "damage" in arguments.parts:
            found["damage"] = damage(slides, folder, arguments.encoder, clean)
        if "killed" in arguments.parts:
            lines = [json.loads(line) for line in (folder / "clean" / "log.jsonl").read_text("utf-8").splitlines()]
            first, last = (datetime.fromisoformat(lines[end]["time"]) for end in (0, -1))
            work = (last - first).total_seconds()
            found["killed"] = killed(slides, folder, arguments.encoder, clean, arguments.kills, work)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
