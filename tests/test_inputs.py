"""What a user names, as slides: each once, each with a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_embed import ColourEncoder, paint

from wsi_brush.embed import embed_slide
from wsi_brush.errors import UsageError
from wsi_brush.inputs import find_slides, slide_name


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return paint(tmp_path / "slides" / "a.png")


def test_folders_are_searched_for_slides_and_stores_are_none(picture: Path, tmp_path: Path) -> None:
    folder = picture.parent
    for name in ("deep/er/B.SVS", "notes.txt", ".hidden/c.svs", "x.ome.zarr/zarr.json", "x.ome.zarr/0/d.tif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "loop").symlink_to(folder)
    embed_slide(picture, folder, encoder=ColourEncoder(), assume_mpp=0.5)
    assert [path.relative_to(folder).as_posix() for path in find_slides([folder])] == [
        "a.png",
        "deep/er/B.SVS",
        "x.ome.zarr",
    ]
    assert find_slides([picture, folder / "deep" / ".." / "a.png"]) == [picture]
    assert find_slides([folder / "x.ome.zarr"]) == [folder / "x.ome.zarr"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="no slides"):
        find_slides([tmp_path / "nothing"])


def test_names() -> None:
    assert [slide_name(Path(name)) for name in ("a.svs", "b.ome.tif", "c.1.TIFF", "d.ome.zarr", "e")] == [
        "a",
        "b",
        "c.1",
        "d",
        "e",
    ]
