"""An errand in a thread of its own, for the widget "Brush": it tells and shows, and ends with an answer or one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from napari.qt.threading import create_worker
from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from superqt.utils import WorkerBase
from superqt.utils._qthreading import WorkerBaseSignals

from wsi_brush.errors import WsiBrushError
from wsi_brush.progress import StoppedError

from .graphics import load_torch


class Signals(WorkerBaseSignals):
    """What an errand says; Qt brings it to the thread of the windows."""

    told = Signal(str, int, int)
    shown = Signal(object)
    stopped = Signal()
    refused = Signal(str)


class Errand(WorkerBase[Any]):
    """`work(errand)` in another thread; see `begin`."""

    def __init__(self, work: Callable[[Errand], Any]) -> None:
        super().__init__(SignalsClass=Signals)
        self._work = work

    def tell(self, what: str, done: int, total: int) -> None:
        """A `progress.Tell`.

        Raises:
            StoppedError: once it is to end.
        """
        if self.abort_requested:
            raise StoppedError
        self.told.emit(what, done, total)

    def show(self, *seen: object) -> None:
        """Something to look at."""
        if not self.abort_requested:
            self.shown.emit(seen)

    def work(self) -> Any:
        """What Qt calls."""
        try:
            self.tell("beginning", 0, 0)
            load_torch()
            return self._work(self)
        except StoppedError:
            self.stopped.emit()
        except (WsiBrushError, OSError, MemoryError) as error:
            self.refused.emit(one_line(error))
        self.quit()  # so that nothing counts as returned
        return None


def one_line(error: Exception) -> str:
    """What to say of an error that a user can put right."""
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return "out of memory; paint less" if isinstance(error, MemoryError) else " ".join(str(error).split())


def begin(work: Callable[[Errand], Any], **slots: Callable[..., None]) -> Errand:
    """Send one; `slots` are called in the thread of the windows: told, shown, then returned, stopped or refused, and
    finished. Closing napari's window stops it."""
    errand: Errand = create_worker(work, _worker_class=Errand, _connect=slots, _start_thread=True)
    return errand


class Bench:
    """What outlives the widget: the errand that is under way, and whether the widget is gone."""

    def __init__(self) -> None:
        self.errand: Errand | None = None
        self.gone = False

    def guard(self, slot: Callable[..., None]) -> Callable[..., None]:
        """A slot that is no longer called once the widget is gone."""

        def called(*words: Any) -> None:
            if not self.gone:
                slot(*words)

        return called

    def leave(self, *_: object) -> None:
        """The widget goes: what is under way stops."""
        self.gone = True
        if self.errand is not None:
            self.errand.quit()
