"""JPEGs of a TIFF decoded here: the pixels, and the damage, are OpenSlide's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from conftest import write_aperio, write_lossless, write_pyramid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from wsi_brush.slide import jpeg, open_slide
from wsi_brush.slide.jpeg import JpegDecoder
from wsi_brush.slide.readers import Level, OpenSlideReader, TiffSlideReader, UnreadableError
from wsi_brush.slide.slide import READERS

HEIGHT, WIDTH, SIDE = 300, 420, 64
REAL = Path(__file__).parents[2] / "shared" / "data" / "slides"


def picture(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Smooth colours and some grain: every subsampling shows."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 7 + k) + np.cos(columns / (5 + k)) for k in range(3)]
    grain = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) * 50 + 128 + grain, 0, 255).astype(np.uint8)


def segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments of a JPEG, and last of all the scan."""
    at = 2
    while stream[at + 1] != 0xDA:
        size = int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], stream[at : at + 2 + size]
        at += 2 + size
    yield 0xDA, stream[at:]


def write_tiles(
    path: Path, *, subsampling: str = "420", rgb: bool = False, tables: bool = False, **options: Any
) -> Path:
    """A TIFF of JPEGs made one by one; with `tables`, what they have in common stands in the page, as Aperio writes."""
    import tifffile
    from imagecodecs import jpeg8_encode

    padded = np.pad(picture(), ((0, -HEIGHT % SIDE), (0, -WIDTH % SIDE), (0, 0)), "edge")
    streams, common = [], b""
    for y in range(0, HEIGHT, SIDE):
        for x in range(0, WIDTH, SIDE):
            tile = np.ascontiguousarray(padded[y : y + SIDE, x : x + SIDE])
            stream = jpeg8_encode(
                tile, 85, colorspace="rgb", outcolorspace="rgb" if rgb else "ycbcr", subsampling=subsampling,
            )  # fmt: skip
            parts = [(kind, part) for kind, part in segments(stream) if kind not in (0xE0, 0xEE)]
            shared = [part for kind, part in parts if kind in (0xDB, 0xC4)] if tables else []
            common = b"\xff\xd8" + b"".join(shared) + b"\xff\xd9" if tables else b""
            streams.append(b"\xff\xd8" + b"".join(part for _, part in parts if part not in shared))
    with tifffile.TiffWriter(path) as file:
        file.write(
            iter(streams), shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, tile=(SIDE, SIDE), compression="jpeg",
            compressionargs={"outcolorspace": "rgb"} if rgb else {},
            photometric="rgb", jpegtables=common or None, metadata=None, resolution=(10000, 10000),
            resolutionunit="CENTIMETER", subsampling=(int(subsampling == "420") + 1,) * 2, **options,
        )  # fmt: skip
    return path


