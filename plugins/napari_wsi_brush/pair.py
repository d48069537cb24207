"""Two pictures in one viewer: side by side, one over the other with a swipe line, or in turn. Needs no window.

Side by side is napari's grid: two cells, one camera, so what moves in one moves in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .under import about_of, is_picture, is_synthetic

SIDE, SWIPE, FLICKER = "side by side", "swipe", "flicker"
MODES = (SIDE, SWIPE, FLICKER)
GAP = 4
"""Pixels of the screen between the two cells."""


def pictures(viewer: Any) -> list[Any]:
    """The layers that can be one of a pair: colour images, but no map of embeddings or of similarity."""
    return [layer for layer in viewer.layers if is_picture(layer)]


def facts_of(layer: Any) -> str:
    """What stands on a painting of how it came to be, in words: seed, guidance, steps; nothing of other pictures."""
    if not is_synthetic(layer):
        return ""
    known = about_of(layer)
    parts = [
        f"{name} {known[name]:g}" for name in ("seed", "guidance", "steps") if isinstance(known.get(name), int | float)
    ]
    parts += [f"label {known['label']}"] if known.get("label") else []
    return "\n".join(["SYNTHETIC, not for diagnosis", ", ".join(parts)]).strip()


class Pair:
    """How a real and a synthetic layer are shown. `maps` are layers of similarity, for the real and the synthetic side.

    `first` stands left, or is what the other is laid over.
    """

    def __init__(self, viewer: Any, real: Any, synthetic: Any) -> None:
        self.viewer, self.real, self.synthetic = viewer, real, synthetic
        self.mode, self.swapped, self.over = SIDE, False, True
        self.maps: tuple[Any, Any] | None = None
        self._hidden: list[Any] = []

    @property
    def sides(self) -> tuple[Any, Any]:
        """What stands left (or below), and right (or above)."""
        return (self.synthetic, self.real) if self.swapped else (self.real, self.synthetic)

    @property
    def shift(self) -> tuple[float, float]:
        """Where the synthetic corner lies on the real picture: down and right, µm."""
        down, right = (self.synthetic.translate - self.real.translate)[-2:]
        return float(down), float(right)

    def show(self, mode: str | None = None, *, swapped: bool | None = None, over: bool | None = None) -> None:
        """Arrange the layers anew; what is not said stays. `over`: in turn, whether the upper picture is shown."""
        self.mode = self.mode if mode is None else mode
        self.swapped = self.swapped if swapped is None else swapped
        self.over = self.over if over is None else over
        for layer in pictures(self.viewer):
            if layer not in self.sides and layer.visible:
                layer.visible = False
                self._hidden.append(layer)
        first, second = self.sides
        side = self.mode == SIDE
        first.opacity, second.opacity = 1.0, 1.0 if side or self.over or self.mode != FLICKER else 0.0
        for layer in self.sides:
            if not layer.visible:
                layer.visible = True  # napari draws the scene anew at each word of it
            layer.name_overlay.visible, layer.name_overlay.font_size = side, 8
        below, above = self.maps or (None, None)
        if self.swapped:
            below, above = above, below
        others = [layer for layer in self.viewer.layers if layer not in (*self.sides, below, above)]
        left, right = [first, *others, *_there(below)], [second, *_there(above)]
        if side:
            self._order([*left, *right])
        else:
            self._order([first, second, *_there(below), *others, *_there(above)])
        if self.maps is not None:
            self.maps[0].visible = side and self.maps[1].visible  # they lie on each other else
        grid = self.viewer.canvas.grid
        grid.stride, grid.shape, grid.spacing = len(left), (1, 2), GAP
        grid.enabled = side
        bar, text = self.viewer.canvas.overlays.scale_bar, self.viewer.canvas.overlays.text
        bar.visible, bar.gridded, bar.font_size = True, True, 8
        corners = ["bottom_left", "bottom_right"]
        if self.swapped:
            corners.reverse()
        bar.position = corners[0] if side else "bottom_right"
        text.position = corners[1] if side else "top_left"  # in the painting's cell: nothing real is called synthetic
        text.font_size, text.gridded = 7, False
        text.visible, text.text = True, self.caption()

    def caption(self) -> str:
        """What is known of the painting, and where no cell has its name on it, what is seen where."""
        first, second = (layer.name for layer in self.sides)
        facts = [fact for fact in map(facts_of, (self.real, self.synthetic)) if fact]
        if self.mode == SIDE:
            return "\n".join(facts)
        if self.mode == FLICKER:
            return "\n".join([f"shown: {second if self.over else first}", *facts])
        return "\n".join([f"left: {first}", f"right: {second}", *facts])

    def end(self) -> None:
        """As it was before: no grid, everything that was hidden shown again."""
        self.viewer.canvas.grid.enabled = False
        self.viewer.canvas.overlays.text.visible = False
        for layer in (*self.sides, *self._hidden):
            if layer in self.viewer.layers:
                layer.visible, layer.opacity = True, 1.0
                layer.name_overlay.visible = False
        self._hidden.clear()

    def fit(self) -> None:
        """Move the camera to the painting, which may be a small part of its slide."""
        self.viewer.fit_to_view(layers=[self.synthetic])

    def look_at(self, down: float, right: float, side: float) -> None:
        """Move the camera to a square of `side` µm around a point, from the synthetic corner: it fills a third."""
        corner = self.synthetic.translate[-2:] - self.synthetic.scale[-2:] / 2
        self.viewer.scene.camera.center = (corner[0] + down, corner[1] + right)
        self.viewer.scene.camera.zoom = min(self.viewer.canvas.viewbox_size(self.viewer.layers)) / (3 * side)

    def _order(self, wanted: Sequence[Any]) -> None:
        layers = self.viewer.layers
        for place, layer in enumerate(wanted):
            now = layers.index(layer)
            if now != place:
                layers.move(now, place)


def _there(layer: Any) -> list[Any]:
    return [] if layer is None else [layer]
