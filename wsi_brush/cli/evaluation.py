"""The words of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import UsageError
from . import plans
from .manners import Shown, errors, prepare, print_figures, print_plan, say
from .options import ENCODERS, AssumeMpp, Debug, DryRun, ForceMpp, Json, Overwrite, Quiet, Threads


class Lists(TyperCommand):
    """A command whose options take as many values as follow: --real A B C is --real A --real B --real C."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {word for option in self.params if option.multiple for word in option.opts}
        spread: list[str] = []
        for word in args:
            if len(spread) > 1 and spread[-2] in many and not word.startswith("-"):
                spread.append(spread[-2])
            spread.append(word)
        return super().parse_args(ctx, spread)


def evaluate(
    real: Annotated[list[Path], typer.Option("--real", help="Real slides, or folders of them.", metavar="SLIDE...")],
    synthetic: Annotated[
        list[Path], typer.Option("--synthetic", help="Synthetic slides, in the same order.", metavar="SLIDE...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report.json and report.html.")],
    training: Annotated[
        list[Path] | None,
        typer.Option("--training", help="What the brush was trained on: searched for copies.", metavar="SLIDE..."),
    ] = None,
    trained_until: Annotated[
        float,
        typer.Option(
            help="Part of their width, from the left, that was trained on; `train` takes 0.75.", min=0.01, max=1
        ),
    ] = 1.0,
    encoder: Annotated[list[str], typer.Option(help=f"{ENCODERS}; several.")] = ["bundled"],  # noqa: B006
    codec: Annotated[
        str, typer.Option(help="What both sides go through first, but for lattices: jpeg:Q or none.")
    ] = "jpeg:90",
    most: Annotated[
        int,
        typer.Option(
            help="Tiles of a side and scale at most; control has 256, copies 400; windows of texture are a 32nd.",
            min=16,
        ),
    ] = 1536,
    seed: Annotated[int, typer.Option(help="Draws tiles and intervals.", min=0)] = 0,
    published: Annotated[
        bool, typer.Option("--published", help="Also CLIP FID and Crop FID; their weights come from your caches.")
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the weights that --published lacks.")] = False,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="No slides are pairs because of their order.")] = False,
    assume_mpp: AssumeMpp = None,
    force_mpp: ForceMpp = None,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Real and synthetic slides to a report: how near they are, beside how near real is to real."""
    with errors(debug):
        from ..commit import check_target
        from ..encoder import load_encoder
        from ..evaluate import check_encoders, evaluate_slides, without_figures
        from ..published import find_networks
        from ..report import KIND, write_report
        from ..samples import Codec
        from ..sides import open_all, open_sides

        Codec(codec)
        if download and not published:
            raise UsageError("--download: nothing is fetched without --published")
        if trained_until != 1 and not training:
            raise UsageError("--trained-until: nothing is searched for copies without --training")
        # what is none is said at once
        *slides, searched = (
            open_all(paths, assume_mpp=assume_mpp, force_mpp=force_mpp) for paths in (real, synthetic, training or [])
        )
        prepare(threads)
        loaded = [load_encoder(name) for name in encoder]
        check_encoders(loaded)
        if dry_run:
            plan = plans.plan_evaluation(slides, loaded, out, most, searched, trained_until, published=published)
            print_plan(plan, json_)
            return
        check_target(out, kind=KIND, overwrite=overwrite)
        with Shown(quiet) as progress:
            networks = find_networks(download=download, tell=progress) if published else None
            sides = open_sides(*slides, by_order=not unpaired, tell=progress)
            figures = evaluate_slides(
                sides, encoders=loaded, codec=codec, most=most, seed=seed, networks=networks, training=searched,
                trained_until=trained_until, tell=progress,
            )  # fmt: skip
        write_report(out, sides, figures, overwrite=overwrite)
        if json_:
            typer.echo(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False))
        elif not quiet:
            print_figures(figures)
            typer.echo(f"{out / 'report.html'}: all of it, with pictures; took {figures['seconds']:.0f} s")
        if (why := without_figures(figures)) is not None:
            say(f"{out}: nothing can be said of how like the two sides are: {why}")
