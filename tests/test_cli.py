"""The words, as a user meets them: one clear line for every mistake, the documented exit code, nothing half-written.

Most runs go through a process that has torch loaded and forks for each (`Words`): a run is a process of its own, with
its own arguments, streams and signals, without the seconds of import. The first tests start it all from nothing.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaozarrs
from conftest import TileStatistics, levels_of, make_brush, write_aperio, write_pyramid
from PIL import Image
from test_dicom import write_dicom
from test_embed import damage

from wsi_brush import __version__, commit, ledger
from wsi_brush.baselines import build
from wsi_brush.brush import load_brush, save_brush
from wsi_brush.scratch import WORK
from wsi_brush.slide import open_slide
from wsi_brush.store import EmbeddingStore

WEIGHTS = Path(__file__).parents[1] / "wsi_brush" / "weights"
needs_encoder = pytest.mark.skipif(
    not (WEIGHTS / "encoder.safetensors").is_file(), reason="the bundled encoder is not in this checkout"
)
pytestmark = needs_encoder
LEDGER = (ledger.FOLDER, ledger.TABLE, ledger.MANIFEST, ledger.LOG)

SERVER = """
import json, os, sys, traceback
import PIL.Image, rich.table, skimage.morphology, skimage.segmentation, timm, tifffile, torch, zarr
import wsi_brush.encoder, wsi_brush.synthesize, wsi_brush.train
torch.set_num_threads(1)
from wsi_brush.cli import main
print("ready", flush=True)
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["wsi-brush", *arguments]
        code = 99
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ran:
    """What a run left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def one_line(self, code: int) -> str:
        """The line of an error: the only thing said, and the code that the documentation promises."""
        assert self.code == code, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("wsi-brush: ")
        return line


class Words:
    """Runs `wsi-brush` with arguments, where the system allows it in a mount namespace with a `disk` of 60 kB."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self.disk: Path | None = folder / "disk"
        self.disk.mkdir()
        mounted = 'mount -t tmpfs -o size=60k none "$0" && exec "$@"'
        unshare = shutil.which("unshare")
        if not unshare or not self._start(unshare, "-rm", "sh", "-c", mounted, str(self.disk)):
            self.disk = None
            assert self._start()

    def _start(self, *inside: str) -> bool:
        self._server = subprocess.Popen(
            [*inside, sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = self._read() == "ready"
        if not ready:
            self.close()
        return ready

    def seen(self, folder: Path) -> list[str]:
        """What is in a folder as the runs see it."""
        return [path.name for path in Path(f"/proc/{self._server.pid}/root", *folder.parts[1:]).iterdir()]

    def __call__(self, *arguments: object, interrupt_after: str = "") -> Ran:
        """`interrupt_after`: Ctrl-C as soon as standard error says this."""
        self._count += 1
        paths = [self._folder / f"{self._count}.{stream}" for stream in ("out", "err")]
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([[*map(str, arguments)], *map(str, paths)]) + "\n")
        self._server.stdin.flush()
        child = int(self._read())
        if interrupt_after:
            wait_for(lambda: paths[1].exists() and interrupt_after in paths[1].read_text("utf-8"))
            os.kill(child, signal.SIGINT)
        code = int(self._read())
        return Ran(code, *(path.read_text("utf-8") for path in paths))

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)


