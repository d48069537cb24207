"""The words.

Exit codes: 0 done (an empty slide is a valid result), 1 usage, 2 environment, 3 finished with failed slides or a slide
that cannot be read, 4 refused, 130 interrupted. Errors are one line on stderr; `--debug` shows the traceback too.
Results go to stdout (`--json`: one JSON value), progress to stderr: a bar on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

from .. import __version__
from ..errors import UsageError
from . import files, plans
from .manners import Shown, errors, interrupted, prepare, print_figures, print_plan, print_table, say, say_terms
from .models import models
from .options import AssumeMpp, Debug, DryRun, ForceMpp, Json, Overwrite, Quiet, Threads

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_ENCODERS = "a name of `models list`, timm:NAME, hf-hub:ORG/NAME or a .safetensors file"
app.add_typer(models, name="models")


@app.callback(invoke_without_command=True)
def words(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Paint new tissue: whole-slide images to embeddings, and embeddings to new whole-slide images."""
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def embed(
    slides: Annotated[list[Path], typer.Argument(help="Slides, or folders of slides.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the stores, one a slide.")],
    encoder: Annotated[str, typer.Option(help=f"{_ENCODERS}.")] = "bundled",
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
        from ..embed import embed_slides
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


@app.command()
def synthesize(
    out: Annotated[Path, typer.Option("--out", "-o", help="The new slide, an OME-Zarr folder.")],
    ref: Annotated[Path | None, typer.Option("--ref", help="The reference slide.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Instead of a reference: what to paint, of a brush trained on labels.")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(help="Where, in level-0 pixels of the reference, or all.", metavar="TOP,LEFT,HEIGHT,WIDTH"),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Instead of a region: the SIZE x SIZE pixels with the most tissue. [4096]")
    ] = None,
    mpp: Annotated[float, typer.Option(help="µm per pixel of the new slide.")] = 0.5,
    brush: Annotated[str, typer.Option(help="bundled, or the folder of a brush.")] = "bundled",
    encoder: Annotated[str | None, typer.Option(help=f"{_ENCODERS}. [the one that the brush names]")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another painting.", min=0, max=2**63 - 1)] = 0,
    steps: Annotated[
        int, typer.Option(help="Evaluations over the range of noise; coarse pitches take more.", min=5, max=1000)
    ] = 20,
    guidance: Annotated[
        float, typer.Option(help="How strongly the embeddings are followed at high noise; 1: as trained.")
    ] = 2.0,
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
    with errors(debug):
        if (ref is None) == (label is None):
            found = "--ref and --label are missing" if ref is None else "--ref and --label exclude each other"
            raise UsageError(f"{found}; give --ref SLIDE, or --label NAME with a brush that was trained on labels")
        for word, given in (("--region", region), ("--encoder", encoder), ("--png", png)):
            if label is not None and given is not None:
                raise UsageError(f"{word}: is for a reference, and a label has none; leave it out")
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
        from ..machine import check_precision, find_device, peak_memory
        from ..paint import Painting, kept
        from ..synthesize import check_asked, synthesize_label, synthesize_slide

        painting = Painting(
            4096 if size is None else size, place, mpp, seed, steps, guidance, solver,
            progressive=progressive == "on", memory=memory, device=device, precision=precision,
        )  # fmt: skip
        prepare(threads, largest=kept(memory))
        check_precision(precision, find_device(device))
        loaded = load_brush(brush)
        check_asked(loaded, label)
        eyes = load_encoder(encoder or loaded.about["encoder"], device=device) if label is None else None
        if dry_run:
            print_plan(plans.plan_painting(loaded, eyes, slide, out, painting), json_)
            return
        client = connect(scheduler) if scheduler is not None else None
        with Shown(quiet) as progress, client or nullcontext():
            if label is not None:
                painted = synthesize_label(
                    label, out, painting, brush=loaded, overwrite=overwrite, client=client, tell=progress
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
            result |= {"region": list(painted.region), "cosine": cosine}
        else:
            result |= {"label": label}
        if json_:
            typer.echo(json.dumps(result, indent=1))
        elif not quiet:
            typer.echo(f"{painted.path}: synthetic, {height} x {width} pixels at {mpp:g} µm")
            asked = f"label {label}"
            if ref is not None and painted.region is not None:
                asked = f"after {ref.name}, region {','.join(map(str, painted.region))} (level-0 pixels)"
            typer.echo(f"{asked}, seed {seed}")
            typer.echo(f"took {painted.seconds:.0f} s and {result['peak_memory_gb']:.1f} GB")
            shown = ", ".join(f"{value:.3f} at {pitch} µm" for pitch, value in cosine.items())
            if label is None:
                typer.echo(f"mean cosine of embeddings with the reference: {shown or 'no whole tile with tissue'}")


@app.command()
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
    with errors(debug):
        from ..machine import check_precision, find_device
        from ..recipe import read_config
        from ..train import train_brush

        read = read_config(config)
        check_precision(read.optimisation.precision, find_device(device))
        work = work or out.resolve().with_name(f"{out.resolve().name}.work")
        if dry_run:
            minutes = read.optimisation.minutes
            budget = {"steps": read.optimisation.steps, "minutes": minutes if math.isfinite(minutes) else "no limit"}
            budget |= {"device": f"{device}, {read.optimisation.precision}"}
            found = {"slides": [source.path for source in read.data.slides], "files": len(read.data.sources(slides))}
            print_plan({**found, "work": str(work), **budget}, json_)
            return
        prepare(read.optimisation.threads)
        tell: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        options = {"work": work, "slides": slides, "device": device, "overwrite": overwrite}
        made = train_brush(read, out, **options, tell=tell).about["training"]  # type: ignore[arg-type]
        if json_:
            typer.echo(json.dumps({"path": str(out), "steps": made["steps"], "minutes": made["minutes"]}))
        elif not quiet:
            typer.echo(f"{out}: {made['steps']} steps in {made['minutes']} minutes")


class _Lists(TyperCommand):
    """A command whose options take as many values as follow: --real A B C is --real A --real B --real C."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {word for option in self.params if option.multiple for word in option.opts}
        spread: list[str] = []
        for word in args:
            if len(spread) > 1 and spread[-2] in many and not word.startswith("-"):
                spread.append(spread[-2])
            spread.append(word)
        return super().parse_args(ctx, spread)


@app.command(cls=_Lists)
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
    encoder: Annotated[list[str], typer.Option(help=f"{_ENCODERS}; several.")] = ["bundled"],  # noqa: B006
    codec: Annotated[str, typer.Option(help="What both sides go through first: jpeg:Q or none.")] = "jpeg:90",
    most: Annotated[int, typer.Option(help="Tiles of a side and scale that are looked at.", min=16)] = 1536,
    seed: Annotated[int, typer.Option(help="Draws tiles and intervals.", min=0)] = 0,
    published: Annotated[
        bool, typer.Option("--published", help="Also CLIP FID and Crop FID; their weights come from your caches.")
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the weights that --published lacks.")] = False,
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
        from ..evaluate import check_encoders, evaluate_slides
        from ..published import find_networks
        from ..report import KIND, write_report
        from ..samples import Codec
        from ..sides import open_all, open_sides

        Codec(codec)
        if download and not published:
            raise UsageError("--download: nothing is fetched without --published")
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
            sides = open_sides(*slides, tell=progress)
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


@app.command()
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


app.command()(files.export)
app.command()(files.info)

# The base of the errors that the parser of options raises; Typer moved it between versions.
_MISUSE: type[typer.BadParameter] = typer.BadParameter.__mro__[2]


def main() -> NoReturn:
    """The `wsi-brush` command."""
    code = 1
    try:
        code = app(standalone_mode=False) or 0
    except _MISUSE as error:
        context = getattr(error, "ctx", None)
        say(f"{error.format_message()} See: {context.command_path if context else 'wsi-brush'} --help")
    except typer.Abort:
        code = 130
    if code == 130:
        interrupted()
    sys.exit(code)


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
