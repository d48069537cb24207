"""The widget "Seeds": one place painted with several seeds, side by side; a click takes one of them over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from magicgui.widgets import SpinBox
from napari.layers import Layer

from wsi_brush.errors import WsiBrushError

from .choices import Choices
from .jobs import Picture, Seeded, paint_seeds
from .layers import MICROMETRES, marked

if TYPE_CHECKING:
    import napari

REFERENCE = "seeds: reference"
_GAP = 1 / 16  # between two of a strip, of a side


class Seeds(Choices):
    """A strip beside the slide: the reference, then a painting a seed, each of which appears as it is made."""

    def __init__(self, viewer: napari.viewer.Viewer) -> None:
        self.first = SpinBox(label="first seed", value=0, min=0, max=2**31 - 100, tooltip="And those that follow it.")
        self.many = SpinBox(label="seeds", value=4, min=1, max=64, tooltip="How many paintings.")
        super().__init__(viewer, [self.first, self.many], side=512)
        self._start = self._step = 0.0  # of the strip, µm to the right of the place itself
        viewer.mouse_drag_callbacks.append(self._click)

    def times(self) -> int:
        """How often the place is painted."""
        return int(self.many.value)

    def begin(self) -> None:
        """Run was pressed."""
        try:
            wish = self.asked()
        except WsiBrushError as error:
            self.refused(str(error))
            return
        seeds = range(self.first.value, self.first.value + self.many.value)
        self.clear_strip()
        self.go(
            f"wsi-brush paints {len(seeds)} seeds",
            lambda job: paint_seeds(wish, seeds, tell=job.tell, look=job.show),
            shown=self._look, returned=self._done,
        )  # fmt: skip

    def stopped(self) -> None:
        """Those that are finished stay."""
        for layer in self.strip():
            if not layer.metadata["finished"]:
                self.viewer.layers.remove(layer)
        self.say("stopped; the seeds that are finished stay")

    def strip(self) -> list[Layer]:
        """The layers of the strip, from left to right."""
        found = [layer for layer in self.viewer.layers if "strip" in layer.metadata]
        return sorted(found, key=lambda layer: layer.metadata["strip"])

    def clear_strip(self) -> None:
        """Take the strip away."""
        for layer in self.strip():
            self.viewer.layers.remove(layer)

    def _look(self, one: Seeded) -> None:
        """One of the strip, new or sharper than it was."""
        if one.seed is None:
            self._begin_strip(one.picture)
        place = self.placed(one.picture, beside=(0.0, self._start + one.number * self._step))
        name = REFERENCE if one.seed is None else f"synthetic: seed {one.seed}"
        layer = next((layer for layer in self.strip() if layer.metadata["strip"] == one.number), None)
        if layer is None:
            about: dict[str, Any] = {"strip": one.number, "seed": one.seed}
            if one.seed is not None:
                about |= marked(seed=one.seed)
            layer = self.viewer.add_image(
                one.picture.pixels, name=name, rgb=True, units=MICROMETRES, metadata=about, **place
            )
        else:
            layer.data = one.picture.pixels
            layer.scale, layer.translate = place["scale"], place["translate"]
        layer.metadata["finished"] = one.finished
        if one.seed is None:
            self._frame(layer)

    def _begin_strip(self, picture: Picture) -> None:
        """To the right of the slide, so that it covers nothing of it."""
        side = picture.pixels.shape[1] * picture.mpp
        self._step = side * (1 + _GAP)
        self._start = self.right + side * _GAP - picture.corner[1]

    def _frame(self, layer: Layer) -> None:
        """All of the strip to be seen, wherever the slide is."""
        (top, left), (bottom, _) = (edge[-2:] for edge in layer.extent.world)
        width = self._step * (self.many.value + 1)
        self.viewer.scene.camera.center = ((top + bottom) / 2, left + width / 2)
        self.viewer.scene.camera.zoom = 0.95 * min(self.viewer.canvas.size / np.array((bottom - top, width)))

    def _done(self, shape: tuple[int, int]) -> None:
        self.say("a click on one takes its seed and its place over into Synthesize")

    def _click(self, _: Any, event: Any) -> Iterator[None]:
        """A press and a release with no way between, on one of the strip."""
        yield
        if event.type == "mouse_release" and not self._gone:
            for layer in self.strip():
                seed = layer.metadata["seed"]
                low, high = (edge[-2:] for edge in layer.extent.world)
                if seed is not None and all(low <= event.position[-2:]) and all(event.position[-2:] <= high):
                    self.take(seed)

    def take(self, seed: int) -> None:
        """The widget that paints a file, with this seed and all else as it is here."""
        _, other = self.viewer.window.add_plugin_dock_widget("wsi-brush", "Synthesize", tabify=True)
        for name in ("reference", "region", "brush", "side", "mpp", "steps", "guidance"):
            getattr(other, name).value = getattr(self, name).value
        other.seed.value = seed
        self.say(f"seed {seed} is taken over into Synthesize")
