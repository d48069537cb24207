"""Many slides, many processes: each slide once, a bad one costs itself, a killed run goes on to the same bytes."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_embed import ColourEncoder
from test_embed import damage as damage_tiles
from test_probe import patched

from wsi_brush import embed, ledger, probe
from wsi_brush.cohort import Pace, Standing, as_shard, bury, embed_slides, open_ledger
from wsi_brush.commit import sha256_of
from wsi_brush.errors import MachineError, RefusedError, UsageError, WsiBrushError
from wsi_brush.inputs import Input, find_inputs

SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from wsi_brush.cohort import embed_slides
from test_embed import ColourEncoder

class Slow(ColourEncoder):
    def __call__(self, tiles):
        time.sleep({slow})
        return super().__call__(tiles)

print("ready", flush=True)
sys.stdin.readline()
embed_slides([{slides!r}], {out!r}, encoder=Slow(), assume_mpp=0.5)
"""


def draw(folder: Path, count: int) -> Path:
    """So many small pictures of pink tissue, no two alike."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        grain = np.random.default_rng(number).integers(-20, 20, (96, 96, 1))
        pixels = (np.array([225, 130, 185]) + grain).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"slide{number:02d}.png")
    return folder


def start(slides: Path, out: Path, *, slow: float = 0.0) -> subprocess.Popen[str]:
    """A process that embeds as soon as it gets a line."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(slides=str(slides), out=str(out), slow=slow)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=120)
    return process.returncode


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ledger.LOG).read_text("utf-8").splitlines()]


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / ledger.TABLE).open(encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def stores(out: Path) -> dict[str, str]:
    """The bytes of every store, the seconds of its making left out of nothing: a store says no time."""
    return {
        path.relative_to(out).as_posix(): sha256_of(path)
        for store in out.glob("[!.]*.zarr")
        for path in store.rglob("*")
        if path.is_file()
    }


def test_what_is_written_beside_the_stores(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 2), tmp_path / "out"
    (slides / "bad.svs").write_text("no slide")
    for _ in range(2):
        embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
        rows = table(out)
        assert list(rows["bad"]) == list(ledger.COLUMNS)
        assert {name: row["status"] for name, row in rows.items()} == {
            "bad": "failed",
            "slide00": "done",
            "slide01": "done",
        }
        assert "bad.svs" in rows["bad"]["error"]
        assert rows["slide00"]["path"] == str(slides / "slide00.png")
        assert int(rows["slide00"]["tiles"]) > 0  # also the second time
        assert (rows["slide00"]["mpp"], rows["slide00"]["mpp_source"]) == ("0.5", "assumed")
    about = json.loads((out / ledger.MANIFEST).read_text("utf-8"))
    assert about["slides"] == {"done": 2, "failed": 1}
    assert about["tiles"] == sum(int(row["tiles"]) for row in rows.values())
    assert about["encoder"]["name"] == "colours"
    assert about["started"] <= about["ended"]
    events = [(line["event"], line["slide"]) for line in log(out)]
    assert events.count(("begin", "slide00")) == 2
    assert events.count(("done", "slide00")) == events.count(("unchanged", "slide00")) == 1
    assert events[0] == ("run", None)
    assert events[-1] == ("end", None)


def test_a_store_that_the_ledger_does_not_know_is_counted(tmp_path: Path) -> None:
    slides, out, moved = draw(tmp_path / "slides", 1), tmp_path / "out", tmp_path / "moved"
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    moved.mkdir()
    shutil.copytree(out / "slide00.zarr", moved / "slide00.zarr")
    (report,) = embed_slides([slides], moved, encoder=ColourEncoder(), assume_mpp=0.5)
    assert report.status == "unchanged"
    assert table(moved)["slide00"] == table(out)["slide00"] | {"seconds": "0.0"}
    assert json.loads((moved / ledger.MANIFEST).read_text("utf-8"))["slides"] == {"done": 1}


def test_a_refusal_leaves_what_is_written_down_of_a_finished_store(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 2), tmp_path / "out"
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    before, seen = table(out), []
    refused = embed_slides([slides], out, encoder=ColourEncoder(), force_mpp=0.25, progress=seen.append)
    assert [(report.status, report.exit_code, report.tiles) for report in refused] == [("failed", 4, 0)] * 2
    assert "mpp was 0.5, is 0.25" in refused[0].message
    assert (seen[-1].failed, seen[-1].tiles) == (2, 0)
    assert table(out) == before
    assert "made otherwise" in next(line["error"] for line in log(out) if line["event"] == "failed")
    again = embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in again] == ["unchanged"] * 2
    assert table(out) == before
    shutil.rmtree(out / "slide00.zarr")
    (slides / "slide00.png").write_text("no slide")
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert [row["status"] for row in table(out).values()] == ["failed", "done"]


