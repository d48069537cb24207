"""Slides that the tests make themselves, from a picture that has a formula.

`picture(grid)` is the exact mean over each pixel, so a slide can be compared with it at any pitch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_brush.grid import Grid

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core; said before torch and OpenBLAS are loaded
    os.environ["OMP_NUM_THREADS"] = "1"

MPP = 0.5
WAVES = ((90.0, 70.0, 0.3), (60.0, 110.0, 1.1), (75.0, 85.0, 2.0))  # µm down, µm across, phase: one for each colour
SIZES = (1024, 1024)


@dataclass(frozen=True)
class MadeSlide:
    """A slide file, and what `open_slide` should find out about it."""

    path: Path
    reader: str
    source: str
    shape: tuple[int, int]
    factors: tuple[int, ...]
    tolerance: float
    """Largest difference from the picture: of a lossless file 2, as it is rounded in the file and on reading."""
    mpp: float = MPP
    assume_mpp: float | None = None


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A test by one thread, and the machine as it was afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(grid: Grid) -> NDArray[np.uint8]:
    """The picture on `grid`: waves, averaged over each pixel in closed form, (height, width, 3)."""
    rows, columns = grid.centres()
    colours = []
    for down, across, phase in WAVES:
        vertical = np.sin(2 * np.pi * rows / down + phase) * np.sinc(grid.mpp / down)
        horizontal = np.cos(2 * np.pi * columns / across) * np.sinc(grid.mpp / across)
        colours.append(150 + 70 * vertical[:, None] * horizontal[None, :])
    return np.rint(np.stack(colours, -1)).astype(np.uint8)


def levels_of(shape: tuple[int, int], factors: tuple[int, ...], mpp: float = MPP) -> list[NDArray[np.uint8]]:
    """The picture at level 0 and its reductions; what does not fill a pixel is dropped."""
    return [picture(Grid(mpp * f, 0, 0, shape[0] // f, shape[1] // f)) for f in factors]


def write_pyramid(
    path: Path, levels: list[NDArray[np.uint8]], *, mpp: float | None = MPP, unit: str = "CENTIMETER", **options: Any
) -> Path:
    """A generic pyramid, one directory a level: OpenSlide does not look into SubIFDs."""
    import tifffile

    per_unit = {"CENTIMETER": 1e4, "INCH": 25400.0}[unit]
    options = {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1)} | options
    with tifffile.TiffWriter(path, bigtiff=bool(options.pop("bigtiff", False))) as file:
        for number, level in enumerate(levels):
            if mpp is not None:
                scale = levels[0].shape[1] / level.shape[1]
                options |= {"resolution": (per_unit / mpp / scale,) * 2, "resolutionunit": unit}
            file.write(level, tile=(128, 128), photometric="rgb", metadata=None, subfiletype=int(number > 0), **options)
    return path


def write_lossless(path: Path, pixels: NDArray[np.uint8], *, mpp: float = 2.0) -> Path:
    """A generic TIFF of one level, of just these pixels."""
    return write_pyramid(path, [pixels], mpp=mpp, compression="zlib", compressionargs={})


def write_aperio(path: Path, levels: list[NDArray[np.uint8]], *, mpp: str | None = f"{MPP:g}") -> Path:
    """An SVS as Aperio's scanners write it; without the thumbnail page, TiffSlide would drop a level."""
    import tifffile

    height, width, _ = levels[0].shape
    head = f"Aperio Image Library v12.0.0 \n{width}x{height}"
    jpeg: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1)}
    common: dict[str, Any] = {"photometric": "rgb", "metadata": None, **jpeg}
    size = f"|MPP = {mpp}" if mpp else ""
    thumbnail = levels[-1]
    alarm = np.zeros((64, 96, 3), np.uint8)  # were label or macro ever read, the black would show
    with tifffile.TiffWriter(path) as file:
        base = f"{head} [0,0 {width}x{height}] (128x128) JPEG/RGB Q=95|AppMag = 20{size}"
        file.write(levels[0], tile=(128, 128), description=base, **common)
        to = f"{head} -> {thumbnail.shape[1]}x{thumbnail.shape[0]} - "
        file.write(thumbnail, rowsperstrip=16, description=to, **common)
        for level in levels[1:]:
            to = f"{head} [0,0 {width}x{height}] (128x128) -> {level.shape[1]}x{level.shape[0]} JPEG/RGB Q=95"
            file.write(level, tile=(128, 128), description=to, **common)
        file.write(alarm, rowsperstrip=16, subfiletype=1, description=f"{head}\nlabel 96x64", **common)
        file.write(alarm, rowsperstrip=16, subfiletype=9, description=f"{head}\nmacro 96x64", **common)
    return path


