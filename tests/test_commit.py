"""What is written appears whole or not at all: also after kill -9 at every step, and on a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wsi_brush import commit
from wsi_brush.commit import MANIFEST, STAGE, check_target, read_manifest, staged, sweep, verify, write_json
from wsi_brush.errors import MachineError, RefusedError

FILES = ("a.bin", "deep/b.bin", "deep/er/c.bin")


def make(target: Path, generation: int, *, overwrite: bool = False, kind: str = "thing") -> None:
    """An artefact whose files and manifest all say `generation`."""
    with staged(target, kind=kind, about={"generation": generation}, overwrite=overwrite) as stage:
        for name in FILES:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_bytes(bytes([generation % 256]) * 1000)


def generation_of(target: Path) -> int | None:
    """The generation at `target`, None where there is nothing; fails on anything half."""
    if not target.exists():
        return None
    assert verify(target) == []
    manifest = read_manifest(target)
    assert manifest is not None
    assert {path.read_bytes()[0] for path in target.rglob("*.bin")} == {manifest["generation"] % 256}
    return int(manifest["generation"])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(STAGE))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that kills itself at its `step`-th touch of the file system; whether it came so far."""
    child = os.fork()
    if not child:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def steps(work: Callable[[], None], *, before: Callable[[], None]) -> Iterator[int]:
    """Every step at which `work` can be killed, after `before` each time."""
    for step in range(1, 500):
        before()
        if not killed_at(step, work):
            assert step > 20, "the hook counted too little to mean anything"
            return
        yield step
    raise AssertionError("the work never ended")


