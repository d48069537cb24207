"""`wsi-brush models`: which encoders there are, fetching their weights, and trying them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .manners import errors, prepare, say
from .options import Debug, Json

models = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Encoders by name.")

Name = Annotated[str, typer.Argument(help="A name of `models list`, timm:NAME or hf-hub:ORG/NAME.")]
_UNKNOWN = "not known"


@models.command("list")
def list_(json_: Json = False, debug: Debug = False) -> None:
    """All encoders: what they see, their licence, whether they are gated, and whether their weights are here."""
    with errors(debug):
        from ..hub import state_of
        from ..zoo import entries

        found = [
            {**asdict(entry), "kwargs": dict(entry.kwargs), "home": entry.home, "here": state_of(entry)}
            for entry in entries()
        ]
        if json_:
            typer.echo(json.dumps(found, indent=1))
        else:
            _print(found)


@models.command()
def fetch(name: Name, json_: Json = False, debug: Debug = False) -> None:
    """Fetch the weights of an encoder into the hub's cache: the one command for encoders that needs a network."""
    with errors(debug):
        from ..hub import fetch as fetch_weights

        path, left = fetch_weights(name)
        if json_:
            typer.echo(json.dumps({"name": name, "path": str(path), "left": left}, indent=1))
        else:
            typer.echo(f"{name}: {path}")
            if left is not None:
                say(f"{name}: {left}")


@models.command()
def verify(
    name: Annotated[str, typer.Argument(help="What --encoder takes.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Load an encoder and run it on a made tile: shape, finite numbers, and the golden vector where one is known."""
    with errors(debug):
        from ..encoder import load_encoder
        from ..golden import verify as try_out

        prepare(0)
        found = try_out(load_encoder(name, device=device))
        if json_:
            typer.echo(json.dumps(asdict(found), indent=1))
        else:
            typer.echo(f"{found.name}: {found.dim} numbers of a tile of {found.tile} px; golden vector {found.golden}")
        if found.problem is not None:
            say(found.problem)
            raise typer.Exit(4)


def _print(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "tile", "numbers", "pooling", "µm/px", "size", "licence", "access", "here")
    for one in found:
        mpp = " ".join(f"{value:g}" for value in one["mpp"] or ()) or _UNKNOWN
        access = {True: "gated", False: "open", None: _UNKNOWN}[one["gated"]]
        licence = (one["licence"] or _UNKNOWN) + (" *" if one["outputs"] else "")
        size = one["parameters"] or ("small" if one["here"] == "bundled" else _UNKNOWN)
        table.add_row(
            one["id"], str(one["tile"]), str(one["dim"]), one["pooling"], mpp, size, licence, access, one["here"]
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for one in found:
        if one["outputs"]:
            typer.echo(f"* {one['id']}: {one['outputs']}")
