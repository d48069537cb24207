"""What embedding costs: reading against a bare OpenSlide, both together against the slower, memory against the size.

    python tests/benchmarks/embedding.py [reading] [both] [memory] [--slide SLIDE ...]

Every figure is a ratio to a rival of the same run; nothing here is a test. `reading`: tiles a second at 0.5 µm of our
readers, over a loop of OpenSlide's read_region for the same tiles in one process, in turns; the files are read once
before. `both`: tiles a second of embedding with the bundled encoder, over the slower of reading alone and encoding
alone. `memory`: peak memory, ours and that of the readers, of embedding made slides of 10,000 and 100,000 pixels a
side at 0.25 µm (--sides), one JPEG behind all their tiles, with an encoder that costs nothing and answers with as many
numbers as the bundled one (or with that: --encoder bundled, for hours).
"""

import argparse
import io
import json
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wsi_brush.machine import keep_memory, peak_memory
from wsi_brush.reading import Readers
from wsi_brush.regions import COVER, embed_lattices
from wsi_brush.slide import Slide, open_slide
from wsi_brush.tiles import batches, windows
from wsi_brush.tissue import find_tissue

MPP = 0.5


class Cheap:
    """An encoder that costs nothing: as many numbers as the bundled one gives, all of them a tile's mean."""

    name, dim, tile, fingerprint = "cheap", 368, 128, "1"

    def __call__(self, tiles):
        return np.repeat(tiles[:, ::16, ::16].mean((1, 2, 3), np.float32)[:, None], self.dim, 1)


def wanted_of(slide: Slide, tile: int, most: int) -> tuple[object, np.ndarray]:
    """The lattice at 0.5 µm, and its first cells with tissue."""
    lattice = slide.grid.at(tile * MPP)
    wanted = find_tissue(slide).cover(lattice) >= COVER
    inside = (lattice.height - 1, lattice.width - 1)  # OpenSlide alone knows nothing beyond the edge
    wanted[inside[0] :], wanted[:, inside[1] :] = False, False
    wanted.flat[np.flatnonzero(wanted)[most:]] = False
    return lattice, wanted


def by_openslide(slide: Slide, wanted: np.ndarray, tile: int) -> float:
    """Tiles a second of a loop over the same tiles."""
    import openslide

    start = time.perf_counter()
    with openslide.OpenSlide(slide.path) as file:
        for row, column in np.argwhere(wanted):
            np.asarray(file.read_region((int(column) * tile, int(row) * tile), 0, (tile, tile)).convert("RGB"))
    return int(wanted.sum()) / (time.perf_counter() - start)


def by_readers(slide: Slide, lattice, wanted: np.ndarray, tile: int, count: int) -> float:
    """Tiles a second of ours; processes are there when it begins, as they are when a slide is embedded."""
    with Readers(slide, count, tile=tile) as readers:
        one = np.zeros_like(wanted)
        one.flat[np.flatnonzero(wanted)[: 1 if count < 2 else 200]] = True
        list(readers.read(windows(slide, lattice, MPP, one, tile)))
        start, seen = time.perf_counter(), 0
        for batch in batches(readers.read(windows(slide, lattice, MPP, wanted, tile)), tile):
            seen += len(batch.tiles) - len(batch.bad)
        return seen / (time.perf_counter() - start)


def reading(paths: list[Path], most: int, repeats: int) -> dict[str, object]:
    found = {}
    for path in paths:
        slide = open_slide(path, assume_mpp=MPP)
        lattice, wanted = wanted_of(slide, 128, most)
        rates: dict[str, list[float]] = {"openslide": [], "0": [], "1": [], "2": []}
        for _ in range(repeats):  # in turns: what else runs here slows down all of them
            rates["openslide"].append(by_openslide(slide, wanted, 128))
            for count in (0, 1, 2):
                rates[str(count)].append(by_readers(slide, lattice, wanted, 128, count))
        bare = statistics.median(rates["openslide"])
        found[path.name] = {
            "tiles": int(wanted.sum()),
            "openslide, tiles/s": round(bare),
            **{f"{n} processes, ratio": round(statistics.median(rates[n]) / bare, 2) for n in ("0", "1", "2")},
        }
    return found


def encoded(encoder, batches: list[np.ndarray]) -> float:
    """Tiles a second of the encoder alone, on all cores."""
    start = time.perf_counter()
    for tiles in batches:
        encoder(tiles)
    return sum(len(tiles) for tiles in batches) / (time.perf_counter() - start)


