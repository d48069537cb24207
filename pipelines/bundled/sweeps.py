"""Settings of the painting against quality: steps of the solver, guidance, and what another seed changes.

    python pipelines/bundled/sweeps.py pipelines/bundled/brush.toml --slides DATA/slides --work WORK [--brush FOLDER]
        [--device cuda --workers 14] [--only steps guidance seeds]

A reference is a square of the right quarter of a slide, which its recipe does not train on: the one with the most
tissue. Writes WORK/sweeps.md (tables) and WORK/sweeps.json (every figure). Paintings are made one after another, and
judged in `--workers` processes of one thread beside that. Killed, the same command goes on: what is painted or judged
stays, in a folder of its own for every brush, device and size.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from held_out import MPP, HeldOut, held_out, target_of
from PIL import Image

from wsi_brush import __version__
from wsi_brush.brush import Brush, load_brush
from wsi_brush.commit import fingerprint, write_json
from wsi_brush.distances import Vectors
from wsi_brush.encoder import Encoder, load_encoder
from wsi_brush.errors import SlideError, UsageError, WsiBrushError
from wsi_brush.evaluate import evaluate_slides
from wsi_brush.grid import Grid
from wsi_brush.machine import find_device, keep_memory, name_of
from wsi_brush.progress import Told
from wsi_brush.recipe import read_config
from wsi_brush.samples import Codec, Spot, elsewhere, embed_spots, spots_of
from wsi_brush.scratch import work_folder
from wsi_brush.sides import open_sides
from wsi_brush.stages import Painting
from wsi_brush.synthesize import choose_canvas, synthesize_slide
from wsi_brush.tissue import Tissue

SWEEPS = ("steps", "guidance", "seeds")
SEEDS = (0, 1)
SCALES = (0.5, 2.0)  # µm: at 8 a tile of the encoder is wider than the square
MOST = 4096  # tiles a side and scale that are looked at: all of them
CODEC = "jpeg:90"


class Setting(NamedTuple):
    """What is changed of a painting."""

    steps: int = Painting.steps
    guidance: float = Painting.guidance
    seed: int = SEEDS[0]

    @property
    def name(self) -> str:
        return f"steps{self.steps}-guidance{self.guidance:g}-seed{self.seed}"


def settings(asked: argparse.Namespace) -> dict[str, list[Setting]]:
    """Of each sweep the settings, in the order of its table; the default is in all of them."""
    sweeps = {
        "steps": [Setting(steps=one) for one in sorted({*asked.steps, Painting.steps})],
        "guidance": [
            Setting(guidance=one, seed=seed) for one in sorted({*asked.guidance, Painting.guidance}) for seed in SEEDS
        ],
        "seeds": [Setting(seed=seed) for seed in SEEDS],
    }
    return {name: sweeps[name] for name in asked.only}


def squares(places: list[HeldOut], brush: Brush, size: int) -> list[HeldOut]:
    """The square of `size` pixels at MPP with the most tissue, of each region that has room for one."""
    found = []
    for slide, (_, first, *_), assume_mpp in places:
        tissue = brush.tissue_of(slide)
        column = -int(-first * slide.mpp // tissue.grid.mpp)  # the first cell that lies whole in the region
        grid = tissue.grid
        beside = Tissue(tissue.mask[:, column:], Grid(grid.mpp, 0, column, grid.height, grid.width - column))
        if min(int(grid.height), beside.grid.width) * grid.mpp < size * MPP or not beside.mask.any():
            print(f"{slide.path.name}: no room for {size} pixels of tissue")
            continue
        canvas = choose_canvas(slide, Painting(size=size, mpp=MPP), beside)
        top, left, bottom, right = (round(edge / slide.mpp) for edge in canvas.extent)
        found.append(HeldOut(slide, (top, left, bottom - top, right - left), assume_mpp))
    return found


def paint(setting: Setting, place: HeldOut, folder: Path, brush: Brush, encoder: Encoder, painting: Painting) -> float:
    """Paint after a place; seconds from its embeddings to the last pixel."""
    at: dict[str, float] = {}
    target = target_of(place.slide, folder)
    shutil.rmtree(work_folder(target), ignore_errors=True)  # the seconds are to be of all of it
    synthesize_slide(
        place.slide.path, target, replace(painting, region=place.region, **setting._asdict()), brush=brush,
        encoder=encoder, assume_mpp=place.assume_mpp, overwrite=target.exists(),
        tell=lambda what, done, total: at.update({what: time.monotonic()}),
    )  # fmt: skip
    return at["painting"] - at["embedding the reference"]


# -- what the workers do -------------------------------------------------------------------------------


def judge(places: list[HeldOut], folder: Path, encoder: str, target: Path) -> None:
    """Write the figures of a setting's paintings against their references."""
    real, painted = [one.slide for one in places], [target_of(one.slide, folder) for one in places]
    try:
        sides = open_sides(real, painted)
    except SlideError as error:  # what learnt nothing paints no tissue
        write_json(target, {"missing": str(error)})
        return
    write_json(target, evaluate_slides(sides, encoders=[load_encoder(encoder)], codec=CODEC, most=MOST))