def test_a_slide_without_tissue_stays_empty(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    Image.new("RGB", (96, 96), "white").save(slides / "blank.png")
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    before = table(out)
    assert (before["blank"]["status"], before["blank"]["error"]) == ("empty", "")
    for sizes in ({"assume_mpp": 0.5}, {"force_mpp": 0.25}):
        embed_slides([slides], out, encoder=ColourEncoder(), **sizes)
        assert table(out) == before
    shutil.rmtree(out / ledger.FOLDER)
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5, overwrite=True)
    assert table(out) == {"blank": before["blank"] | {"seconds": "0.0"}}


def test_a_store_that_is_damaged_is_written_down_as_failed(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 1), tmp_path / "out"
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    file = out / "slide00.zarr" / "zarr.json"
    file.write_bytes(file.read_bytes()[:-3])
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert table(out)["slide00"]["status"] == "failed"
    assert "slide00.zarr" in table(out)["slide00"]["error"]


def test_tiles_that_cannot_be_read_are_counted(tissue_slide: Path, tmp_path: Path) -> None:
    slide, out = Path(shutil.copy(tissue_slide, tmp_path / "a.tif")), tmp_path / "out"
    damage_tiles(slide, 3 * 8 + 4)
    for _ in range(2):
        embed_slides([slide], out, encoder=ColourEncoder())
        assert table(out)["a"]["bad_tiles"] == "16"
        assert json.loads((out / ledger.MANIFEST).read_text("utf-8"))["bad_tiles"] == 16


