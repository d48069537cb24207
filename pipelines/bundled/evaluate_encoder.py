"""Is the bundled encoder worth something? `evaluate_encoder.py --encoder PATH.safetensors --work WORK`.

Only the held-out right quarter of every slide is looked at (decoded by train_encoder.py, in WORK). Queries are tiles
of its upper half, the gallery is tiles of its lower half, and 5-nearest-neighbour majority vote names the slide.
Slides count equally. A slide is left out where a half holds no tile of tissue. Compared, on the same tiles:

    trained     the encoder as it is loaded, cosine
    untrained   the same network as timm initialises it, standardised on the same kind of training tiles, cosine
    histogram   8 x 8 x 8 RGB, Hellinger distance

Intervals are 95 % percentile bootstraps over square blocks of the queries (tiles of one block lie too near each
other to count as independent). A tile of 128 px at mpp 8 is wider than any held-out strip: there the table shows
squares of 64 px, from few and small places. "Mixed" rows take the queries from the slide's own pyramid and the
gallery from the averaged finest pitch: a level made by another program is the same tissue.

Also: how much stain jitter moves an embedding compared with another tile, how many dimensions are in use, and how
well colour can be read back linearly. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from train_encoder import Picture, Sampler, decode, effective_rank, make_views

from wsi_brush.encoder import Encoder, load_encoder
from wsi_brush.machine import keep_memory

NEIGHBOURS = 5
MOST = 120  # tiles a slide and half, at most
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Tiles:
    """Tiles (n, side, side, 3) with the slide each is of (n,) and the block it lies in (n,)."""

    rgb: NDArray[np.uint8]
    slide: NDArray[np.int64]
    block: NDArray[np.int64]


def held_out(
    pictures: list[Picture], side: int, *, step: int, block: int, seed: int, mixed: bool = False
) -> tuple[Tiles, Tiles, list[str]]:
    """Queries, gallery and the names of the slides; a slide too small for a tile in each half is left out."""
    random = np.random.default_rng(seed)
    halves: tuple[list[list[NDArray[np.int64]]], ...] = ([], [])
    rgb: tuple[list[NDArray[np.uint8]], ...] = ([], [])
    names: list[str] = []
    for picture in pictures:
        begin, middle = picture.cut + 2, picture.rgb.shape[0] // 2
        other = picture.averaged if mixed and picture.averaged is not None else picture.rgb
        strips = picture.rgb[:middle, begin:], other[middle:, begin:]
        parts = [replace(picture, rgb=part, cut=part.shape[1], averaged=None) for part in strips]
        corners: list[Any] = [
            part.tiles(side, 0.3, columns=slice(0, None), step=step) if min(part.rgb.shape[:2]) >= side else []
            for part in parts
        ]
        if not all(len(found) for found in corners):
            continue
        for part, found, half, pixels in zip(parts, corners, halves, rgb, strict=True):
            chosen = np.asarray(found)[random.permutation(len(found))[:MOST]]
            blocks = chosen // block @ np.array([1000, 1])
            half.append([np.full(len(chosen), len(names)), blocks + len(names) * 1_000_000])
            pixels.append(np.stack([part.rgb[top : top + side, left : left + side] for top, left in chosen]))
        names.append(picture.slide)
    queries, gallery = (
        Tiles(np.concatenate(pixels), *(np.concatenate(column) for column in zip(*half, strict=True)))
        for pixels, half in zip(rgb, halves, strict=True)
    )
    return queries, gallery, names


def histogram(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Square roots of the shares of 8 x 8 x 8 RGB bins: their inner product ranks like the Hellinger distance."""
    bins = (tiles >> 5).astype(np.int64).reshape(len(tiles), -1, 3) @ np.array([64, 8, 1])
    counts = np.stack([np.bincount(tile, minlength=512) for tile in bins])
    shares: NDArray[np.float32] = np.sqrt(counts / bins.shape[1]).astype(np.float32)
    return shares


