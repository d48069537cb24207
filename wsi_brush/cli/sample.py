"""The words of `sample`."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .manners import errors, print_plan
from .options import Debug, DryRun, Json, Quiet


def sample(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The new file, or its folder. [the user's cache]")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fetch a small real slide to try everything on: 1.9 MB, public domain, from OpenSlide's test data."""
    with errors(debug):
        from ..sample import BYTES, LICENCE, NAME, SHA256, SOURCE, fetch_sample, sample_path

        about = {"source": f"{SOURCE}{NAME}", "licence": LICENCE, "sha256": SHA256, "bytes": BYTES}
        if dry_run:
            path = sample_path(out)
            print_plan({**about, "output": f"{path}{' (exists)' if path.exists() else ''}"}, json_)
            return
        path, fetched = fetch_sample(out)
        if json_:
            typer.echo(json.dumps({"path": str(path), "fetched": fetched, **about}, indent=1))
        elif not quiet:
            typer.echo(
                f"{path}: {f'{BYTES / 1e6:.1f} MB fetched' if fetched else 'there already'}, whole by its sha256"
            )
            typer.echo(f"from {about['source']} ({LICENCE})")
            typer.echo(f"try: wsi-brush synthesize --ref {quote(str(path))} --size 1024 -o synthetic.ome.zarr")
