"""A cohort by several devices of this machine, or by the workers of a Dask cluster that is there already.

Each is a process that claims slides as any other process may (`cohort`): what is handed out here is only the command.
No port is opened.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import errors
from .cohort import (
    Pace,
    Watch,
    bury,
    cohort_of,
    embed_claimed,
    open_ledger,
    report_of,
)
from .embed import SlideReport
from .encoder import Encoder, load_encoder
from .errors import MachineError, RefusedError, WsiBrushError
from .inputs import Input
from .ledger import Ledger
from .machine import find_device, keep_memory, lent_cores

if TYPE_CHECKING:
    from distributed import Client

_OPTIONS = ("assume_mpp", "force_mpp", "overwrite", "outlines", "workers", "strict")
_PATIENCE = 20.0  # seconds for a process to clear up after Ctrl-C
_LOOK = 0.5  # seconds between two looks at what the others have ended


@dataclass(frozen=True)
class Order:
    """What every process of a fleet is told; `encoder` as it is named to `load_encoder`."""

    out: str
    encoder: str
    since: int
    assume_mpp: float | None
    force_mpp: float | None
    overwrite: bool
    outlines: Path | None
    workers: int
    strict: bool

    @property
    def options(self) -> dict[str, Any]:
        """As `embed_claimed` takes them."""
        return {key: getattr(self, key) for key in _OPTIONS}


def embed_on_devices(
    paths: Iterable[Path | str], out: Path | str, *, encoder: str, devices: Sequence[str], threads: int = 0,
    assume_mpp: float | None = None, force_mpp: float | None = None, overwrite: bool = False,
    progress: Watch | None = None, outlines: Path | None = None, workers: int = 0, strict: bool = False,
    shard: tuple[int, int] = (1, 1), loaded: Encoder | None = None,
) -> list[SlideReport]:  # fmt: skip
    """As `embed_slides`, by one process a device; one that dies costs the slide that it was at, and is replaced.

    `threads`: of each process, by default an equal part of the cores. `loaded`: the encoder, where the caller has it.

    Raises:
        UsageError, RefusedError, MachineError: as `embed_slides`, and of any of the processes; the others end then.
    """
    for device in devices:
        find_device(device)
    slides, loaded = cohort_of(paths, outlines, shard), loaded or load_encoder(encoder)
    ledger = open_ledger(out, loaded, outlines=outlines, overwrite=overwrite)
    order = Order(str(out), encoder, ledger.since, assume_mpp, force_mpp, overwrite, outlines, workers, strict)
    threads = threads or max(1, int(lent_cores()) // len(devices))
    ledger.log("run", slides=len(slides), shard=f"{shard[0]}/{shard[1]}", devices=list(devices))
    tally = _Tally(ledger, slides, progress)
    crew: list[_Hand] = []
    try:
        for device in devices:
            crew.append(_Hand(order, slides, device, threads))
        while crew:
            wait([thing for hand in crew for thing in hand.signs], _LOOK)
            for hand in list(crew):
                if not hand.hear():
                    continue
                crew.remove(hand)
                if hand.error is not None:
                    raise hand.error
                if hand.at is not None:  # it died at this slide
                    named = next(one for one in slides if one.name == hand.at)
                    bury(ledger, named, f"its process on {hand.device} died ({hand.how()})")
                    crew.append(_Hand(order, slides, hand.device, threads))
                elif not hand.done:
                    raise MachineError(f"the process on {hand.device} ended before its first slide ({hand.how()})")
            tally.look()
    finally:
        for hand in crew:
            hand.interrupt()
        for hand in crew:
            hand.stop()
        tally.look()
        tally.close()
    return tally.reports()


class _Tally:
    """What has come of the slides so far."""

    def __init__(self, ledger: Ledger, slides: Sequence[Input], progress: Watch | None) -> None:
        self._ledger, self._slides, self._pace = ledger, slides, Pace(slides, progress)
        self._rows: dict[str, dict[str, Any]] = {}

    def look(self) -> None:
        """Count what others have written down."""
        for named in self._slides:
            if named.name not in self._rows and (row := self._ledger.ended(named.name)) is not None:
                self.count(named, row)

    def count(self, named: Input, row: dict[str, Any]) -> None:
        """A slide has ended."""
        self._rows[named.name] = row
        self._pace.end(named, row)
        self._ledger.publish_in_time()

    def close(self) -> None:
        self._ledger.publish(ended=len(self._rows) == len(self._slides))

    def reports(self) -> list[SlideReport]:
        self._ledger.log("end", slides=len(self._rows))
        out = self._ledger.out
        return [report_of(one.path, one.name, out, self._rows.get(one.name)) for one in self._slides]


class _Hand:
    """A process that embeds on a device, and what is heard of it."""

    def __init__(self, order: Order, slides: Sequence[Input], device: str, threads: int) -> None:
        self.device, self.done = device, False
        self.at: str | None = None
        self.error: WsiBrushError | None = None
        context = multiprocessing.get_context("spawn")  # threads of torch do not live on in a fork
        self.line, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_embed, args=(order, list(slides), device, threads, theirs))
        resource_tracker.ensure_running()  # which would unblock it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can end in order
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    @property
    def signs(self) -> list[Connection | int]:
        """What is to be waited for: a line that has ended says so for ever."""
        return [self.process.sentinel, *([] if self.line.closed else [self.line])]

    def hear(self) -> bool:
        """Listen; whether it has ended."""
        ended = not self.process.is_alive()
        try:
            while not self.line.closed and self.line.poll():
                word, what = self.line.recv()
                if word == "begin":
                    self.at = what
                elif word == "end":
                    self.at, self.done = None, True
                elif word == "error":
                    self.at, self.error = None, getattr(errors, what[0])(what[1])
        except (EOFError, OSError):
            self.line.close()
        if ended:
            self.process.join()
            self.line.close()
        return ended

    def how(self) -> str:
        """How it ended."""
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"code {code}"

    def interrupt(self) -> None:
        """Ask it to end as Ctrl-C does, so that it clears up."""
        if self.process.is_alive() and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def stop(self) -> None:
        """Wait for its end, and if need be bring it about."""
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.line.close()


def _embed(order: Order, slides: list[Input], device: str, threads: int, line: Connection) -> None:
    """In the process of a device."""
    import torch

    def once(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal and the parent both send it
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, once)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    keep_memory()
    torch.set_num_threads(threads)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        encoder = load_encoder(order.encoder, device=device)
        _embed_each(order, slides, encoder, line)
        line.send(("end", None))
    except KeyboardInterrupt:
        os._exit(130)
    except WsiBrushError as error:
        kind = type(error).__name__
        line.send(("error", (kind if hasattr(errors, kind) else "WsiBrushError", str(error))))


def _embed_each(order: Order, slides: list[Input], encoder: Encoder, line: Connection) -> None:
    """Embed what nobody else is at, and say of each slide that it is begun."""
    ledger = _ledger(order, encoder)
    for named in slides:
        embed_claimed(ledger, named, encoder, begun=lambda name: line.send(("begin", name)), **order.options)


def _end_with(sentinel: int) -> None:
    """End this process with its parent, whose death frees no claim of its children."""
    wait([sentinel])
    os._exit(1)


def _ledger(order: Order, encoder: Encoder) -> Ledger:
    return open_ledger(order.out, encoder, outlines=order.outlines, overwrite=order.overwrite, since=order.since)


# -- on a Dask cluster ---------------------------------------------------------------------------------


def embed_on_cluster(
    paths: Iterable[Path | str], out: Path | str, *, encoder: str, client: Client, device: str = "cpu",
    assume_mpp: float | None = None, force_mpp: float | None = None, overwrite: bool = False,
    progress: Watch | None = None, outlines: Path | None = None, workers: int = 0, strict: bool = False,
    shard: tuple[int, int] = (1, 1), loaded: Encoder | None = None,
) -> list[SlideReport]:  # fmt: skip
    """As `embed_slides`, a task a slide on the cluster that `cluster.connect` found; a worker that dies costs its
    slide. Slides, outlines and `out` are read and written by the workers, in a file system that they share with here.
    `loaded`: the encoder, where the caller has it.

    Raises:
        UsageError, RefusedError, MachineError: as `embed_slides`, and if a worker does not see the output.
    """
    from distributed import as_completed

    slides, loaded = cohort_of(paths, outlines, shard), loaded or load_encoder(encoder)
    out = Path(out).absolute()
    ledger = open_ledger(out, loaded, outlines=outlines, overwrite=overwrite)
    found = _whole_name(encoder)
    drawn = None if outlines is None else outlines.absolute()
    order = Order(str(out), found, ledger.since, assume_mpp, force_mpp, overwrite, drawn, workers, strict)
    for worker, sees in client.run(_sees, str(out)).items():
        if not sees:
            raise MachineError(f"worker {worker} does not see {out}; write to a folder that all workers share")
    ledger.log("run", slides=len(slides), shard=f"{shard[0]}/{shard[1]}", scheduler=True)
    tally = _Tally(ledger, slides, progress)
    tasks = {
        client.submit(
            _task, order, replace(one, path=one.path.absolute()), loaded.fingerprint, device, pure=False, retries=0
        ): one
        for one in slides
    }
    try:
        for task in as_completed(list(tasks), loop=client.loop):  # type: ignore[no-untyped-call]
            named = tasks.pop(task)
            error = task.exception() if task.status == "error" else None
            if task.status == "finished":
                row = task.result()
            elif isinstance(error, WsiBrushError):
                raise error
            elif type(error).__name__ == "KilledWorker":
                bury(ledger, named, "the worker that embedded it died")
                row = ledger.ended(named.name)
            else:
                raise MachineError(f"the cluster lost a slide ({error or task.status}); run the same command again")
            if row is not None:
                tally.count(named, row)
    finally:
        for task in tasks:
            task.cancel()  # type: ignore[no-untyped-call]
        tally.close()
    return tally.reports()


def _whole_name(encoder: str) -> str:
    """The name of an encoder for a process that runs in another folder."""
    path = Path(encoder)
    return str(path.absolute()) if path.is_file() else encoder


def _sees(path: str) -> bool:
    return Path(path).is_dir()


_LOADING = threading.Lock()


@lru_cache(maxsize=1)
def _encoder(name: str, device: str) -> Encoder:
    return load_encoder(name, device=device)


def _task(order: Order, named: Input, fingerprint: str, device: str) -> dict[str, Any] | None:
    """On a worker."""
    import torch

    torch.set_num_threads(1)
    with _LOADING:
        encoder = _encoder(order.encoder, device)
    if encoder.fingerprint != fingerprint:
        raise RefusedError(f"a worker has other weights of {order.encoder} than are here; install the same there")
    return embed_claimed(_ledger(order, encoder), named, encoder, **order.options)
