"""Whether the machine and the weights are fit, said line by line, and what is unfit found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_lossless

from wsi_brush import doctor, machine
from wsi_brush.doctor import check_machine, check_weights, exit_code
from wsi_brush.headers import Examined, Finding


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {one.about: one for one in findings}


def test_this_machine_is_described(tmp_path: Path) -> None:
    found = by_name(check_machine(tmp_path / "not" / "yet"))
    assert {"python", "openslide", "cores", "memory", "disk", "gpu", "cache"} <= found.keys()
    assert found["openslide"].status == "OK"
    assert found["disk"].said.endswith(f"free at {tmp_path.resolve() / 'not' / 'yet'}")
    assert all("\n" not in one.said for one in found.values())


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = by_name(check_machine(tmp_path / "file" / "out"))["disk"]
    assert (found.status, found.said) == ("bad", f"{tmp_path / 'file'}: cannot be written to; give another --out")


def test_memory_disk_and_cores_that_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    cores = by_name(check_machine())["cores"]
    assert cores.status == "look"
    assert cores.said.endswith("of which 0.5 are lent; pass --threads 1")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert by_name(check_machine())["cores"].status == "OK"
    for free, status, line in ((0.4e9, "bad", "400.0 MB free"), (2e9, "look", "pass --max-memory 1.0GB")):
        monkeypatch.setattr(doctor, "free_memory", lambda free=free: int(free))
        found = by_name(check_machine())["memory"]
        assert found.status == status
        assert line in found.said
    for free, status in ((10**7, "bad"), (10**9, "look"), (10**10, "OK")):
        monkeypatch.setattr(doctor, "free_disk", lambda _, free=free: free)
        assert by_name(check_machine(tmp_path))["disk"].status == status


def test_packages_and_extras_by_what_the_distribution_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real answers of importlib.metadata, for requirements that are there, too old, or not there."""
    needed = [f"numpy>={np.__version__}", 'colorama; sys_platform == "win32"', 'h5py-none>=3; extra == "interchange"']
    extra = 'numpy>=1; extra == "cluster"'
    monkeypatch.setattr(metadata, "requires", lambda _: [*needed, extra])
    monkeypatch.setattr(metadata, "metadata", lambda _: _Extras())
    found = by_name(check_machine())
    assert found["packages"].said.startswith("all 1 that are needed; torch ")
    assert found["extra cluster"] == Finding("OK", "extra cluster", "numpy is here")
    said = 'optional, without h5py-none; python -m pip install "wsi-brush[interchange]"'
    assert found["extra interchange"] == Finding("OK", "extra interchange", said)
    assert "extra test" not in found
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy>=99", "none-such>=1"])
    found = by_name(check_machine())
    assert found["numpy"].status == "look"
    assert found["numpy"].said.endswith('expected >=99; python -m pip install "numpy>=99"')
    assert found["none-such"].status == "bad"
    assert "packages" not in found


class _Extras:
    """What `metadata.metadata` answers, of which one list is asked."""

    def get_all(self, _: str) -> list[str]:
        return ["cluster", "interchange", "test"]


def test_graphics_cards_are_those_that_the_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 81000 MiB'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (card,) = doctor._gpus()
    assert (card.status, card.said.partition(";")[0]) == ("OK", "cuda:0 NVIDIA H100, 81559 MiB, 81000 MiB free")
    command.write_text("#!/bin/sh\nexit 9\n")
    (card,) = doctor._gpus()
    assert card == Finding("look", "gpu", "nvidia-smi does not answer (CalledProcessError); use --device cpu")


def test_the_bundled_weights_are_whole() -> None:
    found = by_name(check_weights())
    for name in ("encoder bundled", "encoder judge", "brush"):
        assert found[name].status == "OK"
        assert found[name].said.startswith("whole (sha256 ")
        assert "licence MIT" in found[name].said


