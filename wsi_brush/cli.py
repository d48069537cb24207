"""The words.

Exit codes: 0 done (an empty slide is a valid result), 1 usage, 2 environment, 3 finished with failed slides or a slide
that cannot be read, 4 refused, 130 interrupted. Errors are one line on stderr; `--debug` shows the traceback too.
Results go to stdout (`--json`: one JSON value), progress to stderr: a bar on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import MachineError, SlideError, UsageError, WsiBrushError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .brush import Brush
    from .embed import SlideReport
    from .encoder import Encoder
    from .paint import Painting
    from .slide import Slide

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and what --json asks for.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it needs; write nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that wsi-brush made.")]
AssumeMpp = Annotated[
    float | None, typer.Option(help="Pixel size in µm for slides whose header has none.", metavar="MPP")
]
ForceMpp = Annotated[
    float | None, typer.Option(help="Pixel size in µm whatever the header says; recorded.", metavar="MPP")
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 for all.", min=0)]
_ENCODERS = "bundled, timm:NAME, hf-hub:ORG/NAME or a .safetensors file"


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
    with _errors(debug):
        from .embed import embed_slides
        from .encoder import load_encoder

        _prepare(threads)
        loaded = load_encoder(encoder)
        if dry_run:
            _print_plan(_plan_embedding(loaded, slides, out, assume_mpp, force_mpp), json_)
            return
        with _Shown(quiet) as progress:
            reports = embed_slides(
                slides, out, encoder=loaded, assume_mpp=assume_mpp, force_mpp=force_mpp, overwrite=overwrite,
                progress=lambda path, done, total: progress(path.name, done, total),
            )  # fmt: skip
        if json_:
            typer.echo(json.dumps([asdict(report) for report in reports], indent=1, default=str))
        elif not quiet:
            _print_table(reports)
        failed = [report for report in reports if report.exit_code]
        for report in failed:
            _say(report.message)
        if failed:
            raise typer.Exit(failed[0].exit_code if len(reports) == 1 else 3)


@app.command()
def synthesize(
    ref: Annotated[Path, typer.Option("--ref", help="The reference slide.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new slide, an OME-Zarr folder.")],
    region: Annotated[
        str | None, typer.Option(help="Where, in level-0 pixels of the reference.", metavar="TOP,LEFT,HEIGHT,WIDTH")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Instead of a region: the SIZE x SIZE pixels with the most tissue. [4096]")
    ] = None,
    mpp: Annotated[float, typer.Option(help="µm per pixel of the new slide.")] = 0.5,
    brush: Annotated[str, typer.Option(help="bundled, or the folder of a brush.")] = "bundled",
    encoder: Annotated[str | None, typer.Option(help=f"{_ENCODERS}. [the one that the brush names]")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another painting.", min=0, max=2**63 - 1)] = 0,
    steps: Annotated[int, typer.Option(help="Evaluations of the solver.", min=5, max=1000)] = 20,
    guidance: Annotated[
        float, typer.Option(help="How strongly the embeddings are followed; 1 is half the work.")
    ] = 1.5,
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
    with _errors(debug):
        if region is not None and size is not None:
            raise UsageError("--region and --size exclude each other; give one")
        if not math.isfinite(guidance):
            raise UsageError(f"--guidance {guidance}: expected a number, such as 2")
        place = _read_region(region)
        from .slide import open_slide

        slide = open_slide(
            ref, assume_mpp=assume_mpp, force_mpp=force_mpp
        )  # what is none is said before torch is loaded
        from .brush import load_brush
        from .encoder import load_encoder
        from .machine import peak_memory
        from .paint import Painting
        from .synthesize import synthesize_slide

        painting = Painting(4096 if size is None else size, place, mpp, seed, steps, guidance)
        _prepare(threads)
        loaded = load_brush(brush)
        if dry_run:
            _print_plan(_plan_painting(loaded, slide, out, painting), json_)
            return
        with _Shown(quiet) as progress:
            painted = synthesize_slide(
                ref, out, painting, brush=loaded, encoder=load_encoder(encoder or loaded.about["encoder"]),
                assume_mpp=assume_mpp, force_mpp=force_mpp, overwrite=overwrite, png=png, tell=progress,
            )  # fmt: skip
        cosine = {f"{pitch:g}": round(value, 4) for pitch, value in painted.cosine.items() if not math.isnan(value)}
        height, width = painted.shape
        result = {
            "path": str(painted.path), "synthetic": True, "height": height, "width": width, "mpp": mpp,
            "region": list(painted.region), "seed": seed, "seconds": round(painted.seconds, 1),
            "peak_memory_gb": round(peak_memory() / 1e9, 2), "cosine": cosine,
        }  # fmt: skip
        if json_:
            typer.echo(json.dumps(result, indent=1))
        elif not quiet:
            typer.echo(f"{painted.path}: synthetic, {height} x {width} pixels at {mpp:g} µm")
            typer.echo(f"after {ref.name}, region {','.join(map(str, painted.region))} (level-0 pixels), seed {seed}")
            typer.echo(f"took {painted.seconds:.0f} s and {result['peak_memory_gb']:.1f} GB")
            shown = ", ".join(f"{value:.3f} at {pitch} µm" for pitch, value in cosine.items())
            typer.echo(f"mean cosine of embeddings with the reference: {shown or 'no whole tile with tissue'}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; see pipelines/.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new brush.")],
    work: Annotated[Path | None, typer.Option(help="Folder of pack and checkpoints. [OUT.work]")] = None,
    slides: Annotated[Path, typer.Option(help="Folder that the configuration's slides are in.")] = Path(),
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Slides to a brush. Run again: goes on from the newest checkpoint."""
    with _errors(debug):
        from .train import read_config, train_brush

        read = read_config(config)
        work = work or out.resolve().with_name(f"{out.resolve().name}.work")
        if dry_run:
            minutes = read.optimisation.minutes
            budget = {"steps": read.optimisation.steps, "minutes": minutes if math.isfinite(minutes) else "no limit"}
            _print_plan({"slides": [source.path for source in read.data.slides], "work": str(work), **budget}, json_)
            return
        _prepare(read.optimisation.threads)
        tell: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        made = train_brush(read, out, work=work, slides=slides, overwrite=overwrite, tell=tell).about["training"]
        if json_:
            typer.echo(json.dumps({"path": str(out), "steps": made["steps"], "minutes": made["minutes"]}))
        elif not quiet:
            typer.echo(f"{out}: {made['steps']} steps in {made['minutes']} minutes")


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(help="Stores, pyramids or brushes.")],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Whether finished artefacts are whole: every file there, and as it was written."""
    with _errors(debug):
        from .commit import verify as find_problems

        found = {str(path): find_problems(path) for path in paths}
        if json_:
            typer.echo(json.dumps(found, indent=1))
        for path, problems in found.items():
            if problems:
                _say(f"{path}: {'; '.join(problems)}")
            elif not quiet and not json_:
                typer.echo(f"{path}: whole")
        if any(found.values()):
            raise typer.Exit(4)


# The base of the errors that the parser of options raises; Typer moved it between versions.
_MISUSE: type[typer.BadParameter] = typer.BadParameter.__mro__[2]


def main() -> NoReturn:
    """The `wsi-brush` command."""
    code = 1
    try:
        code = app(standalone_mode=False) or 0
    except _MISUSE as error:
        context = getattr(error, "ctx", None)
        _say(f"{error.format_message()} See: {context.command_path if context else 'wsi-brush'} --help")
    except typer.Abort:
        code = 130
    if code == 130:
        _interrupted()
    sys.exit(code)


# -- manners -------------------------------------------------------------------------------------------


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """What a user can put right becomes one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        _interrupted()
    except (WsiBrushError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, WsiBrushError):
            _say(str(error))
            raise typer.Exit(error.exit_code) from None
        if isinstance(error, OSError):
            _say(f"{error.filename or 'input or output'}: {error.strerror or error}")
        else:
            _say("out of memory; paint a smaller region, or on a larger machine")
        raise typer.Exit(MachineError.exit_code) from None