def apart(places: list[HeldOut], folders: list[Path], name: str, target: Path) -> None:
    """Write how far two seeds' paintings after the same references lie apart: in the space of the brush's encoder, by
    pitch, and as the correlation of their pixels' luminance (mean over the references).

    A distance is that of two tiles' embeddings in units of their spread over the brush's training data, root mean
    square over the numbers of an embedding, mean over tiles.
    """
    real = [one.slide for one in places]
    try:
        one, other = (open_sides(real, [target_of(slide, folder) for slide in real]) for folder in folders)
    except SlideError as error:
        write_json(target, {"missing": str(error)})
        return
    brush, codec, found = load_brush(name), Codec(CODEC), dict[str, Any]()
    eyes = load_encoder(brush.about["encoder"])
    for mpp in SCALES:
        regions = [one.real[pair.real] for pair in one.pairs]
        spots = spots_of(regions, mpp, eyes.tile, stride=1.0, most=MOST)
        theirs = [Spot(one.pairs[number].real, grid) for number, grid in spots]
        ours = [Spot(one.pairs[number].synthetic, one.pairs[number].here(grid)) for number, grid in spots]
        sides = ((one.real, theirs), (one.synthetic, ours), (other.synthetic, ours))
        seen = [embed_spots(fields, some, [eyes], codec, Told(None, "", 0))[0] for fields, some in sides]
        reference, first, second = (
            brush.standardised(mpp, vectors.astype(np.float32)).astype(float) for vectors in seen
        )
        number = {(field, grid.top, grid.left): index for index, (field, grid) in enumerate(theirs)}
        pairs = [
            (index, number[beside])
            for index, (field, grid) in enumerate(theirs)
            for beside in ((field, grid.bottom, grid.left), (field, grid.top, grid.right))
            if beside in number
        ]
        strangers = [(index, there) for index, there in enumerate(elsewhere(one.real, theirs, seed=0)) if there >= 0]
        found[f"{mpp:g}"] = {
            "tiles": len(spots),
            "seeds": distance(first, second),
            "reference": distance(np.concatenate([first, second]), np.concatenate([reference, reference])),
            "beside": distance(*(reference[[pair[side] for pair in pairs]] for side in (0, 1))),
            "elsewhere": distance(*(reference[[pair[side] for pair in strangers]] for side in (0, 1))),
        }
    pictures = [[luminance(field.slide.read(field.slide.grid)) for field in side.synthetic] for side in (one, other)]
    found["pixels"] = mean(float(np.corrcoef(*pair)[0, 1]) for pair in zip(*pictures, strict=True))
    write_json(target, found)


def distance(one: Vectors, other: Vectors) -> float | None:
    """Of each row of one from the same row of the other, mean; None where there are none."""
    return float(np.sqrt(((one - other) ** 2).mean(1)).mean()) if len(one) else None


def luminance(pixels: Any) -> Vectors:
    return np.asarray(Image.fromarray(pixels).convert("L"), np.float64).ravel()


