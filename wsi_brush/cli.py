"""The words.

Exit codes: 0 done (an empty slide is a valid result), 1 usage, 2 environment, 3 finished with failed slides or a
slide that cannot be read, 4 refused, 130 interrupted. Errors are one line on stderr; `--debug` shows the traceback. Results go
to stdout (`--json`: one JSON value), progress to stderr: a bar on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import MachineError, UsageError, WsiBrushError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it needs; do nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that wsi-brush made.")]
AssumeMpp = Annotated[
    float | None, typer.Option(help="Pixel size in µm for slides whose header has none.", metavar="MPP")
]
ForceMpp = Annotated[
    float | None, typer.Option(help="Pixel size in µm whatever the header says; recorded.", metavar="MPP")
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 for all.", min=0)]
EncoderName = Annotated[
    str, typer.Option("--encoder", help="bundled, timm:NAME, hf-hub:ORG/NAME or a .safetensors file.")
]


@app.callback(invoke_without_command=True)
def words(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Paint new tissue: whole-slide images to embeddings, and embeddings to new whole-slide images."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def embed(
    slides: Annotated[list[Path], typer.Argument(help="Slides, or folders of slides.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the stores, one a slide.")],
    encoder: EncoderName = "bundled",
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
        from .embed import embed_slides, find_slides
        from .encoder import load_encoder

        if dry_run:
            _print_plan({"slides": [str(path) for path in find_slides(slides)], "stores": str(out)}, json_)
            return
        _prepare(threads)
        loaded = load_encoder(encoder)
        with _Progress(quiet) as progress:
            reports = embed_slides(
                slides, out, encoder=loaded, assume_mpp=assume_mpp, force_mpp=force_mpp, overwrite=overwrite,
                progress=lambda path, done, total: progress(path.name, done, total),
            )  # fmt: skip
        rows = [
            {
                "slide": str(report.path), "store": str(report.store), "status": report.status, "tiles": report.tiles,
                "seconds": round(report.seconds, 1), "mpp": report.mpp, "mpp_source": report.mpp_source,
                "message": report.message,
            }
            for report in reports
        ]  # fmt: skip
        if json_:
            typer.echo(json.dumps(rows, indent=1))
        else:
            _print_table(rows)
        codes = [report.exit_code for report in reports if report.exit_code]
        if codes:
            raise typer.Exit(codes[0] if len(codes) == len(reports) == 1 else 3)


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
    seed: Annotated[int, typer.Option(help="Another seed, another painting.")] = 0,
    steps: Annotated[int, typer.Option(help="Evaluations of the solver.", min=5, max=1000)] = 20,
    guidance: Annotated[
        float, typer.Option(help="How strongly the embeddings are followed; 1 is half the work.")
    ] = 2.0,
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
            raise UsageError(f"a guidance of {guidance} makes no sense; give a number, such as --guidance 2")
        from .slide import open_slide
        from .synthesize import Painting, choose_canvas, synthesize_slide
        from .tissue import find_tissue

        painting = Painting(
            size=4096 if size is None else size,
            region=_read_region(region),
            mpp=mpp,
            seed=seed,
            steps=steps,
            guidance=guidance,
        )
        if dry_run:
            slide = open_slide(ref, assume_mpp=assume_mpp, force_mpp=force_mpp)
            canvas = choose_canvas(slide, painting, find_tissue(slide))
            pixels = canvas.height * canvas.width
            _print_plan(
                {
                    "canvas": f"{canvas.height} x {canvas.width} pixels at {canvas.mpp:g} µm",
                    "corner": f"{canvas.top}, {canvas.left} (pixels at {canvas.mpp:g} µm)",
                    "memory": f"about {1.2 + pixels * 90 / 1e9:.1f} GB",
                    "disk": f"about {pixels * 3.5 / 1e6:.0f} MB",
                },
                json_,
            )
            return
        from .brush import load_brush
        from .encoder import load_encoder

        _prepare(threads)
        loaded = load_brush(brush)
        with _Progress(quiet) as progress:
            painted = synthesize_slide(
                ref, out, painting, brush=loaded, encoder=load_encoder(loaded.about["encoder"]), assume_mpp=assume_mpp,
                force_mpp=force_mpp, overwrite=overwrite, png=png, tell=progress,
            )  # fmt: skip
        from .machine import peak_memory

        cosine = {f"{pitch:g}": round(value, 4) for pitch, value in painted.cosine.items() if not math.isnan(value)}
        gigabytes = round(peak_memory() / 1e9, 2)
        result = {
            **{"path": str(painted.path), "synthetic": True, "height": painted.shape[0], "width": painted.shape[1]},
            **{"mpp": mpp, "region": list(painted.region), "seconds": round(painted.seconds, 1)},
            **{"peak_memory_gb": gigabytes, "cosine": cosine},
        }
        if json_:
            typer.echo(json.dumps(result, indent=1))
            return
        top, left, height, width = painted.region
        typer.echo(f"{painted.path}: synthetic, {painted.shape[0]} x {painted.shape[1]} pixels at {mpp:g} µm")
        typer.echo(f"after {ref.name}, region {top},{left},{height},{width} (level-0 pixels), seed {seed}")
        typer.echo(f"took {painted.seconds:.0f} s and {gigabytes:.1f} GB")
        shown = ", ".join(f"{value:.3f} at {pitch} µm" for pitch, value in cosine.items())
        typer.echo(f"mean cosine of embeddings with the reference: {shown or 'no whole tile with tissue in both'}")


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
        work = work or out.with_name(f"{out.name}.work")
        if dry_run:
            budget = {"steps": read.optimisation.steps, "minutes": read.optimisation.minutes}
            _print_plan({"slides": [source.path for source in read.data.slides], "work": str(work), **budget}, json_)
            return
        _prepare(read.optimisation.threads)
        tell: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        brush = train_brush(read, out, work=work, slides=slides, overwrite=overwrite, tell=tell)
        result = {
            "path": str(out),
            "steps": brush.about["training"]["steps"],
            "minutes": brush.about["training"]["minutes"],
        }
        typer.echo(json.dumps(result) if json_ else f"{out}: {result['steps']} steps in {result['minutes']} minutes")


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(help="Stores, pyramids or brushes.")],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Whether finished artefacts are whole: every file there, and as it was written."""
    with _errors(debug):
        from .commit import verify as find_problems

        found = {str(path): find_problems(path) for path in paths}
        if json_:
            typer.echo(json.dumps(found, indent=1))
        else:
            for path, problems in found.items():
                typer.echo(f"{path}: {'; '.join(problems) if problems else 'whole'}")
        if any(found.values()):
            raise typer.Exit(4)


