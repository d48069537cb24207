"""The words.

Exit codes: 0 done (an empty slide is a valid result), 1 usage, 2 environment, 3 finished with failed slides or a slide
that cannot be read, 4 refused, 130 interrupted. Errors are one line on stderr; `--debug` shows the traceback too.
Results go to stdout (`--json`: one JSON value), progress to stderr: a bar on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from .. import __version__
from . import doctor, embedding, evaluation, files, painting, sample, training, viewing
from .manners import interrupted, say
from .models import models

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def words(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Paint new tissue: whole-slide images to embeddings, and embeddings to new whole-slide images."""
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(embedding.embed)
app.command()(painting.synthesize)
app.command()(training.train)
app.command(cls=evaluation.Lists)(evaluation.evaluate)
app.command()(files.verify)
app.command()(files.export)
app.command()(files.info)
app.command()(sample.sample)
app.command()(doctor.doctor)
app.command()(viewing.view)
app.add_typer(models, name="models")

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
