"""The words of `embed`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import plans
from .manners import Shown, errors, prepare, print_plan, print_table, say, say_terms, show_standing
from .options import ENCODERS, AssumeMpp, Debug, DryRun, ForceMpp, Json, Overwrite, Quiet, Threads

if TYPE_CHECKING:
    from ..embed import SlideReport
    from ..encoder import Encoder


def embed(
    slides: Annotated[
        list[Path], typer.Argument(help="Slides, folders of them, quoted patterns, or a CSV with path[,mpp,id].")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the stores, one a slide.")],
    encoder: Annotated[str, typer.Option(help=f"{ENCODERS}.")] = "bundled",
    tissue: Annotated[
        Path | None,
        typer.Option(help="What is tissue, drawn: GeoJSON, or a folder with SLIDENAME.geojson.", metavar="GEOJSON"),
    ] = None,
    assume_mpp: AssumeMpp = None,
    force_mpp: ForceMpp = None,
    shard: Annotated[
        str, typer.Option(help="Part I of N of the slides, from 1/N to N/N; no two parts share a slide.", metavar="I/N")
    ] = "1/1",
    devices: Annotated[
        str, typer.Option(help="cpu, cuda:0 or several as cuda:0,cuda:1: one process each.", metavar="D[,D]")
    ] = "cpu",
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask cluster whose workers embed, a slide each.", metavar="ADDRESS")
    ] = None,
    overwrite: Overwrite = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that read a slide; 0: none, a file that makes OpenSlide abort then ends it all. Default 1, "
            "with an encoder on a GPU up to 8.",
            min=0,
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A tile that cannot be read fails its slide; else it is NaN, and counted.")
    ] = False,
    threads: Threads = 0,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Slides to embeddings: one store a slide, at 0.5, 2 and 8 µm. Run again: only what is missing is done."""
    with errors(debug, goes_on=True):
        from ..cohort import as_shard, cohort_of
        from ..encoder import load_encoder
        from ..reading import default_count

        prepare(threads)
        part, named = as_shard(shard), devices.split(",")
        loaded = load_encoder(encoder, device=named[0] if len(named) == 1 and scheduler is None else "cpu")
        if not quiet:
            say_terms(loaded)
            if part[1] > 1:
                say(f"shard {shard}: {len(cohort_of(slides, tissue, part))} of the slides")
        if dry_run:
            print_plan(plans.plan_embedding(loaded, slides, out, assume_mpp, force_mpp, tissue, part), json_)
            return
        with Shown(quiet) as shown:
            options = {
                "assume_mpp": assume_mpp, "force_mpp": force_mpp, "overwrite": overwrite, "outlines": tissue,
                "shard": part, "strict": strict,
                "workers": default_count(gpu=named[0].startswith("cuda")) if workers is None else workers,
                "progress": lambda standing: show_standing(shown, standing),
            }  # fmt: skip
            reports = _reports(slides, out, encoder, loaded, named, scheduler, threads, options)
        if json_:
            typer.echo(json.dumps([asdict(report) for report in reports], indent=1, default=str))
        elif not quiet:
            print_table(reports)
        failed = [report for report in reports if report.exit_code]
        for report in [one for one in reports if one.exit_code or one.bad_tiles]:
            say(report.message)
        if failed:
            raise typer.Exit(failed[0].exit_code if len(reports) == 1 else 3)


def _reports(
    slides: list[Path], out: Path, name: str, loaded: Encoder, devices: list[str], scheduler: str | None, threads: int,
    options: dict[str, Any],
) -> list[SlideReport]:  # fmt: skip
    """Embed here, on several devices, or on a cluster."""
    if scheduler is not None:
        from ..cluster import connect
        from ..fleet import embed_on_cluster

        if len(devices) > 1:
            raise UsageError("--devices: one for all workers with --scheduler, cpu or cuda")
        with connect(scheduler) as client:
            return embed_on_cluster(
                slides, out, encoder=name, client=client, device=devices[0], loaded=loaded, **options
            )
    if len(devices) > 1:
        from ..fleet import embed_on_devices

        return embed_on_devices(slides, out, encoder=name, devices=devices, threads=threads, loaded=loaded, **options)
    from ..cohort import embed_slides

    return embed_slides(slides, out, encoder=loaded, **options)