def both(paths: list[Path], repeats: int) -> dict[str, object]:
    from wsi_brush.encoder import load_encoder

    encoder, found = load_encoder(), {}
    for path in paths:
        slide = open_slide(path, assume_mpp=MPP)
        tissue = find_tissue(slide)
        lattice = slide.grid.at(encoder.tile * MPP)
        wanted = tissue.cover(lattice) >= COVER
        rates: dict[str, list[float]] = {"reading": [], "encoding": [], "both": []}
        with Readers(slide, 1, tile=encoder.tile) as readers:
            given = windows(slide, lattice, MPP, wanted, encoder.tile)
            kept = [batch.tiles for batch in batches(readers.read(given), encoder.tile)]
            encoder(kept[0])
            for _ in range(repeats):  # in turns: what else runs here slows down all of them
                rates["reading"].append(by_readers(slide, lattice, wanted, encoder.tile, 1))
                rates["encoding"].append(encoded(encoder, kept))
                start = time.perf_counter()
                embed_lattices(slide, slide.grid, tissue, readers, encoder, [MPP], strict=True, progress=None)
                rates["both"].append(int(wanted.sum()) / (time.perf_counter() - start))
        middle = {name: statistics.median(some) for name, some in rates.items()}
        found[path.name] = {
            "tiles": int(wanted.sum()),
            **{f"{name}, tiles/s": round(rate) for name, rate in middle.items()},
            "both over the slower": round(middle["both"] / min(middle["reading"], middle["encoding"]), 3),
        }
    return found


def made_slide(path: Path, side: int, tile: int = 256) -> Path:
    """A classic TIFF of side x side pixels at 0.25 µm and two coarser levels, one JPEG behind all tiles of all."""
    from PIL import Image

    random = np.random.default_rng(0)
    spots = random.random((tile // 8, tile // 8)).repeat(8, 0).repeat(8, 1) < 0.3
    pixels = np.where(spots[..., None], (110, 80, 150), (225, 150, 185)).astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "JPEG", quality=80, subsampling=0)
    data, levels = picture.getvalue(), [side, side // 4, side // 16]
    body, directories = bytearray(b"II*\0" + bytes(4) + data), []
    for number, size in enumerate(levels):
        count, arrays = (-(-size // tile)) ** 2, len(body)
        body += struct.pack(f"<{count}I", *[8] * count) + struct.pack(f"<{count}I", *[len(data)] * count)
        resolution = len(body)
        body += struct.pack("<II", 40000 * size // side, 1)
        bits = len(body)
        body += struct.pack("<HHHH", 8, 8, 8, 0)
        tags = [
            (254, 4, 1, int(number > 0)), (256, 4, 1, size), (257, 4, 1, size), (258, 3, 3, bits), (259, 3, 1, 7),
            (262, 3, 1, 6), (277, 3, 1, 3), (282, 5, 1, resolution), (283, 5, 1, resolution), (284, 3, 1, 1),
            (296, 3, 1, 3), (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, count, arrays if count > 1 else 8),
            (325, 4, count, arrays + 4 * count if count > 1 else len(data)), (530, 3, 2, 1 | 1 << 16),
        ]  # fmt: skip
        body += bytes(len(body) % 2)
        directories.append(len(body))
        body += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    ends = [4, *(place + 2 + 12 * 16 for place in directories)]  # where the place of each directory stands
    for end, place in zip(ends, directories, strict=False):
        struct.pack_into("<I", body, end, place)
    path.write_bytes(body)
    return path


def alone(path: Path, out: Path, encoder: str, workers: int) -> None:
    """Embed in a process of its own, and say what it took."""
    from wsi_brush.embed import embed_slide

    loaded = Cheap()
    if encoder != "cheap":
        from wsi_brush.encoder import load_encoder

        loaded = load_encoder(encoder)
    start = time.perf_counter()
    report = embed_slide(path, out, encoder=loaded, workers=workers)
    peak, readers = peak_memory(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"tiles": report.tiles, "s": time.perf_counter() - start, "peak": peak, "reader": readers}))


def memory(sides: list[int], encoder: str) -> dict[str, object]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in sides:
            path = made_slide(Path(folder, f"{side}.tif"), side)
            command = [sys.executable, __file__, "--alone", str(path), folder, encoder, "1"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
    return {
        "tiles": {side: one["tiles"] for side, one in found.items()},
        "s": {side: round(one["s"], 1) for side, one in found.items()},
        "peak, MB": {side: round(one["peak"] / 1e6) for side, one in found.items()},
        "peak of a reader, MB": {side: round(one["reader"] / 1e6) for side, one in found.items()},
        "last over the first, MB": round((found[sides[-1]]["peak"] - found[sides[0]]["peak"]) / 1e6),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        keep_memory()
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("what", nargs="*")
        examples = Path(__file__).parents[2] / "examples"
        parser.add_argument("--slide", type=Path, nargs="+", default=[examples / "reference.tif"])
        parser.add_argument("--tiles", type=int, default=2000, help="at most so many are read")
        parser.add_argument("--repeats", type=int, default=3)
        parser.add_argument("--sides", type=int, nargs="+", default=[10_000, 100_000])
        parser.add_argument("--encoder", default="cheap")
        arguments = parser.parse_args()
        every = {
            "reading": lambda: reading(arguments.slide, arguments.tiles, arguments.repeats),
            "both": lambda: both(arguments.slide, arguments.repeats),
            "memory": lambda: memory(arguments.sides, arguments.encoder),
        }
        for name in arguments.what or every:
            print(f"{name}: {json.dumps(every[name](), ensure_ascii=False)}", flush=True)
