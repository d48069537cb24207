"""What matters, at small scale: a short training for each change of the recipe, judged by one loss on held-out scenes.

    python pipelines/bundled/levers.py pipelines/bundled/brush.toml --slides DATA/slides --work WORK
        [--steps 400] [--only base width depth]

Each run begins from nothing, sees the same scenes in the same order as far as its change allows, and differs from the
recipe, made small (`--width`, `--batch` scenes a step), in what LEVERS says. All are judged by the recipe's own
measure, whatever they were trained for: velocity loss of the averaged weights on the right quarters of the slides, at
the noise levels that the solver visits. The base is trained with three seeds: what lies within their spread is no
difference. Writes WORK/levers.md and WORK/levers.json; killed, the same command goes on with the runs that are missing.
So few steps rank what learns fast, not what learns most.
"""

import argparse
import copy
import json
import math
import time
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from wsi_brush import __version__
from wsi_brush.commit import fingerprint, write_json
from wsi_brush.coordinates import CoordinateSampler, TrainingPack
from wsi_brush.denoiser import Denoiser
from wsi_brush.errors import UsageError
from wsi_brush.machine import keep_memory
from wsi_brush.objective import losses
from wsi_brush.recipe import TrainConfig, read_config
from wsi_brush.train import Training, training_pack

Change = dict[str, dict[str, Any]]

LEVERS: dict[str, list[tuple[str, Change]]] = {
    "base": [(f"the recipe, seed {seed}", {"optimisation": {"seed": seed}}) for seed in range(3)],
    "points": [
        ("no scattered points", {"data": {"points": 0}}),
        ("256 scattered points a scene", {"data": {"points": 256}}),
        ("their loss weighs 1, not 0.1", {"optimisation": {"scattered": 1.0}}),
        ("four times as many windows of 64 pixels", {"data": {"window": 64}, "optimisation": {"batch": 4}}),
    ],
    "noise": [
        ("loss of the image, not of the velocity", {"optimisation": {"objective": "x0"}}),
        ("all noise levels at every pitch", {"optimisation": {"full_range": 1.0}}),
        ("none but those that the solver visits", {"optimisation": {"full_range": 0.0, "margin": 1.0}}),
        ("A half as wide", {"model": {"mollifier": 0.25}}),
        ("A twice as wide", {"model": {"mollifier": 1.0}}),
    ],
    "depth": [
        ("grid level of 2 operators, not 4", {"model": {"layout": 2}}),
        ("grid level of 8", {"model": {"layout": 8}}),
        ("2 operators at 8 pixels, not 4", {"model": {"depth": (1, 2, 2)}}),
        ("8 operators at 8 pixels", {"model": {"depth": (1, 2, 8)}}),
        ("2 operators at 2 pixels, not 1", {"model": {"depth": (2, 2, 4)}}),
        ("64 global tokens, not 16", {"model": {"tokens": 64}}),
    ],
    "width": [("half as wide", {"model": {"width": 0.5}}), ("twice as wide", {"model": {"width": 2.0}})],
    "condition": [
        ("without the embeddings at 0.5 µm", {"without": {"0.5": True}}),
        ("without those at 2 µm", {"without": {"2": True}}),
        ("without those at 8 µm", {"without": {"8": True}}),
        ("without any", {"without": {"0.5": True, "2": True, "8": True}}),
        ("condition never withheld", {"optimisation": {"unconditional": 0.0}}),
        ("withheld from 0.3, not 0.1", {"optimisation": {"unconditional": 0.3}}),
    ],
    "optimiser": [
        ("half the rate", {"optimisation": {"rate": 0.5}}),
        ("twice the rate", {"optimisation": {"rate": 2.0}}),
        ("average of weights 0.8", {"optimisation": {"average": 0.8}}),
        ("no average of weights", {"optimisation": {"average": 0.0}}),
    ],
}
SCALED = {"batch", "rate", "width"}  # of which a change says the factor
JUDGED = (0.5, 1.0, 2.0)  # µm: the pitches at which nearly all of the time goes


def changed(recipe: TrainConfig, change: Change, *, steps: int, batch: int, width: int) -> TrainConfig:
    """The recipe, small, with a change."""
    plain = recipe.model_dump(exclude={"card"})
    plain["optimisation"] |= {
        "steps": steps, "minutes": math.inf, "batch": batch, "shards": 1, "warmup": 20, "average": 0.95, "start": None,
        "precision": "float32",
    }  # fmt: skip
    plain["model"]["width"] = width
    for part, values in change.items():
        for name, value in values.items() if part != "without" else ():
            plain[part][name] = plain[part][name] * value if name in SCALED else value
    for part, name in (("optimisation", "batch"), ("model", "width")):
        plain[part][name] = int(plain[part][name])
    return TrainConfig.model_validate(plain)


