"""Is the bundled encoder worth something? `evaluate_encoder.py --encoder PATH.safetensors --work WORK`.

Only the held-out right quarter of every slide is looked at (decoded by train_encoder.py, in WORK). Queries are tiles
of its upper half, the gallery is tiles of its lower half, and 5-nearest-neighbour majority vote names the slide.
Slides count equally. Compared, on the same tiles:

    trained     the encoder as it is loaded, cosine
    untrained   the same network as it was initialised, standardised with its own statistics of training tiles, cosine
    histogram   8 x 8 x 8 RGB, Hellinger distance

Intervals are 95 % percentile bootstraps over blocks of 256 px (tiles of one block lie too near each other to count
as independent). Also: how much mild stain jitter moves an embedding compared with another tile, how many dimensions are in use, and how
well mean colour and contrast can be read back linearly. Prints Markdown for the model card.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from train_encoder import Picture, Sampler, decode, effective_rank, keep_memory, make_views

from wsi_brush.encoder import Encoder, load_encoder

NEIGHBOURS = 5
MOST = 120  # tiles a slide and half, at most
BLOCK = 256  # px
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Tiles:
    """Tiles (n, side, side, 3) with the slide each is of (n,) and the block it lies in (n,)."""

    rgb: NDArray[np.uint8]
    slide: NDArray[np.int64]
    block: NDArray[np.int64]


def held_out(pictures: list[Picture], side: int, tissue: float, step: int, seed: int) -> tuple[Tiles, Tiles, list[str]]:
    """Queries, gallery and the names of the slides; a slide too small for a tile in each half is left out."""
    random = np.random.default_rng(seed)
    halves: tuple[list[list[NDArray[np.int64]]], ...] = ([], [])
    rgb: tuple[list[NDArray[np.uint8]], ...] = ([], [])
    names = []
    for picture in pictures:
        begin, middle = picture.cut + 2, picture.rgb.shape[0] // 2
        strip = picture.rgb[:, begin:]
        parts = [replace(picture, rgb=part, cut=part.shape[1]) for part in (strip[:middle], strip[middle:])]
        corners = [
            part.tiles(side, tissue, columns=slice(0, None), step=step) if min(part.rgb.shape[:2]) >= side else []
            for part in parts
        ]
        if not all(len(found) for found in corners):
            continue
        for part, found, half, pixels in zip(parts, corners, halves, rgb, strict=True):
            chosen = np.asarray(found)[random.permutation(len(found))[:MOST]]
            blocks = chosen // BLOCK @ np.array([1000, 1])
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
    return np.sqrt(counts / bins.shape[1]).astype(np.float32)


def vote(queries: Tiles, gallery: Tiles, embed: Embed) -> NDArray[np.bool_]:
    """Which queries are given their own slide; a tie goes to the slide with the nearest neighbour."""
    first, second = (embed(tiles.rgb) for tiles in (queries, gallery))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    near = gallery.slide[np.argsort(-(first @ second.T), axis=1, kind="stable")[:, :NEIGHBOURS]]
    named = []
    for row in near:
        count = np.bincount(row)
        named.append(next(slide for slide in row if count[slide] == count.max()))
    return np.asarray(named) == queries.slide


def balanced(right: NDArray[np.bool_], slide: NDArray[np.int64]) -> float:
    """Mean over slides of the part that is right."""
    return float(np.mean([right[slide == one].mean() for one in np.unique(slide)]))


def interval(
    values: list[NDArray[np.bool_]], tiles: Tiles, statistic: Callable[[list[float]], float], draws: int = 1000
) -> tuple[float, float]:
    """95 % percentile bootstrap of a statistic of the balanced accuracies of `values`, over blocks within slides."""
    random = np.random.default_rng(0)
    groups = [
        [np.flatnonzero(tiles.block == block) for block in np.unique(tiles.block[tiles.slide == slide])]
        for slide in np.unique(tiles.slide)
    ]
    drawn = []
    for _ in range(draws):
        picks = [np.concatenate([g[i] for i in random.integers(len(g), size=len(g))]) for g in groups]
        drawn.append(statistic([float(np.mean([value[pick].mean() for pick in picks])) for value in values]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def untrained(encoder: Encoder, architecture: str, kwargs: dict[str, object], tiles: NDArray[np.uint8]) -> Embed:
    """The same architecture as timm initialises it; batch statistics and standardisation from training tiles."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, **kwargs)
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    scale, shift = encoder._scale, encoder._shift
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches
    with torch.no_grad():
        for part in pixels.split(64):
            network(part * scale + shift)
        network.eval()
        seen = torch.cat([network(part * scale + shift) for part in pixels.split(64)])
    network.register_buffer("embedding_mean", seen.mean(dim=0))
    network.register_buffer("embedding_std", seen.std(dim=0).clamp_min(1e-6))
    return Encoder(network, encoder.about)