# -- the tables ----------------------------------------------------------------------------------------


def said(value: float | None, digits: int = 3, floor: float | None = None) -> str:
    """A figure, its floor in brackets; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" + (f" ({floor:.{digits}g})" if floor is not None else "")


def of_floor(one: Any) -> str:
    one = one if isinstance(one, dict) else {}
    return said(one.get("value"), floor=one.get("floor"))


def quality(found: dict[Setting, dict[str, Any]], encoder: str) -> list[str]:
    """A row for each setting."""
    heads = ["steps", "guidance", "seed", "s a painting"]
    heads += [f"{what} {mpp:g} µm" for mpp in SCALES for what in ("FD", "KID")]
    heads += ["precision", "recall", "octaves", "cosine 0.5 µm", "cosine 2 µm", "nuclei", "their area"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for setting, one in found.items():
        figures = one["figures"]
        cells = [str(setting.steps), f"{setting.guidance:g}", str(setting.seed), said(median(one["seconds"].values()))]
        if "missing" in figures:
            cells.append(figures["missing"])
            lines.append(f"| {' | '.join(cells)} |" + " |" * (len(heads) - len(cells)))
            continue
        scales, control = figures["scales"][encoder], (figures["control"] or {}).get(encoder, {}).get("cosine", {})
        for mpp in SCALES:
            cells += [of_floor(scales.get(f"{mpp:g}", {}).get(name)) for name in ("frechet", "kernel")]
        cells += [of_floor(scales.get("0.5", {}).get(name)) for name in ("precision", "recall")]
        texture = figures["texture"]
        ratios = texture.get("octaves", {}).get("ratio", [])
        cells.append(" ".join(said(ratio, 2) for ratio in ratios) or "–")
        cells += [said(control.get(f"{mpp:g}", {}).get("mean")) for mpp in SCALES]
        nuclei = texture.get("nuclei", {})
        cells.append(said((nuclei.get("density_ratio") or {}).get("value")))
        ours, real = ((nuclei.get(side) or {}).get("median_area") for side in ("synthetic", "real"))
        cells.append(said(ours / real if ours and real else None))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def diversity(found: dict[float, dict[str, Any]]) -> list[str]:
    """A row for each guidance, and two of real tiles to hold it against."""
    heads = [f"{what}, {mpp:g} µm" for mpp in SCALES for what in ("seed to seed", "to the reference")]
    lines = [f"| guidance | {' | '.join(heads)} | pixel correlation |", "|---" * (len(heads) + 2) + "|"]
    for guidance, one in found.items():
        if "missing" in one:
            lines.append(f"| {guidance:g} | {one['missing']} |" + " |" * len(heads))
            continue
        cells = [said(one[f"{mpp:g}"][name]) for mpp in SCALES for name in ("seeds", "reference")]
        lines.append(f"| {guidance:g} | {' | '.join(cells)} | {said(one['pixels'])} |")
    known = next((one for one in found.values() if "missing" not in one), None)
    for name, words in (("beside", "real, a tile apart"), ("elsewhere", "real, elsewhere in the square")):
        if known is not None:
            cells = [cell for mpp in SCALES for cell in ("", said(known[f"{mpp:g}"][name]))]
            lines.append(f"| {words} | {' | '.join(cells)} | |")
    return lines


def main(arguments: argparse.Namespace) -> None:
    """Paint, judge, write."""
    device = find_device(arguments.device)
    brush = load_brush(arguments.brush).on(device)
    name, size = brush.about["encoder"], arguments.size
    encoder = load_encoder(name, device=arguments.device)
    places = squares(held_out(read_config(arguments.recipe).data, arguments.slides, least=size), brush, size)
    if not places:
        raise UsageError(
            f"{arguments.recipe}: no slide has {size} pixels at {MPP:g} µm held out; give a smaller --size"
        )
    painting = Painting(mpp=MPP, device=arguments.device)
    regions = {one.slide.path.name: list(one.region) for one in places}
    given = {
        "version": __version__,
        "brush": brush.fingerprint,
        "device": device.type,
        "size": size,
        "regions": regions,
    }
    work = arguments.work / fingerprint(given)[:8]
    work.mkdir(parents=True, exist_ok=True)
    log = work / "seconds.json"
    seconds: dict[str, dict[str, float]] = read_json(log) if log.exists() else {}
    sweeps = settings(arguments)
    wanted = list(dict.fromkeys(one for sweep in sweeps.values() for one in sweep))
    wanted.sort(key=lambda one: one != Setting())  # the default first
    pairs = {one.guidance: [one._replace(seed=seed) for seed in SEEDS] for one in wanted if one.seed == SEEDS[1]}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which begin after this
    waiting, done = [], set[Setting]()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn"), initializer=keep_memory) as hands:
        for setting in wanted:
            folder, taken = work / setting.name, seconds.setdefault(setting.name, {})
            folder.mkdir(exist_ok=True)
            for place in places:
                target = target_of(place.slide, folder).name
                if target not in taken:
                    taken[target] = paint(setting, place, folder, brush, encoder, painting)
                    write_json(log, seconds)
            print(f"{setting.name}: {median(taken.values()):.2f} s a painting", flush=True)
            done.add(setting)
            if not (target_file := work / f"{setting.name}.json").exists():
                waiting.append(hands.submit(judge, places, folder, name, target_file))
            both = pairs.get(setting.guidance, [])
            if setting in both and done.issuperset(both) and not (target_file := apart_file(work, setting)).exists():
                waiting.append(
                    hands.submit(apart, places, [work / one.name for one in both], arguments.brush, target_file)
                )
        for one in waiting:
            one.result()
    found = {one: {"seconds": seconds[one.name], "figures": read_json(work / f"{one.name}.json")} for one in wanted}
    spread = {guidance: read_json(apart_file(work, both[0])) for guidance, both in sorted(pairs.items())}
    about = {
        "wsi_brush": __version__, "torch": torch.__version__, "date": str(date.today()), "device": name_of(device),
        "brush": str(arguments.brush), "brush_sha256": brush.sha256, "encoder": name, "size": size, "mpp": MPP,
        "codec": CODEC, "regions": regions,
    }  # fmt: skip
    write_json(arguments.work / "sweeps.json", {
        "about": about, "settings": [one._asdict() | found[one] for one in wanted],
        "seeds": [{"guidance": guidance} | one for guidance, one in spread.items()],
    })  # fmt: skip
    lines = [
        f"{len(places)} SYNTHETIC paintings a setting, {size}² at {MPP:g} µm, after held-out squares of "
        f"{', '.join(regions)}; brush {arguments.brush}, encoder {name}, {CODEC}; wsi-brush {__version__}, torch "
        f"{torch.__version__}, {about['device']} ({device.type}), {about['date']}. Default: {Painting.steps} steps, "
        f"guidance {Painting.guidance:g}.", "",
    ]  # fmt: skip
    for sweep, some in sweeps.items():
        lines += [f"## {sweep.capitalize()}", "", *quality({one: found[one] for one in some}, name), ""]
    lines += ["In brackets: the floor, real against real. Seconds: median, from the embeddings to the last pixel; "
              f"{arguments.workers} processes judge beside it. FD, KID: Fréchet and kernel distance. Octaves, finest "
              "first, and what is said of nuclei: synthetic over real.", ""]  # fmt: skip
    if spread:
        lines += ["## Two seeds of one reference", "", *diversity(spread), "",
                  "Distances: of tiles at one place, in units of their spread over the training data.", ""]  # fmt: skip
    (arguments.work / "sweeps.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def apart_file(work: Path, setting: Setting) -> Path:
    return work / f"seeds-steps{setting.steps}-guidance{setting.guidance:g}.json"


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--brush", default="bundled")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N: of embedding and painting")
    parser.add_argument("--workers", type=int, default=1, help="processes that judge, on the CPU, a thread each")
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--size", type=int, default=1024, help="pixels a side of a painting")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 12, 20, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    try:
        main(parser.parse_args())
    except WsiBrushError as error:
        sys.exit(f"{error}")
