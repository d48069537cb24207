"""The words of `train`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .manners import errors, prepare, print_plan
from .options import Debug, DryRun, Json, Overwrite, Quiet


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; see pipelines/.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new brush.")],
    work: Annotated[Path | None, typer.Option(help="Folder of pack and checkpoints. [OUT.work]")] = None,
    slides: Annotated[Path, typer.Option(help="Folder that the configuration's slides are in.")] = Path(),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Slides to a brush. Run again: goes on from the newest checkpoint."""
    with errors(debug, goes_on=True):
        from ..recipe import read_config
        from ..train import check_training, train_brush

        read = read_config(config)
        work = work or out.resolve().with_name(f"{out.resolve().name}.work")
        if dry_run:
            check_training(read, work=work, slides=slides, device=device)
            minutes = read.optimisation.minutes
            budget = {"steps": read.optimisation.steps, "minutes": minutes if math.isfinite(minutes) else "no limit"}
            budget |= {"device": f"{device}, {read.optimisation.precision}"}
            found = {"slides": [source.path for source in read.data.slides], "files": len(read.data.sources(slides))}
            output = f"{out}{' (exists)' if out.exists() else ''}"
            print_plan({**found, "work": str(work), **budget, "output": output}, json_)
            return
        prepare(read.optimisation.threads)
        tell: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        options = {"work": work, "slides": slides, "device": device, "overwrite": overwrite}
        made = train_brush(read, out, **options, tell=tell).about["training"]  # type: ignore[arg-type]
        if json_:
            typer.echo(json.dumps({"path": str(out), "steps": made["steps"], "minutes": made["minutes"]}))
        elif not quiet:
            typer.echo(f"{out}: {made['steps']} steps in {made['minutes']} minutes")