def test_a_slide_that_ends_the_process_which_opens_it_costs_itself(
    tissue_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = draw(tmp_path / "slides", 1)
    shutil.copy(tissue_slide, slides / "bad.tif")
    patched(monkeypatch, tmp_path, "os.abort()")
    try:
        bad, good = embed_slides([slides], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
    finally:
        probe._end()
    assert (bad.status, good.status) == ("failed", "done")
    assert "opening it ended its process (SIGABRT" in bad.message


def test_a_disk_that_fails_costs_the_slide_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = draw(tmp_path / "slides", 2)
    digest = embed.slide_fingerprint

    def read(path: Path) -> str:
        if path.stem == "slide00":
            raise OSError(errno.EIO, "Input/output error")
        return digest(path)

    monkeypatch.setattr(embed, "slide_fingerprint", read)
    bad, good = embed_slides([slides], tmp_path / "out", encoder=ColourEncoder(), assume_mpp=0.5)
    assert (bad.status, bad.exit_code, good.status) == ("failed", 3, "done")
    assert bad.message == f"{slides / 'slide00.png'}: Input/output error"


@pytest.mark.parametrize("error", [MachineError, UsageError])
def test_what_would_cost_every_slide_ends_the_run(tmp_path: Path, error: type[WsiBrushError]) -> None:
    class Failing(ColourEncoder):
        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            raise error("out of memory")

    slides, out = draw(tmp_path / "slides", 2), tmp_path / "out"
    with pytest.raises(error, match="out of memory"):
        embed_slides([slides], out, encoder=Failing(), assume_mpp=0.5)
    assert [line["event"] for line in log(out)] == ["run", "begin"]


def test_the_death_of_who_was_at_a_slide_is_written_down_unless_it_has_a_store(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 2), tmp_path / "out"
    embed_slides([slides / "slide00.png"], out, encoder=ColourEncoder(), assume_mpp=0.5)
    before = table(out)["slide00"]
    book = open_ledger(out, ColourEncoder(), outlines=None, overwrite=False)
    for one in find_inputs([slides]):
        bury(book, one, "the worker died")
    book.publish()
    rows = table(out)
    assert rows["slide00"] == before
    assert rows["slide01"]["error"] == f"{slides / 'slide01.png'}: the worker died"
    assert [line["slide"] for line in log(out) if line["event"] == "failed"] == ["slide00", "slide01"]


def test_other_parameters_are_refused_before_a_slide_is_opened(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 1), tmp_path / "out"
    embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    draw(slides, 2)
    before = log(out)
    with pytest.raises(RefusedError, match=r"encoder_weights was 1, is 2.*--overwrite"):
        embed_slides([slides], out, encoder=ColourEncoder("2"), assume_mpp=0.5)
    with pytest.raises(RefusedError, match=r"tissue_rules was .*, is outlines"):
        embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5, outlines=tmp_path)
    assert log(out) == before
    reports = embed_slides([slides], out, encoder=ColourEncoder("2"), assume_mpp=0.5, overwrite=True)
    assert [report.status for report in reports] == ["done", "done"]
    assert json.loads((out / ledger.MANIFEST).read_text("utf-8"))["parameters"]["encoder_weights"] == "2"


@pytest.mark.parametrize("name", [ledger.TABLE, ledger.MANIFEST, ledger.LOG])
def test_files_of_these_names_that_are_not_ours_stay(tmp_path: Path, name: str) -> None:
    slides, out = draw(tmp_path / "slides", 1), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(RefusedError, match=name):
        embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_shards_share_no_slide_and_leave_none(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 5), tmp_path / "out"
    parts = [
        embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5, shard=as_shard(f"{number}/2"))
        for number in (1, 2)
    ]
    names = [[report.path.stem for report in part] for part in parts]
    assert names == [["slide00", "slide02", "slide04"], ["slide01", "slide03"]]
    assert len(table(out)) == 5
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UsageError, match="expected I/N"):
            as_shard(wrong)


def test_two_processes_embed_each_slide_once(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 10), tmp_path / "out"
    both = [start(slides, out, slow=0.05) for _ in range(2)]
    for process in both:
        go(process)
    assert [end(process) for process in both] == [0, 0]
    lines = log(out)
    done = [line for line in lines if line["event"] == "done"]
    assert Counter(line["slide"] for line in done) == {f"slide{number:02d}": 1 for number in range(10)}
    assert len({line["process"] for line in done}) == 2
    at: dict[str, int] = {}  # who is at a slide, as the log goes
    for line in lines:
        if line["event"] == "begin":
            assert line["slide"] not in at
            at[line["slide"]] = line["process"]
        elif line["slide"] is not None:
            assert at.pop(line["slide"]) == line["process"]
    assert not at
    assert {row["status"] for row in table(out).values()} == {"done"}


def test_two_may_begin_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = tmp_path / "out", ledger.Ledger._now

    def late(self: ledger.Ledger) -> int:
        monkeypatch.undo()
        ledger.Ledger(out, {"dim": 1}, about={}).log("run")
        return now(self)

    monkeypatch.setattr(ledger.Ledger, "_now", late)
    ledger.Ledger(out, {"dim": 1}, about={}).log("run")
    assert [line["event"] for line in log(out)] == ["run", "run"]


