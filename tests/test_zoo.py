"""The table of encoders: one meaning a name, real architectures of the printed size, nothing that is not said."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

from wsi_brush.backbone import POOLINGS, build
from wsi_brush.encoder import load_encoder
from wsi_brush.zoo import Entry, entries, find, is_free, nearest, terms_line

HERE = ("bundled", "judge")
KNOWN = {
    *HERE, "resnet50", "uni", "uni2-h", "ctranspath", "phikon", "phikon-v2", "virchow", "virchow2", "gigapath",
    "gigapath-flash", "h-optimus-0", "h-optimus-1", "h0-mini", "hibou-b", "hibou-l", "gpfm", "midnight", "lunit-vits8",
    "conch", "kaiko-vits16", "kaiko-vits8", "kaiko-vitb16", "kaiko-vitb8", "kaiko-vitl14",
}  # fmt: skip
NETWORKS = [entry for entry in entries() if entry.architecture and entry.id not in HERE]


def test_it_knows_the_encoders_of_the_field() -> None:
    assert {entry.id for entry in entries()} >= KNOWN


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("UNI", "uni"), ("uni_v1", "uni"), ("uni2", "uni2-h"), ("uni_v2", "uni2-h"), ("phikonv2", "phikon-v2"),
        ("phikon_v2", "phikon-v2"), ("hoptimus0", "h-optimus-0"), ("H-optimus-1", "h-optimus-1"),
        ("lunit-dino-s8", "lunit-vits8"), ("hibou_l", "hibou-l"), ("Prov-GigaPath", "gigapath"),
        ("midnight12k", "midnight-cls"), ("conch_v1", "conch"), ("virchow-full", "virchow"),
    ],
)  # fmt: skip
def test_names_of_peers_lead_to_the_same_vector(name: str, expected: str) -> None:
    found = find(name)
    assert found is not None
    assert found.id == expected


def test_no_name_means_two_things() -> None:
    names = [re.sub(r"[^a-z0-9]", "", name.lower()) for e in entries() for name in (e.id, *e.aliases)]
    assert len(set(names)) == len(names)


def test_other_names_are_unknown_and_slips_have_a_neighbour() -> None:
    assert find("timm:resnet50") is None
    assert find("") is None
    assert nearest("vircow2") == "virchow2"
    assert nearest("something else") is None


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.id)
def test_an_entry_is_consistent(entry: Entry) -> None:
    assert entry.pooling in POOLINGS
    side = entry.resize or entry.tile
    assert side <= entry.tile
    assert (entry.crop or side) <= side
    assert all(0 < value < 1 for value in (*entry.mean, *entry.std))
    assert entry.revision is None or re.fullmatch(r"[0-9a-f]{40}", entry.revision)
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.id in HERE or (entry.file and (entry.repository or entry.page))
    assert entry.licence


@pytest.mark.parametrize("name", HERE)
def test_a_bundled_entry_is_what_lies_in_the_package(name: str) -> None:
    entry, about = find(name), load_encoder(name).about
    assert entry is not None
    assert (entry.id, entry.tile, entry.dim, entry.sha256) == (name, about.tile, about.dim, about.fingerprint)
    assert (entry.mean, entry.std, entry.licence) == (about.mean, about.std, about.licence)


@cache
def size_of(architecture: str, kwargs: tuple[tuple[str, Any], ...], stem: str, mlp: str) -> tuple[int, int]:
    """Width and number of parameters of a network, made without memory for its numbers (a meta device)."""
    with torch.device("meta"):
        network = build(architecture, {**dict(kwargs), "num_classes": 0}, stem=stem, mlp=mlp)
    return int(network.num_features), sum(value.numel() for value in network.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.id)
def test_the_full_network_has_the_printed_size(entry: Entry) -> None:
    width, count = size_of(entry.architecture or "", tuple(sorted(entry.kwargs.items())), entry.stem, entry.mlp)
    assert {"cls": width, "own": width, "cls+mean": 2 * width, "layer3": width // 2}[entry.pooling] == entry.dim
    if entry.parameters is None:
        return
    number, unit = float(entry.parameters[:-1]), {"M": 1e6, "B": 1e9}[entry.parameters[-1]]
    assert count == pytest.approx(number * unit, rel=0.08)


# licences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("MIT", True), ("apache-2.0", True), ("BSD-3-Clause", True), ("GPL-3.0", True), ("unknown", None), (None, None),
        ("CC-BY-NC-ND-4.0", False), ("Owkin non-commercial", False), ("MIT (weights); data: see encoder.md", True),
        ("unclear: TRIDENT says MIT", False),
    ],
)  # fmt: skip
def test_free_licences_are_told_from_others(licence: str | None, free: bool | None) -> None:
    assert is_free(licence) is free


def test_what_a_licence_asks_is_one_line_and_free_ones_ask_nothing() -> None:
    uni = find("uni")
    assert uni is not None
    line = terms_line(uni.id, uni.licence, uni.outputs) or ""
    assert "\n" not in line
    for word in ("uni", "CC-BY-NC-ND-4.0", "no commercial use", "models trained on its outputs"):
        assert word in line
    assert terms_line("phikon", "Owkin non-commercial", None)
    assert terms_line("midnight", "MIT", None) is None
    assert terms_line("file", "unknown", None) is None
