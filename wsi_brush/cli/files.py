"""The words for what lies there already: what it is, whether it is whole, and how others read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .manners import errors, print_facts, say
from .options import AssumeMpp, Debug, DryRun, ForceMpp, Json, Overwrite, Quiet


def export(
    store: Annotated[Path, typer.Argument(help="A store of embeddings, as `embed` writes it.")],
    to: Annotated[
        Literal["trident-h5", "stamp-h5", "anndata", "parquet", "geojson"],
        typer.Option("--to", help="Who is to read it; geojson: the tissue, for QuPath."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new file.")],
    mpp: Annotated[float, typer.Option(help="µm per pixel of the tiles.")] = 0.5,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """A store to a file that others read: TRIDENT and CLAM, STAMP, AnnData, Parquet, QuPath."""
    with errors(debug):
        from ..interchange import export_store, tiles_of
        from ..store import EmbeddingStore

        opened = EmbeddingStore.open(store)
        plan = {"store": str(store), "to": to, "output": f"{out}{' (exists)' if dry_run and out.exists() else ''}"}
        if dry_run:
            tiles = {} if to == "geojson" else {"tiles": len(tiles_of(opened, mpp).cells)}
            print_facts({**plan, **tiles}, json_)
            return
        count = export_store(opened, out, to, mpp=mpp, overwrite=overwrite)
        what = "pieces" if to == "geojson" else "tiles"
        if json_:
            typer.echo(json.dumps({**plan, what: count}, indent=1))
        elif not quiet:
            typer.echo(f"{out}: {count} {what}{f' at {mpp:g} µm' if what == 'tiles' else ' of tissue'}, {to}")


def info(
    path: Annotated[Path, typer.Argument(help="A slide, store, brush (or bundled), pyramid, canvas or palette.")],
    assume_mpp: AssumeMpp = None,
    force_mpp: ForceMpp = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What a slide, store, brush, pyramid, canvas or palette is: its sizes, and where it comes from."""
    with errors(debug):
        from ..info import describe

        facts = describe(path, assume_mpp=assume_mpp, force_mpp=force_mpp)
        if json_ or not quiet:
            print_facts(facts, json_)


def verify(
    paths: Annotated[list[Path], typer.Argument(help="Stores, pyramids or brushes.")],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Whether finished artefacts are whole: every file there, and as it was written."""
    with errors(debug):
        from ..commit import verify as find_problems

        found = {str(path): find_problems(path) for path in paths}
        if json_:
            typer.echo(json.dumps(found, indent=1))
        for path, problems in found.items():
            if problems:
                say(f"{path}: {'; '.join(problems)}")
            elif not quiet and not json_:
                typer.echo(f"{path}: whole")
        if any(found.values()):
            raise typer.Exit(4)
