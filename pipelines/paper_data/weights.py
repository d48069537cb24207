"""Published weights in the layout of `load_encoder`: `weights.py uni pytorch_model.bin -o uni.safetensors`.

UNI, CTransPath and others (`--help` names them) are published as pickles, which wsi-brush does not load: a pickle can
run code. This script reads tensors alone (PyTorch's `weights_only`) or safetensors, gives them the names that timm has
for them today, writes them as safetensors with a description (JSON) beside, and loads the encoder once to see that
every tensor has its place. Nothing is fetched here: `wsi-brush models fetch NAME` does that, under the terms of its
authors, and says where to write what is made of it, so that it is found by name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsi_brush.commit import sha256_of
from wsi_brush.encoder import load_encoder
from wsi_brush.errors import RefusedError, UsageError, WsiBrushError
from wsi_brush.zoo import entries

ENCODERS: dict[str, dict[str, Any]] = {entry.id: entry.description for entry in entries() if entry.pickled}
"""Those of `wsi_brush/zoo.toml` that are published as pickles, as they are described beside their weights."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        UsageError: if it is none of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"{path}: no file of tensors that is safe to read ({reason})") from None
    for inside in ("model", "state_dict"):
        found = found.get(inside, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(f"{path}: holds more than tensors by name; expected the weights of an encoder")
    return found


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As timm names them today: a Swin's stages begin with the downsampling that once ended the stage before, tables
    that follow from the sizes are not kept, nor is the head of a pretext task."""
    old = "layers.0.downsample.reduction.weight" in tensors
    found = {}
    for published, value in tensors.items():
        name = published.removeprefix("module.")
        if name.startswith("head.") or name.rpartition(".")[2] in ("relative_position_index", "attn_mask"):
            continue
        if old:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) + 1}.downsample", name)
        found[name] = value.contiguous()
    return found


def convert(name: str, source: Path, target: Path) -> None:
    """Write the weights of `source` and their description to `target` (.safetensors) and beside it.

    Raises:
        UsageError, RefusedError: if they are not that encoder's, or something is there already.
    """
    beside = target.with_suffix(".json")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: expected a name that ends with .safetensors")
    if target.exists() or beside.exists():
        raise RefusedError(f"{target}: it or {beside.name} exists; choose another name")
    tensors = renamed(read(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, target)
        about = {**ENCODERS[name], "sha256": sha256_of(target)}
        beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        load_encoder(str(target))
    except BaseException:  # also Ctrl-C: what is left would count as ready
        target.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoder", choices=sorted(ENCODERS))
    parser.add_argument("weights", type=Path, help="the published file: .bin, .pth or .safetensors")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        convert(arguments.encoder, arguments.weights, arguments.out)
    except WsiBrushError as error:
        sys.exit(str(error))
    print(f'{arguments.out}: use it as encoder = "{arguments.out}"; as "{arguments.encoder}", where models fetch said')


if __name__ == "__main__":
    main()