def at_side(embed: Embed, side: int) -> Embed:
    """An encoder as it sees squares of another side: convolutional networks take any."""
    if not isinstance(embed, Encoder) or embed.tile == side:
        return embed
    return Encoder(embed._network, replace(embed.about, tile=side))


def retrieval(pictures: list[Picture], embeds: dict[str, Embed], side: int, step: int) -> str:
    """One row of the table."""
    queries, gallery, names = held_out(pictures, side, 0.3, step, seed=0)
    right = {name: vote(queries, gallery, at_side(embed, side)) for name, embed in embeds.items()}
    cells = []
    for value in right.values():
        low, high = interval([value], queries, lambda share: share[0])
        cells.append(f"{100 * balanced(value, queries.slide):.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    for other in ("untrained", "histogram"):
        low, high = interval([right["trained"], right[other]], queries, lambda share: share[0] - share[1])
        cells.append(f"[{100 * low:+.1f}, {100 * high:+.1f}]")
    worst = min((float(right["trained"][queries.slide == i].mean()), name) for i, name in enumerate(names))
    place = f"| {pictures[0].mpp:g} | {side} | {len(names)} | {len(queries.rgb)} / {len(gallery.rgb)} | "
    return place + " | ".join(cells) + f" | {worst[1]} {100 * worst[0]:.0f} |"


def stain(tiles: NDArray[np.uint8], embed: Embed, config: dict[str, object]) -> str:
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
    parser.add_argument("--architecture", default=None, help="of the untrained network; default: of the configuration")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    config = tomllib.loads(arguments.config.read_text())
    pictures = decode(arguments.slides, arguments.work, config["data"]["mpp"], config["data"]["train_until"])
    encoder = load_encoder(arguments.encoder)
    seen = Sampler(pictures, config, seed=123).tiles(1024, encoder.tile)
    architecture = arguments.architecture or config["architecture"]
    embeds: dict[str, Embed] = {
        "trained": encoder,
        "untrained": untrained(encoder, architecture, {"num_classes": 0}, seen),
        "histogram": histogram,
    }
    print(
        "| mpp | tile, px | slides | queries / gallery | trained | untrained | histogram | trained - untrained | trained - histogram | worst slide |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    strips = []
    for mpp, side, step in ((0.5, 128, 32), (2.0, 128, 16), (8.0, 64, 8)):
        chosen = [picture for picture in pictures if picture.mpp == mpp]
        print(retrieval(chosen, embeds, side, step), flush=True)
        if side == encoder.tile:
            strips.append(np.concatenate([part.rgb for part in held_out(chosen, side, 0.3, step, seed=1)[:2]])[::4])
    tiles = np.concatenate(strips)
    tiles = tiles[np.random.default_rng(0).permutation(len(tiles))]
    print(f"\n{len(tiles)} held-out tiles of mpp 0.5 and 2:")
    for name in ("trained", "untrained"):
        print(f"- {name}: {stain(tiles[:500], embeds[name], config)}")
        print(f"- {name}: effective rank {effective_rank(torch.from_numpy(embeds[name](tiles))):.1f} of {encoder.dim}")
        print(f"- {name}: colour read back linearly, R² of {readable(seen, tiles, embeds[name])}")


if __name__ == "__main__":
    main()
