"""Verb: slides -> stores. One slide that fails costs itself only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from .embed import SlideReport, TileEncoder, check_outlines, embed_slide, named_slides
from .errors import MachineError, SlideError, UsageError, WsiBrushError


def embed_slides(
    paths: Iterable[Path | str],
    out: Path | str,
    *,
    encoder: TileEncoder,
    assume_mpp: float | None = None,
    force_mpp: float | None = None,
    overwrite: bool = False,
    progress: Callable[[Path, int, int], None] | None = None,
    outlines: Path | None = None,
) -> list[SlideReport]:
    """Embed slides and folders of slides; one that fails costs itself only. `progress` also gets the slide.

    Raises:
        UsageError: if a folder holds no slides, or there is one file of outlines for several.
        MachineError: if `out` cannot be written to, or the disk is full.
    """
    reports, slides = [], list(named_slides(paths))
    check_outlines(outlines, len(slides))
    for path, name in slides:
        tell = None if progress is None else (lambda done, total, path=path: progress(path, done, total))
        try:
            report = embed_slide(
                path,
                out,
                encoder=encoder,
                assume_mpp=assume_mpp,
                force_mpp=force_mpp,
                overwrite=overwrite,
                progress=tell,
                name=name,
                outlines=outlines,
            )
        except (UsageError, MachineError):
            raise  # would cost every slide that follows
        except WsiBrushError as error:
            report = SlideReport(
                path, Path(out) / f"{name}.zarr", "failed", message=str(error), exit_code=error.exit_code
            )
        except OSError as error:
            line = f"{path}: {error.strerror or error}"
            report = SlideReport(
                path, Path(out) / f"{name}.zarr", "failed", message=line, exit_code=SlideError.exit_code
            )
        reports.append(report)
    return reports
