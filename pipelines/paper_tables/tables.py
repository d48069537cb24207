"""The paper's tables, from one command: all systems trained for the same minutes, painted after the same slides.

    pip install -c constraints.txt ".[baselines]"
    export OMP_WAIT_POLICY=passive
    python pipelines/paper_tables/tables.py pipelines/paper_tables/tables.toml --slides DATA/slides --work WORK

Writes WORK/RESULTS.md: quality by size of the painting (the paper's Tables 2 and 3, and its ablation), in the encoder
that conditions the systems and in one that does not, with CLIP FID and Crop FID where their weights are in the user's
caches; and the cost of training (Table 4). All systems are judged by the same places, those that all have painted. A
reference is a square of a slide that no system has seen. Killed, the same command goes on: what is trained, painted or
evaluated stays, in a folder of its own for every recipe. --minutes, --each and --only make it shorter; the table says
so. A system's `sizes` in the tables' file say what it paints, where that is not all.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from wsi_brush import __version__
from wsi_brush.brush import Brush, load_brush
from wsi_brush.commit import fingerprint
from wsi_brush.coordinates import TrainingPack
from wsi_brush.encoder import load_encoder
from wsi_brush.errors import UsageError, WsiBrushError
from wsi_brush.evaluate import evaluate_slides
from wsi_brush.grid import Grid
from wsi_brush.machine import keep_memory, peak_memory
from wsi_brush.published import Networks, find_networks
from wsi_brush.recipe import TrainConfig, checked, read_toml
from wsi_brush.report import write_report
from wsi_brush.scratch import work_folder
from wsi_brush.sides import open_sides
from wsi_brush.slide import Slide, open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide
from wsi_brush.tissue import find_tissue
from wsi_brush.train import Training, train_brush, training_pack

MPP = 0.5
LEAST = 0.1  # tissue of a square, part of it
GUIDANCE = 2.0  # of all systems, as in RESULTS.md
OURS = "ours"
PUBLISHED = {"clip": "clip", "crop": "inception"}
"""The figures that papers print, and the network that each needs."""
BESIDE = (
    "In square brackets: a 95 % interval over blocks, where there are blocks enough. In round ones: the floor, real "
    "against real, and then a thumbnail's. The finest octaves are detail's variance over the reference's."
)
KEYS = ("minutes", "steps", "seed", "encoder", "held_out", "paintings", "data", "optimisation", "systems")
COST_SIZES, COST_STEPS, COST_MEMORY = (256, 1024, 4096), 3, 8e9  # Table 4: pixels, steps that are timed, bytes


def recipe(tables: dict[str, Any], system: str) -> TrainConfig:
    """What a system is trained by: what all share, and what is its own."""
    own = tables["systems"][system]
    model = own.get("model", {}) | ({} if system == OURS else {"system": system})
    optimisation = tables["optimisation"] | own.get("optimisation", {})
    return checked(
        {
            "data": tables["data"] | {"encoder": tables["encoder"]} | own.get("data", {}),
            "model": model,
            "optimisation": optimisation | {"minutes": tables["minutes"], "seed": tables["seed"]},
        },
        f"the recipe of {system}",
    )


def folder_of(tables: dict[str, Any], system: str, work: Path) -> Path:
    """Where a system is trained and paints: another folder for another recipe or other references."""
    given = {"recipe": recipe(tables, system).model_dump(mode="json"), "held out": tables["held_out"]}
    return work / system / fingerprint(given)[:8]


def trained(tables: dict[str, Any], system: str, slides: Path, work: Path, device: str) -> Path:
    """The folder of a system's brush."""
    folder = folder_of(tables, system, work)
    target, own = folder / "brush", folder / "training"
    if not target.exists():
        own.mkdir(parents=True, exist_ok=True)
        if not (own / "pack").exists():
            training_pack(recipe(tables, system).data, work, slides)  # decoded and embedded once, for all systems
            (own / "pack").symlink_to((work / "pack").resolve())
        train_brush(recipe(tables, system), target, work=own, slides=slides, device=device)
    return target