def _say(line: str) -> None:
    """One line on stderr, whatever is in it."""
    typer.echo(f"wsi-brush: {' '.join(line.split())}", err=True)


def _interrupted() -> NoReturn:
    """Leave at once: threads of zarr and torch may still be at work, and would complain on their way out."""
    _say("interrupted; run the same command again, it goes on from what is done")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def _prepare(threads: int) -> None:
    import torch

    from .machine import keep_memory

    keep_memory()
    if threads:
        torch.set_num_threads(threads)


def _read_region(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    try:
        top, left, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--region {text}: expected four whole numbers TOP,LEFT,HEIGHT,WIDTH in level-0 pixels"
        ) from None
    return top, left, height, width


def _plan_embedding(
    encoder: Encoder, paths: list[Path], out: Path, assume_mpp: float | None, force_mpp: float | None
) -> dict[str, Any]:
    """What would be embedded, and what it would need; slides that cannot be read are named."""
    import numpy as np

    from .embed import COVER, PITCHES, find_slides
    from .slide import open_slide
    from .tissue import find_tissue

    slides, failed, tiles = find_slides(paths), [], 0
    for path in slides:
        try:
            slide = open_slide(path, assume_mpp=assume_mpp, force_mpp=force_mpp)
            tissue = find_tissue(slide)
        except SlideError as error:
            failed.append(str(error))
        else:
            covers = [tissue.cover(slide.grid.at(encoder.tile * mpp)) for mpp in PITCHES]
            tiles += sum(int((cover >= COVER).sum()) for cover in covers)
    start = time.perf_counter()
    encoder(np.zeros((64, encoder.tile, encoder.tile, 3), np.uint8))
    minutes = (time.perf_counter() - start) / 64 * tiles / 60
    return {
        "slides": [str(path) for path in slides],
        "unreadable": failed,
        "tiles": tiles,
        "time": f"about {minutes:.1f} minutes, and the reading",
        "memory": "about 1 GB",
        "disk": f"about {tiles * encoder.dim * 2 / 1e6:.0f} MB",
        "output": str(out),
    }


