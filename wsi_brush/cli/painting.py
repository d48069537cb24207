"""The words of `synthesize`."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from . import plans
from .manners import Shown, errors, prepare, print_plan
from .options import ENCODERS, AssumeMpp, Debug, DryRun, ForceMpp, Json, Overwrite, Quiet, Threads


def synthesize(
    out: Annotated[Path, typer.Option("--out", "-o", help="The new slide, an OME-Zarr folder.")],
    ref: Annotated[Path | None, typer.Option("--ref", help="The reference slide.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Instead of a reference: what to paint, of a brush trained on labels.")
    ] = None,
    canvas: Annotated[
        Path | None, typer.Option(help="Instead of a reference: a canvas that was painted on and saved.")
    ] = None,
    embeddings: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of a reference: its embeddings alone, a store of `embed`, or h5 of TRIDENT or STAMP, one a "
            "pitch, the option once for each."
        ),
    ] = None,
    same_encoder: Annotated[
        bool,
        typer.Option("--same-encoder", help="The h5 of others is of the brush's encoder, though it does not say so."),
    ] = False,
    region: Annotated[
        str | None,
        typer.Option(help="Where, in level-0 pixels of the reference, or all.", metavar="TOP,LEFT,HEIGHT,WIDTH"),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Instead of a region: the SIZE x SIZE pixels with the most tissue. [4096]")
    ] = None,
    mpp: Annotated[float, typer.Option(help="µm per pixel of the new slide.")] = 0.5,
    brush: Annotated[str, typer.Option(help="bundled, or the folder of a brush.")] = "bundled",
    encoder: Annotated[str | None, typer.Option(help=f"{ENCODERS}. [the one that the brush names]")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another painting.", min=0, max=2**63 - 1)] = 0,
    steps: Annotated[
        int, typer.Option(help="Evaluations over the range of noise; coarse pitches take more.", min=5, max=1000)
    ] = 20,
    guidance: Annotated[
        float, typer.Option(help="How strongly the embeddings are followed at high noise; 1: as trained, and faster.")
    ] = 1.0,
    solver: Annotated[
        Literal["2m", "ddim", "heun", "ancestral"], typer.Option(help="How the noise is left behind.")
    ] = "2m",
    progressive: Annotated[
        Literal["on", "off"], typer.Option(help="Begin at coarse pitches; off: every step at the finest.")
    ] = "on",
    max_memory: Annotated[
        str, typer.Option(help="Memory for all of it; a larger canvas is kept on disk.", metavar="SIZE")
    ] = "4GB",
    scheduler: Annotated[
        str | None, typer.Option(help="A Dask scheduler whose workers paint the tiles.", metavar="ADDRESS")
    ] = None,
    device: Annotated[str, typer.Option(help="What computes: cpu, cuda or cuda:N.", metavar="DEVICE")] = "cpu",
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of products: exact, or faster on a GPU.")
    ] = "float32",
    png: Annotated[Path | None, typer.Option(help="Also write reference and painting side by side.")] = None,
    assume_mpp: AssumeMpp = None,
    force_mpp: ForceMpp = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """A reference to a new slide: an OME-Zarr pyramid that follows its embeddings and copies none of its pixels."""
    with errors(debug, goes_on=True):
        given = {"--ref": ref, "--embeddings": embeddings or None, "--label": label, "--canvas": canvas}
        asked = [word for word, one in given.items() if one is not None]
        if len(asked) != 1:
            *named, last = asked or given
            raise UsageError(
                f"{', '.join(named)} and {last} {'exclude each other' if asked else 'are missing'}; give --ref SLIDE, "
                "or --embeddings STORE.zarr, or --canvas CANVAS.zarr, or --label NAME with a brush that was trained on "
                "labels"
            )
        for word, one in (("--region", region), ("--encoder", encoder), ("--png", png)):
            if ref is None and one is not None and (word != "--region" or not embeddings):
                what = "embeddings alone have" if embeddings else f"a {asked[0][2:]} has"
                raise UsageError(f"{word}: is for a reference, and {what} none; leave it out")
        if same_encoder and not embeddings:
            raise UsageError("--same-encoder: is for --embeddings; leave it out")
        if canvas is not None and size is not None:
            raise UsageError("--size: a canvas has its own; leave it out")
        if region is not None and size is not None:
            raise UsageError("--region and --size exclude each other; give one")
        if not math.isfinite(guidance):
            raise UsageError(f"--guidance {guidance}: expected a number, such as 2")
        place = _read_region(region) if region is not None and region != "all" else None
        memory = _read_memory(max_memory)
        from ..slide import open_slide

        slide = None
        if ref is not None:  # what is none is said before torch is loaded
            slide = open_slide(ref, assume_mpp=assume_mpp, force_mpp=force_mpp)
        if region == "all" and slide is not None:
            place = (0, 0, *slide.grid.shape)
        from ..brush import load_brush
        from ..cluster import connect
        from ..encoder import load_encoder
        from ..followed import follow
        from ..machine import check_precision, find_device, peak_memory
        from ..stages import Painting, kept
        from ..synthesize import (
            check_asked,
            synthesize_canvas,
            synthesize_embeddings,
            synthesize_label,
            synthesize_slide,
        )

        drawn = None
        if canvas is not None:
            from ..canvas import Canvas

            drawn = Canvas.load(canvas)
            mpp = drawn.grid.mpp
        painting = Painting(
            4096 if size is None else size, place, mpp, seed, steps, guidance, solver,
            progressive=progressive == "on", memory=memory, device=device, precision=precision,
        )  # fmt: skip
        prepare(threads, largest=kept(memory))
        check_precision(precision, find_device(device))
        loaded = load_brush(brush)
        check_asked(loaded, label)
        if drawn is not None:
            drawn.check_brush(loaded.about["encoder"], loaded.about["fingerprint"], loaded.pitches)
        followed = None
        if embeddings:
            followed = follow(embeddings, brush=loaded, slide_mpp=assume_mpp, same_encoder=same_encoder)
            if region == "all":
                painting = replace(painting, region=(0, 0, *followed.grid.shape))
        eyes = load_encoder(encoder or loaded.about["encoder"], device=device) if ref is not None else None
        if dry_run:
            pixels = None if drawn is None else drawn.grid
            print_plan(plans.plan_painting(loaded, eyes, slide or followed, out, painting, pixels), json_)
            return
        client = connect(scheduler) if scheduler is not None else None
        with errors(debug, goes_on=loaded.rival is None), Shown(quiet) as progress, client or nullcontext():
            if label is not None:
                painted = synthesize_label(
                    label, out, painting, brush=loaded, overwrite=overwrite, client=client, tell=progress
                )
            elif drawn is not None:
                painted = synthesize_canvas(
                    drawn, out, painting, brush=loaded, overwrite=overwrite, client=client, tell=progress
                )
            elif followed is not None:
                painted = synthesize_embeddings(
                    followed, out, painting, brush=loaded, overwrite=overwrite, client=client, tell=progress
                )
            else:
                assert ref is not None
                assert eyes is not None
                painted = synthesize_slide(
                    ref, out, painting, brush=loaded, encoder=eyes, assume_mpp=assume_mpp, force_mpp=force_mpp,
                    overwrite=overwrite, png=png, client=client, tell=progress,
                )  # fmt: skip
        cosine = {f"{pitch:g}": round(value, 4) for pitch, value in painted.cosine.items() if not math.isnan(value)}
        height, width = painted.shape
        result = {
            "path": str(painted.path), "synthetic": True, "height": height, "width": width, "mpp": mpp,
            "seed": seed, "seconds": round(painted.seconds, 1),
            "peak_memory_gb": round(peak_memory() / 1e9, 2),
        }  # fmt: skip
        if painted.region is not None:
            result |= {"region": list(painted.region)}
        if ref is not None:
            result |= {"cosine": cosine}
        elif followed is not None:
            result |= {"embeddings": followed.about["fingerprint"]}
        elif drawn is not None:
            result |= {"canvas": drawn.fingerprint, "strokes": len(drawn.strokes)}
        else:
            result |= {"label": label}
        if json_:
            typer.echo(json.dumps(result, indent=1))
        elif not quiet:
            typer.echo(f"{painted.path}: synthetic, {height} x {width} pixels at {mpp:g} µm")
            said = f"label {label}"
            if drawn is not None:
                said = f"canvas {drawn.fingerprint}, {len(drawn.strokes)} strokes"
            if ref is not None or followed is not None:
                said = f"after {ref.name}" if ref is not None else f"after embeddings {result['embeddings']}"
            if painted.region is not None:
                said += f", region {','.join(map(str, painted.region))} (level-0 pixels)"
            typer.echo(f"{said}, seed {seed}")
            typer.echo(f"took {painted.seconds:.0f} s and {result['peak_memory_gb']:.1f} GB")
            shown = ", ".join(f"{value:.3f} at {pitch} µm" for pitch, value in cosine.items())
            if ref is not None:
                typer.echo(f"mean cosine of embeddings with the reference: {shown or 'no whole tile with tissue'}")


def _read_region(text: str) -> tuple[int, int, int, int]:
    try:
        top, left, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--region {text}: expected four whole numbers TOP,LEFT,HEIGHT,WIDTH in level-0 pixels, or all"
        ) from None
    return top, left, height, width


def _read_memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"--max-memory {text}: expected a size, such as 4GB or 800MB")
    return int(float(match[1]) * 10 ** {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}[match[2].upper()])