class TestKilled:
    def test_a_first_run_leaves_nothing_or_all(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        seen = set()
        for _ in steps(lambda: make(target, 1), before=lambda: shutil.rmtree(target, ignore_errors=True)):
            seen.add(generation_of(target))
            sweep(target)
            assert leftovers(tmp_path) == []
        assert seen >= {None}
        assert generation_of(target) == 1

    def test_an_overwriting_run_leaves_the_old_or_the_new(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        seen = set()
        for _ in steps(lambda: make(target, 2, overwrite=True), before=lambda: make(target, 1, overwrite=True)):
            seen.add(generation_of(target))
            sweep(target)
            assert leftovers(tmp_path) == []
        assert seen == {1, 2}

    def test_so_it_does_where_folders_cannot_be_swapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """There the next run puts the old one back, if the kill fell between the two renames."""
        monkeypatch.setattr(commit, "_exchange", lambda *_: False)
        target = tmp_path / "out"
        seen, restored = set(), 0
        for _ in steps(lambda: make(target, 2, overwrite=True), before=lambda: make(target, 1, overwrite=True)):
            restored += not target.exists()
            sweep(target)
            seen.add(generation_of(target))
            assert leftovers(tmp_path) == []
        assert seen == {1, 2}
        assert restored

    def test_at_random_moments_from_outside(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        script = textwrap.dedent(
            """
            import sys, itertools
            from pathlib import Path
            sys.path.insert(0, sys.argv[1])
            from test_commit import generation_of, make
            for generation in itertools.count((generation_of(Path(sys.argv[2])) or 0) + 1):
                make(Path(sys.argv[2]), generation, overwrite=True)
                print(generation, flush=True)
            """
        )
        chance, newest = random.Random(0), 0
        for _ in range(8):
            command = [sys.executable, "-c", script, str(Path(__file__).parent), str(target)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                child.stdout.readline()
                time.sleep(chance.uniform(0, 0.02))
                child.kill()
                printed = [newest, *map(int, child.stdout.read().split())]
            found = generation_of(target)
            assert found is not None
            assert found >= max(printed)
            newest = found
        make(target, newest + 1, overwrite=True)
        assert leftovers(tmp_path) == []


class TestTargets:
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("foreign", ["file", "folder", "empty", "link", "other kind", "damaged"])
    def test_what_is_not_ours_is_never_touched(self, tmp_path: Path, foreign: str, overwrite: bool) -> None:
        target, beside = tmp_path / "out", tmp_path / "beside"
        make(beside, 7)
        if foreign == "file":
            target.write_text("a slide")
        elif foreign == "link":
            target.symlink_to(beside)
        elif foreign == "other kind":
            make(target, 1, kind="store")
        else:
            target.mkdir()
            if foreign != "empty":
                (target / ("slide.svs" if foreign == "folder" else MANIFEST)).write_text("a slide")
        before = snapshot(tmp_path)
        with pytest.raises(RefusedError, match=str(target)):
            make(target, 2, overwrite=overwrite)
        assert snapshot(tmp_path) == before
        assert target.is_symlink() == (foreign == "link")

    def test_ours_is_replaced_only_when_asked(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "out"
        make(target, 1)
        with pytest.raises(RefusedError, match="--overwrite"):
            make(target, 2)
        assert generation_of(target) == 1
        make(target, 2, overwrite=True)
        assert generation_of(target) == 2
        assert leftovers(target.parent) == []

    def test_what_appears_meanwhile_is_not_touched(self, tmp_path: Path) -> None:
        target = tmp_path / "out"
        with pytest.raises(RefusedError), staged(target, kind="thing", about={}, overwrite=True):
            target.mkdir()
            (target / "slide.svs").write_text("a slide")
        assert snapshot(tmp_path) == {"out/slide.svs": b"a slide"}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_an_error_leaves_what_was_there(self, tmp_path: Path, error: type[BaseException]) -> None:
        target = tmp_path / "out"
        make(target, 1)
        with pytest.raises(error), staged(target, kind="thing", about={}, overwrite=True) as stage:
            (stage / "half").write_text("half")
            raise error
        assert generation_of(target) == 1
        assert leftovers(tmp_path) == []

    def test_a_folder_that_cannot_be_written_to_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(MachineError, match="choose another output"):
            check_target(tmp_path / "file" / "out", kind="thing", overwrite=False)

    def test_a_new_about_may_be_filled_until_the_end(self, tmp_path: Path) -> None:
        about: dict[str, Any] = {"by pitch": {2: "b", 10: "a"}, "pair": (1, 2)}
        with staged(tmp_path / "out", kind="thing", about=about):
            about["seconds"] = 1.5
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        assert manifest["seconds"] == 1.5
        assert verify(tmp_path / "out") == []


class TestDisk:
    def test_a_full_disk_is_one_line_and_leaves_the_old(self, tmp_path: Path) -> None:
        unshare = shutil.which("unshare")
        if not unshare or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs `unshare -rm` to mount a tiny disk of its own")
        script = textwrap.dedent(
            """
            import sys
            from pathlib import Path
            sys.path.insert(0, sys.argv[1])
            from test_commit import generation_of, leftovers, make
            from wsi_brush.commit import staged
            from wsi_brush.errors import MachineError
            target = Path(sys.argv[2]) / "out"
            make(target, 1)
            try:
                with staged(target, kind="thing", about={}, overwrite=True) as stage:
                    (stage / "big").write_bytes(bytes(4_000_000))
            except MachineError as error:
                print(error)
            assert generation_of(target) == 1
            assert not leftovers(target.parent)
            """
        )
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = 'mount -t tmpfs -o size=1m none "$1" || exit 77; exec "$2" -c "$3" "$4" "$1"'
        command = [unshare, "-rm", "sh", "-c", mounted, "sh", disk, sys.executable, script, Path(__file__).parent]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if ran.returncode == 77:
            pytest.skip("a namespace of its own may not mount here")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines() == [
            f"{disk / 'out'}: the disk is full; free some space and run the same command again"
        ]

    def test_every_file_is_on_the_disk_before_it_appears(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: set[int] = set()
        fsync, replace = os.fsync, os.replace

        def note(descriptor: int) -> None:
            fsync(descriptor)
            synced.add(os.fstat(descriptor).st_ino)

        def appear(source: Path, target: Path) -> None:
            if target == tmp_path / "out":
                assert {path.stat().st_ino for path in source.rglob("*")} <= synced
                assert source.stat().st_ino in synced
            replace(source, target)

        monkeypatch.setattr(os, "fsync", note)
        monkeypatch.setattr(os, "replace", appear)
        make(tmp_path / "out", 1)
        assert tmp_path.stat().st_ino in synced


class TestSweep:
    def test_only_stages_of_dead_runs_of_this_target_go(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            ended.wait()
        prefix = commit._stage_prefix(tmp_path / "out[1]")
        kept = [
            f"{prefix}{os.getpid()}-alive",
            f"{prefix}x",
            f"{commit._stage_prefix(tmp_path / 'other')}{ended.pid}-dead",
            f"{STAGE}out[1]-elsewhere-{ended.pid}-dead",
            "out1",
        ]
        for name in [f"{prefix}{ended.pid}-dead", f"{prefix}{ended.pid}-old", *kept]:
            (tmp_path / name).mkdir()
        (tmp_path / "out[1]").mkdir()
        sweep(tmp_path / "out[1]")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out[1]"])


class TestVerify:
    def test_changed_missing_and_added_files_are_named(self, tmp_path: Path) -> None:
        make(tmp_path / "out", 1)
        (tmp_path / "out" / "a.bin").write_bytes(b"\x01" * 999 + b"\x00")
        (tmp_path / "out" / "deep" / "b.bin").unlink()
        (tmp_path / "out" / "deep" / "new").write_text("new")
        assert verify(tmp_path / "out") == [
            "a.bin: changed since it was written",
            "deep/b.bin: missing",
            "deep/new: not in the manifest",
        ]

    def test_what_was_never_finished_says_so(self, tmp_path: Path) -> None:
        assert "never finished" in verify(tmp_path)[0]

    def test_every_flipped_bit_is_found(self, tmp_path: Path) -> None:
        """In the files and in the manifest; where the manifest is no JSON any more, reading it refuses."""
        make(tmp_path / "out", 1)
        chance = random.Random(0)
        for _ in range(400):
            path = tmp_path / "out" / chance.choice([*FILES, MANIFEST, MANIFEST])
            whole = path.read_bytes()
            place, bit = chance.randrange(len(whole)), chance.randrange(8)
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert verify(tmp_path / "out"), f"bit {bit} of byte {place} of {path.name}"
            except RefusedError as error:
                assert path.name == MANIFEST and "damaged" in str(error)  # noqa: PT017, PT018
            path.write_bytes(whole)
        assert verify(tmp_path / "out") == []

    def test_a_manifest_of_another_kind_of_json_is_no_crash(self, tmp_path: Path) -> None:
        (tmp_path / MANIFEST).write_text(json.dumps({"kind": "thing"}))
        assert verify(tmp_path) == [f"{MANIFEST}: changed since it was written"]

    def test_a_digest_does_not_depend_on_the_order_of_keys(self) -> None:
        assert commit.fingerprint({"a": 1, "b": [1, 2]}) == commit.fingerprint({"b": [1, 2], "a": 1})
        assert commit.fingerprint({"a": 1}) != commit.fingerprint({"a": 2})


def test_json_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for _ in steps(
        lambda: [write_json(path, {"n": n}) for n in range(2, 12)] and None, before=lambda: write_json(path, {"n": 1})
    ):
        assert 1 <= json.loads(path.read_text("utf-8"))["n"] < 12