def test_what_ended_since_the_run_began_is_reported_and_not_done_again(tmp_path: Path) -> None:
    slides, out, begun = draw(tmp_path / "slides", 1), tmp_path / "out", list[str]()
    since = open_ledger(out, ColourEncoder(), outlines=None, overwrite=False).since
    for _ in range(2):
        (report,) = embed_slides(
            [slides], out, encoder=ColourEncoder(), assume_mpp=0.5, since=since, begun=begun.append
        )
        assert report.status == "done"
    assert begun == ["slide00"]


def test_what_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 3), tmp_path / "out"
    other = start(slides, out, slow=60)
    go(other)
    deadline = time.monotonic() + 60
    while not (out / ledger.LOG).exists() or len(log(out)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reports = embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in reports] == ["elsewhere", "done", "done"]
    assert json.loads((out / ledger.MANIFEST).read_text("utf-8"))["ended"] is None
    other.kill()
    end(other)
    reports = embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in reports] == ["done", "unchanged", "unchanged"]


def test_what_another_process_had_when_it_died_is_done_in_the_end(tmp_path: Path) -> None:
    slides, out = draw(tmp_path / "slides", 2), tmp_path / "out"
    with contextlib.ExitStack() as other:
        other.enter_context(open_ledger(out, ColourEncoder(), outlines=None, overwrite=False).claim("slide00"))
        reports = embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5, begun=lambda _: other.close())
    assert [report.status for report in reports] == ["done", "done"]


def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    slides = draw(tmp_path / "slides", 6)
    for number, damage in enumerate((b"", b"no slide at all", (slides / "slide02.png").read_bytes()[:300])):
        (slides / f"slide{2 * number:02d}.png").write_bytes(damage)
    clean = embed_slides([slides], tmp_path / "clean", encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.status for report in clean] == ["failed", "done"] * 3
    out, chance = tmp_path / "out", random.Random(6)
    for _ in range(3):
        process = start(slides, out, slow=0.05)
        go(process)
        time.sleep(chance.uniform(0.05, 1.0))
        process.send_signal(signal.SIGKILL)
        end(process)
    again = embed_slides([slides], out, encoder=ColourEncoder(), assume_mpp=0.5)
    assert [report.exit_code for report in again] == [report.exit_code for report in clean]
    assert stores(out) == stores(tmp_path / "clean")
    assert {name: row["status"] for name, row in table(out).items()} == {
        name: row["status"] for name, row in table(tmp_path / "clean").items()
    }
    assert not [path for path in out.iterdir() if path.name.startswith(".wsi-brush-stage")]


def test_the_standing_counts_slides_tiles_and_time(tmp_path: Path) -> None:
    slides = [Input(path, path.stem) for path in sorted(draw(tmp_path / "slides", 4).iterdir())]
    seen: list[Standing] = []
    pace = Pace(slides, seen.append)
    pace._start -= 100
    pace.end(slides[0], {"status": "done", "now": "unchanged", "tiles": 7})
    pace.end(slides[0], {"status": "done", "now": "unchanged", "tiles": 7})
    assert (pace.standing.ended, pace.standing.tiles, pace.standing.left) == (1, 0, None)
    pace.tile(slides[1], 5, 10)
    assert pace.standing.rate == pytest.approx(0.05, rel=0.05)
    assert pace.standing.here == (5, 10)
    assert pace.standing.share == pytest.approx(1.5 / 4, rel=0.05)
    assert pace.standing.left == pytest.approx(2.5 / 0.5 * 100, rel=0.05)
    pace.end(slides[1], {"status": "failed", "now": "failed", "tiles": 0})
    pace.end(slides[2], {"status": "done", "now": "done", "tiles": 12})
    pace.end(slides[3], {"status": "done", "now": "done", "tiles": 3})
    assert (pace.standing.ended, pace.standing.failed, pace.standing.tiles) == (4, 1, 15)
    assert (pace.standing.share, pace.standing.left) == (1.0, 0.0)
    assert len(seen) == 5