def tile_at(path: Path, number: int) -> tuple[int, int]:
    """Where a tile stands in the file, and its bytes."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        return page.dataoffsets[number], page.databytecounts[number]


def decoder(path: Path) -> JpegDecoder:
    return JpegDecoder(OpenSlideReader(path), path)


def level_of(path: Path, number: int = 0) -> Level:
    return OpenSlideReader(path).levels[number]


def drawn(path: Path, window: tuple[int, int, int, int], number: int = 0) -> NDArray[np.uint8] | None:
    """What OpenSlide says of a window in a fresh handle; None if it is damaged."""
    return outcome(OpenSlideReader(path), level_of(path, number), window)


def outcome(reader: Any, level: Level, window: tuple[int, int, int, int]) -> NDArray[np.uint8] | None:
    try:
        return reader.read(level, *window)  # type: ignore[no-any-return]
    except UnreadableError:
        return None


def is_direct(reader: JpegDecoder, level: int = 0) -> bool:
    """Whether a level is decoded here."""
    return level in reader._plain and level in reader._compared


windows = st.tuples(
    st.integers(0, HEIGHT - 1), st.integers(0, WIDTH - 1), st.integers(1, 200), st.integers(1, 200)
).map(lambda place: (place[0], place[1], min(place[2], HEIGHT - place[0]), min(place[3], WIDTH - place[1])))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"subsampling": "444"}, {"subsampling": "422"}, {"tables": True},
        {"rgb": True, "subsampling": "444", "tables": True}, {"rgb": True, "subsampling": "444"},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_jpeg_has_openslides_pixels_in_any_window(options: dict[str, Any], tmp_path: Path) -> None:
    path = write_tiles(tmp_path / "a.tif", **options)
    direct, level = decoder(path), level_of(path)

    @settings(max_examples=25, deadline=None)
    @given(windows)
    def same(window: tuple[int, int, int, int]) -> None:
        assert np.array_equal(direct.read(level, *window), drawn(path, window))

    same()
    assert is_direct(direct)
    direct.close()


@pytest.mark.parametrize("write", [write_pyramid, write_aperio])
def test_all_levels_of_a_pyramid_are_decoded_here(write: Callable[..., Path], tmp_path: Path) -> None:
    full = picture(512, 640)
    path = write(tmp_path / "a.svs", [full, full[::2, ::2], full[::4, ::4]])
    direct = decoder(path)
    for number in range(3):
        level = level_of(path, number)
        window = (level.height // 3, level.width // 5, level.height // 2, level.width // 2)
        assert np.array_equal(direct.read(level, *window), drawn(path, window, number))
        assert is_direct(direct, number)
    direct.close()


def test_so_are_those_that_tiffslide_reads(tmp_path: Path) -> None:
    full = picture(515, 642)  # quarters of it are none of its pixels, so OpenSlide's second level would be interpolated
    path = write_pyramid(tmp_path / "a.tif", [full, full[1:-1:4, 1:-1:4]])
    slide, plain = open_slide(path, assume_mpp=0.5), TiffSlideReader(path)
    assert slide.reader == "tiffslide"
    direct = JpegDecoder(TiffSlideReader(path), path)
    for number, level in enumerate(plain.levels):
        window = (3, 5, level.height - 10, level.width - 7)
        assert np.array_equal(direct.read(level, *window), plain.read(level, *window))
        assert is_direct(direct, number)
    direct.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(0, 6),
    how=st.sampled_from(["flip", "cut", "end", "noise"]),
    at=st.floats(0, 1, exclude_max=True),
    value=st.integers(1, 255),
    tables=st.booleans(),
)
def test_damage_is_what_openslide_says_it_is(
    number: int, how: str, at: float, value: int, tables: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    place, size = tile_at(write_tiles(path, tables=tables), number)
    data, start = bytearray(path.read_bytes()), place + int(at * size)
    rest = place + size - start
    if how == "flip":
        data[start] ^= value
    elif how == "cut":
        data[start : place + size] = bytes(rest)
    elif how == "end":
        data[start : place + size] = (b"\xff\xd9" * rest)[:rest]
    else:
        data[start : place + size] = np.random.default_rng(value).bytes(rest)
    path.write_bytes(data)
    direct = decoder(path)
    direct.read(level_of(path), 100, 100, 20, 20)  # so that the level is known to be plain, by another tile
    window = (0, number * SIDE, SIDE, min(SIDE, WIDTH - number * SIDE))
    one, other = outcome(direct, level_of(path), window), drawn(path, window)
    assert (one is None) == (other is None)
    assert one is None or np.array_equal(one, other)
    direct.close()


def test_one_damaged_tile_leaves_the_others_to_be_decoded_here(tmp_path: Path) -> None:
    path = write_tiles(tmp_path / "a.tif")
    place, size = tile_at(path, 0)
    data = bytearray(path.read_bytes())
    data[place : place + size] = bytes(size)
    path.write_bytes(data)
    direct = decoder(path)
    assert outcome(direct, level_of(path), (0, 0, 10, 10)) is None
    assert not is_direct(direct)
    direct = decoder(path)  # as `Slide` does: OpenSlide would repeat its error
    assert np.array_equal(direct.read(level_of(path), 70, 70, 9, 9), drawn(path, (70, 70, 9, 9)))
    assert is_direct(direct)
    direct.close()


def turned(path: Path) -> Path:
    return write_tiles(path, extratags=[(274, 3, 1, 3, True)])


def twice(path: Path) -> Path:
    return write_pyramid(path, [picture(), picture()[::-1]])


@pytest.mark.parametrize("write", [turned, twice, lambda path: write_lossless(path, picture())])
def test_what_is_not_plain_is_left_to_the_reader(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif")
    direct = decoder(path)
    assert np.array_equal(direct.read(level_of(path), 3, 5, 200, 100), drawn(path, (3, 5, 200, 100)))
    assert not direct._plain


def test_a_level_whose_first_tile_differs_is_left_to_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiles(tmp_path / "a.tif")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", partial(simplejpeg.decode_jpeg, fastdct=True))  # another decoder
    direct = decoder(path)
    assert direct._plain
    assert np.array_equal(direct.read(level_of(path), 0, 0, 200, 100), drawn(path, (0, 0, 200, 100)))
    assert not direct._plain


def test_only_tiles_that_reach_into_the_next_window_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiles(tmp_path / "a.tif")
    direct, level = decoder(path), level_of(path)
    tiles = direct._plain[0]
    direct.read(level, 0, 0, SIDE, 2 * SIDE)
    assert not tiles._kept
    direct.read(level, 0, 0, SIDE + 1, SIDE)
    assert list(tiles._kept) == [7]
    monkeypatch.setattr(jpeg, "_KEPT", 3 * SIDE * SIDE * 3)
    for row in range(0, 4 * SIDE, SIDE):
        direct.read(level, row, 0, 10, 10)
    assert list(tiles._kept) == [0, 14, 21]
    direct.close()


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no real slides beside the checkout (../shared/data/slides)")
@pytest.mark.parametrize("name", ["kidney_oncocytoma.tif", "CMU-1-Small-Region.svs", "lung_scc_HE3_whole.tif"])
def test_real_slides_have_the_pixels_of_their_reader(name: str) -> None:
    path = REAL / name
    slide = open_slide(path, assume_mpp=0.5)
    plain = READERS[slide.reader](path)
    direct = JpegDecoder(READERS[slide.reader](path), path)
    random = np.random.default_rng(0)
    for level in slide.levels:
        for _ in range(8):
            height, width = (int(random.integers(1, min(side, 700))) for side in (level.height, level.width))
            place = int(random.integers(level.height - height)), int(random.integers(level.width - width))
            assert np.array_equal(direct.read(level, *place, height, width), plain.read(level, *place, height, width))
        assert is_direct(direct, level.number)
    direct.close()