def test_weights_that_are_damaged_exchanged_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(doctor.BUNDLED.parent, weights)
    monkeypatch.setattr(doctor, "BUNDLED", weights / "brush")
    with (weights / "encoder.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    (weights / "judge.json").unlink()
    with (weights / "brush" / "brush.safetensors").open("ab") as file:
        file.write(b"x")
    found = by_name(check_weights())
    assert {name: found[name].status for name in ("encoder bundled", "encoder judge", "brush")} == {
        "encoder bundled": "bad", "encoder judge": "bad", "brush": "bad",
    }  # fmt: skip
    assert "damaged or exchanged" in found["encoder bundled"].said
    assert "cannot be read (No such file or directory)" in found["encoder judge"].said
    assert "brush.safetensors" in found["brush"].said
    about = json.loads((weights / "encoder.json").read_text())
    shutil.copytree(Path(machine.__file__).parent / "weights" / "brush", weights / "brush", dirs_exist_ok=True)
    (weights / "encoder.json").write_text(json.dumps(about | {"sha256": "0" * 64}))
    assert "follows another encoder" in by_name(check_weights())["brush"].said


def test_encoders_in_the_cache_are_named_with_their_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from wsi_brush.zoo import find

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    none = by_name(check_weights())["encoders"].said
    for name in ("phikon-v2", "uni"):
        entry = find(name)
        assert entry is not None
        assert entry.repository is not None
        assert entry.file is not None
        folder = tmp_path / "hub" / f"models--{entry.repository.replace('/', '--')}"
        (folder / "snapshots" / str(entry.revision)).mkdir(parents=True)
        (folder / "snapshots" / str(entry.revision) / entry.file).write_bytes(b"weights")
    found = by_name(check_weights())
    assert found["encoder phikon-v2"].status == "OK"
    assert "licence Owkin non-commercial" in found["encoder phikon-v2"].said
    assert found["encoder uni"].status == "look"
    assert "is a pickle, which is not loaded" in found["encoder uni"].said
    assert int(found["encoders"].said.split()[0]) == int(none.split()[0]) - 2


def test_exit_codes() -> None:
    fine, look, bad = (Finding(status, "x", "y") for status in ("OK", "look", "bad"))  # type: ignore[arg-type]
    slide = Examined(Path("a"), (fine, look))
    assert exit_code([fine, look], [slide]) == 0
    assert exit_code([fine], [slide, Examined(Path("b"), (bad,))]) == 3
    assert exit_code([bad], [Examined(Path("b"), (bad,))]) == 2


def run(*words: Any, without: str = "torch") -> subprocess.CompletedProcess[str]:
    """The command in a process that may load nothing heavy."""
    code = f"import sys; sys.modules.update(dict.fromkeys(['timm', 'skimage', {without!r}])); "
    code += "from wsi_brush.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_words(tmp_path: Path) -> None:
    good = write_lossless(tmp_path / "good.tif", np.full((200, 300, 3), 200, np.uint8), mpp=0.5)
    (tmp_path / "damaged.tif").write_bytes(good.read_bytes()[:-500])
    shown = run(tmp_path, "-o", tmp_path)
    assert shown.returncode == 3, shown.stderr
    lines = shown.stdout.splitlines()
    assert {line[:5] for line in lines} <= {"OK   ", "look ", "bad  "}
    assert f"bad  {tmp_path / 'damaged.tif'}: truncated" in shown.stdout
    assert f"OK   {good}: 200 x 300 pixels of 0.5 µm (tiff resolution)" in shown.stdout
    assert lines[-1].startswith("look slides: 1 bad of 2; ")
    found = json.loads(run(good, "--json").stdout)
    assert found["exit_code"] == 0
    assert [slide["facts"]["mpp"] for slide in found["slides"]] == [0.5]
    assert {one["status"] for one in found["weights"]} == {"OK"}
    quiet = run(tmp_path, "-q", "-o", tmp_path / "good.tif" / "out")
    assert quiet.returncode == 2
    assert quiet.stdout == ""
    assert [line.split(": ")[1] for line in quiet.stderr.splitlines()] == ["disk", str(tmp_path / "damaged.tif")]
    assert run(tmp_path / "good.tif", "--force-mpp", 700).returncode == 1


def test_a_package_that_is_not_there_is_one_line() -> None:
    done = run(without="huggingface_hub")
    assert done.returncode == 2
    assert done.stderr.startswith("wsi-brush: huggingface_hub: not installed; install wsi-brush again")
    assert len(done.stderr.splitlines()) == 1