def squares(slide: Slide, size: int, count: int) -> list[tuple[int, int, int, int]]:
    """The squares of `size` pixels at MPP with the most tissue that share no pixel: level-0 (top, left, height, width).

    Of a lattice that begins in the slide's corner, so that every system is given the same. Where fewer than `count` are
    tissue to a tenth there are fewer: nothing can be said of glass.

    Raises:
        UsageError: if it has none.
    """
    side = size * MPP
    rows, columns = (int(length * slide.mpp / side) for length in slide.grid.shape)
    if not rows or not columns:
        raise UsageError(f"{slide.path}: has no square of {size} pixels at {MPP:g} µm; paint smaller ones after it")
    cover = find_tissue(slide).cover(Grid(side, 0, 0, rows, columns))
    best = np.argsort(-cover, axis=None, kind="stable")[:count]
    best = best[cover.flat[best] >= LEAST]
    if not len(best):
        raise UsageError(f"{slide.path}: no square of {size} pixels holds tissue; take it out of held_out")
    pixels = round(side / slide.mpp)
    return [(round(y * side / slide.mpp), round(x * side / slide.mpp), pixels, pixels)
            for y, x in zip(*np.unravel_index(best, cover.shape), strict=True)]  # fmt: skip


def painted(
    tables: dict[str, Any], system: str, brush: Brush, slides: Path, work: Path, size: int, each: int, device: str
) -> tuple[Path, float]:
    """A folder with a system's paintings of a size, `each` of every held-out slide, and the mean seconds of one."""
    folder = folder_of(tables, system, work) / f"{size}-{each}-{tables['steps']}"
    folder.mkdir(exist_ok=True)
    encoder, log = load_encoder(tables["encoder"]), folder / "seconds.json"
    seconds: dict[str, float] = json.loads(log.read_text()) if log.exists() else {}
    for source in tables["held_out"]:
        slide = open_slide(slides / source["path"], assume_mpp=source.get("assume_mpp"))
        for number, region in enumerate(squares(slide, size, each)):
            target = folder / f"{slide.path.stem}-{number}.ome.zarr"
            if target.name in seconds:
                continue
            shutil.rmtree(work_folder(target), ignore_errors=True)  # its seconds are to be of all of it
            painting = Painting(
                region=region, mpp=MPP, seed=tables["seed"] + number, steps=tables["steps"], guidance=GUIDANCE,
                memory=16 * 10**9, device=device,
            )  # fmt: skip
            found = synthesize_slide(
                slide.path, target, painting, brush=brush, encoder=encoder, assume_mpp=source.get("assume_mpp"),
                overwrite=target.exists(),
            )  # fmt: skip
            print(f"{system}: {target.name} of {size}² in {found.seconds:.0f} s", flush=True)
            seconds[target.name] = found.seconds
            log.write_text(json.dumps(seconds))
    return folder, float(np.mean(list(seconds.values())))


def judges(encoder: str) -> list[str]:
    """What paintings are judged in: the encoder that conditions them, which flatters them, and one that does not."""
    return [encoder, "bundled" if encoder == "judge" else "judge"]


def in_common(folders: Sequence[Path]) -> list[str]:
    """The paintings that all systems have, so that their figures are of as many."""
    return sorted(set.intersection(*({path.name for path in folder.glob("*.ome.zarr")} for folder in folders)))


