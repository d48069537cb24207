"""What painting costs: against its arithmetic floor, against the finest pitch alone, against the parent's way.

    OMP_WAIT_POLICY=passive python tests/benchmarks/painting.py [parts] [progressive] [parent] [size] [--ref SLIDE]
    python tests/benchmarks/painting.py device [--ref SLIDE] [--size 1024] [--tiles 1024 2048] [--device cuda]

Every figure is a ratio to a rival or a floor of the same run; nothing here is a test. `parts`: one evaluation, sweep by
sweep, over counted FLOPs at the speed of the best matrix product measured here. `progressive`: the ladder on and off,
with what each makes of the reference's octaves and embeddings. `parent`: the same network evaluated in one piece with
DDIM-50 at full resolution, 2048 x 2048 (10 steps are timed). `size`: seconds a pixel and peak memory from 2048 to
16384 pixels a side (or --sides) under --max-memory 2GB, one step of a part. `device` (only where it is named): the same
painting by the CPU in float32 and by a GPU in float32 and bfloat16, with how much they differ, and what a tile costs.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from wsi_brush import operators
from wsi_brush.brush import Brush, load_brush
from wsi_brush.denoiser import NODE, node_mass
from wsi_brush.diffusion import coefficients, moves, solve
from wsi_brush.errors import MachineError
from wsi_brush.field import NoiseField
from wsi_brush.grid import Grid
from wsi_brush.machine import keep_memory, peak_memory, side_by_side
from wsi_brush.paint import paint_canvas
from wsi_brush.splat import nodes
from wsi_brush.stages import Painting, kept
from wsi_brush.store import EmbeddingMap
from wsi_brush.stream import CanvasDenoiser


def embeddings(brush: Brush, canvas: Grid) -> dict[float, EmbeddingMap]:
    """Random ones: what is painted is no matter here."""
    random, maps = np.random.default_rng(0), {}
    for mpp in brush.pitches:
        lattice = canvas.at(brush.about["tile"] * mpp)
        values = random.standard_normal((*lattice.shape, brush.denoiser.config.dim), np.float32).astype(np.float16)
        maps[mpp] = EmbeddingMap(mpp, lattice, values)
    return maps


def seconds(work, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def best_speed() -> float:
    """FLOP/s of the best matrix product of the operator's widths, on all threads."""
    rates = []
    for rows, inner, columns in ((4096, 256, 512), (16384, 128, 256), (2048, 2048, 2048)):
        one, other = torch.randn(rows, inner), torch.randn(inner, columns)
        one @ other
        rates.append(2 * rows * inner * columns / seconds(lambda one=one, other=other: one @ other, 30))
    return max(rates)


def parts(brush: Brush, side: int = 2048) -> dict[str, object]:
    """Each part of an evaluation on all threads, over the FLOPs it takes (counted) at the best speed measured here."""
    from torch.utils.flop_counter import FlopCounterMode

    canvas = Grid(0.5, 0, 0, side, side)
    denoise = CanvasDenoiser(brush, embeddings(brush, canvas), canvas, mpp=0.5, guidance=1.0)
    state = NoiseField(0).read(canvas).numpy()
    tiles, (asked,) = list(denoise.tiles(state)), denoise._asked

    def sweep(work):
        for _ in side_by_side(partial(work, state), tiles):
            pass

    def paint_tiles():
        sweep(denoise.image)

    def sketch_tiles():
        sweep(denoise.sketch)

    work = {"sweep A": sketch_tiles, "grid level": lambda: asked.lay_out(denoise._nodes), "sweep B": paint_tiles}
    denoise.prepare(state, 1.0)
    found, total, floors, speed, threads = {}, 0.0, 0.0, best_speed(), torch.get_num_threads()
    for name, part in work.items():
        taken = min(seconds(part) for _ in range(3))
        torch.set_num_threads(1)
        with FlopCounterMode(display=False) as counted:
            part()
        torch.set_num_threads(threads)
        floor = counted.get_total_flops() / speed
        total, floors = total + taken, floors + floor
        found[name] = {
            "us a pixel": round(1e6 * taken / side**2, 3),
            "FLOP a pixel": round(counted.get_total_flops() / side**2),
            "over its floor": round(taken / floor, 2),
        }
    speeds = {"us a pixel": round(1e6 * total / side**2, 3), "over the floor": round(total / floors, 2)}
    return {"GFLOP/s of one product": round(speed / 1e9), **found, "all": speeds}


