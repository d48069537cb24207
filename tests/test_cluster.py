"""A Dask cluster paints the same bytes, survives a worker, and says in one line what is wrong with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import TileStatistics, make_brush, two_workers_of_dask
from distributed import Client, LocalCluster

from wsi_brush import cluster
from wsi_brush.brush import Brush
from wsi_brush.commit import sha256_of
from wsi_brush.encoder import Encoder
from wsi_brush.errors import MachineError, RefusedError, UsageError
from wsi_brush.stages import Painting
from wsi_brush.synthesize import synthesize_slide

ENCODER = cast(Encoder, TileStatistics())
PAINTING = Painting(
    region=(200, 180, 300, 520), steps=6, guidance=2.0, tile=256
)  # two steps of history, slopes, guidance


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def brush() -> Brush:
    return cast(Brush, make_brush(dim=ENCODER.dim, tile=ENCODER.tile))


@pytest.fixture
def two_workers() -> Iterator[LocalCluster]:
    with two_workers_of_dask() as made:
        yield made


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_the_same_bytes_though_a_worker_is_killed(
    tissue_slide: Path, brush: Brush, tmp_path: Path, two_workers: LocalCluster
) -> None:
    synthesize_slide(tissue_slide, tmp_path / "here", PAINTING, brush=brush, encoder=ENCODER)
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "painting" and done > total / 2 and not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    with cluster.connect(two_workers.scheduler_address) as client:
        synthesize_slide(
            tissue_slide, tmp_path / "there", PAINTING, brush=brush, encoder=ENCODER, client=client, tell=kill
        )
    assert killed
    assert hashes(tmp_path / "there") == hashes(tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def test_what_is_wrong_with_a_cluster_is_one_line(
    tissue_slide: Path, brush: Brush, tmp_path: Path, two_workers: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = two_workers.scheduler_address

    def make(client: Client, **options: Any) -> None:
        painting = Painting(**{"region": (200, 180, 64, 64), "steps": 5, "tile": 256, **options})
        synthesize_slide(tissue_slide, tmp_path / "x", painting, brush=brush, encoder=ENCODER, client=client)

    with cluster.connect(address) as client:
        with pytest.raises(UsageError, match="tiles of 128 pixels, a cluster needs multiples of 256"):
            make(client, tile=128)
        monkeypatch.setattr(cluster, "_sees", _blind)
        with pytest.raises(MachineError, match=r"worker .* does not see .*all workers share"):
            make(client)
    monkeypatch.setattr(cluster, "__version__", "0.0.1")
    with pytest.raises(RefusedError, match=r"worker tcp://127.* has .*here is .*'0\.0\.1'.*install the same"):
        cluster.connect(address)
    two_workers.scale(0)  # type: ignore[no-untyped-call]
    two_workers.close()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(cluster, "_PATIENCE", 0.5)
    with pytest.raises(MachineError, match="no Dask scheduler answers"):
        cluster.connect(address)
    assert list(tmp_path.iterdir()) == []


def _blind(path: str) -> bool:
    return False