def wait_for(happened: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Words]:
    found = Words(tmp_path_factory.mktemp("streams"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def brush(tiny_brush: Path) -> Path:
    return tiny_brush


@pytest.fixture(scope="module")
def painted(words: Words, brush: Path, tissue_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A painting of 96 x 160 pixels; no test may change it."""
    target = tmp_path_factory.mktemp("painted") / "new.ome.zarr"
    ran = words(*paint(tissue_slide, target, brush, region="400,400,96,160"))
    assert ran.code == 0, ran.err
    return target


def paint(slide: Path, target: Path, brush: Path | str, **options: object) -> list[object]:
    """The words of a quick painting; an option of value True is a switch."""
    options = {"steps": 5, "guidance": 1} | options
    named = [[f"--{name.replace('_', '-')}", *([] if value is True else [value])] for name, value in options.items()]
    return ["synthesize", "--ref", slide, "-o", target, "--brush", brush, *(word for pair in named for word in pair)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): commit.sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def stores(folder: Path) -> dict[str, str]:
    """The files of a cohort's stores; its table, manifest and log say when they were written."""
    return {name: value for name, value in hashes(folder).items() if ".zarr/" in name}


def from_nothing(*arguments: object, module: bool = True) -> subprocess.CompletedProcess[str]:
    """A run in a fresh interpreter."""
    command = [sys.executable, "-m", "wsi_brush"] if module else [sys.executable, "-c"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


class TestStart:
    @pytest.mark.parametrize("code", ["import wsi_brush", "import sys; sys.argv = ['wsi-brush', '--help']; main()"])
    def test_it_starts_in_half_a_second_without_torch(self, code: str) -> None:
        loaded = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n"
        script = f"{loaded}{'from wsi_brush.cli import main' if 'main' in code else ''}\n{code}"
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            ran = from_nothing(script, module=False)
            taken.append(time.perf_counter() - start)
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout.splitlines()[-1] == "False"
        assert min(taken) < 0.5

    def test_help_names_the_words(self) -> None:
        for arguments in (("--help",), ()):
            ran = from_nothing(*arguments)
            assert ran.returncode == 0
            assert ran.stderr == ""
            assert all(
                word in ran.stdout for word in ("embed", "synthesize", "train", "evaluate", "verify", "export", "info")
            )

    def test_every_verb_has_its_help(self, words: Words) -> None:
        for verb in ("embed", "synthesize", "train", "evaluate", "verify", "export", "info", "view"):
            ran = words(verb, "--help")
            assert (ran.code, ran.err) == (0, "")
            assert all(option in ran.out for option in ("--json", "--quiet", "--debug"))
            assert verb in ("verify", "info") or "--dry-run" in ran.out

    def test_version(self, words: Words) -> None:
        assert words("--version") == Ran(0, f"{__version__}\n", "")

    def test_a_painting_in_a_fresh_process(
        self, brush: Path, painted: Path, tissue_slide: Path, tmp_path: Path
    ) -> None:
        """The whole way without the forking process: the same bytes, and two threads change none."""
        target = tmp_path / "new.ome.zarr"
        ran = from_nothing(*paint(tissue_slide, target, brush, region="400,400,96,160", threads=2, json=True))
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["path"] == str(target)
        assert hashes(target) == hashes(painted)


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["embed"], "Missing argument"),
            (["synthesize", "-o", "out"], "--ref"),
            (["paint"], "No such command"),
            (["--sharp"], "No such option"),
            (["embed", "a.svs", "-o", "out", "--sharp"], "No such option"),
            (["embed", "a.svs", "-o", "out", "--threads", "-1"], "--threads"),
            (["synthesize", "--ref", "a.svs", "-o", "out", "--max-memory", "much"], "--max-memory much"),
            (["synthesize", "--ref", "a.svs", "-o", "out", "--solver", "euler"], "--solver"),
            (["synthesize", "--ref", "a.svs", "-o", "b", "--seed", "pi"], "--seed"),
            (["synthesize", "--ref", "a.svs", "-o", "b", "--seed", 2**63], "--seed"),
            (["synthesize", "--ref", "a.svs", "-o", "b", "--steps", "1"], "--steps"),
            (["synthesize", "--ref", "a.svs", "-o", "b", "--guidance", "nan"], "--guidance nan"),
            (["evaluate", "--real", "a.svs", "-o", "out"], "--synthetic"),
            (
                ["evaluate", "--real", "a", "--synthetic", "b", "-o", "c", "--codec", "gif"],
                "--codec gif: expected none",
            ),
            (["verify"], "Missing argument"),
        ],
    )
    def test_words_that_make_no_sense_are_one_line_and_code_1(
        self, words: Words, arguments: list[object], named: str
    ) -> None:
        assert named in words(*arguments).one_line(1)

    def test_the_line_says_where_help_is(self, words: Words) -> None:
        assert words("embed").one_line(1).endswith("See: wsi-brush embed --help")


class TestEvaluate:
    def test_two_of_each_side_make_a_report(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        """As a shell spreads names after one option."""
        other, third = (shutil.copy(tissue_slide, tmp_path / name) for name in ("other.tif", "third.tif"))
        report = tmp_path / "report"
        arguments = ["--real", tissue_slide, other, "--synthetic", other, third, "-o", report, "--most", 16]
        arguments += ["--force-mpp", 0.51]
        plan = words("evaluate", *arguments, "--dry-run")
        assert plan.code == 0
        assert "tissue.tif (0.51 µm per pixel), other.tif (0.51 µm per pixel)" in plan.out
        assert not report.exists()
        ran = words("evaluate", *arguments, "--json")
        assert ran.code == 0, ran.err
        figures = json.loads(ran.out)
        assert figures == json.loads((report / "report.json").read_text("utf-8"))
        assert [one["name"] for one in figures["synthetic"]] == ["other.tif", "third.tif"]
        assert [one["name"] for one in figures["real"]] == ["tissue.tif", "other.tif"]
        assert {(one["mpp"], one["mpp_source"]) for one in figures["real"] + figures["synthetic"]} == {(0.51, "forced")}
        assert set(figures["control"]) == {"bundled", "descriptor"}
        assert words("verify", report).code == 0
        again = words("evaluate", *arguments)
        assert again.one_line(4)
        shown = words("evaluate", *arguments, "--overwrite", "--quiet", "--unpaired")
        assert (shown.code, shown.out) == (0, "")
        figures = json.loads((report / "report.json").read_text("utf-8"))
        assert figures["control"] is None
        assert figures["notes"][0] == "2 real and 2 synthetic: not paired, so nothing is said about control"

    def test_what_the_brush_was_trained_on_is_searched_for_copies(
        self, words: Words, tissue_slide: Path, tmp_path: Path
    ) -> None:
        """The synthetic side is a training slide upside down, half of it trained on; the real one is a mosaic."""
        pixels = (slide := open_slide(tissue_slide)).read(slide.grid)
        flipped = write_pyramid(tmp_path / "flipped.tif", [pixels[::-1]])
        stones = pixels.reshape(32, 32, 32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
        stones = np.random.default_rng(0).permutation(np.concatenate([stones, stones]))
        mosaic = stones.reshape(32, 64, 32, 32, 3).swapaxes(1, 2).reshape(1024, 2048, 3)
        real, report = write_pyramid(tmp_path / "mosaic.tif", [mosaic]), tmp_path / "report"
        arguments = ["--real", real, "--synthetic", flipped, "-o", report, "--most", 64]
        arguments += ["--training", tissue_slide, real, "--trained-until", 0.5]
        plan = words("evaluate", *arguments, "--dry-run")
        assert plan.code == 0
        assert "training: tissue.tif, mosaic.tif" in plan.out
        assert "looking for copies" in plan.out
        ran = words("evaluate", *arguments)
        assert ran.code == 0, ran.err
        assert "mosaic.tif: what was trained on is not held out" in ran.err
        assert "correlation with the nearest training tile" in ran.out
        found = json.loads((report / "report.json").read_text("utf-8"))["copying"]
        assert found["training"] == ["tissue.tif", "mosaic.tif"]
        assert 0.3 < found["share"]["value"] < 0.7
        assert found["share"]["floor"] <= 0.05
        assert [one["turn"] for one in found["worst"][:8]] == [1] * 8
        assert {one["training"] for one in found["worst"][:8]} == {0}
        page = (report / "report.html").read_text("utf-8")
        assert page.count("nearest in training</figcaption>") == len(found["worst"]) == 12
        assert "the left 50 %" in page
        for value in ("0", "1.5"):
            assert "--trained-until" in words("evaluate", *arguments, "--trained-until", value).one_line(1)

    @pytest.mark.parametrize(
        ("option", "needs"), [(["--download"], "--published"), (["--trained-until", 0.5], "--training")]
    )
    def test_what_would_do_nothing_is_refused(self, words: Words, option: list[object], needs: str) -> None:
        line = words("evaluate", "--real", "a", "--synthetic", "b", "-o", "c", *option).one_line(1)
        assert line.startswith(f"wsi-brush: {option[0]}: nothing is ")
        assert line.endswith(f" without {needs}")

    def test_several_encoders_have_their_figures_each(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        about = json.loads((WEIGHTS / "encoder.json").read_text("utf-8"))
        shutil.copy(WEIGHTS / "encoder.safetensors", tmp_path / "mine.safetensors")
        (tmp_path / "mine.json").write_text(json.dumps(about | {"name": "mine"}), "utf-8")
        report, mine = tmp_path / "report", tmp_path / "mine.safetensors"
        sides = ["evaluate", "--real", tissue_slide, "--synthetic", tissue_slide, "-o", report, "--most", 16]
        ran = words(*sides, "--encoder", "bundled", mine, "--json")
        assert ran.code == 0, ran.err
        figures = json.loads(ran.out)
        assert list(figures["scales"]) == list(figures["borders"]) == ["bundled", "mine"]
        assert figures["scales"]["bundled"] == figures["scales"]["mine"]
        assert set(figures["control"]) == {"bundled", "mine", "descriptor"}
        for encoders, said in (
            (("bundled", "nothing"), "'nothing' is no encoder; expected bundled"),
            (("bundled", tmp_path / "none.safetensors"), "none.safetensors: no such file"),
            ((mine, mine), "--encoder mine: a second one of that name"),
        ):
            assert said in words(*sides, "--encoder", *encoders, "--overwrite").one_line(1)

    def test_a_painting_is_found_to_follow_its_reference(
        self, words: Words, tissue_slide: Path, tmp_path: Path
    ) -> None:
        """Among two slides of one size, in another order."""
        mirrored, new = tmp_path / "mirrored.tif", tmp_path / "new.ome.zarr"
        slide = open_slide(tissue_slide)
        write_pyramid(mirrored, [slide.read(slide.grid)[:, ::-1]])
        assert words(*paint(mirrored, new, "bundled", region="300,300,448,448")).code == 0
        ran = words(
            "evaluate", "--real", tissue_slide, mirrored, "--synthetic", new, "-o", tmp_path / "report", "--most", 16,
            "--json",
        )  # fmt: skip
        assert ran.code == 0, ran.err
        figures = json.loads(ran.out)
        assert [(one["name"], one["area"]) for one in figures["real"]] == [("mirrored.tif", [300, 300, 448, 448])]
        assert figures["control"] is not None
        assert not any("pair" in note for note in figures["notes"])
        assert "tissue.tif: left out, as nothing was painted after it" in figures["notes"]

    def test_what_cannot_be_compared_is_one_line(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        blank = write_pyramid(tmp_path / "blank.tif", [np.full((512, 512, 3), 245, np.uint8)])
        (tmp_path / "empty").mkdir()
        for other, code, said in (
            (tmp_path / "none.tif", 3, "none.tif"),
            (tmp_path / "empty", 1, "no slides in this folder"),
        ):
            for sides in (("--real", "--synthetic"), ("--synthetic", "--real")):
                report = tmp_path / "report"
                ran = words("evaluate", sides[0], tissue_slide, sides[1], other, "-o", report, "--quiet")
                assert said in ran.one_line(code)
                assert not report.exists()
        ran = words("evaluate", "--real", blank, "--synthetic", tissue_slide, "-o", report, "--quiet")
        assert "blank.tif: no tissue" in ran.one_line(3)
        ran = words("evaluate", "--real", tissue_slide, "--synthetic", blank, "-o", report)
        assert (ran.code, report.exists()) == (0, True)  # a painting that failed is a result
        assert "blank.tif: no tissue; is it H&E" in ran.err
        assert "nothing can be said of how like the two sides are: fewer than 4 windows" in ran.err
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
        ran = words("evaluate", "--real", tissue_slide, "--synthetic", tissue_slide, "-o", mine, "--overwrite")
        assert "mine" in ran.one_line(4)


class TestBadSlides:
    """Of a reference; each leaves nothing at all."""

    def refused(self, words: Words, brush: Path, slide: Path, code: int = 3, **options: object) -> str:
        target = slide.parent / "out" / "new.ome.zarr"
        target.parent.mkdir(exist_ok=True)
        line = words(*paint(slide, target, brush, size=64, **options)).one_line(code)
        assert str(slide) in line
        assert list(target.parent.iterdir()) == []
        return line

    def test_a_missing_file(self, words: Words, brush: Path, tmp_path: Path) -> None:
        assert "no such file" in self.refused(words, brush, tmp_path / "absent.svs")

    def test_a_text_file_named_svs(self, words: Words, brush: Path, tmp_path: Path) -> None:
        (tmp_path / "text.svs").write_text("This is no slide.\n" * 100)
        assert "not a slide" in self.refused(words, brush, tmp_path / "text.svs")

    @pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
    def test_a_truncated_svs(self, words: Words, brush: Path, tmp_path: Path, kept: float) -> None:
        path = write_aperio(tmp_path / "cut.svs", levels_of((512, 512), (1, 2)))
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
        line = self.refused(words, brush, path)
        assert "truncated" in line or "empty" in line

    def test_a_slide_without_pixel_size(self, words: Words, brush: Path, tmp_path: Path) -> None:
        path = write_pyramid(tmp_path / "bare.tif", levels_of((512, 512), (1, 2)), mpp=None)
        assert "--assume-mpp" in self.refused(words, brush, path)
        target = tmp_path / "new.ome.zarr"
        assert words(*paint(path, target, brush, size=64, assume_mpp=0.5)).code == 0
        assert open_slide(target).mpp == 0.5

    def test_a_folder(self, words: Words, brush: Path, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        assert "no OME-Zarr" in self.refused(words, brush, tmp_path / "folder")

    def test_debug_shows_the_traceback_and_keeps_the_code(self, words: Words, brush: Path, tmp_path: Path) -> None:
        ran = words(*paint(tmp_path / "absent.svs", tmp_path / "new", brush, debug=True))
        assert ran.code == 3
        assert "Traceback" in ran.err
        assert ran.err.splitlines()[-1].startswith("wsi-brush: ")


class TestPlaces:
    def refused(self, words: Words, brush: Path, slide: Path, folder: Path, **options: object) -> str:
        line = words(*paint(slide, folder / "new.ome.zarr", brush, **options)).one_line(1)
        assert list(folder.iterdir()) == []
        return line

    @pytest.mark.parametrize("region", ["1000,1000,100,100", "-1,0,64,64", "0,0,0,64", "0,0,2000,2000"])
    def test_a_region_outside_the_slide(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, region: str
    ) -> None:
        line = self.refused(words, brush, tissue_slide, tmp_path, region=region)
        assert f"region {region} is not inside the slide; level 0 is 1024 x 1024 pixels" in line

    @pytest.mark.parametrize("region", ["1,2,3", "a,b,c,d", "", "1,2,3,4,5", "1;2;3;4", "0,0,64.5,64"])
    def test_a_malformed_region(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, region: str
    ) -> None:
        assert "TOP,LEFT,HEIGHT,WIDTH" in self.refused(words, brush, tissue_slide, tmp_path, region=region)

    def test_a_region_and_a_size(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        line = self.refused(words, brush, tissue_slide, tmp_path, region="0,0,64,64", size=64)
        assert "exclude each other" in line

    @pytest.mark.parametrize("size", [1025, 4096, 10**9])
    def test_a_size_larger_than_the_slide(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, size: int
    ) -> None:
        assert "--size 1024 or less" in self.refused(words, brush, tissue_slide, tmp_path, size=size)

    @pytest.mark.parametrize("size", [0, -5])
    def test_a_size_of_nothing(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, size: int) -> None:
        assert f"a size of {size}" in self.refused(words, brush, tissue_slide, tmp_path, size=size)

    @pytest.mark.parametrize("mpp", [0.7, 0, -1, "nan", "inf"])
    def test_a_pitch_that_the_brush_does_not_paint(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, mpp: object
    ) -> None:
        assert "paints at 0.5, 1, 2, 4, 8" in self.refused(words, brush, tissue_slide, tmp_path, size=64, mpp=mpp)

    def test_a_size_that_is_no_multiple_of_anything(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path
    ) -> None:
        ran = words(*paint(tissue_slide, tmp_path / "new.ome.zarr", brush, size=101, json=True))
        assert ran.code == 0
        result = json.loads(ran.out)
        assert (result["height"], result["width"]) == (101, 101)
        assert open_slide(tmp_path / "new.ome.zarr").grid.shape == (101, 101)


class TestOutputs:
    def test_where_nothing_can_be_written(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for folder in (tmp_path / "file" / "deep", Path("/proc/nowhere")):
            for ran in (
                words(*paint(tissue_slide, folder / "new.ome.zarr", brush, size=64)),
                words("embed", tissue_slide, "-o", folder),
            ):
                assert f"{folder}: cannot be written to" in ran.one_line(2)
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_not_ours_stays(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, overwrite: bool
    ) -> None:
        options = {"size": 64} | ({"overwrite": True} if overwrite else {})
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "zarr.json").write_text("{}")
        (tmp_path / "file").write_text("mine")
        shutil.copytree(brush, tmp_path / "brush")  # ours, but no painting
        before = hashes(tmp_path)
        for name in ("folder", "file", "brush"):
            line = words(*paint(tissue_slide, tmp_path / name, brush, **options)).one_line(4)
            assert f"{tmp_path / name}: exists and is no pyramid of wsi-brush" in line
        assert hashes(tmp_path) == before

    def test_what_is_ours_is_replaced_only_when_asked(
        self, words: Words, brush: Path, tissue_slide: Path, painted: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "new.ome.zarr"
        shutil.copytree(painted, target)
        before = hashes(target)
        options = {"region": "400,400,64,64", "seed": 1}
        assert "--overwrite" in words(*paint(tissue_slide, target, brush, **options)).one_line(4)
        assert hashes(target) == before
        assert words(*paint(tissue_slide, target, brush, overwrite=True, **options)).code == 0
        assert open_slide(target).grid.shape == (64, 64)
        assert commit.verify(target) == []
        assert [path.name for path in tmp_path.iterdir()] == ["new.ome.zarr"]

    def test_a_full_disk(self, words: Words, brush: Path, tissue_slide: Path) -> None:
        """One line, and what had been written is gone: a smaller painting finds room."""
        disk = words.disk
        if disk is None:
            pytest.skip("needs `unshare -rm` to mount a tiny disk of its own")
        for arguments in (
            paint(tissue_slide, disk / "new.ome.zarr", brush, size=512, quiet=True),
            ["embed", tissue_slide, "-o", disk, "--quiet"],
        ):
            assert "the disk is full; free some space" in words(*arguments).one_line(2)
            assert [name for name in words.seen(disk) if name.endswith(".zarr") or name.startswith(commit.STAGE)] == []
        assert words(*paint(tissue_slide, disk / "new.ome.zarr", brush, size=64, quiet=True)).code == 0
        assert "new.ome.zarr" in words.seen(disk)


class TestInterrupted:
    """Ctrl-C: code 130, one line beside the progress, no stage, and what stood there still stands."""

    def check(self, ran: Ran, folder: Path, before: dict[str, str], *, goes_on: bool = True) -> None:
        assert ran.code == 130, ran
        assert ran.out == ""
        lines = [line for line in ran.err.splitlines() if not line.endswith(" %")]
        then = "run the same command again, it goes on from what is done" if goes_on else "the same command begins anew"
        assert lines == [f"wsi-brush: interrupted; {then}"]
        kept = {name: value for name, value in hashes(folder).items() if not name.startswith((WORK, *LEDGER))}
        assert kept == before
        assert not [path for path in folder.iterdir() if path.name.startswith(commit.STAGE)]

    def test_while_painting(self, words: Words, brush: Path, tissue_slide: Path, painted: Path, tmp_path: Path) -> None:
        shutil.copytree(painted, tmp_path / "old.ome.zarr")
        before = hashes(tmp_path)
        for name in ("new.ome.zarr", "old.ome.zarr"):
            arguments = paint(tissue_slide, tmp_path / name, brush, size=1024, steps=200, overwrite=True)
            self.check(words(*arguments, interrupt_after="painting: "), tmp_path, before)

    def test_and_the_same_command_goes_on(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        options = {"region": "400,400,64,64", "steps": 40}
        assert words(*paint(tissue_slide, tmp_path / "once", brush, **options)).code == 0
        arguments, before = paint(tissue_slide, tmp_path / "again", brush, **options), hashes(tmp_path)
        self.check(words(*arguments, interrupt_after="painting: "), tmp_path, before)
        other = words(*paint(tissue_slide, tmp_path / "again", brush, **{**options, "seed": 8})).one_line(4)
        assert "seed 0 -> 8" in other
        ran = words(*arguments)
        assert ran.code == 0
        assert hashes(tmp_path / "again") == hashes(tmp_path / "once")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "once"]

    def test_while_a_rival_paints(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        """It holds its canvas in memory alone, and so it says."""
        ours = load_brush(brush)
        rival = build("infty-diff", {"dim": ours.denoiser.config.dim, "width": 8, "grid": 8})
        save_brush(replace(ours, network=rival), tmp_path / "rival")
        arguments = paint(tissue_slide, tmp_path / "new.ome.zarr", tmp_path / "rival", size=512, steps=200)
        self.check(words(*arguments, interrupt_after="painting with"), tmp_path, hashes(tmp_path), goes_on=False)

    def test_while_comparing(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        """Nothing is kept there, and so it says."""
        arguments = ["evaluate", "--real", tissue_slide, "--synthetic", tissue_slide, "-o", tmp_path / "report"]
        self.check(words(*arguments, interrupt_after="embedding at"), tmp_path, {}, goes_on=False)

    def test_while_embedding(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        arguments = ["embed", tissue_slide, "-o", tmp_path, "--force-mpp", 4]
        self.check(words(*arguments, interrupt_after="tissue.tif: "), tmp_path, {})

    def test_while_embedding_the_reference(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        arguments = paint(tissue_slide, tmp_path / "new.ome.zarr", brush, size=8000, force_mpp=4)
        self.check(words(*arguments, interrupt_after="embedding the reference: "), tmp_path, {})

    @pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4])
    def test_while_writing(self, tmp_path: Path, seconds: float) -> None:
        """zarr writes in a thread of its own, which must not go on while the stage is being removed."""
        script = """
import sys
import numpy as np
from pathlib import Path
from wsi_brush import commit
from wsi_brush.cli import manners
from wsi_brush.grid import Grid
from wsi_brush.machine import undisturbed
from wsi_brush.pyramid import SHARD, Pyramid
grid = Grid(0.5, 0, 0, 4096, 2048)
pixels = np.random.default_rng(0).integers(0, 256, (SHARD, SHARD, 3), dtype=np.uint8)
with manners.errors(False, goes_on=True), commit.staged(Path(sys.argv[1]), kind="pyramid", about={}) as stage:
    pyramid = Pyramid(stage, grid, about={})
    print("writing", flush=True)
    for _ in range(20):
        for part in grid.tiles(SHARD):
            with undisturbed():
                pyramid.write(part, pixels)
"""
        command = [sys.executable, "-c", script, str(tmp_path / "new")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(seconds)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
        self.check(Ran(child.returncode, out, err), tmp_path, {})


class TestBrushes:
    def test_an_unknown_brush(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for name in (tmp_path / "absent", tmp_path / "empty", tissue_slide):
            line = words(*paint(tissue_slide, tmp_path / "new", name, size=64)).one_line(1)
            assert f"{name}: no brush here" in line

    def test_a_brush_for_another_encoder(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        from wsi_brush.brush import save_brush

        save_brush(make_brush(dim=368, tile=128, encoder="bundled", fingerprint="0" * 64), tmp_path / "other")
        line = words(*paint(tissue_slide, tmp_path / "new", tmp_path / "other", size=64)).one_line(1)
        assert "use the encoder it was trained with" in line
        save_brush(make_brush(dim=8, tile=128, encoder="mine", fingerprint="0" * 64), tmp_path / "mine")
        line = words(*paint(tissue_slide, tmp_path / "new", tmp_path / "mine", size=64)).one_line(1)
        assert "'mine' is no encoder" in line
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("name", ["brush.safetensors", "brush.json", commit.MANIFEST])
    def test_a_damaged_brush(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path, name: str) -> None:
        damaged = tmp_path / "damaged"
        shutil.copytree(brush, damaged)
        data = bytearray((damaged / name).read_bytes())
        data[len(data) // 2] ^= 128
        (damaged / name).write_bytes(data)
        line = words(*paint(tissue_slide, tmp_path / "new", damaged, size=64)).one_line(4)
        assert "damaged" in line
        assert not (tmp_path / "new").exists()


class TestEmbed:
    def test_a_bad_slide_costs_one_and_again_is_nothing_to_do(
        self, words: Words, tissue_slide: Path, tmp_path: Path
    ) -> None:
        slides, out = tmp_path / "slides", tmp_path / "out"
        slides.mkdir()
        for name in ("a.tif", "c.tif"):
            shutil.copy(tissue_slide, slides / name)
        (slides / "b.svs").write_text("no slide")
        ran = words("embed", slides, "-o", out)
        assert ran.code == 3
        assert [line for line in ran.err.splitlines() if line.startswith("wsi-brush: ")] == [
            line for line in ran.err.splitlines() if "b.svs" in line
        ]
        assert any(line.startswith("3 slides: 100 %, 3 done (1 failed)") for line in ran.err.splitlines())
        assert sorted(path.name for path in out.glob("[!.]*.zarr")) == ["a.zarr", "c.zarr"]
        assert [line.split(",")[2] for line in (out / "slides.csv").read_text().splitlines()[1:]] == [
            *("done", "failed", "done")
        ]
        store = EmbeddingStore.open(out / "a.zarr")
        assert store.maps[0.5].present.any()
        for row, status in zip(ran.out.splitlines()[3:6], ("done", "failed", "done"), strict=True):
            assert status in row
        before = stores(out)
        again = words("embed", slides, "-o", out, "--json")
        assert again.code == 3
        assert [row["status"] for row in json.loads(again.out)] == ["unchanged", "failed", "unchanged"]
        assert stores(out) == before
        part = words("embed", slides, "-o", out, "--shard", "2/2", "--json")
        assert [Path(row["path"]).name for row in json.loads(part.out)] == ["b.svs"]
        assert "shard 2/2: 1 of the slides" in part.err
        plan = words("embed", slides, "-o", out, "--shard", "1/2", "--dry-run", "--json")
        assert [Path(path).name for path in json.loads(plan.out)["slides"]] == ["a.tif", "c.tif"]
        assert "--shard 3/2: expected I/N" in words("embed", slides, "-o", out, "--shard", "3/2").one_line(1)

    def test_one_bad_slide_is_one_line(self, words: Words, tmp_path: Path) -> None:
        assert "absent.svs: no such file" in words(
            "embed", tmp_path / "absent.svs", "-o", tmp_path / "out", "--quiet"
        ).one_line(3)

    def test_a_slide_without_pixel_size(self, words: Words, tmp_path: Path) -> None:
        path = write_pyramid(tmp_path / "bare.tif", levels_of((512, 512), (1, 2)), mpp=None)
        assert "--assume-mpp" in words("embed", path, "-o", tmp_path / "out", "--quiet").one_line(3)
        ran = words("embed", path, "-o", tmp_path / "out", "--assume-mpp", 0.5, "--json", "--quiet")
        assert (ran.code, ran.err) == (0, "")
        (row,) = json.loads(ran.out)
        assert (row["mpp"], row["mpp_source"]) == (0.5, "assumed")

    def test_a_damaged_tile_is_counted_or_refused(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        path = Path(shutil.copy(tissue_slide, tmp_path / "a.tif"))
        damage(path, 3 * 8 + 4)
        for more, code, status, tiles in (((), 0, "done", "1"), (("--strict",), 3, "failed", "0")):
            out = tmp_path / status
            ran = words("embed", path, "-o", out, "--workers", 2, *more)
            assert ran.code == code, ran.err
            assert any(line.startswith(f"wsi-brush: {path}: ") for line in ran.err.splitlines())
            assert status in ran.out
            (row,) = csv.DictReader((out / "slides.csv").read_text("utf-8").splitlines())
            assert (row["status"], row["bad_tiles"], bool(row["error"])) == (status, tiles, bool(more))

    def test_two_devices_are_two_processes(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        slides = tmp_path / "slides"
        slides.mkdir()
        for name in ("a.tif", "b.tif"):
            shutil.copy(tissue_slide, slides / name)
        ran = words("embed", slides, "-o", tmp_path / "two", "--devices", "cpu,cpu", "--threads", 1, "--json", "-q")
        assert (ran.code, ran.err) == (0, "")
        assert [row["status"] for row in json.loads(ran.out)] == ["done", "done"]
        assert words("embed", slides, "-o", tmp_path / "one", "--threads", 1, "-q").code == 0
        assert stores(tmp_path / "two") == stores(tmp_path / "one")

    def test_a_blank_slide_is_a_valid_result(self, words: Words, tmp_path: Path) -> None:
        Image.fromarray(np.full((300, 300, 3), 245, np.uint8)).save(tmp_path / "blank.png")
        ran = words("embed", tmp_path / "blank.png", "-o", tmp_path / "out", "--assume-mpp", 0.5, "--json")
        assert ran.code == 0
        assert json.loads(ran.out)[0]["status"] == "empty"

    def test_an_unknown_encoder(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        line = words("embed", tissue_slide, "-o", tmp_path / "out", "--encoder", "best").one_line(1)
        assert "'best' is no encoder" in line
        assert not (tmp_path / "out").exists()


class TestManners:
    def test_the_plain_words(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        """On no terminal: the result on standard output, plain lines of progress on standard error."""
        target, png = tmp_path / "new.ome.zarr", tmp_path / "pair.png"
        ran = words(*paint(tissue_slide, target, brush, region="400,400,200,300", seed=7, png=png))
        assert ran.code == 0
        where, after, took, cosine = ran.out.splitlines()
        assert where == f"{target}: synthetic, 200 x 300 pixels at 0.5 µm"
        assert after == "after tissue.tif, region 400,400,200,300 (level-0 pixels), seed 7"
        assert took.startswith("took ")
        assert cosine.startswith("mean cosine of embeddings with the reference: ")
        assert "at 0.5 µm" in cosine
        lines = ran.err.splitlines()
        assert "embedding the reference: 100 %" in lines
        assert lines[-1] == "painting: 100 %"
        assert "\r" not in ran.err
        assert "\x1b" not in ran.err
        yaozarrs.validate_zarr_store(target)
        with Image.open(png) as picture:
            assert "synthetic" in cast(dict[str, Any], picture.info)["Comment"]

    def test_json(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        target = tmp_path / "new.ome.zarr"
        ran = words(*paint(tissue_slide, target, brush, region="400,400,200,300", json=True, quiet=True))
        assert (ran.code, ran.err) == (0, "")
        result = json.loads(ran.out)
        assert result.pop("seconds") > 0
        assert result.pop("peak_memory_gb") > 0
        assert -1 <= result.pop("cosine")["0.5"] <= 1
        assert result == {
            "path": str(target),
            "synthetic": True,
            "height": 200,
            "width": 300,
            "mpp": 0.5,
            "region": [400, 400, 200, 300],
            "seed": 0,
        }

    def test_quiet_is_silent(
        self, words: Words, brush: Path, painted: Path, tissue_slide: Path, tmp_path: Path
    ) -> None:
        for arguments in (
            paint(tissue_slide, tmp_path / "new.ome.zarr", brush, size=64, quiet=True),
            ["embed", tissue_slide, "-o", tmp_path, "-q"],
            ["verify", painted, "-q"],
        ):
            assert words(*arguments) == Ran(0, "", "")

    def test_a_dry_run_writes_nothing(self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path) -> None:
        config = tmp_path / "config.toml"
        sizes = "sizes = [64, 64, 64, 64, 32]\nwindow = 32\npoints = 0"
        config.write_text(f'[data]\nslides = [{{ path = "{tissue_slide}" }}]\n{sizes}\n')
        (tmp_path / "out").mkdir()
        for arguments, named in (
            (paint(tissue_slide, tmp_path / "out" / "new.ome.zarr", brush, size=512), "512 x 512 pixels at 0.5 µm"),
            (["embed", tissue_slide, "-o", tmp_path / "out" / "deep"], "tissue.tif"),
            (["train", config, "-o", tmp_path / "out" / "brush"], "tissue.tif"),
        ):
            ran = words(*arguments, "--dry-run")
            assert (ran.code, ran.err) == (0, "")
            assert named in ran.out
            assert json.loads(words(*arguments, "--dry-run", "--json").out)
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_dry_run_finds_what_would_fail(
        self, words: Words, brush: Path, tissue_slide: Path, tmp_path: Path
    ) -> None:
        assert "give --size 1024" in words(*paint(tissue_slide, tmp_path / "x", brush, dry_run=True)).one_line(1)
        assert "no brush" in words(*paint(tissue_slide, tmp_path / "x", tmp_path, dry_run=True)).one_line(1)
        ran = words("embed", tissue_slide, tmp_path / "absent.svs", "-o", tmp_path / "x", "--dry-run")
        assert "absent.svs: no such file" in ran.out
        assert "no slides" in words("embed", brush, "-o", tmp_path / "x", "--dry-run").one_line(1)

    def test_a_wrong_configuration_is_one_line(self, words: Words, tmp_path: Path) -> None:
        config = tmp_path / "config.toml"
        config.write_text('[data]\nslides = [{ path = "a.tif" }]\n[optimisation]\nstep = 3\n')
        assert "did you mean steps?" in words("train", config, "-o", tmp_path / "brush").one_line(1)
        assert "expected a TOML file" in words("train", tmp_path / "absent", "-o", tmp_path / "brush").one_line(1)


class TestInputs:
    def test_a_table_names_its_slides(self, words: Words, tissue_slide: Path, tmp_path: Path) -> None:
        bare = write_pyramid(tmp_path / "no header.tif", levels_of((256, 256), (1,)), mpp=None)
        table = tmp_path / "cohort.csv"
        table.write_text(f"path,mpp,id\n{tissue_slide},,one\n{bare.name},0.5,two\n")
        ran = words("embed", table, "-o", tmp_path / "out", "--dry-run", "--json")
        assert (ran.code, json.loads(ran.out)["slides"]) == (0, [str(tissue_slide), str(bare)])
        assert json.loads(ran.out)["unreadable"] == []
        ran = words("embed", table, "-o", tmp_path / "out", "--json", "-q")
        assert ran.code == 0, ran.err
        assert {path.name for path in (tmp_path / "out").glob("*.zarr")} == {"one.zarr", "two.zarr"}
        assert [one["mpp_source"] for one in json.loads(ran.out)] == ["tiff resolution", "assumed"]
        table.write_text(f"path,mpp\n{bare.name},none\n")
        assert "cohort.csv, row 2: mpp none" in words("embed", table, "-o", tmp_path / "x").one_line(1)

    def test_a_quoted_pattern_and_a_dicom_series(self, words: Words, tmp_path: Path) -> None:
        (tmp_path / "deep" / "er").mkdir(parents=True)
        slide = write_pyramid(tmp_path / "deep" / "er" / "a b.tif", levels_of((256, 256), (1,)))
        series = write_dicom(tmp_path / "deep" / "case", levels_of((256, 256), (1, 2)))
        for pattern in (tmp_path / "*p" / "**" / "*", tmp_path / "deep" / "**" / "[a-z0-9]*.[td]*"):
            plan = json.loads(words("embed", pattern, "-o", tmp_path / "out", "--dry-run", "--json").out)
            assert (sorted(plan["slides"]), plan["unreadable"]) == (sorted([str(slide), str(series[0])]), [])
        assert "finds no slides" in words("embed", tmp_path / "*.svs", "-o", tmp_path / "out", "--dry-run").one_line(1)
        told = json.loads(words("info", series[0].parent, "--json").out)
        assert told["levels"]
        assert "Mustermann" not in json.dumps(told)


class TestVerify:
    def test_whole(self, words: Words, painted: Path, brush: Path) -> None:
        assert words("verify", painted, brush) == Ran(0, f"{painted}: whole\n{brush}: whole\n", "")
        assert json.loads(words("verify", painted, "--json").out) == {str(painted): []}

    def test_a_flipped_byte(self, words: Words, painted: Path, tmp_path: Path) -> None:
        target = tmp_path / "new.ome.zarr"
        shutil.copytree(painted, target)
        shard = max((path for path in target.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        assert f"{shard.relative_to(target)}: changed" in words("verify", target).one_line(4)
        ran = words("verify", target, "--json")
        assert ran.code == 4
        assert len(json.loads(ran.out)[str(target)]) == 1

    def test_what_is_not_there(self, words: Words, tmp_path: Path) -> None:
        assert "never finished" in words("verify", tmp_path / "absent").one_line(4)


class TestModels:
    def test_verify_tries_an_encoder(self, words: Words, tmp_path: Path) -> None:
        ran = words("models", "verify", "bundled", "--json")
        assert ran.code == 0, ran.err
        told = json.loads(ran.out)
        assert (told["golden"], told["problem"]) == ("agrees", None)
        for end in ("safetensors", "json"):
            shutil.copy(WEIGHTS / f"encoder.{end}", tmp_path / f"own.{end}")
        own = words("models", "verify", tmp_path / "own.safetensors")
        assert (own.code, own.err) == (0, "")
        assert "368 numbers of a tile of 128 px" in own.out

    def test_mistakes_are_one_line(self, words: Words) -> None:
        assert "did you mean bundled?" in words("models", "verify", "bundle").one_line(1)
        assert "is no encoder on the hub" in words("models", "fetch", "oracle").one_line(1)
        assert "nothing to fetch" in words("models", "fetch", "bundled").one_line(4)
        assert "not on the hub; get ctranspath.pth" in words("models", "fetch", "ctranspath").one_line(4)

    def test_terms_of_an_encoder_are_said_once_and_stored(
        self, words: Words, tissue_slide: Path, tmp_path: Path
    ) -> None:
        shutil.copy(WEIGHTS / "encoder.safetensors", tmp_path / "own.safetensors")
        about = json.loads((WEIGHTS / "encoder.json").read_text("utf-8"))
        terms = {"licence": "CC-BY-NC-ND-4.0", "outputs": "no commercial use"}
        (tmp_path / "own.json").write_text(json.dumps(about | {"name": "own"} | terms))
        ran = words("embed", tissue_slide, "-o", tmp_path / "out", "--encoder", tmp_path / "own.safetensors")
        assert ran.code == 0, ran.err
        (line,) = [line for line in ran.err.splitlines() if "licence" in line]
        assert line.startswith("wsi-brush: encoder own: licence CC-BY-NC-ND-4.0; no commercial use")
        (store,) = (tmp_path / "out").glob("*.zarr")
        assert EmbeddingStore.open(store).about["encoder_terms"] == terms
        ran = words("embed", tissue_slide, "-o", tmp_path / "free")
        assert "licence" not in ran.err


def test_the_fake_encoder_has_the_size_of_the_bundled_ones_tiles() -> None:
    """What `test_synthesize` takes for an encoder stands for the one that is used here."""
    assert json.loads((WEIGHTS / "encoder.json").read_text("utf-8"))["tile"] == TileStatistics.tile