def blinded(pack: TrainingPack, without: dict[str, bool]) -> TrainingPack:
    """The pack with the embeddings of some pitches worth nothing."""
    seen = copy.copy(pack)
    seen.about = copy.deepcopy(pack.about)
    for pitch in without:
        seen.about["embeddings"][pitch]["limit"] = 0.0
    return seen


@torch.no_grad()
def judged(run: Training, recipe: TrainConfig, pack: TrainingPack, *, batches: int) -> dict[str, float]:
    """Loss of the averaged weights on held-out scenes, by pitch."""
    found = {}
    network = run.average
    assert isinstance(network, Denoiser)
    for mpp in JUDGED:
        sampler = CoordinateSampler(
            pack, shares=[float(one == mpp) for one in run.ladder.pitches], sizes=[256] * len(run.ladder.pitches),
            window=128, points=64, seed=1, held_out=True,
        )  # fmt: skip
        values = []
        for batch in range(batches):
            generator = torch.Generator().manual_seed(batch)
            scenes = sampler.draw(batch, 8, mpp=mpp)
            values.append(losses(network, run.ladder, scenes, run.pack.about, recipe.optimisation, generator)[0].item())
        found[f"{mpp:g} µm"] = mean(values)
    return found


def main(arguments: argparse.Namespace) -> None:
    """Train, judge, write."""
    recipe = read_config(arguments.recipe)
    torch.set_num_threads(arguments.threads)
    pack = training_pack(recipe.data, arguments.work, arguments.slides)
    file = arguments.work / "levers.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    sizes = {"steps": arguments.steps, "batch": arguments.batch, "width": arguments.width}
    given = {**sizes, "batches": arguments.batches}
    given |= {"recipe": fingerprint(recipe.model_dump(mode="json", exclude={"card"}))}
    if known and known["about"]["given"] != given:
        raise UsageError(f"{file}: made with {known['about']['given']}, not {given}; choose another --work")
    runs: dict[str, Any] = known.get("runs", {})
    about = {"wsi_brush": __version__, "torch": torch.__version__, "date": str(date.today()), "given": given}
    for lever in arguments.only:
        for name, change in LEVERS[lever]:
            if name in runs:
                continue
            config = changed(recipe, change, **sizes)
            run = Training(config, blinded(pack, change.get("without", {})), arguments.work)
            start = time.process_time()
            while not run.over:
                run.step()
            weights = sum(one.numel() for one in run.denoiser.parameters())
            runs[name] = {"lever": lever, "weights": weights, "seconds": time.process_time() - start}
            runs[name] |= judged(run, recipe, pack, batches=arguments.batches)
            write_json(file, {"about": about, "runs": runs})
            print(name, {key: value for key, value in runs[name].items() if key != "lever"}, flush=True)
    lines = table(runs)
    (arguments.work / "levers.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def table(runs: dict[str, Any]) -> list[str]:
    """A row for each run; the base's is the mean of its seeds, and what they differ by."""
    pitches = [f"{mpp:g} µm" for mpp in JUDGED]
    base = [one for one in runs.values() if one["lever"] == "base"]
    lines = [f"| change | weights, M | s of a core | {' | '.join(pitches)} |", "|---" * (3 + len(pitches)) + "|"]
    if base:
        values = [[one[mpp] for one in base] for mpp in pitches]
        cells = [f"{mean(some):.4f} ({max(some) - min(some):.4f})" for some in values]
        first = [f"none (mean of {len(base)} seeds; their range)", f"{base[0]['weights'] / 1e6:.2f}"]
        first.append(f"{mean(one['seconds'] for one in base):.0f}")
        lines.append(f"| {' | '.join([*first, *cells])} |")
    for name, one in runs.items():
        if one["lever"] != "base":
            cells = [name, f"{one['weights'] / 1e6:.2f}", f"{one['seconds']:.0f}"]
            lines.append(f"| {' | '.join([*cells, *(f'{one[mpp]:.4f}' for mpp in pitches)])} |")
    return lines


if __name__ == "__main__":
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="scenes a step")
    parser.add_argument("--width", type=int, default=24, help="of the base")
    parser.add_argument("--batches", type=int, default=8, help="of 8 held-out scenes, a pitch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    main(parser.parse_args())