def write_ome_tiff(path: Path, levels: list[NDArray[np.uint8]], *, mpp: float = MPP, unit: str = "µm") -> Path:
    """An OME-TIFF pyramid in SubIFDs, its pixel size in the XML alone."""
    import tifffile

    metadata = {
        "axes": "YXS",
        "PhysicalSizeX": mpp,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": mpp,
        "PhysicalSizeYUnit": unit,
    }
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            file.write(level, subfiletype=1, **options)
    return path


def write_ome_zarr(
    path: Path,
    levels: list[NDArray[np.uint8]],
    *,
    version: str,
    mpp: float = MPP,
    unit: str | None = "micrometer",
    channels: int = 3,
) -> Path:
    """An OME-Zarr of either version; chunks that are all white are not written."""
    import zarr

    new = version == "0.5"
    group = zarr.create_group(path, zarr_format=3 if new else 2)
    datasets = []
    for number, level in enumerate(levels):
        pixels = np.ascontiguousarray(level.transpose(2, 0, 1)[:channels])
        options: dict[str, Any] = {"dimension_names": ["c", "y", "x"]} if new else {}
        if not new:
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        array = group.create_array(
            str(number), shape=pixels.shape, dtype="uint8", chunks=(channels, 128, 128), fill_value=255, **options
        )
        array[:] = pixels
        scale = levels[0].shape[1] // level.shape[1]
        pitch = {"type": "scale", "scale": [1.0, mpp * scale, mpp * scale]}
        shift = {"type": "translation", "translation": [0.0, mpp * (scale - 1) / 2, mpp * (scale - 1) / 2]}
        datasets.append({"path": str(number), "coordinateTransformations": [pitch, shift]})
    space = [{"name": name, "type": "space"} | ({"unit": unit} if unit else {}) for name in "yx"]
    scales: dict[str, Any] = {
        "name": "picture",
        "axes": [{"name": "c", "type": "channel"}, *space],
        "datasets": datasets,
    }
    if new:
        group.attrs["ome"] = {"version": version, "multiscales": [scales]}
    else:
        group.attrs["multiscales"] = [{"version": version, **scales}]
    return path