def _plan_painting(brush: Brush, slide: Slide, out: Path, painting: Painting) -> dict[str, Any]:
    """Where would be painted, and what it would need: as measured with the bundled brush, 512 to 4096 pixels a side."""
    from .paint import estimate_seconds
    from .synthesize import choose_canvas
    from .tissue import find_tissue

    brush.ladder.starting_at(painting.mpp)  # before the slide is searched for tissue
    canvas = choose_canvas(slide, painting, find_tissue(slide))
    minutes = estimate_seconds(brush, canvas, painting) / 60
    pixels = canvas.height * canvas.width
    return {
        "canvas": f"{canvas.height} x {canvas.width} pixels at {canvas.mpp:g} µm",
        "corner": f"row {canvas.top}, column {canvas.left} (pixels at {canvas.mpp:g} µm)",
        "time": f"about {minutes:.1f} minutes of painting",
        "memory": f"about {1.1 + 1.6 * min(1, pixels / 2e6) + pixels * 90e-9:.1f} GB",
        "disk": f"at most {pixels * 4 / 1e6:.0f} MB",
        "output": f"{out}{' (exists)' if out.exists() else ''}",
    }


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan, indent=1))
        return
    for name, value in plan.items():
        typer.echo(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")


def _print_table(reports: list[SlideReport]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("slide", "status", "tiles", "seconds", "µm/px", "from")
    for one in reports:
        mpp = "" if one.mpp is None else f"{one.mpp:.4g}"
        table.add_row(escape(one.path.name), one.status, str(one.tiles), f"{one.seconds:.1f}", mpp, one.mpp_source)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


class _Shown:
    """Progress on stderr: a bar on a terminal, elsewhere a plain line at the start, every ten seconds, at the end."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._what, self._said = quiet, "", 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Shown:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

            columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._quiet:
            return
        new, self._what = what != self._what, what
        if self._bar is not None:
            if new or self._task is None:
                from rich.markup import escape

                self._task = self._bar.add_task(escape(what), total=total)
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if new or now - self._said > 10 or done >= total:
            self._said = now
            typer.echo(f"{what}: {100 * done // max(total, 1)} %", err=True)
