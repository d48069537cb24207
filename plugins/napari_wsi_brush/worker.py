"""A job in a thread of its own: it tells, shows, can be stopped, and answers with one line where a user is wrong.

Jobs of all widgets take turns: a painting takes every core, and torch's threads and memory are the process's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from napari.qt.threading import create_worker
from qtpy.QtCore import Signal  # type: ignore[attr-defined]
from qtpy.QtWidgets import QWidget
from superqt.utils import WorkerBase
from superqt.utils._qthreading import WorkerBaseSignals

from wsi_brush.progress import StoppedError

from .graphics import load_torch
from .jobs import one_line

_TURN = threading.Lock()


class Signals(WorkerBaseSignals):
    """What a job says; Qt brings it to the thread of the windows."""

    told = Signal(str, int, int)
    shown = Signal(object)
    stopped = Signal()
    refused = Signal(str)


class Job(WorkerBase[Any]):
    """`work(job)` in another thread; it calls `job.tell` and `job.show`. See `start`."""

    def __init__(self, work: Callable[[Job], Any]) -> None:
        super().__init__(SignalsClass=Signals)
        self._work = work

    def tell(self, what: str, done: int, total: int) -> None:
        """A `progress.Tell`.

        Raises:
            StoppedError: once the job is to end.
        """
        if self.abort_requested:
            raise StoppedError
        self.told.emit(what, done, total)

    def show(self, thing: object) -> None:
        """Something to look at."""
        if not self.abort_requested:
            self.shown.emit(thing)

    def run(self) -> None:
        """What Qt calls."""
        try:
            super().run()
        except RuntimeError as error:  # whoever would listen went with the window
            if "deleted" not in str(error):
                raise

    def work(self) -> Any:
        """What is done between the first signal and the last."""
        try:
            while not _TURN.acquire(timeout=0.1):
                self.tell("waiting for another painting", 0, 0)
            try:
                self.tell("beginning", 0, 0)
                load_torch()
                return self._work(self)
            finally:
                _TURN.release()
        except StoppedError:
            self.stopped.emit()
        except Exception as error:
            line = one_line(error)
            if line is None:
                raise
            self.refused.emit(line)
        self.quit()  # so that nothing counts as returned
        return None


class _Named:
    """A function that says what it does, in napari's list of what is running."""

    def __init__(self, what: str, work: Callable[[Job], Any]) -> None:
        self._what, self._work = what, work

    def __call__(self, job: Job) -> Any:
        return self._work(job)

    def __str__(self) -> str:
        return self._what


def start(what: str, work: Callable[[Job], Any], **slots: Callable[..., None]) -> Job:
    """Begin a job; `slots` are called in the thread of the windows: told, shown, then returned, stopped, refused.

    Closing napari's window stops it.
    """
    job: Job = create_worker(_Named(what, work), _worker_class=Job, _connect=slots, _start_thread=True)
    return job


class Working(QWidget):
    """A widget that has one job under way at most, which ends with it."""

    def __init__(self) -> None:
        super().__init__()
        self.job: Job | None = None
        self._gone = False
        self.destroyed.connect(lambda: self._leave())  # a method of what is gone would not be called

    def _leave(self) -> None:
        """The widget is no more; what it runs ends."""
        self._gone = True
        if self.job is not None:
            self.job.quit()
