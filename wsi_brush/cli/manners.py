"""How results, errors, progress and Ctrl-C look."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ..errors import MachineError, WsiBrushError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..cohort import Standing
    from ..embed import SlideReport
    from ..encoder import Encoder


@contextmanager
def errors(debug: bool, *, goes_on: bool = False) -> Iterator[None]:
    """What a user can put right becomes one line and an exit code; `goes_on`: the verb keeps what is done."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted(
            "run the same command again, it goes on from what is done" if goes_on else "the same command begins anew"
        )
    except (WsiBrushError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _says_no_memory(error):
            raise
        if debug:
            traceback.print_exc()
        if isinstance(error, WsiBrushError):
            say(str(error))
            raise typer.Exit(error.exit_code) from None
        if isinstance(error, OSError):
            say(f"{error.filename or 'input or output'}: {error.strerror or error}")
        else:
            say("out of memory; paint a smaller region, train with a smaller `batch`, or on a larger machine")
        raise typer.Exit(MachineError.exit_code) from None


def _says_no_memory(error: RuntimeError) -> bool:
    """torch's allocators: that of a GPU has an error of its own, that of the CPU says so with a plain RuntimeError."""
    return type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)


def say(line: str) -> None:
    """One line on stderr, whatever is in it."""
    typer.echo(f"wsi-brush: {' '.join(line.split())}", err=True)


def say_terms(encoder: Encoder) -> None:
    """What its licence asks, where it is not a free one."""
    from ..zoo import terms_line

    line = terms_line(encoder.name, **encoder.terms)
    if line is not None:
        say(line)


def interrupted(then: str = "") -> NoReturn:
    """Leave at once: threads of zarr and torch may still be at work, and would complain on their way out."""
    say(f"interrupted{then and f'; {then}'}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def prepare(threads: int, *, largest: int | None = None) -> None:
    import torch

    from ..machine import keep_memory

    keep_memory(largest)
    if threads:
        torch.set_num_threads(threads)


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan, indent=1))
        return
    for name, value in plan.items():
        typer.echo(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """What is known of something, a line for each fact and for each part of a list of parts."""
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for name, value in facts.items():
        parts = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        for part in parts:
            typer.echo(f"{name.replace('_', ' ')}: {_said(part)}")


def _said(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_said(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_said(part) for part in value) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_figures(figures: dict[str, Any]) -> None:
    """What an evaluation found, in a few lines."""
    for note in figures["notes"]:
        say(note)
    for name, scales in figures["scales"].items():
        for mpp, scale in scales.items():
            parts = [scale["missing"]] if "missing" in scale else [f"{scale['n']} tiles a half"]
            for figure in ("frechet", "kernel", "precision", "recall", "coverage"):
                one = scale.get(figure, {"missing": ""})
                if "missing" not in one:
                    parts.append(f"{figure} {one['value']:.3g} (floor {one['floor']:.3g})")
            typer.echo(f"{name}, {mpp} µm: {', '.join(parts)}")
    for name, one in (figures["published"] or {}).items():
        if name in ("clip", "crop"):
            typer.echo(_published(name, one))
    texture = figures["texture"]
    if "missing" in texture:
        typer.echo(f"texture: {texture['missing']}")
    else:
        ratios = " ".join("none" if ratio is None else f"{ratio:.2f}" for ratio in texture["octaves"]["ratio"])
        typer.echo(f"power of octaves, finest first, synthetic over real: {ratios}")
        if "missing" not in texture["nuclei"]:
            nuclei = [texture["nuclei"][side]["density"] for side in ("real", "synthetic")]
            typer.echo(f"nuclei per mm²: {nuclei[0]:.0f} real, {nuclei[1]:.0f} synthetic")
    for name, one in (figures["control"] or {}).items():
        cosines = ", ".join(f"{c['mean']:.3f} at {mpp} µm" for mpp, c in one["cosine"].items() if "mean" in c)
        found = one["retrieval"]
        top = f"; own reference first of {found['regions']}: {100 * found['top1']:.0f} %" if "top1" in found else ""
        typer.echo(f"cosine with the reference in {name}: {cosines or 'too few tiles'}{top}")
    if figures["copying"]:
        _print_copying(figures["copying"])


def _print_copying(found: dict[str, Any]) -> None:
    if "missing" in found:
        typer.echo(f"copies: {found['missing']}")
        return
    share, near = found["share"], found["correlation"]
    floor = "" if share["floor"] is None else f" (floor {100 * share['floor']:.2g} %)"
    typer.echo(
        f"copies: {100 * share['value']:.2g} % of {found['synthetic']} tiles{floor}; correlation with the nearest "
        f"training tile {near['value']:.2f}, of held-out real ones {near['floor']:.2f}"
    )


def _published(name: str, one: dict[str, Any]) -> str:
    parts = [one["missing"]] if "missing" in one else []
    for key, word in (("frechet", "FID"), ("kernel", "KID")):
        found = one.get(key, {"missing": ""})
        if "missing" not in found:
            beside = ", ".join(f"{part} {found[part]:.3g}" for part in ("floor", "thumbnail"))
            parts.append(f"{word} {found['value']:.3g} ({beside})")
    words = {"clip": "CLIP", "crop": "Crop"}[name]
    return f"{words}, {one.get('n', 0)} squares of {one['side']} pixels: {', '.join(parts)}"


def print_table(reports: list[SlideReport]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("slide", "status", "tiles", "bad tiles", "seconds", "µm/px", "from")
    for one in reports:
        mpp = "" if one.mpp is None else f"{one.mpp:.4g}"
        bad = str(one.bad_tiles) if one.bad_tiles else ""
        table.add_row(escape(one.path.name), one.status, str(one.tiles), bad, f"{one.seconds:.1f}", mpp, one.mpp_source)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def show_standing(shown: Shown, standing: Standing) -> None:
    """One slide by its tiles; of several how many have ended, tiles a second, and the time that is left."""
    if standing.slides == 1:
        shown(standing.slide, *standing.here)
        return
    parts = [f"{standing.ended} done" + (f" ({standing.failed} failed)" if standing.failed else "")]
    parts += [f"{standing.rate:.0f} tiles/s"] if standing.rate else []
    if standing.left is not None and standing.ended < standing.slides:
        parts.append(f"{_clock(standing.left)} left")
    shown(f"{standing.slides} slides", int(1000 * standing.share), 1000, ", ".join(parts))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


class Shown:
    """Progress on stderr: a bar on a terminal, elsewhere a plain line at the start, every ten seconds, at the end."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._what, self._said = quiet, "", 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Shown:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            note = TextColumn("{task.fields[note]}", markup=False)
            columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn(), note)
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """`note`: what else is to be said of it."""
        if self._quiet:
            return
        new, self._what = what != self._what, what
        if self._bar is not None:
            if new or self._task is None:
                from rich.markup import escape

                self._task = self._bar.add_task(escape(what), total=total, note="")
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if new or now - self._said > 10 or done >= total:
            self._said = now
            typer.echo(f"{what}: {100 * done // max(total, 1)} %{note and f', {note}'}", err=True)
