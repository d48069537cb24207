"""The widget "Synthesize": a new slide after a region of one that is open, seen while it sharpens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from magicgui.types import FileDialogMode
from magicgui.widgets import CheckBox, FileEdit, SpinBox

from wsi_brush.errors import WsiBrushError

from .choices import Choices
from .jobs import Picture, free_name, paint
from .layers import MICROMETRES, marked

if TYPE_CHECKING:
    import napari

PREVIEW = "synthetic: being painted"


class Synthesize(Choices):
    """Paints a file and opens it where its reference lies; stopped, Run with the same choices goes on."""

    def __init__(self, viewer: napari.viewer.Viewer) -> None:
        self.seed = SpinBox(label="seed", value=0, min=0, max=2**31 - 1, tooltip="Another seed, another painting.")
        self.file = FileEdit(
            label="output",
            mode=FileDialogMode.OPTIONAL_FILE,
            value=free_name(Path.cwd()),
            filter="*.zarr",
            tooltip="An OME-Zarr folder.",
        )
        self.overwrite = CheckBox(text="overwrite", value=False, tooltip="Replace a painting that is there.")
        super().__init__(viewer, [self.seed, self.file, self.overwrite], side=1024)

    def target(self) -> Path:
        """The file that is to be written; napari knows it by its ending."""
        path = Path(str(self.file.value))
        return path if path.suffix == ".zarr" else path.with_name(f"{path.name}.ome.zarr")

    def begin(self) -> None:
        """Run was pressed."""
        try:
            wish = self.asked(seed=self.seed.value)
        except WsiBrushError as error:
            self.refused(str(error))
            return
        target, overwrite = self.target(), self.overwrite.value
        self.go(
            f"wsi-brush paints {target.name}; what is done is kept",
            lambda job: paint(wish, target, overwrite=overwrite, tell=job.tell, look=job.show),
            shown=self._look, returned=self._open,
        )  # fmt: skip

    def stopped(self) -> None:
        """What is half done is kept beside the output, and looks like nothing that is finished."""
        self._clear()
        self.say("stopped; Run with the same choices goes on from here")

    def refused(self, line: str) -> None:
        """Neither is anything left of what failed."""
        self._clear()
        super().refused(line)

    def _look(self, picture: Picture) -> None:
        """What is painted so far, in its place, instead of what was there before."""
        place = self.placed(picture)
        layer = next(iter(self.layers_named(PREVIEW)), None)
        if layer is None:
            self.viewer.add_image(picture.pixels, name=PREVIEW, rgb=True, units=MICROMETRES, metadata=marked(), **place)
            return
        layer.data = picture.pixels
        layer.scale, layer.translate = place["scale"], place["translate"]

    def _clear(self) -> None:
        for layer in self.layers_named(PREVIEW):
            self.viewer.layers.remove(layer)

    def _open(self, painted: Any) -> None:
        """The finished file, where its reference lies."""
        self._clear()
        for layer in self.viewer.open(painted.path, plugin="wsi-brush"):
            layer.translate = layer.translate + self.origin
        cosines = ", ".join(f"{value:.2f} at {mpp:g} µm" for mpp, value in painted.cosine.items() if value == value)
        self.say(
            f"took {painted.seconds:.0f} s; cosine of embeddings with the reference {cosines or 'of no whole tile'}"
        )
        self.file.value = free_name(painted.path.parent)