def vote(queries: Tiles, gallery: Tiles, embed: Embed) -> NDArray[np.bool_]:
    """Which queries are given their own slide; a tie goes to the slide with the nearest neighbour."""
    first, second = (embed(tiles.rgb) for tiles in (queries, gallery))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    near = gallery.slide[np.argsort(-(first @ second.T), axis=1, kind="stable")[:, :NEIGHBOURS]]
    named = []
    for row in near:
        count = np.bincount(row)
        named.append(next(slide for slide in row if count[slide] == count.max()))
    right: NDArray[np.bool_] = np.asarray(named) == queries.slide
    return right


def balanced(right: NDArray[np.float64], slide: NDArray[np.int64]) -> float:
    """Mean over slides of the part that is right."""
    return float(np.mean([right[slide == one].mean() for one in np.unique(slide)]))


def interval(right: NDArray[np.float64], tiles: Tiles, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of the balanced mean of `right` (n,), over blocks within slides."""
    random = np.random.default_rng(0)
    slides = np.unique(tiles.slide)
    means = np.zeros(draws)
    for slide in slides:
        blocks = [right[tiles.block == block] for block in np.unique(tiles.block[tiles.slide == slide])]
        sums, counts = (np.array([f(block) for block in blocks], float) for f in (np.sum, len))
        drawn = random.integers(len(blocks), size=(draws, len(blocks)))
        means += sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) / len(slides)
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def untrained(encoder: Encoder, architecture: str, tiles: NDArray[np.uint8]) -> Embed:
    """The same architecture as timm initialises it; batch statistics and standardisation from training tiles."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, num_classes=0)
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.about.mean, encoder.about.std))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches
    with torch.no_grad():
        for part in pixels.split(64):
            network((part / 255 - mean) / std)
        network.eval()
        seen = torch.cat([network((part / 255 - mean) / std) for part in pixels.split(64)])
    network.register_buffer("embedding_mean", seen.mean(dim=0))
    network.register_buffer("embedding_std", seen.std(dim=0).clamp_min(1e-6))
    return Encoder(network, encoder.about)


def at_side(embed: Embed, side: int) -> Embed:
    """An encoder as it sees squares of another side: convolutional networks take any."""
    if not isinstance(embed, Encoder) or embed.tile == side:
        return embed
    return Encoder(embed._network, replace(embed.about, tile=side))


def retrieval(
    pictures: list[Picture], embeds: dict[str, Embed], side: int, *, step: int, block: int, mixed: bool
) -> str:
    """One row of the table; the figures of each slide go to standard error."""
    queries, gallery, names = held_out(pictures, side, step=step, block=block, seed=0, mixed=mixed)
    right = {name: vote(queries, gallery, at_side(embed, side)).astype(float) for name, embed in embeds.items()}
    cells = []
    for value in right.values():
        low, high = interval(value, queries)
        cells.append(f"{100 * balanced(value, queries.slide):.1f} [{low:.1f}, {high:.1f}]")
    for other in ("untrained", "histogram"):
        more = right["trained"] - right[other]
        low, high = interval(more, queries)
        cells.append(f"{100 * balanced(more, queries.slide):+.1f} [{low:+.1f}, {high:+.1f}]")
    for index, name in enumerate(names):
        shares = " ".join(f"{100 * value[queries.slide == index].mean():.0f}" for value in right.values())
        print(f"    mpp {pictures[0].mpp:g} {name}: {shares}", file=sys.stderr)
    place = [
        f"{pictures[0].mpp:g}{', mixed' if mixed else ''}",
        side,
        len(names),
        f"{len(queries.rgb)} / {len(gallery.rgb)}",
    ]
    return "| " + " | ".join(map(str, place + cells)) + " |"