def main() -> NoReturn:
    """The `wsi-brush` command."""
    try:
        app()
    except KeyboardInterrupt:
        _interrupted()
    sys.exit(0)


# -- manners -------------------------------------------------------------------------------------------


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """What a user can put right becomes one line and an exit code."""
    try:
        yield
    except WsiBrushError as error:
        if debug:
            raise
        _fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        _interrupted()
    except MemoryError:
        if debug:
            raise
        _fail("out of memory; paint a smaller region, or on a larger machine", MachineError.exit_code)
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", MachineError.exit_code)


def _fail(line: str, code: int) -> NoReturn:
    typer.echo(f"wsi-brush: {line}", err=True)
    raise typer.Exit(code)


def _interrupted() -> NoReturn:
    typer.echo("wsi-brush: interrupted; nothing unfinished was left, run the same command again", err=True)
    sys.exit(130)


def _prepare(threads: int) -> None:
    import torch

    from .machine import keep_memory

    keep_memory()
    torch.set_num_threads(threads or os.cpu_count() or 1)


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


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan, indent=1))
        return
    for name, value in plan.items():
        typer.echo(f"{name}: {', '.join(value) if isinstance(value, list) else value}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("slide", "status", "tiles", "seconds", "µm/px", "from", "")
    for row in rows:
        mpp = "" if row["mpp"] is None else f"{row['mpp']:.4g}"
        cells = (Path(row["slide"]).name, row["status"], str(row["tiles"]), str(row["seconds"]), mpp, row["mpp_source"])
        table.add_row(*cells, row["message"])
    Console(width=None if sys.stdout.isatty() else 200).print(table)


class _Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._bar, self._task, self._what, self._said = quiet, None, None, "", 0.0

    def __enter__(self) -> _Progress:
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
        if self._bar is not None:
            if what != self._what or self._task is None:
                self._what, self._task = what, self._bar.add_task(what, total=total)
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if what != self._what or now - self._said > 10 or done >= total:
            self._what, self._said = what, now
            typer.echo(f"{what}: {100 * done // max(total, 1)} %", err=True)
