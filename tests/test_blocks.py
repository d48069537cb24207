"""What was done comes back to the bit, without a gap; what is damaged is as good as none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi_brush import blocks
from wsi_brush.blocks import Blocks

ROWS = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float16)
ROWS[3] = np.nan


def keep(folder: Path, counts: tuple[int, ...] = (4, 3, 5)) -> list[Path]:
    kept, start = Blocks(folder, 5, seconds=0), 0
    assert list(kept.load()) == []
    for count in counts:
        kept.add(ROWS[start : start + count])
        start += count
    return sorted(folder.iterdir())


def back(folder: Path) -> np.ndarray:
    return np.concatenate([ROWS[:0], *Blocks(folder, 5).load()])


def test_rows_come_back(tmp_path: Path) -> None:
    assert len(keep(tmp_path)) == 3
    assert back(tmp_path).tobytes() == ROWS.tobytes()


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_damage_costs_what_follows_it(tmp_path: Path, victim: int, how: str) -> None:
    path = keep(tmp_path)[victim]
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    kept = (0, 4, 7)[victim]
    assert back(tmp_path).tobytes() == ROWS[:kept].tobytes()
    assert len(list(tmp_path.iterdir())) == victim
    again = Blocks(tmp_path, 5, seconds=0)
    list(again.load())
    again.add(ROWS[kept:])
    assert back(tmp_path).tobytes() == ROWS.tobytes()


def test_half_a_file_is_none(tmp_path: Path) -> None:
    path = keep(tmp_path)[2]
    path.rename(path.with_suffix(".partial"))
    assert back(tmp_path).tobytes() == ROWS[:7].tobytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_many_rows_do_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BYTES", 6 * 5 * 2)
    kept = Blocks(tmp_path, 5)
    kept.add(ROWS[:4])
    assert not list(tmp_path.iterdir())
    kept.add(ROWS[4:])
    assert back(tmp_path).tobytes() == ROWS.tobytes()


def test_short_work_writes_nothing(tmp_path: Path) -> None:
    kept = Blocks(tmp_path, 5)
    list(kept.load())
    kept.add(ROWS)
    assert list(tmp_path.iterdir()) == []
