"""`python -m wsi_brush` is `wsi-brush`."""

from .cli import main

main()
