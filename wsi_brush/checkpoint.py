"""Checkpoints of a training: its state twice on disk, so that one is whole whatever happens to the other.

A generation is `checkpoint-a.safetensors` (or b) and, written after it, `checkpoint-a.json` with its step and its
SHA-256. Of the two the older is written anew, or the one that was found damaged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .commit import sha256_of, write_json
from .errors import RefusedError

_NAMES = "ab"
_NEEDED = {"step", "identity", "sha256"}


class Checkpoints:
    """The two generations in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._damaged = folder, set[str]()

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """A new generation; of its facts (JSON) `step` says how new it is, `identity` what must be the same where it is
        read."""
        ages = {name: (self._facts(name) or {"step": -1})["step"] for name in _NAMES}
        name = min(_NAMES, key=lambda one: -1 if one in self._damaged else ages[one])
        partial, path = self._folder / f"{name}.partial", self._path(name)
        save_file(dict(tensors), partial)
        os.replace(partial, path)
        write_json(path.with_suffix(".json"), {**facts, "sha256": sha256_of(path)})
        path.chmod(path.with_suffix(".json").stat().st_mode)
        self._damaged.discard(name)

    def read(self, identity: str, tell: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Facts and tensors of the newest generation that verifies; None where none was ever written.

        Raises:
            RefusedError: if it has another identity, or none verifies.
        """
        known = {name: self._facts(name) for name in _NAMES if self._path(name).with_suffix(".json").exists()}
        for name, facts in sorted(known.items(), key=lambda one: -one[1]["step"] if one[1] else -math.inf):
            path = self._path(name)
            if facts is None or not path.is_file() or sha256_of(path) != facts["sha256"]:
                tell(f"{path if facts else path.with_suffix('.json')}: damaged, trying the other generation")
                self._damaged.add(name)
                continue
            if facts["identity"] != identity:
                raise RefusedError(
                    f"{path}: made by another configuration or on another kind of device; choose another --work or "
                    "remove it"
                )
            try:
                return facts, load_file(path)
            except SafetensorError as error:
                raise RefusedError(f"{path}: {error}; remove it and run again") from None
        if known:
            raise RefusedError(
                f"{self._folder}: no checkpoint is whole; remove them to begin anew, or choose another --work"
            )
        return None

    def _path(self, name: str) -> Path:
        return self._folder / f"checkpoint-{name}.safetensors"

    def _facts(self, name: str) -> dict[str, Any] | None:
        """None where they are missing or cannot be read."""
        try:
            found = json.loads(self._path(name).with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.keys() >= _NEEDED else None