def stain(tiles: NDArray[np.uint8], embed: Embed, config: dict[str, Any]) -> str:
    """Cosine of a tile with its stain-jittered self, and with another tile."""
    still = config | {"views": {"scale": [1.0, 1.0], "stain": 0.1, "brightness": 0.05, "blur": 0.0, "offset": 0}}
    views = make_views(torch.from_numpy(tiles), tiles.shape[1], still, torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    jittered = ((views * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (embed(tiles), embed(jittered)))
    same, other = (one * two).sum(axis=1), (one * np.roll(two, 1, axis=0)).sum(axis=1)
    nearest = ((one @ two.T).argmax(axis=1) == np.arange(len(one))).mean()
    return (
        f"cosine with the jittered, turned self {same.mean():.3f} (5th percentile {np.percentile(same, 5):.3f}), "
        f"with another tile {other.mean():.3f} (95th percentile {np.percentile(other, 95):.3f}); "
        f"the jittered self is the nearest of {len(one)} for {100 * nearest:.1f} %"
    )


def readable(train: NDArray[np.uint8], test: NDArray[np.uint8], embed: Embed) -> str:
    """R² on held-out tiles of a ridge from the embedding to mean and standard deviation of R, G and B."""
    inputs, targets = [], []
    for tiles in (train, test):
        flat = tiles.reshape(len(tiles), -1, 3).astype(np.float64) / 255
        inputs.append(np.pad(embed(tiles).astype(np.float64), ((0, 0), (0, 1)), constant_values=1))
        targets.append(np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1))
    x, y = inputs[0], targets[0]
    answer = inputs[1] @ np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    left = ((answer - targets[1]) ** 2).sum(axis=0) / ((targets[1] - targets[1].mean(axis=0)) ** 2).sum(axis=0)
    return (
        "mean R, G, B "
        + ", ".join(f"{v:.3f}" for v in 1 - left[:3])
        + "; spread "
        + ", ".join(f"{v:.3f}" for v in 1 - left[3:])
    )


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", required=True, help="bundled, or a local safetensors file")
    parser.add_argument("--slides", type=Path, default=Path())
    parser.add_argument("--work", type=Path, required=True, help="the work folder of train_encoder.py")
    parser.add_argument("--config", type=Path, default=here / "encoder.toml")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    config = tomllib.loads(arguments.config.read_text())
    pictures = decode(arguments.slides, arguments.work, config["data"]["mpp"], config["data"]["train_until"])
    encoder = load_encoder(arguments.encoder)
    seen = Sampler(pictures, config, seed=123).tiles(1024, encoder.tile)
    embeds: dict[str, Embed] = {
        "trained": encoder,
        "untrained": untrained(encoder, config["architecture"], seen),
        "histogram": histogram,
    }
    titles = ["mpp", "side, px", "slides", "queries / gallery", *embeds, "trained - untrained", "trained - histogram"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    strips = []
    rows = ((0.5, 128, 32, 256, False), (2.0, 128, 16, 256, False), (8.0, 64, 8, 64, False))
    for mpp, side, step, block, mixed in (*rows, (2.0, 128, 16, 256, True), (8.0, 64, 8, 64, True)):
        chosen = [picture for picture in pictures if picture.mpp == mpp]
        print(retrieval(chosen, embeds, side, step=step, block=block, mixed=mixed), flush=True)
        if side == encoder.tile and not mixed:
            found = held_out(chosen, side, step=step, block=block, seed=1)[:2]
            strips.append(np.concatenate([part.rgb for part in found])[::4])
    tiles = np.concatenate(strips)
    tiles = tiles[np.random.default_rng(0).permutation(len(tiles))]
    print(f"\n{len(tiles)} held-out tiles of mpp 0.5 and 2:")
    for name in ("trained", "untrained"):
        print(f"- {name}: {stain(tiles[:500], embeds[name], config)}")
        print(f"- {name}: effective rank {effective_rank(torch.from_numpy(embeds[name](tiles))):.1f} of {encoder.dim}")
        print(f"- {name}: colour read back linearly, R² of {readable(seen, tiles, embeds[name])}")


if __name__ == "__main__":
    main()
