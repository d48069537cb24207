"""The options that every verb has, or many."""

from __future__ import annotations

from typing import Annotated

import typer

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
ENCODERS = "a name of `models list`, timm:NAME, hf-hub:ORG/NAME or a .safetensors file"
