"""A brush on what it was not trained on: the right quarter of every slide of its recipe, painted and judged.

    python pipelines/bundled/held_out.py pipelines/bundled/brush.toml --slides DATA/slides --work WORK [--brush FOLDER]

Writes WORK/NAME.ome.zarr for every quarter that is at least 1024 pixels wide at 0.5 µm, and WORK/report (report.html):
every figure of `wsi-brush evaluate`, of those regions alone, in the space of the brush's own encoder and of every
`--judge` beside it (one that the brush never saw: `judge`). `--copies` searches what was trained on for copies;
`--overlap` prints how often the own reference is found among regions that overlap by half, of which there are more,
and `--place 384` among those of so many µm, of which there are more too.
Killed, the same command goes on.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from wsi_brush.brush import load_brush
from wsi_brush.control import PLACE, retrieval
from wsi_brush.encoder import load_encoder
from wsi_brush.evaluate import evaluate_slides
from wsi_brush.machine import keep_memory
from wsi_brush.recipe import Data, read_config
from wsi_brush.report import write_report
from wsi_brush.samples import Codec
from wsi_brush.sides import open_sides, painted_after
from wsi_brush.slide import Slide, open_slide
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide

MPP, LEAST = 0.5, 1024


class HeldOut(NamedTuple):
    """What a recipe leaves of a slide: `region` is (top, left, height, width) in level-0 pixels."""

    slide: Slide
    region: tuple[int, int, int, int]
    assume_mpp: float | None


def held_out(data: Data, slides: Path, *, least: int = LEAST) -> list[HeldOut]:
    """The part of every slide that was not trained on, where it is at least `least` pixels a side at MPP."""
    found = []
    for source in data.sources(slides):
        slide = open_slide(slides / source.path, assume_mpp=source.assume_mpp)
        first = -int(-slide.grid.width * data.until // 1)  # the first column that was not trained on
        region = (0, first, slide.grid.height, slide.grid.width - first)
        if min(region[2:]) * slide.mpp < least * MPP:
            print(f"{slide.path.name}: too small")
            continue
        found.append(HeldOut(slide, region, source.assume_mpp))
    return found


def target_of(slide: Slide, folder: Path) -> Path:
    """Where the painting after a slide is."""
    return folder / f"{slide.path.stem}.ome.zarr"


def otherwise(target: Path, wanted: dict[str, Any]) -> list[str]:
    """What of a painting is not as wanted, by what it says of itself."""
    made = painted_after(target) or {}
    return [name.removesuffix("_fingerprint") for name, value in wanted.items() if made.get(name) != value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--brush", default="bundled")
    parser.add_argument("--guidance", type=float, default=Painting.guidance)
    parser.add_argument("--judge", nargs="+", default=[], help="further encoders: names, or local safetensors files")
    parser.add_argument("--most", type=int, default=1536, help="tiles of a side and scale that are looked at")
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--place", type=float, default=PLACE, help="µm, side of the regions")
    arguments = parser.parse_args()
    if not 64 <= arguments.place <= PLACE:
        parser.error(f"--place {arguments.place:g}: expected 64, a tile, to {PLACE:g}")
    keep_memory()
    brush, data = load_brush(arguments.brush), read_config(arguments.recipe).data
    encoder = load_encoder(brush.about["encoder"])
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = {"brush_fingerprint": brush.fingerprint, "guidance": arguments.guidance, "steps": Painting.steps}
    real, painted = [], []
    for slide, region, assume_mpp in held_out(data, arguments.slides):
        target = target_of(slide, arguments.work)
        if not target.exists():
            done = synthesize_slide(
                slide.path, target, Painting(region=region, mpp=MPP, guidance=arguments.guidance), brush=brush,
                encoder=encoder, assume_mpp=assume_mpp,
            )  # fmt: skip
            print(f"{target.name}: {done.shape[0]} x {done.shape[1]} in {done.seconds:.0f} s", flush=True)
        elif other := otherwise(target, wanted):
            parser.error(f"{target}: was painted with another {' and '.join(other)}; give another --work")
        real.append(slide)
        painted.append(target)
    sides = open_sides(real, painted)
    judges = [encoder, *map(load_encoder, arguments.judge)]
    if arguments.overlap or arguments.place < PLACE:
        how = {"stride": 0.5 if arguments.overlap else 1.0, "place": arguments.place}
        for judge, found in zip(judges, retrieval(sides, judges, Codec("jpeg:90"), MPP, **how), strict=True):
            print(f"{judge.name}: {found}", flush=True)
    known = [open_slide(arguments.slides / source.path, assume_mpp=source.assume_mpp)
             for source in data.sources(arguments.slides) if arguments.copies]  # fmt: skip
    figures = evaluate_slides(sides, encoders=judges, most=arguments.most, training=known, trained_until=data.until)
    write_report(arguments.work / "report", sides, figures, overwrite=True)
    print(arguments.work / "report" / "report.html")


if __name__ == "__main__":
    main()
