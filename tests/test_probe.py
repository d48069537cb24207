"""A slide's header is found out elsewhere: what ends a process ends that one, and costs one line."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MadeSlide, levels_of, write_pyramid

from wsi_brush import probe as module
from wsi_brush.errors import PixelSizeError, SlideError, UsageError
from wsi_brush.probe import probe
from wsi_brush.slide import open_slide

WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT, NEXT = 256, 257, 322, 323, 0


def change(path: Path, changes: dict[int, int]) -> Path:
    """Set numbers of the first directory of a little-endian TIFF; `NEXT` is the place of the following directory."""
    data = bytearray(path.read_bytes())
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    for at in range(place + 2, place + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, at)
        if tag in changes:
            struct.pack_into("<HII", data, at + 2, 4, 1, changes[tag])
    if NEXT in changes:
        struct.pack_into("<I", data, place + 2 + 12 * count, changes[NEXT])
    path.write_bytes(data)
    return path


def child() -> int:
    """The process that opens slides for this one."""
    return module._KEPT[0]._process.pid


def test_it_says_what_opening_says(made_slides: dict[str, MadeSlide]) -> None:
    first = None
    for made in made_slides.values():
        header, slide = probe(made.path, assume_mpp=made.assume_mpp), open_slide(made.path, assume_mpp=made.assume_mpp)
        assert (header.mpp, header.mpp_source, header.reader) == (slide.mpp, slide.mpp_source, slide.reader)
        assert header.levels == tuple((level.height, level.width) for level in slide.levels)
        assert (header.height, header.width) == header.levels[0]
        assert (header.pixel, header.synthetic) == (slide.pixel, slide.synthetic)
        first = first or child()
        assert child() == first  # one process for all


def test_errors_are_those_of_opening(tmp_path: Path) -> None:
    bare = write_pyramid(tmp_path / "bäre slide.tif", levels_of((256, 256), (1,)), mpp=None)
    with pytest.raises(PixelSizeError, match=r"bäre slide\.tif: no pixel size"):
        probe(bare)
    with pytest.raises(UsageError, match="--assume-mpp 1000"):
        probe(bare, assume_mpp=1000)
    with pytest.raises(SlideError, match="no such file"):
        probe(tmp_path / os.fsdecode(b"\xff.svs"))
    assert probe(bare, force_mpp=2).mpp == 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({TILE_WIDTH: 1 << 30, TILE_HEIGHT: 1 << 30}, "tiles of 1073741824 x 1073741824; expected tiles of at most"),
        ({TILE_WIDTH: 16384, TILE_HEIGHT: 16384}, "expected tiles of at most 16384 a side and 64 megapixels"),
        ({WIDTH: 0}, "256 x 0 pixels"),
        ({WIDTH: 1 << 31}, "need 33554432 tiles of 128 x 128, it has 4"),
        ({NEXT: 8}, "directories run in a circle|damaged"),
    ],
)
def test_sizes_are_looked_at_before_a_library_believes_them(tmp_path: Path, changes: dict[int, int], line: str) -> None:
    path = change(write_pyramid(tmp_path / "a.tif", levels_of((256, 256), (1,))), {TILE_WIDTH: 128})
    assert open_slide(path).grid.shape == (256, 256)
    if NEXT in changes:
        (changes[NEXT],) = struct.unpack_from("<I", path.read_bytes(), 4)
    change(path, changes)
    for opened in (open_slide, probe):
        with pytest.raises(SlideError, match=line):
            opened(path)


def patched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """A fresh child whose OpenSlide does `code` when it opens a file that is called bad.tif."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import openslide, os, time\n"
        "_open = openslide.OpenSlide\n"
        "class OpenSlide(_open):\n"
        "    def __init__(self, path):\n"
        f"        if str(path).endswith('bad.tif'):\n            {code}\n"
        "        super().__init__(path)\n"
        "openslide.OpenSlide = OpenSlide\n"
    )
    module._end()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("os.write(2, b'GLib-ERROR: failed to allocate\\n'); os.abort()", r"SIGABRT: GLib-ERROR: failed to allocate\)"),
        ("os.kill(os.getpid(), 11)", r"SIGSEGV: .*"),
        ("time.sleep(60)", "not open after 0.5 seconds"),
        ("bytearray(4 << 30)", "needs too much memory"),
        ("print('noise', flush=True)", None),
    ],
)
def test_what_a_library_does_to_its_process_costs_one_slide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, line: str | None
) -> None:
    good = write_pyramid(tmp_path / "good.tif", levels_of((256, 256), (1,)))
    bad = write_pyramid(tmp_path / "bad.tif", levels_of((256, 256), (1,)))
    patched(monkeypatch, tmp_path, code)
    try:
        before = probe(good)
        monkeypatch.setattr(module, "SECONDS", 0.5)
        start = time.monotonic()
        if line is None:
            assert probe(bad) == before
        else:
            with pytest.raises(SlideError, match=rf"bad\.tif: .*{line}") as caught:
                probe(bad)
            assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 10
        monkeypatch.setattr(module, "SECONDS", 60)
        assert probe(good) == before
    finally:
        module._end()


def test_a_child_that_was_killed_is_replaced(tmp_path: Path) -> None:
    good = write_pyramid(tmp_path / "good.tif", levels_of((256, 256), (1,)))
    before = probe(good)
    killed = child()
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: not module._KEPT[0].alive)
    assert probe(good) == before
    assert child() != killed


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    good = write_pyramid(tmp_path / "good.tif", levels_of((256, 256), (1,)))
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        probe(good)
        os.write(write, struct.pack("<I", child()))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    (orphan,) = struct.unpack("<I", os.read(read, 4))
    wait_for(lambda: not Path(f"/proc/{orphan}").exists() or " Z " in Path(f"/proc/{orphan}/stat").read_text())
    os.close(read)
    os.close(write)


def wait_for(happened: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)
