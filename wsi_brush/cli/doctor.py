"""The words of `doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MachineError
from .manners import errors, print_facts, say
from .options import AssumeMpp, Debug, ForceMpp, Json, Quiet

if TYPE_CHECKING:
    from ..headers import Examined, Finding


def doctor(
    slides: Annotated[list[Path] | None, typer.Argument(help="Slides, or folders of slides.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where results will go: is there room?")] = Path(),
    assume_mpp: AssumeMpp = None,
    force_mpp: ForceMpp = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Whether this machine, the weights and the slides' headers are fit; OK, look or bad. Nothing heavy is loaded."""
    with errors(debug), _packages_missing():
        from ..doctor import check_machine, check_weights, exit_code, free_disk
        from ..headers import check_cohort, check_slide
        from ..inputs import find_inputs

        inputs = find_inputs(slides or [])

        def show(finding: Finding) -> None:
            if json_:
                return
            if not quiet:
                typer.echo(f"{finding.status:<5}{finding.about}: {finding.said}")
            elif finding.status == "bad":
                say(f"{finding.about}: {finding.said}")

        machine: list[Finding] = []
        weights: list[Finding] = []
        examined: list[Examined] = []
        for part, findings in ((machine, check_machine(out)), (weights, check_weights())):
            for finding in findings:
                part.append(finding)
                show(finding)
        for one in inputs:
            examined.append(check_slide(one.path, assume_mpp=one.assumed(assume_mpp), force_mpp=force_mpp))
            for finding in examined[-1].findings:
                show(finding)
        cohort = check_cohort(examined, free_disk(out)) if len(examined) > 1 else None
        if cohort is not None:
            show(cohort)
        code = exit_code([*machine, *weights], examined)
        if json_:
            found = {
                "exit_code": code,
                "machine": [asdict(one) for one in machine],
                "weights": [asdict(one) for one in weights],
                "slides": [asdict(one) | {"path": str(one.path)} for one in examined],
                "cohort": None if cohort is None else asdict(cohort),
            }
            print_facts(found, as_json=True)
        if code:
            raise typer.Exit(code)


@contextmanager
def _packages_missing() -> Iterator[None]:
    """Without some packages not even the doctor goes on."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MachineError(f"{error.name}: not installed; install wsi-brush again, with all that it needs") from None