def judged(
    tables: dict[str, Any], slides: Path, folder: Path, names: Sequence[str], networks: Networks
) -> dict[str, Any]:
    """The figures of the paintings `names` of a folder against the squares that they follow, in both `judges`."""
    target = folder.with_name(f"{folder.name}-report")
    wanted = [judges(tables["encoder"]), list(names), there(networks)]
    if target.exists():
        found = dict(json.loads((target / "report.json").read_text(encoding="utf-8")))
        if asked_of(found) == wanted:
            return found
    opened = {Path(one["path"]).stem: open_slide(slides / one["path"], assume_mpp=one.get("assume_mpp"))
              for one in tables["held_out"]}  # fmt: skip
    sides = open_sides([opened[name.rsplit("-", 1)[0]] for name in names], [folder / name for name in names])
    encoders = [load_encoder(name) for name in judges(tables["encoder"])]
    figures = evaluate_slides(sides, encoders=encoders, seed=tables["seed"], networks=networks)
    write_report(target, sides, figures, overwrite=target.exists())
    return figures


def there(networks: Networks) -> list[str]:
    """The figures that papers print whose network is here."""
    return [name for name, network in PUBLISHED.items() if getattr(networks, network) is not None]


def asked_of(figures: dict[str, Any]) -> list[list[str]]:
    """What a report was made of: encoders, paintings, published figures."""
    encoders, paintings = ([one["name"] for one in figures[key]] for key in ("encoders", "synthetic"))
    published = figures.get("published") or {}
    return [encoders, paintings, [name for name in PUBLISHED if "network" in published.get(name, {})]]


def cost(tables: dict[str, Any], system: str, size: int, work: Path) -> dict[str, float]:
    """Seconds of a training step on scenes of `size` pixels at MPP, by one scene a batch and by two, and the memory.

    In a process of its own, for its peak. A recipe's scenes are small at every pitch, so that what it takes does not go
    by the slide's size; here a scene is a whole image of `size`.
    """
    command = [sys.executable, __file__, "--cost", json.dumps([tables, system, size, str(work)])]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def measured(tables: dict[str, Any], system: str, size: int, work: Path) -> dict[str, float]:
    """What `cost` measures, in this process."""
    own, found = recipe(tables, system), {}
    shares = (1.0, 0.0, 0.0, 0.0, 0.0)
    data = own.data.model_copy(update={"shares": shares, "sizes": (size, *own.data.sizes[1:]), "in_memory": False})
    for batch in (1, 2):
        optimisation = own.optimisation.model_copy(update={"batch": batch, "shards": 1, "precision": "float32"})
        config = own.model_copy(update={"data": data, "optimisation": optimisation})
        run = Training(config, TrainingPack(work / "pack"), work / "cost")
        first = timed(run.step)
        taken = [timed(run.step) for _ in range(COST_STEPS if first < 5 else 1)]
        found |= {f"seconds{batch}": min(taken), f"peak{batch}": peak_memory()}
    return found


