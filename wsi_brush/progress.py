"""What is being done, and how much of it is done."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class StoppedError(Exception):
    """Raised by a `Tell` to end what is being done, as Ctrl-C does: what can be gone on from is kept."""


class Told:
    """Counts what is done of `total`, and tells."""

    def __init__(self, tell: Tell | None, what: str, total: int, *, done: int = 0) -> None:
        self._tell, self._what, self._done, self._total = tell, what, done, total

    def add(self, count: int = 1) -> None:
        """So much more is done."""
        self._done += count
        if self._tell is not None:
            self._tell(self._what, self._done, self._total)
