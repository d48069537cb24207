"""A class in place of an embedding: of every tile at every pitch it is the same vector, so it needs no encoder.

The paper conditions CelebA-HQ on an attribute (the colour of the hair) in this way. A label's vector has a 1 at the
label's place among all labels, sorted, and 0 elsewhere. As a map it is a constant function on the plane, so the
operator, the brush and the canvas treat it as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from .commit import fingerprint
from .embed import PITCHES
from .errors import UsageError
from .grid import Grid
from .store import EmbeddingMap

LABELS = "labels"
"""Stands where the name of an encoder would."""
_TILE = 128  # pixels, as the bundled encoder's: a cell of the maps is as large


@final
@dataclass(frozen=True)
class Labels:
    """The labels that a brush knows, sorted; it takes the place of an encoder."""

    names: tuple[str, ...]

    @staticmethod
    def of(given: Iterable[str]) -> Labels:
        """The labels among those given, each once."""
        return Labels(tuple(sorted(set(given))))

    @property
    def name(self) -> str:
        """What stands in the place of an encoder's name."""
        return LABELS

    @property
    def dim(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def tile(self) -> int:
        """Side of a cell of the maps, pixels at the map's pitch."""
        return _TILE

    @property
    def fingerprint(self) -> str:
        """Digest of the names."""
        return fingerprint({"labels": list(self.names)})

    def maps(self, label: str, region: Grid, *, pitches: Sequence[float] = PITCHES) -> dict[float, EmbeddingMap]:
        """The label's vector in every cell that covers `region` (a grid of any pitch), by pitch.

        Raises:
            UsageError: if there is no such label.
        """
        if label not in self.names:
            raise UsageError(f"{label!r} is no label of this brush; it knows {', '.join(self.names)}")
        vector = np.zeros(self.dim, np.float16)
        vector[self.names.index(label)] = 1
        found = {}
        for mpp in pitches:
            lattice = region.at(self.tile * mpp)
            found[mpp] = EmbeddingMap(mpp, lattice, np.broadcast_to(vector, (*lattice.shape, self.dim)).copy())
        return found