def progressive(brush: Brush, reference: Path, side: int = 1024) -> dict[str, object]:
    """On and off after one reference: time, detail variance over the reference's, and how near its embeddings are."""
    from wsi_brush.embed import embed_region
    from wsi_brush.encoder import load_encoder
    from wsi_brush.pair import read_reference
    from wsi_brush.slide import open_slide
    from wsi_brush.synthesize import as_pixels, choose_canvas
    from wsi_brush.texture import octaves
    from wsi_brush.tissue import find_tissue

    slide, encoder = open_slide(reference), load_encoder(brush.about["encoder"])
    painting = Painting(size=side)
    canvas = choose_canvas(slide, painting, find_tissue(slide))
    maps = embed_region(slide, canvas, encoder=encoder, pitches=brush.pitches)
    real = read_reference(slide, canvas, Grid(canvas.mpp, 0, 0, side, side))
    tiles = list(Grid(canvas.mpp, 0, 0, side, side).tiles(encoder.tile))

    def seen(pixels):
        cut = [pixels[t.top : t.bottom, t.left : t.right] for t in tiles]
        return brush.standardised(0.5, encoder(np.stack(cut)))

    theirs, found, times = seen(real), {}, {}
    for name in ("on", "off"):
        start = time.perf_counter()
        state = paint_canvas(brush, maps, canvas, replace(painting, progressive=name == "on"))
        times[name] = time.perf_counter() - start
        pixels = as_pixels(torch.as_tensor(np.asarray(state))[:, :side, :side])
        ours = seen(pixels)
        cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        found[name] = {
            "s": round(times[name], 1),
            "detail over the reference's, finest octave first": (octaves(pixels) / octaves(real)).round(3).tolist(),
            "distance of embeddings": round(float(((ours - theirs) ** 2).mean()), 4),
            "cosine": round(float(cosine.mean()), 4),
        }
    return {**found, "off / on": round(times["off"] / times["on"], 2)}


