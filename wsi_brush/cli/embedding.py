"""The words of `embed`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import plans
from .manners import Shown, errors, prepare, print_plan, print_table, say, say_terms
from .options import ENCODERS, AssumeMpp, Debug, DryRun, ForceMpp, Json, Overwrite, Quiet, Threads


def embed(
    slides: Annotated[list[Path], typer.Argument(help="Slides, or folders of slides.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the stores, one a slide.")],
    encoder: Annotated[str, typer.Option(help=f"{ENCODERS}.")] = "bundled",
    tissue: Annotated[
        Path | None,
        typer.Option(help="What is tissue, drawn: GeoJSON, or a folder with SLIDENAME.geojson.", metavar="GEOJSON"),
    ] = None,
    assume_mpp: AssumeMpp = None,
    force_mpp: ForceMpp = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Slides to embeddings: one store a slide, at 0.5, 2 and 8 µm. Run again: only what is missing is done."""
    with errors(debug):
        from ..cohort import embed_slides
        from ..encoder import load_encoder

        prepare(threads)
        loaded = load_encoder(encoder)
        if not quiet:
            say_terms(loaded)
        if dry_run:
            print_plan(plans.plan_embedding(loaded, slides, out, assume_mpp, force_mpp, tissue), json_)
            return
        with Shown(quiet) as progress:
            reports = embed_slides(
                slides, out, encoder=loaded, assume_mpp=assume_mpp, force_mpp=force_mpp, overwrite=overwrite,
                outlines=tissue, progress=lambda path, done, total: progress(path.name, done, total),
            )  # fmt: skip
        if json_:
            typer.echo(json.dumps([asdict(report) for report in reports], indent=1, default=str))
        elif not quiet:
            print_table(reports)
        failed = [report for report in reports if report.exit_code]
        for report in failed:
            say(report.message)
        if failed:
            raise typer.Exit(failed[0].exit_code if len(reports) == 1 else 3)
