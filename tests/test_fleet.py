"""Several devices, or a Dask cluster, embed as one process does; a hand that dies costs the slide that it was at."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import two_workers_of_dask
from distributed import Client
from test_cohort import draw, log, stores, table
from test_embed import ColourEncoder
from test_embed import draw as draw_outlines
from test_encoder import write_encoder

from wsi_brush import cluster, fleet, ledger
from wsi_brush.cohort import Standing, embed_slides
from wsi_brush.encoder import load_encoder
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.fleet import embed_on_cluster, embed_on_devices

NAMES = [f"slide{number:02d}" for number in range(6)]
TWO: dict[str, Any] = {"devices": ["cpu", "cpu"], "threads": 1, "assume_mpp": 0.5}
ONE = TWO | {"devices": ["cpu"]}

SCRIPT = """
from wsi_brush.fleet import embed_on_devices
embed_on_devices([{slides!r}], {out!r}, encoder={encoder!r}, devices=["cpu"], threads=1, assume_mpp=0.5)
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("six") / "slides", len(NAMES))


@pytest.fixture(scope="module")
def clean(slides: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The stores of one process."""
    out = tmp_path_factory.mktemp("clean") / "out"
    embed_slides([slides], out, encoder=load_encoder(encoder), assume_mpp=0.5)
    return stores(out)


def times_done(out: Path) -> Counter[str]:
    return Counter(line["slide"] for line in log(out) if line["event"] == "done")


@contextmanager
def at_first_slide(out: Path, act: Callable[[int], None]) -> Iterator[list[str]]:
    """Act with the number of the process that is the first to begin a slide, which is named when the block ends."""
    begun: list[str] = []

    def watch() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not begun:
            for line in log(out) if (out / ledger.LOG).exists() else []:
                if line["event"] == "begin":
                    begun.append(line["slide"])
                    act(line["process"])
                    return
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield begun
    finally:
        watching.join()


def test_a_process_that_is_killed_costs_its_slide_and_another_does_the_rest(
    slides: Path, encoder: str, clean: dict[str, str], tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", list[Standing]()
    with at_first_slide(out, lambda process: os.kill(process, signal.SIGKILL)) as begun:
        reports = embed_on_devices([slides], out, encoder=encoder, progress=seen.append, **ONE)
    (lost,) = begun
    assert {report.path.stem: report.status for report in reports} == dict.fromkeys(NAMES, "done") | {lost: "failed"}
    (error,) = [report.message for report in reports if report.exit_code == 3]
    assert error == f"{slides / lost}.png: its process on cpu died (SIGKILL)"
    assert table(out)[lost]["error"] == error
    assert times_done(out) == Counter(name for name in NAMES if name != lost)  # each of them once
    lines = log(out)
    assert len({line["process"] for line in lines if line["event"] == "begin"}) == 2
    assert (lines[0]["event"], lines[0]["devices"], lines[-1]["event"]) == ("run", ["cpu"], "end")
    assert stores(out) == {name: value for name, value in clean.items() if not name.startswith(lost)}
    assert (seen[-1].ended, seen[-1].failed, seen[-1].share) == (6, 1, 1.0)


def test_ctrl_c_ends_all_and_the_same_goes_on(
    slides: Path, encoder: str, clean: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with (
        at_first_slide(out, lambda _: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        embed_on_devices([slides], out, encoder=encoder, **TWO)
    assert multiprocessing.active_children() == []
    assert len(times_done(out)) < len(NAMES)
    assert table(out).keys() == times_done(out).keys()
    reports = embed_on_devices([slides], out, encoder=encoder, **ONE)
    assert {report.status for report in reports} <= {"done", "unchanged"}
    assert times_done(out) == Counter(NAMES)
    assert stores(out) == clean
    assert capfd.readouterr().err == ""


def test_processes_end_with_the_one_that_began_them(slides: Path, encoder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = SCRIPT.format(slides=str(slides), out=str(out), encoder=encoder)
    with (
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent,
        at_first_slide(out, lambda _: parent.kill()),
    ):
        parent.communicate(timeout=120)  # until nobody has its output any more
    assert parent.returncode == -signal.SIGKILL
    assert times_done(out) == Counter()


def test_a_second_ctrl_c_leaves_the_clearing_up_alone(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends one to all processes, and the parent another."""
    seen: list[object] = []

    def embed_each(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            seen.append("cleared")

    monkeypatch.setattr(fleet, "_embed_each", embed_each)
    monkeypatch.setattr(os, "_exit", seen.append)
    order = fleet.Order("out", encoder, 0, None, None, False, None, 0, False)
    before = signal.getsignal(signal.SIGINT)
    try:
        fleet._embed(order, [], "cpu", 1, multiprocessing.Pipe()[1])
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["cleared", 130]


def test_devices_share_the_cores(slides: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def embed_each(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise InterruptedError

    monkeypatch.setattr(fleet, "_embed_each", embed_each)
    monkeypatch.setattr(fleet, "_Hand", lambda *given: fleet._embed(*given, multiprocessing.Pipe()[1]))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is none of a device
    monkeypatch.setattr(fleet, "lent_cores", lambda: 7.5)
    for threads in (0, 1):
        with pytest.raises(InterruptedError):
            embed_on_devices([slides], tmp_path, encoder=encoder, **TWO | {"threads": threads})
    assert seen == [3, 1]


def test_what_is_wrong_in_a_process_ends_all(slides: Path, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.safetensors: no such file"):
        embed_on_devices([slides], tmp_path, encoder="gone.safetensors", loaded=load_encoder(encoder), **ONE)
    assert multiprocessing.active_children() == []


def test_what_is_wrong_with_all_is_said_before_a_process_begins(slides: Path, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'abacus' is no device"):
        embed_on_devices([slides], tmp_path / "out", encoder=encoder, devices=["cpu", "abacus"])
    with pytest.raises(UsageError, match="no such file"):
        embed_on_devices([slides], tmp_path / "out", encoder=f"{encoder}x.safetensors", **TWO)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with two_workers_of_dask() as made, cluster.connect(made.scheduler_address) as found:
        yield found


def test_a_cluster_embeds_each_slide_once(
    slides: Path, encoder: str, clean: dict[str, str], client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names are those of here, not of the workers
    names = {"encoder": os.path.relpath(encoder), "client": client, "assume_mpp": 0.5}
    for status in ("done", "unchanged"):
        reports = embed_on_cluster([os.path.relpath(slides)], "out", **names)
        assert [(report.path.stem, report.status) for report in reports] == [(name, status) for name in NAMES]
    assert times_done(tmp_path / "out") == Counter(NAMES)
    assert stores(tmp_path / "out") == clean
    assert len({line["process"] for line in log(tmp_path / "out") if line["event"] == "begin"}) == 2
    draw_outlines(tmp_path / "tissue" / "slide00.geojson", (0, 0, 96, 96))
    (report,) = embed_on_cluster([slides / "slide00.png"], "drawn", outlines=Path("tissue"), **names)
    assert report.status == "done", report.message


def test_workers_with_other_weights_or_without_the_output_are_refused(
    slides: Path, encoder: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"encoder": encoder, "client": client, "assume_mpp": 0.5}
    with pytest.raises(RefusedError, match=r"other weights of .* than are here"):
        embed_on_cluster([slides], tmp_path / "out", loaded=ColourEncoder(), overwrite=True, **options)
    assert stores(tmp_path / "out") == {}
    monkeypatch.setattr("wsi_brush.fleet._sees", _blind)
    with pytest.raises(MachineError, match=r"does not see .*all workers share"):
        embed_on_cluster([slides], tmp_path / "out", **options, overwrite=True)


def _blind(path: str) -> bool:
    return False
