"""The word for looking: a slide, or a painting beside its reference, in napari."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .manners import errors, print_facts
from .options import AssumeMpp, Debug, DryRun, Json, Quiet


def view(
    paths: Annotated[
        list[Path],
        typer.Argument(help="A slide, painting or store; or a real and a synthetic slide.", metavar="REAL [SYNTHETIC]"),
    ],
    heat: Annotated[bool, typer.Option("--heat", help="Compare them tile by tile, at 2 µm/px.")] = False,
    assume_mpp: AssumeMpp = None,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """See it in napari: one, or a real and a synthetic one side by side, linked."""
    with errors(debug):
        from ..view import open_viewer, plan_view

        if dry_run or json_:
            facts = plan_view(paths, heat=heat, assume_mpp=assume_mpp)
            if json_ or not quiet:
                print_facts(facts, json_)
            if dry_run:
                return
        open_viewer(paths, heat=heat, assume_mpp=assume_mpp)
        import napari

        napari.run()