@pytest.fixture(scope="session")
def made_slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeSlide]:
    """One slide for each way to store one; they are shared, so no test may change them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("slides")
    shape, halves, thirds = (512, 768), (1, 2, 4), (1, 3, 9)
    whole, ragged = levels_of(shape, halves), (505, 761)
    by_three = levels_of((504, 720), thirds)
    rough = levels_of(ragged, (1, 2, 4))
    Image.fromarray(whole[0]).save(folder / "plain.png", dpi=(300, 300))
    jpeg, exact = 9.0, 2.0
    made = [
        MadeSlide(write_aperio(folder / "aperio.svs", whole), "openslide", "openslide.mpp-x", shape, halves, jpeg),
        MadeSlide(write_pyramid(folder / "generic.tif", whole), "openslide", "tiff resolution", shape, halves, jpeg),
        MadeSlide(
            write_pyramid(folder / "deflate.tif", whole, compression="deflate", compressionargs=None, subsampling=None),
            *("openslide", "tiff resolution", shape, halves, exact),
        ),
        MadeSlide(
            write_pyramid(folder / "big.tif", whole, bigtiff=True, unit="INCH"),
            *("openslide", "tiff resolution", shape, halves, jpeg),
        ),
        MadeSlide(
            write_pyramid(folder / "thirds.tif", by_three), "openslide", "tiff resolution", (504, 720), thirds, jpeg
        ),
        # 761 pixels over 380: OpenSlide would read between the pixels of the second level.
        MadeSlide(write_pyramid(folder / "ragged.tif", rough), "tiffslide", "tiff resolution", ragged, halves, jpeg),
        MadeSlide(write_aperio(folder / "ragged.svs", rough), "tiffslide", "openslide.mpp-x", ragged, halves, jpeg),
        MadeSlide(write_ome_tiff(folder / "nested.ome.tif", whole), "tiffslide", "ome-xml", shape, halves, exact),
        MadeSlide(
            write_pyramid(folder / "no-mpp.tif", whole, mpp=None),
            *("openslide", "assumed", shape, halves, jpeg, MPP, MPP),
        ),
        MadeSlide(
            write_ome_zarr(folder / "old.ome.zarr", whole, version="0.4"),
            *("ome-zarr", "ome-zarr scale", shape, halves, exact),
        ),
        MadeSlide(
            write_ome_zarr(folder / "new.ome.zarr", whole, version="0.5"),
            *("ome-zarr", "ome-zarr scale", shape, halves, exact),
        ),
        MadeSlide(folder / "plain.png", "image", "assumed", shape, (1,), exact, MPP, MPP),
    ]
    return {slide.path.name: slide for slide in made}


@pytest.fixture(scope="session")
def tissue_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1024 x 1024 pixels of 0.5 µm: a pink textured piece with purple nuclei on white; a generic pyramid."""
    random = np.random.default_rng(7)
    rows, columns = np.mgrid[: SIZES[0], : SIZES[1]].astype(np.float32)
    angle = np.arctan2(rows - 520, columns - 500)
    edge = 330 + 50 * np.sin(3 * angle) + 25 * np.sin(7 * angle + 1)
    inside = np.clip((edge - np.hypot(rows - 520, columns - 500)) / 4, 0, 1)[..., None]
    grain = random.normal(0, 1, (SIZES[0] // 4, SIZES[1] // 4)).repeat(4, 0).repeat(4, 1)
    strands = np.sin(rows / 9 + 3 * np.sin(columns / 40)) + 0.6 * grain
    stroma = np.array([226.0, 150.0, 190.0]) + np.array([7.0, 18.0, 11.0]) * strands[..., None]
    nuclei = np.zeros(SIZES, np.float32)
    for row, column, radius in zip(*random.uniform(20, 1004, (2, 1500)), random.uniform(4, 9, 1500), strict=True):
        top, left = int(row) - 12, int(column) - 12
        y, x = np.mgrid[max(0, top) : top + 25, max(0, left) : left + 25]
        y, x = y[: SIZES[0] - max(0, top)], x[: SIZES[1] - max(0, left)]
        part = nuclei[max(0, top) : top + 25, max(0, left) : left + 25]
        shade = np.clip(radius - np.hypot(y - row, x - column), 0, 1)[: part.shape[0], : part.shape[1]]
        np.maximum(part, shade, out=part)
    purple = np.array([96.0, 58.0, 134.0]) + 9 * grain[..., None]
    colour = stroma + nuclei[..., None] * (purple - stroma)
    level = np.clip(np.rint(248 + inside * (colour - 248)), 0, 255)
    levels = [level.astype(np.uint8)]
    for _ in range(2):
        level = np.rint(level.reshape(level.shape[0] // 2, 2, level.shape[1] // 2, 2, 3).mean((1, 3)))
        levels.append(level.astype(np.uint8))
    return write_pyramid(tmp_path_factory.mktemp("tissue") / "tissue.tif", levels)


def tissue(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Nuclei of 5 to 10 µm where chance puts them, on mottled stroma: (height, width, 3) at 2 µm."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: 2 * height, : 2 * width].astype(np.float32)
    grain = random.normal(0, 1, (height // 4, width // 4)).repeat(8, 0).repeat(8, 1)
    nuclei = np.zeros(rows.shape, np.float32)
    for _ in range(height * width // 22):
        row, column, radius = random.uniform(0, 2 * height), random.uniform(0, 2 * width), random.uniform(2.5, 5)
        part = (slice(max(0, int(row) - 6), int(row) + 7), slice(max(0, int(column) - 6), int(column) + 7))
        shade = np.clip(radius - np.hypot(rows[part] - row, columns[part] - column), 0, 1)
        np.maximum(nuclei[part], shade, out=nuclei[part])
    stroma = np.array([226.0, 150.0, 190.0]) + np.array([7.0, 18.0, 11.0]) * grain[..., None]
    colour = stroma + nuclei[..., None] * (np.array([96.0, 58.0, 134.0]) - stroma)
    return np.rint(colour.reshape(height, 2, width, 2, 3).mean((1, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of one `tissue`: `training.tif` (256 x 320 pixels of 2 µm), `held.tif` and `other.tif` (640 x 640)."""
    found = tmp_path_factory.mktemp("kin")
    for seed, (name, sides) in enumerate({"training": (256, 320), "held": (640, 640), "other": (640, 640)}.items()):
        write_lossless(found / f"{name}.tif", tissue(*sides, seed + 1))
    return found


def make_maps(canvas: Grid, *, dim: int, tile: int, seed: int = 0) -> dict[float, Any]:
    """Random embeddings of three pitches, a fifth of the cells without tissue."""
    from wsi_brush.store import EmbeddingMap

    random, maps = np.random.default_rng(seed), {}
    for mpp in (0.5, 2.0, 8.0):
        lattice = canvas.at(tile * mpp)
        values = random.normal(size=(*lattice.shape, dim)).astype(np.float16)
        values[random.random(lattice.shape) < 0.2] = np.nan
        maps[mpp] = EmbeddingMap(mpp, lattice, values)
    return maps


def make_brush(
    *,
    dim: int,
    tile: int,
    encoder: str = "none",
    fingerprint: str = "none",
    depth: tuple[int, int, int] = (1, 1, 2),
    pitches: tuple[float, ...] = (0.5, 2.0, 8.0),
) -> Any:
    """A tiny brush that was never trained. No weight of it is zero, so every part of the operator has its say."""
    import torch

    from wsi_brush.brush import Brush
    from wsi_brush.denoiser import Denoiser, DenoiserConfig
    from wsi_brush.diffusion import Ladder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = DenoiserConfig(dim=dim, sets=len(pitches), width=16, depth=depth, layout=2, heads=2, tokens=4)
        denoiser = Denoiser(sizes)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    moments = {f"{mpp:g}": {"mean": [0.0] * dim, "std": [1.0] * dim} for mpp in pitches}
    about = {"encoder": encoder, "fingerprint": fingerprint, "tile": tile, "embeddings": moments}
    ladder = Ladder((0.5, 1.0, 2.0, 4.0, 8.0), (0.15, 0.12, 0.1, 0.1))
    return Brush(denoiser.eval().requires_grad_(False), ladder, about)


@pytest.fixture(scope="session")
def brush() -> Any:
    """A tiny brush for `TileStatistics`; no test may change it."""
    return make_brush(dim=TileStatistics.dim, tile=TileStatistics.tile, encoder=TileStatistics.name)


@pytest.fixture(scope="session")
def tiny_brush(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny brush for the bundled encoder, on disk; no test may change it."""
    import json

    import wsi_brush
    from wsi_brush.brush import save_brush

    about = json.loads((Path(wsi_brush.__file__).parent / "weights" / "encoder.json").read_text("utf-8"))
    made = make_brush(dim=about["dim"], tile=about["tile"], encoder="bundled", fingerprint=about["sha256"])
    folder = tmp_path_factory.mktemp("brushes") / "tiny"
    save_brush(made, folder)
    return folder


def two_workers_of_dask() -> Any:
    """A cluster of two processes here, to be used with `with`. Its page takes any free port: tests run side by side."""
    from distributed import LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "memory_limit": 0}
    return LocalCluster(**options, host="127.0.0.1", dashboard_address="127.0.0.1:0")  # type: ignore[no-untyped-call]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line, in this process: its exit code and what it said."""
    from wsi_brush import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wsi-brush", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


class TileStatistics:
    """An encoder without weights: mean and spread of the colours in each quarter of a tile."""

    name, dim, tile, fingerprint = "statistics", 24, 128, "none"

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        quarters = tiles.reshape(-1, 2, 64, 2, 64, 3).astype(np.float32) / 255
        parts = [quarters.mean((2, 4)), quarters.std((2, 4))]
        return np.concatenate([part.reshape(len(tiles), -1) for part in parts], 1)
