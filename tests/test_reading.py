"""Any number of readers gives the same tiles; what kills one costs the tile at which it dies."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pyramid

from wsi_brush import reading
from wsi_brush.errors import MachineError, SlideError
from wsi_brush.reading import Readers, default_count
from wsi_brush.slide import Slide, open_slide
from wsi_brush.tiles import Read, windows

TILE = 32

FATAL = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[2])
from wsi_brush import reading
from wsi_brush.slide.readers import OpenSlideReader
from wsi_brush.slide.slide import READERS
class Fatal(OpenSlideReader):
    def read(self, level, top, left, height, width):
        how, row, column = json.loads(sys.argv[1])
        if top <= row < top + height and left <= column < left + width:
            if how == "abort":
                os.abort()
            if how == "hang":
                time.sleep(1000)
            if how == "eat":
                held = [bytearray(1 << 26) for _ in range(1 << 10)]
        return super().read(level, top, left, height, width)
READERS["openslide"] = Fatal
reading.serve()
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    pixels = np.random.default_rng(0).integers(0, 256, (512, 2200, 3), np.uint8)
    path = tmp_path_factory.mktemp("reading") / "a.tif"
    return open_slide(write_pyramid(path, [pixels], compression="zlib", compressionargs={}))


def read(slide: Slide, count: int, **limits: Any) -> list[Read]:
    lattice = slide.grid.at(0.5 * TILE)
    wanted = np.random.default_rng(1).random(lattice.shape) < 0.5
    with Readers(slide, count, **limits) as readers:
        return list(readers.read(windows(slide, lattice, 0.5, wanted, TILE)))


def same(some: list[Read], others: list[Read]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(one.tiles, other.tiles) and np.array_equal(one.window.cells, other.window.cells)
        for one, other in zip(some, others, strict=True)
    )


def fatal(monkeypatch: pytest.MonkeyPatch, how: str, row: int = 0, column: int = 0) -> None:
    """Readers in whose process the pixel at that place is the end."""
    monkeypatch.setattr(reading, "COMMAND", (sys.executable, "-c", FATAL, json.dumps([how, row, column])))


def test_any_number_of_readers_gives_the_same(slide: Slide) -> None:
    alone = read(slide, 0)
    assert len(alone) == 3
    assert not any(one.bad for one in alone)
    for count in (1, 2):
        assert same(read(slide, count), alone)


def test_who_is_slow_to_take_them_finds_each_window_as_it_was_read(slide: Slide) -> None:
    """The readers are ahead by then: a window must not stand where another was put meanwhile."""
    alone, found = read(slide, 0), []
    wanted = np.random.default_rng(1).random(slide.grid.at(0.5 * TILE).shape) < 0.5  # as `read` has it
    with Readers(slide, 1) as readers:
        for one in readers.read(windows(slide, slide.grid.at(0.5 * TILE), 0.5, wanted, TILE)):
            found.append(one)
            time.sleep(0.5)
    assert same(found, alone)


@pytest.mark.parametrize(
    ("how", "limits", "why"),
    [
        ("abort", {}, "the reader dies of it, by signal 6"),
        ("hang", {"seconds": 3}, "it takes more than 3 s"),
        ("eat", {"memory": 1 << 30}, r"it takes more than 1\.1 GB"),
    ],
)
def test_what_kills_a_reader_costs_a_tile(
    slide: Slide, monkeypatch: pytest.MonkeyPatch, how: str, limits: dict[str, int], why: str
) -> None:
    """Three windows for one reader: the last two are asked for when it dies of the first."""
    alone = read(slide, 0)
    row, column = (int(place) for place in alone[0].window.cells[5])
    fatal(monkeypatch, how, row * TILE + 3, column * TILE + 7)
    found = read(slide, 1, **limits)
    assert [list(one.bad) for one in found] == [[5], [], []]
    assert f"rows {row * TILE}-{row * TILE + TILE}, columns {column * TILE}-" in found[0].bad[5]
    assert re.search(why, found[0].bad[5])
    alone[0].tiles[5] = 0
    assert same(found, alone)


def test_a_slide_that_kills_every_reader_fails(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DEATHS", 3)
    monkeypatch.setattr(reading, "COMMAND", (sys.executable, "-c", "print('ready', flush=True)"))
    with pytest.raises(SlideError, match="3 readers have died of it, the last one so: the reader ends with 0"):
        read(slide, 1)


def test_a_slide_that_is_gone_is_no_damaged_tile(slide: Slide, tmp_path: Path) -> None:
    path = tmp_path / "b.tif"
    path.write_bytes(slide.path.read_bytes())
    other = open_slide(path)
    path.unlink()
    for count in (0, 1):
        with pytest.raises(SlideError, match="no such file"):
            read(other, count)


def test_readers_that_cannot_be_started_are_said(slide: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ((sys.executable, "-c", "raise SystemExit(1)"), ("/no/such/python",)):
        monkeypatch.setattr(reading, "COMMAND", command)
        with pytest.raises(MachineError, match="--workers 0"):
            read(slide, 1)


def test_processes_end_with_who_asked(slide: Slide) -> None:
    """At the end, and where the answers are left lying; each holds a few windows, however many there are."""
    lattice = slide.grid.at(0.5 * TILE)
    with Readers(slide, 1) as readers:
        started = readers._readers[0]._process
        assert started is not None
        first = next(readers.read(windows(slide, lattice, 0.5, np.ones(lattice.shape, np.bool_), TILE)))
        assert not first.bad
        again = list(readers.read(windows(slide, lattice, 0.5, np.ones(lattice.shape, np.bool_), TILE)))
        assert np.array_equal(again[0].tiles, first.tiles)
        last = readers._readers[0]._process
        assert last is not None
        assert last.pid != started.pid
    assert started.returncode is not None
    assert last.returncode is not None


def test_a_reader_ends_when_nobody_asks_any_more(slide: Slide) -> None:
    """Its stdin ends, as it does when who asked is killed."""
    with Readers(slide, 1) as readers:
        process = readers._readers[0]._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_windows_are_read_ahead_and_no_further(slide: Slide) -> None:
    lattice, taken = slide.grid.at(0.5 * TILE), 0

    def watched() -> Any:
        nonlocal taken
        for _ in range(20):
            for window in windows(slide, lattice, 0.5, np.ones(lattice.shape, np.bool_), TILE):
                taken += 1
                yield window

    with Readers(slide, 1) as readers:
        for number, _ in enumerate(readers.read(watched())):
            assert number + 1 <= taken <= number + reading._AHEAD
            if number == 6:
                break


def test_the_default_leaves_a_core_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (6, 5), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert default_count(gpu=True) == expected
        assert default_count(gpu=False) == 1