def timed(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# -- the tables ----------------------------------------------------------------------------------------


def number(one: Any, *, key: str = "value", form: str = ".3g") -> str:
    """A figure, [its interval], (its floor, and a thumbnail's); or a dash. `key`: what it is called there."""
    if not isinstance(one, dict) or one.get(key) is None:
        return "–"
    edges = [one.get("low"), one.get("high")]
    beside = ", ".join(f"{one[name]:{form}}" for name in ("floor", "thumbnail") if one.get(name) is not None)
    interval = "" if None in edges else f" [{edges[0]:{form}}, {edges[1]:{form}}]"
    return f"{one[key]:{form}}{interval}{f' ({beside})' if beside else ''}"


def table(heads: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    """Rows of a table, one a system."""
    lines = [f"| system | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    return lines + [f"| {system} | {' | '.join(cells)} |" for system, cells in rows.items()]


def quality(found: dict[str, dict[str, Any]], encoder: str) -> list[str]:
    """Rows of a table of quality in an encoder."""
    wanted = (("0.5", "frechet"), ("0.5", "kernel"), ("2", "kernel"), ("8", "frechet"), ("8", "kernel"))
    heads = [f"{'FD' if figure == 'frechet' else 'KID'} {mpp} µm" for mpp, figure in wanted]

    def cells(figures: dict[str, Any]) -> list[str]:
        scales, control = figures["scales"][encoder], (figures["control"] or {}).get(encoder, {})
        cosines = [control.get("cosine", {}).get(mpp) for mpp in ("0.5", "2")]
        said = [", ".join(str(scales.get(mpp, {}).get("n", "–")) for mpp in ("0.5", "2", "8"))]
        said += [number(scales.get(mpp, {}).get(figure)) for mpp, figure in wanted]
        said += [number(one, key="mean", form=".3f") + (f" of {one['n']}" if one else "") for one in cosines]
        top = control.get("retrieval", {})
        if "top1" not in top:
            return [*said, "–"]
        low, high = (100 * top[f"top1_{edge}"] for edge in ("low", "high"))
        return [*said, f"{100 * top['top1']:.0f} % [{low:.0f}, {high:.0f}] of {top['regions']}"]

    heads = ["tiles a half at 0.5, 2, 8 µm", *heads, "cosine 0.5 µm", "cosine 2 µm", "top 1"]
    return table(heads, {system: cells(one) for system, one in found.items()})


def plain(found: dict[str, dict[str, Any]], networks: Networks) -> list[str]:
    """Rows of what needs neither encoder: the finest octaves, and the figures that papers print."""
    shown = there(networks)
    heads = ["windows", "finest octave", "the next"]
    for name in shown:
        heads += [f"{name} squares", f"{name} FID", f"{name} KID"]

    def cells(figures: dict[str, Any]) -> list[str]:
        texture = figures["texture"]
        octaves = texture.get("octaves", {})
        said = [str(texture.get("synthetic", "–"))]
        for at in range(2):
            one = {key: octaves.get(key, [None] * 2)[at] for key in ("ratio", "low", "high")}
            said.append(number(one, key="ratio", form=".2f"))
        for name in shown:
            one = figures["published"][name]
            said += [f"{one.get('n', 0)} of {one['side']}²", number(one.get("frechet")), number(one.get("kernel"))]
        return said

    return table(heads, {system: cells(one) for system, one in found.items()})


def costs(found: dict[str, dict[int, dict[str, float]]], parameters: dict[str, int]) -> list[str]:
    """Rows of the table of costs."""
    heads = [f"{what}, {size}²" for what in ("s a scene", "largest batch") for size in COST_SIZES]
    lines = [f"| system | parameters | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for system, sizes in found.items():
        cells = [f"{sizes[size]['seconds2'] / 2:.2f}" for size in COST_SIZES]
        for size in COST_SIZES:
            one, two = sizes[size]["peak1"], sizes[size]["peak2"]
            cells.append(str(1 + int((COST_MEMORY - one) / max(two - one, 1e6))) if one <= COST_MEMORY else "0")
        lines.append(f"| {system} | {parameters[system] / 1e6:.2f} M | {' | '.join(cells)} |")
    return lines


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tables' file, with what the words of the command change in it.

    Raises:
        UsageError: if there is no such file, it lacks something, or it has no such system or size.
    """
    tables = read_toml(arguments.tables)
    lacking = [name for name in KEYS if name not in tables]
    if lacking:
        raise UsageError(f"{arguments.tables}: lacks {', '.join(lacking)}; expected what tables.toml has")
    sizes = [one["size"] for one in tables["paintings"]]
    for option, given, known in (("--only", arguments.only, [*tables["systems"]]), ("--sizes", arguments.sizes, sizes)):
        if unknown := [one for one in given or [] if one not in known]:
            raise UsageError(f"{option} {unknown[0]}: not in {arguments.tables}; it has {', '.join(map(str, known))}")
    if arguments.minutes is not None:
        tables["minutes"] = arguments.minutes
    tables["systems"] = {name: tables["systems"][name] for name in arguments.only or tables["systems"]}
    own = {} if arguments.each is None else {"each": arguments.each}
    tables["paintings"] = [one | own for one in tables["paintings"] if one["size"] in (arguments.sizes or sizes)]
    for system in tables["systems"]:
        recipe(tables, system)
    return tables


def above_zero(word: str) -> float:
    """A number of the command.

    Raises:
        ArgumentTypeError: if it is not above 0, or not finite.
    """
    try:
        found = float(word)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{word}; expected a number above 0")
    return found


def count(word: str) -> int:
    """A whole number of the command.

    Raises:
        ArgumentTypeError: if it is none, or 0.
    """
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word}; expected a whole number above 0")
    return int(word)


def main(arguments: argparse.Namespace) -> None:
    """Train, paint, judge, write."""
    tables = asked(arguments)
    work, slides, systems = arguments.work, arguments.slides, list(tables["systems"])
    work.mkdir(parents=True, exist_ok=True)
    networks = find_networks()
    left_out = networks.missing.replace("--download", "`wsi-brush evaluate --download`")
    loaded = {system: load_brush(trained(tables, system, slides, work, arguments.device)) for system in systems}
    trainings = {system: brush.about["training"] for system, brush in loaded.items()}
    lines = [f"{tables['steps']} steps of the solver; wsi-brush {__version__}, {date.today()}. Trained: "
             + ", ".join(f"{system} {one['minutes']:g} minutes, {one['steps']} steps of "
                         f"{one['optimisation']['batch']} scenes" for system, one in trainings.items())
             + f" ({', '.join(sorted({one.get('device', 'device not recorded') for one in trainings.values()}))}).",
             ""]  # fmt: skip
    parameters = {system: sum(p.numel() for p in brush.network.parameters()) for system, brush in loaded.items()}
    for one in tables["paintings"]:
        size, each = one["size"], one["each"]
        made = {
            system: painted(tables, system, brush, slides, work, size, each, arguments.device)
            for system, brush in loaded.items()
            if size in tables["systems"][system].get("sizes", [size])
        }
        if not made:
            continue
        names = in_common([folder for folder, _ in made.values()])
        found = {system: judged(tables, slides, folder, names, networks) for system, (folder, _) in made.items()}
        conditions, other = judges(tables["encoder"])
        what = f"{len(names)} painting{'s' if len(names) != 1 else ''} after held-out slides"
        lines += [f"## {size}²: {what}, the same of every system", "",
                  f"In `{other}`, which conditions none of them:", "", *quality(found, other), "",
                  f"In `{conditions}`, which conditions them and flatters them:", "", *quality(found, conditions), "",
                  "In neither:", "", *plain(found, networks), "",
                  *([f"Left out: {left_out}.", ""] if left_out else []),
                  f"{BESIDE} Seconds a painting: "
                  + ", ".join(f"{system} {value:.0f}" for system, (_, value) in made.items()) + ".", ""]  # fmt: skip
    if not arguments.no_costs:
        spent = {system: {size: cost(tables, system, size, work) for size in COST_SIZES} for system in systems}
        lines += [f"## Training: seconds a scene, and the largest batch in {COST_MEMORY / 1e9:g} GB", "",
                  *costs(spent, parameters), ""]  # fmt: skip
    (work / "RESULTS.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    keep_memory()
    if sys.argv[1:2] == ["--cost"]:
        given, name, pixels, where = json.loads(sys.argv[2])
        print(json.dumps(measured(given, name, pixels, Path(where))))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("tables", type=Path)
        parser.add_argument("--slides", type=Path, required=True)
        parser.add_argument("--work", type=Path, required=True)
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N: of training and painting")
        parser.add_argument("--minutes", type=above_zero, help="above 0: of training, each system")
        parser.add_argument("--each", type=count, help="1 or more: paintings after each held-out slide")
        parser.add_argument("--sizes", type=count, nargs="+", help="of the paintings, pixels: of those in TABLES")
        parser.add_argument("--only", nargs="+", help="systems: of those in TABLES")
        parser.add_argument("--no-costs", action="store_true")
        try:
            main(parser.parse_args())
        except WsiBrushError as error:
            sys.exit(f"{error}")