def monolithic(brush: Brush, canvas: Grid, steps: int) -> None:
    """DDIM at full resolution, every evaluation in one piece, operator by operator."""
    operators._banded = lambda u: False
    net, condition = brush.denoiser, brush.condition(embeddings(brush, canvas), canvas, 0.5)

    @torch.inference_mode()
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        level = torch.tensor([sigma])
        skip, out, into = coefficients(level)
        setting = net.setting(level, 0.5, condition, origin=torch.zeros(1, 2, dtype=torch.float64))
        blocks = net.sketch(into * x[None], setting)
        grid, tokens = net.layout(nodes(blocks), node_mass(1, canvas.height // NODE, canvas.width // NODE), setting)
        memory = net.memory(tokens, setting)
        said = net.paint(into * x[None], setting, grid, memory, corner=(torch.zeros(1), torch.zeros(1)))
        return (skip * x + out * said)[0]

    (rung,) = brush.ladder.rungs(steps, progressive=False)
    solve(denoise, rung.sigmas[0] * NoiseField(0).read(canvas), moves(rung.sigmas, "ddim"))


def measured(what: str, side: int, *more: str) -> dict[str, float]:
    """One painting in a process of its own, for its peak memory."""
    command = [sys.executable, __file__, "--alone", what, str(side), *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def alone(what: str, side: int, steps: int, gigabytes: float) -> None:
    brush, canvas = load_brush(), Grid(0.5, 0, 0, side, side)
    start, before = time.perf_counter(), time.process_time()
    if what == "parent":
        monolithic(brush, canvas, steps)
    else:
        from wsi_brush.scratch import working

        painting = Painting(steps=steps, guidance=1.0, memory=int(gigabytes * 1e9))
        with working(Path(f"benchmark-{side}"), {"side": side}, overwrite=True) as work:
            paint_canvas(brush, embeddings(brush, canvas), canvas, painting, work=work)
    taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - before}
    print(json.dumps({**taken, "peak": peak_memory()}))


def parent(side: int = 2048) -> dict[str, object]:
    theirs, ours = measured("parent", side, "10", "2"), measured("ours", side, "20", "1.7")
    theirs["seconds"] *= 5  # all steps cost the same
    return {
        "times faster": round(theirs["seconds"] / ours["seconds"], 2),
        "times less memory": round(theirs["peak"] / ours["peak"], 2),
        "ours, s": round(ours["seconds"], 1),
        "theirs, s": round(theirs["seconds"], 1),
    }


def size(sides: list[int]) -> dict[str, object]:
    found = {side: measured("ours", side, "1", "2") for side in sides}
    costs = {side: 1e6 * one["cpu"] / side**2 for side, one in found.items()}  # others' work does not slow this down
    peaks = {side: one["peak"] / 1e9 for side, one in found.items()}
    return {
        "us of a core a pixel": {side: round(cost, 3) for side, cost in costs.items()},
        "us a pixel": {side: round(1e6 * one["seconds"] / side**2, 3) for side, one in found.items()},
        "largest cost over the smallest": round(max(costs.values()) / min(costs.values()), 3),
        "peak, GB": {side: round(peak, 2) for side, peak in peaks.items()},
        "last peak over the first": round(peaks[sides[-1]] / peaks[sides[0]], 3),
    }


def device(brush: Brush, reference: Path, side: int, tiles: list[int], name: str) -> None:
    """One reference painted by the CPU and by a device, after a short painting each that warms up; a line each."""
    from wsi_brush.embed import embed_region
    from wsi_brush.encoder import load_encoder
    from wsi_brush.machine import check_precision, find_device
    from wsi_brush.slide import open_slide
    from wsi_brush.stages import evaluated_pixels, stages
    from wsi_brush.synthesize import as_pixels, choose_canvas
    from wsi_brush.tissue import find_tissue

    there, slide, encoder = find_device(name), open_slide(reference), load_encoder(brush.about["encoder"])
    painting = Painting(size=side, memory=16 * 10**9)
    canvas = choose_canvas(slide, painting, find_tissue(slide))
    maps = embed_region(slide, canvas, encoder=encoder, pitches=brush.pitches)
    again = embed_region(
        slide, canvas, encoder=load_encoder(brush.about["encoder"], device=name), pitches=brush.pitches
    )
    apart = [cosines(one.values, again[mpp].values) for mpp, one in maps.items()]
    ladder = brush.ladder.starting_at(canvas.mpp)
    steps = sum(1 + len(stage.retouches) for stage in stages(ladder, painting) if stage.move)
    pixels = evaluated_pixels(ladder, canvas, painting)
    said(f"{reference.name}, {side} x {side}", steps=steps, evaluated=pixels, embeddings_cosine_least=min(apart))
    corners = list(Grid(canvas.mpp, 0, 0, side, side).tiles(encoder.tile))
    theirs: dict[str, np.ndarray] = {}
    runs = [("cpu", "float32", 1024), *((name, p, tile) for p in ("float32", "bfloat16") for tile in tiles)]
    for where, precision, tile in runs:
        one = replace(painting, device=where, precision=precision, tile=tile)
        try:
            check_precision(precision, find_device(where))
        except MachineError as error:
            print(error)
            continue
        paint_canvas(brush, maps, canvas, replace(one, steps=5))
        on_gpu = where != "cpu" and there.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(there)
        start = time.perf_counter()
        state = np.asarray(paint_canvas(brush, maps, canvas, one))
        taken = time.perf_counter() - start
        image = as_pixels(torch.as_tensor(state)[:, :side, :side])
        cut = np.stack([image[c.top : c.bottom, c.left : c.right] for c in corners if c.shape == (encoder.tile,) * 2])
        found = {"image": image.astype(np.float64), "embeddings": brush.standardised(0.5, encoder(cut))}
        theirs = theirs or found
        off = np.abs(found["image"] - theirs["image"])
        said(
            f"{where} {precision} tile {tile}",
            seconds=taken,
            seconds_a_step=taken / steps,
            us_a_pixel_evaluated=1e6 * taken / pixels,
            off_max=off.max(),
            off_mean=off.mean(),
            off_rms=math.sqrt((off**2).mean()),
            off_99th_percentile=float(np.percentile(off, 99)),
            embeddings_cosine_mean=float(cosines(found["embeddings"], theirs["embeddings"], mean=True)),
            gpu_gb=torch.cuda.max_memory_allocated(there) / 1e9 if on_gpu else 0.0,
            host_peak_gb=peak_memory() / 1e9,
        )
    for precision in ("float32", "bfloat16") if there.type == "cuda" else ("float32",):
        for tile in tiles:
            one_tile(brush.on(there), precision, tile)
    for level in (0, 1, 2):
        neighbours(there, brush.denoiser.config.width << level, max(tiles) >> (level + 1))


def cosines(one: np.ndarray, other: np.ndarray, *, mean: bool = False) -> float:
    """The least, or mean, cosine between the rows of two arrays that are no row of NaN."""
    one, other = (part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (one, other))
    there = np.isfinite(one[:, 0]) & np.isfinite(other[:, 0])
    found = (one * other).sum(1)[there] / np.linalg.norm(one[there], axis=1) / np.linalg.norm(other[there], axis=1)
    return float(found.mean() if mean else found.min())


def one_tile(brush: Brush, precision: str, side: int, repeats: int = 10) -> None:
    """What a tile costs in both sweeps, the grid level, and a trip there and back; and which kernels take the time."""
    from wsi_brush.machine import wait_for
    from wsi_brush.stream import on_host, read_plane

    device, canvas = brush.device, Grid(0.5, 0, 0, 2 * side, 2 * side)
    denoise = CanvasDenoiser(brush, embeddings(brush, canvas), canvas, mpp=0.5, guidance=1.0, precision=precision)
    state = NoiseField(0).read(canvas).numpy()
    tile = Grid(1.0, side // 2, side // 2, side, side)
    denoise.prepare(state, 1.0)
    (asked,) = denoise._asked

    def ms(work) -> float:
        work()
        wait_for(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait_for(device)
        return 1e3 * (time.perf_counter() - start) / repeats

    cost = {
        "sweep_a": ms(lambda: denoise._sketch(state, tile)),
        "sweep_b": ms(lambda: denoise.image(state, tile)),
        "grid_level_of_four": ms(lambda: asked.lay_out(denoise._nodes)),
        "there_and_back": ms(lambda: on_host(read_plane(state, tile, device))),
        "noise": ms(lambda: NoiseField(0).read(tile, device=device)),
    }
    said(f"ms of a tile of {side}, {precision}", **cost)
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as watched:
        denoise.image(state, tile)
        wait_for(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(watched.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    launched = sum(row.count for row in rows if row.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    print(f"  sweep B: {total / 1e3:.2f} ms in kernels, {launched} launches")
    for row in rows[:12]:
        print(f"  {getattr(row, key) / 1e3:8.3f} ms {row.count:5d} x {row.key[:100]}")
    sys.stdout.flush()


def neighbours(device: torch.device, channels: int, side: int) -> None:
    """Ways to the depthwise 3 x 3 sum of a kernel integral on features (1, side, side, channels), ms each."""
    from torch.nn import functional

    from wsi_brush.machine import wait_for

    def shifted(u, kernel):
        around, total = functional.pad(u, (0, 0, 1, 1, 1, 1)), None
        for row in range(3):
            for column in range(3):
                part = around[:, row : row + side, column : column + side]
                tap = kernel[:, 0, row, column]
                total = part * tap if total is None else torch.addcmul(total, part, tap)
        return total

    ways = {
        "channels_last": lambda u, k: functional.conv2d(u.permute(0, 3, 1, 2), k, padding=1, groups=channels),
        "contiguous": lambda u, k: (
            functional.conv2d(u.permute(0, 3, 1, 2).contiguous(), k, padding=1, groups=channels)
            .permute(0, 2, 3, 1)
            .contiguous()
        ),
        "shifted": shifted,
    }
    for kind in (torch.float32, torch.bfloat16):
        u = torch.randn(1, side, side, channels, device=device, dtype=kind)
        kernel, found = torch.randn(channels, 1, 3, 3, device=device, dtype=kind), {}
        for name, way in ways.items():
            with torch.inference_mode():
                way(u, kernel)
                wait_for(device)
                found[name] = 1e3 * seconds(lambda way=way, u=u, kernel=kernel: (way(u, kernel), wait_for(device)), 10)
        said(f"ms of neighbours, {channels} channels, {side} x {side}, {kind}", **found)


def said(what: str, **figures: float) -> None:
    print(f"{what}: {json.dumps({name: round(float(value), 4) for name, value in figures.items()})}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        keep_memory(None if sys.argv[2] == "parent" else kept(int(float(sys.argv[5]) * 1e9)))
        alone(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        keep_memory()
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("what", nargs="*")
        parser.add_argument("--ref", type=Path, default=Path(__file__).parents[2] / "examples" / "reference.tif")
        parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
        parser.add_argument("--size", type=int, default=1024)
        parser.add_argument("--tiles", type=int, nargs="+", default=[1024, 2048])
        parser.add_argument("--device", default="cuda")
        arguments = parser.parse_args()
        every = {
            "parts": lambda: parts(load_brush()),
            "progressive": lambda: progressive(load_brush(), arguments.ref),
            "parent": parent,
            "size": lambda: size(arguments.sides),
        }
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        if "device" in arguments.what:
            device(load_brush(), arguments.ref, arguments.size, arguments.tiles, arguments.device)
        for name in [name for name in arguments.what if name != "device"] if arguments.what else every:
            print(f"{name}: {json.dumps(every[name]())}", flush=True)
