"""What is at a path, said without reading pixels or weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import levels_of, make_brush, write_aperio, write_lossless
from test_embed import ColourEncoder, paint

from wsi_brush import brush as brushes
from wsi_brush import commit, info, synthesize
from wsi_brush.embed import embed_slide
from wsi_brush.errors import RefusedError, SlideError, UsageError
from wsi_brush.grid import Grid
from wsi_brush.info import describe
from wsi_brush.pyramid import Pyramid


def test_kinds_are_those_of_the_manifests() -> None:
    assert (info.BRUSH, info.PYRAMID, info.BUNDLED) == (brushes.KIND, synthesize.KIND, brushes.BUNDLED)


def test_a_slide(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", levels_of((512, 768), (1, 4)), mpp="0.25")
    assert describe(path) == {
        "path": str(path), "kind": "slide", "synthetic": False, "reader": "openslide", "height": 512, "width": 768,
        "mpp": 0.25, "mpp_source": "openslide.mpp-x", "millimetres": {"height": 0.128, "width": 0.192},
        "pixel_sizes": [{"source": "openslide.mpp-x", "height": 0.25, "width": 0.25}],
        "levels": [{"height": 512, "width": 768, "mpp": 0.25}, {"height": 128, "width": 192, "mpp": 1.0}],
        "bytes": path.stat().st_size,
    }  # fmt: skip
    forced = describe(path, force_mpp=0.5)
    assert (forced["mpp_source"], forced["pixel_sizes"][0]["width"]) == ("forced", 0.25)


def test_a_slide_without_a_pixel_size_is_described_all_the_same(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png")
    found = describe(path)
    assert (found["mpp"], found["height"], found["width"]) == (None, 500, 640)
    assert "--assume-mpp" in found["mpp_source"]
    assert str(tmp_path) not in found["mpp_source"]
    assert found["levels"] == [{"height": 500, "width": 640}]
    assert "millimetres" not in found
    assert describe(path, assume_mpp=0.5)["mpp"] == 0.5


@pytest.mark.parametrize("synthetic", [False, True])
def test_a_store(tmp_path: Path, synthetic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = paint(tmp_path / "a.png")
    if synthetic:
        from dataclasses import replace

        from wsi_brush import embed

        real = embed.open_slide
        monkeypatch.setattr(embed, "open_slide", lambda *given, **more: replace(real(*given, **more), synthetic=True))
    report = embed_slide(path, tmp_path, encoder=ColourEncoder("abc"), assume_mpp=0.5)
    found = describe(report.store)
    assert found["kind"] == "embedding store"
    assert found["synthetic"] is synthetic
    assert (found["slide"], found["mpp"], found["mpp_source"]) == ("a.png", 0.5, "assumed")
    assert (found["encoder"], found["encoder_sha256"], found["tile"], found["dim"]) == ("colours", "abc", 32, 6)
    assert [(one["mpp"], one["rows"], one["columns"]) for one in found["maps"]] == [(0.5, 16, 20), (2, 4, 5), (8, 1, 2)]
    assert sum(one["tiles"] for one in found["maps"]) == report.tiles
    assert 0 < found["tissue_fraction"] < 1
    assert found["bytes"] > 1000


def test_a_pyramid(tmp_path: Path) -> None:
    path = tmp_path / "new.ome.zarr"
    grid = Grid(0.5, 64, 32, 300, 400)
    about = {"seed": 7, "encoder": "bundled", "reference": {"region": [1, 2, 3, 4]}}
    with commit.staged(path, kind="pyramid", about={"format": 1}) as stage:
        pyramid = Pyramid(stage, grid, about=about)
        pyramid.write(grid, np.zeros((300, 400, 3), np.uint8))
        pyramid.finish()
    found = describe(path)
    assert (found["kind"], found["synthetic"], found["mpp"]) == ("pyramid", True, 0.5)
    assert (found["height"], found["width"]) == (300, 400)
    assert [level["mpp"] for level in found["levels"]] == [0.5, 1.0]
    assert found["provenance"] == about


def test_a_brush(tmp_path: Path) -> None:
    brushes.save_brush(make_brush(dim=6, tile=32, encoder="colours", fingerprint="abc"), tmp_path / "b")
    found = describe(tmp_path / "b")
    assert (found["kind"], found["system"], found["encoder"], found["encoder_sha256"]) == (
        "brush",
        "ours",
        "colours",
        "abc",
    )
    assert (found["tile"], found["dim"], found["embeddings"]) == (32, 6, [0.5, 2, 8])
    assert found["pitches"] == [0.5, 1, 2, 4, 8]
    assert found["sha256"] == commit.sha256_of(tmp_path / "b" / "brush.safetensors")
    (tmp_path / "b" / "brush.json").write_text("{}")
    with pytest.raises(RefusedError, match="no brush that can be read"):
        describe(tmp_path / "b")


def test_what_is_none_of_these_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        describe(tmp_path / "none")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(SlideError):
        describe(tmp_path / "x.txt")
    with pytest.raises(SlideError, match="no OME-Zarr"):
        describe(tmp_path)
    with commit.staged(tmp_path / "r", kind="report", about={}):
        pass
    with pytest.raises(UsageError, match="a report of wsi-brush"):
        describe(tmp_path / "r")


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The words in a process that may not load torch."""
    code = "import sys; sys.modules['torch'] = None; from wsi_brush.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_words(tmp_path: Path) -> None:
    """`info` of a slide and of the bundled brush, `export` of a store, all of it without torch."""
    pytest.importorskip("h5py")
    path = write_lossless(tmp_path / "s.tif", np.full((200, 300, 3), (225, 150, 185), np.uint8), mpp=2.0)
    said = run("info", path)
    assert said.returncode == 0, said.stderr
    assert "kind: slide\nsynthetic: no\n" in said.stdout
    assert "mpp: 2\nmpp source: tiff resolution\n" in said.stdout
    assert "levels: height 200, width 300, mpp 2" in said.stdout
    assert json.loads(run("info", path, "--json").stdout) == describe(path)
    if info.BUNDLED.is_dir():
        assert json.loads(run("info", "bundled", "--json").stdout)["kind"] == "brush"
    store = embed_slide(path, tmp_path, encoder=ColourEncoder()).store
    target = tmp_path / "s.h5"
    plan = run("export", store, "--to", "trident-h5", "-o", target, "--mpp", 2, "--dry-run")
    assert "to: trident-h5" in plan.stdout
    assert not target.exists()
    done = run("export", store, "--to", "trident-h5", "-o", target, "--mpp", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tiles"] == describe(store)["maps"][1]["tiles"] > 0
    assert target.is_file()
    again = run("export", store, "--to", "trident-h5", "-o", target)
    assert again.returncode == 4
    assert again.stderr.splitlines() == [f"wsi-brush: {target}: exists; choose another name or pass --overwrite"]
    assert run("export", store, "--to", "nothing", "-o", target).returncode == 1
