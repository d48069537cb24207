"""A brush made to listen to another encoder: `adapt.py BRUSH --from WORK1/pack --to WORK2/pack -o FOLDER`.

The packs are of the same slides, by the encoder that the brush knows and by the new one. A ridge regression tells the
first's embedding of a tile from the second's, at each pitch on its own; folded into the layer that reads embeddings, it
costs nothing, and training (`start = FOLDER`) goes on from a brush that follows already. Prints how much of the first's
embedding the second tells (R², on the part of the slides that is held out).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from wsi_brush.brush import Brush, load_brush, save_brush
from wsi_brush.commit import read_manifest

PENALTY = 0.02  # of the ridge, in units of the embeddings' variance


def tiles(pack: Path, about: dict[str, Any], mpp: float, *, held_out: bool) -> NDArray[np.float64]:
    """Standardised embeddings (n, dim) of one pitch, of the part of the slides that is held out or that is not; NaN
    where there is no tissue."""
    moments = about["embeddings"][f"{mpp:g}"]
    found = []
    for number in range(about["slides"]):
        values: Any = zarr.open_array(pack / "slides" / str(number) / "embedding" / f"{mpp:g}", mode="r")
        grid = np.asarray(values[...], np.float64)
        edge = int(grid.shape[1] * about["until"])
        part = grid[:, edge:] if held_out else grid[:, :edge]
        found.append(part.reshape(-1, grid.shape[-1]))
    return np.asarray((np.concatenate(found) - moments["mean"]) / moments["std"])


def ridge(new: NDArray[np.float64], old: NDArray[np.float64]) -> NDArray[np.float64]:
    """What turns the new embedding with a one at its end into the old: (dim + 1, dim)."""
    x = np.pad(new, ((0, 0), (0, 1)), constant_values=1)
    return np.asarray(np.linalg.solve(x.T @ x + PENALTY * len(x) * np.eye(x.shape[1]), x.T @ old))


def adapted(brush: Brush, first: Path, second: Path) -> Brush:
    """The brush with the ridge folded into the layers that read embeddings."""
    old, new = (read_manifest(pack) or {} for pack in (first, second))
    if old.get("fingerprint") != brush.about["fingerprint"] or old.get("sources") != new.get("sources"):
        raise SystemExit(f"{first}, {second}: expected packs of the same slides, the first by the brush's own encoder")
    denoiser, about = brush.denoiser, brush.about | {"encoder": new["encoder"], "embeddings": new["embeddings"]}
    about["fingerprint"] = new["fingerprint"]
    with torch.no_grad():
        for layer, mpp in zip(denoiser.embed, brush.pitches, strict=True):
            parts = []
            for held_out in (False, True):
                x, y = (tiles(pack, one, mpp, held_out=held_out) for pack, one in ((second, new), (first, old)))
                there = np.isfinite(x[:, 0]) & np.isfinite(y[:, 0])
                parts.append((x[there], y[there]))
            (x, y), (x_out, y_out) = parts
            turn = ridge(x, y)
            left = y_out - np.pad(x_out, ((0, 0), (0, 1)), constant_values=1) @ turn
            print(f"{mpp:g} µm: R² {1 - (left**2).mean() / y_out.var(0).mean():.3f} ({len(x)}, {len(x_out)} tiles)")
            matrix, constant = torch.from_numpy(turn[:-1]), torch.from_numpy(turn[-1])
            weight = torch.as_tensor(layer.weight).double()
            bias: Tensor = torch.as_tensor(layer.bias)
            bias.add_((weight @ constant).float())
            torch.as_tensor(layer.weight).copy_(weight @ matrix.T)
    return Brush(denoiser, brush.ladder, about, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("brush", help="bundled, or a folder")
    parser.add_argument("--from", dest="first", type=Path, required=True, help="pack by the encoder that it knows")
    parser.add_argument("--to", dest="second", type=Path, required=True, help="pack by the new one")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    save_brush(adapted(load_brush(arguments.brush), arguments.first, arguments.second), arguments.out, overwrite=True)


if __name__ == "__main__":
    main()
