"""The encoders that are known by name, as data: `zoo.toml`.

Each is an `Entry`: where its weights are, how its network is made, what is done to a tile before it, which of its
numbers are the embedding, and what its terms ask. Peers' names for the same vector lead to it. A fact that is not known
is None. The facts are from public code and model pages, which `zoo.toml` names; no weights but the bundled ones were
seen here.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

_TABLE = Path(__file__).with_name("zoo.toml")
HERE = {"bundled": "encoder.json", "judge": "judge.json"}
"""The descriptions of the encoders in the package, in `weights`."""
_FREE = ("mit", "apache", "bsd", "cc0", "cc by 4.0", "cc-by-4.0", "gpl", "lgpl", "agpl", "public domain", "unlicense")

Pooling = Literal["cls", "cls+mean", "layer3", "own"]


@dataclass(frozen=True)
class Entry:
    """What is known of an encoder; `zoo.toml` says what each field is. `tile`, `resize` and `crop` are pixels."""

    id: str
    tile: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pooling: Pooling = "own"
    aliases: tuple[str, ...] = ()
    repository: str | None = None
    file: str | None = None
    revision: str | None = None
    sha256: str | None = None
    page: str | None = None
    package: str | None = None
    layout: Literal["timm", "transformers"] = "timm"
    architecture: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mlp: str = "plain"
    stem: str = "plain"
    resize: int | None = None
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    crop: int | None = None
    mpp: tuple[float, ...] | None = None
    precision: str | None = None
    parameters: str | None = None
    licence: str | None = None
    outputs: str | None = None
    gated: bool | None = None
    golden: Mapping[str, Any] | None = None

    @property
    def pickled(self) -> bool:
        """Whether its weights are published in a form that is not loaded here."""
        return self.file is not None and not self.file.endswith(".safetensors")

    @property
    def home(self) -> str:
        """Where a person finds it."""
        return self.page or (f"https://huggingface.co/{self.repository}" if self.repository else "wsi-brush")

    @property
    def description(self) -> dict[str, Any]:
        """What stands beside its weights in a local file (see `encoder`), but for the digest of that file."""
        plain = {
            "name": self.id, "architecture": self.architecture, "kwargs": {**self.kwargs, "num_classes": 0},
            "tile": self.tile, "dim": self.dim, "mean": list(self.mean), "std": list(self.std),
            "pooling": self.pooling, "licence": self.licence or "unknown",
        }  # fmt: skip
        given = {"mlp": self.mlp, "stem": self.stem}
        given |= {key: value for key, value in (("outputs", self.outputs), ("package", self.package)) if value}
        plain |= {key: value for key, value in given.items() if value != "plain"}
        if self.resize is not None:
            plain |= {"resize": self.resize, "filter": self.filter}
        return plain | ({"crop": self.crop} if self.crop is not None else {})


@cache
def entries() -> tuple[Entry, ...]:
    """All encoders of the table, the bundled ones first."""
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    found = []
    for name, own in table["encoders"].items():
        fields, whole = dict(own), own
        while "like" in whole:
            whole = table["encoders"][whole["like"]]
            fields = {key: value for key, value in whole.items() if key not in ("aliases", "golden")} | fields
        fields.pop("like", None)
        fields |= table["norms"][fields.pop("norm")] if "norm" in fields else _bundled(name)
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        found.append(Entry(name, **(fields | lists)))
    return tuple(found)


def find(name: str) -> Entry | None:
    """The entry that is called so, by us or by a peer; case, dashes and dots do not matter."""
    return _names().get(_plain(name))


def nearest(name: str) -> str | None:
    """A known name that this one may be a slip of."""
    close = difflib.get_close_matches(_plain(name), list(_names()), 1, 0.7)
    return _names()[close[0]].id if close else None


def is_free(licence: str | None) -> bool | None:
    """Whether a licence lets anybody use and share what is made; None where it is not known."""
    if licence is None or licence.strip().lower() in ("", "unknown", "none", "other"):
        return None
    return licence.strip().lower().startswith(_FREE)


def terms_line(name: str, licence: str | None, outputs: str | None) -> str | None:
    """What a user of an encoder must be told once; None where its licence is a free one, or not known."""
    if outputs is None and is_free(licence) is not False:
        return None
    also = f"; {outputs}" if outputs else ""
    return f"encoder {name}: licence {licence or 'not known'}{also}; it stands in stores and brushes, and binds you"


@cache
def _names() -> dict[str, Entry]:
    return {_plain(name): entry for entry in entries() for name in (entry.id, *entry.aliases)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _bundled(name: str) -> dict[str, Any]:
    about = json.loads(_TABLE.with_name("weights").joinpath(HERE[name]).read_text(encoding="utf-8"))
    found = {key: about[key] for key in ("tile", "dim", "mean", "std", "sha256", "licence", "architecture")}
    return found | {"mpp": about.get("training", {}).get("mpp")}
