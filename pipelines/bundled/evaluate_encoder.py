"""Is the bundled encoder worth something? `evaluate_encoder.py --encoder PATH.safetensors --work WORK`.

Only the held-out right quarter of every slide is looked at (decoded by train_encoder.py, in WORK). Compared, on the
same tiles, with differences of the same tiles as well:

    trained     the encoder as it is loaded, cosine
    first       with `--first`: another encoder to compare with, cosine
    untrained   the same network as timm initialises it, standardised on the same kind of training tiles, cosine
    histogram   8 x 8 x 8 RGB, Hellinger distance

Retrieval: queries are tiles of the upper half of a strip, the gallery is tiles of its lower half, and 5-nearest-
neighbour majority vote names the slide. Linear probe: a ridge from vectors to slides, fitted on tiles of the part
that was trained on, names the slide of those queries and of that gallery. Slides count equally in both, and a slide
is left out where a half holds no tile of tissue. A slide stands for its organ: where two slides are of one organ, or
the organ of one is not known, telling them apart is a matter of stain, scanner and disease.

Intervals are 95 % percentile bootstraps over square blocks of the tiles (tiles of one block lie too near each
other to count as independent). A tile of 128 px at mpp 8 is wider than any held-out strip: there the table shows
squares of 64 px, from few and small places. "Mixed" rows take the queries from the slide's own pyramid and the
gallery from the averaged finest pitch: a level made by another program is the same tissue.

Also: whether an embedding sees more than colour (tiles cut into blocks and shuffled), how much stain jitter moves it
compared with another tile, how many dimensions are in use, and how well colour can be read back linearly. Prints
Markdown.
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
PENALTY = 1e-3  # of the probe's ridge: relative to the mean variance of the vector's numbers
BLOCKS = (16, 8, 4, 1)  # px, what a tile is cut into and shuffled
SHUFFLED = 160  # tiles a pitch
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Vectors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]  # of the queries and of the gallery


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


def trained_part(pictures: list[Picture], names: list[str], side: int, step: int) -> Tiles:
    """Tiles of the part of the named slides that was trained on; `slide` counts as in `names`, `block` is 0."""
    random = np.random.default_rng(2)
    rgb, slide = [], []
    for index, name in enumerate(names):
        picture = next(picture for picture in pictures if picture.slide == name)
        found = picture.tiles(side, 0.3, columns=slice(0, picture.cut), step=step)
        chosen = found[random.permutation(len(found))[:MOST]]
        rgb += [picture.rgb[top : top + side, left : left + side] for top, left in chosen]
        slide += [index] * len(chosen)
    return Tiles(np.stack(rgb), np.array(slide), np.zeros(len(slide), np.int64))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """At length 1: inner products are then cosines."""
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def vote(
    queries: Tiles, gallery: Tiles, first: NDArray[np.float32], second: NDArray[np.float32]
) -> NDArray[np.float64]:
    """1 where a query is given its own slide, else 0; a tie goes to the slide with the nearest neighbour."""
    near = gallery.slide[np.argsort(-(unit(first) @ unit(second).T), axis=1, kind="stable")[:, :NEIGHBOURS]]
    named = []
    for row in near:
        count = np.bincount(row)
        named.append(next(slide for slide in row if count[slide] == count.max()))
    right: NDArray[np.bool_] = np.asarray(named) == queries.slide
    return right.astype(np.float64)


def probe(train: Tiles, test: Tiles, first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 where a ridge from vectors to one-hot slides, in which slides weigh equally, names the slide of a test tile."""
    weight = (1 / np.bincount(train.slide) / (train.slide.max() + 1))[train.slide, None]
    x, y = first.astype(np.float64), np.eye(train.slide.max() + 1)[train.slide]
    centre, middle = (weight * x).sum(axis=0), (weight * y).sum(axis=0)
    x, y = (x - centre) * np.sqrt(weight), (y - middle) * np.sqrt(weight)
    square = x.T @ x
    solved = np.linalg.solve(square + PENALTY * np.trace(square) / len(square) * np.eye(len(square)), x.T @ y)
    named = ((second - centre) @ solved + middle).argmax(axis=1)
    right: NDArray[np.bool_] = named == test.slide
    return right.astype(np.float64)


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


def compared(place: list[Any], right: dict[str, NDArray[np.float64]], tiles: Tiles) -> str:
    """One row of a table: percent right, then trained less every other, on the same tiles, with their intervals."""
    row = [str(cell) for cell in place]
    for value in right.values():
        low, high = interval(value, tiles)
        row.append(f"{100 * balanced(value, tiles.slide):.1f} [{low:.1f}, {high:.1f}]")
    for name, value in right.items():
        if name != "trained":
            more = right["trained"] - value
            low, high = interval(more, tiles)
            row.append(f"{100 * balanced(more, tiles.slide):+.1f} [{low:+.1f}, {high:+.1f}]")
    return "| " + " | ".join(row) + " |"


def table(first: str, embeds: dict[str, Embed]) -> str:
    """The head of a table of `compared` rows; `first` names what they count."""
    titles = ["mpp", "side, px", "slides", first, *embeds, *(f"trained - {one}" for one in embeds if one != "trained")]
    return "| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|"


def by_slide(what: str, right: dict[str, NDArray[np.float64]], tiles: Tiles, names: list[str]) -> None:
    """Percent right in each slide, to standard error."""
    print(f"    {what}: {', '.join(right)}", file=sys.stderr)
    for index, name in enumerate(names):
        shares = " ".join(f"{100 * value[tiles.slide == index].mean():.0f}" for value in right.values())
        print(f"        {name}: {shares}", file=sys.stderr)


def shuffled(tiles: NDArray[np.uint8], block: int) -> NDArray[np.uint8]:
    """Each tile cut into squares of `block` px that change places: its colours without their layout."""
    random = np.random.default_rng(3)
    count, side = tiles.shape[:2]
    along = side // block
    cut = tiles.reshape(count, along, block, along, block, 3).swapaxes(2, 3).reshape(count, along**2, block, block, 3)
    cut = np.stack([tile[random.permutation(along**2)] for tile in cut])
    whole = cut.reshape(count, along, along, block, block, 3).swapaxes(2, 3)
    return np.ascontiguousarray(whole.reshape(tiles.shape))


def layout(queries: Tiles, gallery: Tiles, embed: Embed) -> str:
    """Cosine of a tile with its shuffled self, and of a query with a gallery tile: those two never overlap."""
    random = np.random.default_rng(4)
    parts = []
    for half in (queries, gallery):
        chosen = random.permutation(len(half.rgb))[: SHUFFLED // 2]
        parts.append(Tiles(half.rgb[chosen], half.slide[chosen], half.block[chosen]))
    tiles = np.concatenate([part.rgb for part in parts])
    whole = unit(embed(tiles))
    kept = [(whole * unit(embed(shuffled(tiles, block)))).sum(axis=1).mean() for block in BLOCKS]
    pairs = whole[: len(parts[0].rgb)] @ whole[len(parts[0].rgb) :].T
    same = parts[0].slide[:, None] == parts[1].slide[None]
    cells = [*(f"{value:.3f}" for value in kept), f"{pairs[same].mean():.3f}", f"{pairs[~same].mean():.3f}"]
    return " | ".join(cells)


def stain(tiles: NDArray[np.uint8], embeds: dict[str, Embed], config: dict[str, Any]) -> dict[str, str]:
    """Cosine of a tile with its stain-jittered self, and with another tile."""
    still = config | {"views": {"scale": [1.0, 1.0], "stain": 0.1, "brightness": 0.05, "blur": 0.0, "offset": 0}}
    views = make_views(torch.from_numpy(tiles), tiles.shape[1], still, torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    jittered = ((views * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    moved: dict[str, float] = {}
    lines: dict[str, str] = {}
    for name, embed in embeds.items():
        one, two = unit(embed(tiles)), unit(embed(jittered))
        same, other = (one * two).sum(axis=1), (one * np.roll(two, 1, axis=0)).sum(axis=1)
        nearest = ((one @ two.T).argmax(axis=1) == np.arange(len(one))).mean()
        # How far the jitter moves a tile, of how far another tile is: cosines of two encoders have no common scale.
        moved[name] = float((1 - same.mean()) / (1 - other.mean()))
        lines[name] = (
            f"cosine with the jittered, turned self {same.mean():.3f} (5th percentile {np.percentile(same, 5):.3f}), "
            f"with another, jittered tile {other.mean():.3f} (95th percentile {np.percentile(other, 95):.3f}), "
            f"margin {same.mean() - other.mean():.3f}; "
            f"the jittered self is the nearest of {len(one)} for {100 * nearest:.1f} %; "
            f"the jitter moves it by {100 * moved[name]:.1f} % of the way to another tile"
        )
    for name in moved.keys() - {"first"} if "first" in moved else ():
        lines[name] += f", {moved[name] / moved['first']:.2f} times as far as the first"
    return lines


def readable(
    train: NDArray[np.uint8], test: NDArray[np.uint8], first: NDArray[np.float32], second: NDArray[np.float32]
) -> str:
    """R² on held-out tiles of a ridge from their vectors to mean and standard deviation of R, G and B."""
    targets = []
    for tiles in (train, test):
        flat = tiles.reshape(len(tiles), -1, 3).astype(np.float64) / 255
        targets.append(np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1))
    centre, middle = first.mean(axis=0, dtype=np.float64), targets[0].mean(axis=0)  # which no ridge is to draw to zero
    x, y = first - centre, targets[0] - middle
    answer = (second - centre) @ np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y) + middle
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
    parser.add_argument("--encoder", required=True, help="a name, or a local safetensors file")
    parser.add_argument("--first", help="another encoder to compare with, as --encoder")
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
    networks: dict[str, Embed] = {"trained": encoder}
    if arguments.first:
        networks["first"] = at_side(load_encoder(arguments.first), encoder.tile)
    networks["untrained"] = untrained(encoder, config["architecture"], seen)
    embeds = networks | {"histogram": histogram}
    print("Retrieval\n\n" + table("queries / gallery", embeds))
    strips, probes, layouts = [], [], []
    rows = ((0.5, 128, 32, 256, False), (2.0, 128, 16, 256, False), (8.0, 64, 8, 64, False))
    for mpp, side, step, block, mixed in (*rows, (2.0, 128, 16, 256, True), (8.0, 64, 8, 64, True)):
        chosen = [picture for picture in pictures if picture.mpp == mpp]
        queries, gallery, names = held_out(chosen, side, step=step, block=block, seed=0, mixed=mixed)
        sized = {name: at_side(embed, side) for name, embed in embeds.items()}
        vectors: Vectors = {name: (embed(queries.rgb), embed(gallery.rgb)) for name, embed in sized.items()}
        right = {name: vote(queries, gallery, *pair) for name, pair in vectors.items()}
        place = [f"{mpp:g}{', mixed' if mixed else ''}", side, len(names)]
        print(compared([*place, f"{len(queries.rgb)} / {len(gallery.rgb)}"], right, queries), flush=True)
        by_slide(f"retrieval, mpp {place[0]}", right, queries, names)
        if mixed:
            continue
        train = trained_part(chosen, names, side, step)
        test = Tiles(
            np.concatenate([queries.rgb, gallery.rgb]),
            np.concatenate([queries.slide, gallery.slide]),
            np.concatenate([queries.block, -1 - gallery.block]),  # the halves count their blocks alike
        )
        right = {
            name: probe(train, test, embed(train.rgb), np.concatenate(vectors[name])) for name, embed in sized.items()
        }
        probes.append(compared([*place, f"{len(train.rgb)} / {len(test.rgb)}"], right, test))
        by_slide(f"linear probe, mpp {place[0]}", right, test, names)
        if side == encoder.tile:
            halves = held_out(chosen, side, step=step, block=block, seed=1)[:2]
            strips.append(np.concatenate([part.rgb for part in halves])[::4])
            layouts += [f"| {mpp:g} | {name} | {layout(*halves, embed)} |" for name, embed in networks.items()]
    print("\nLinear probe\n\n" + table("trained on / tested on", embeds), *probes, sep="\n")
    print(f"\nColour against layout: mean cosine with the shuffled self, {SHUFFLED} held-out tiles a pitch\n")
    titles = ["mpp", "encoder", *(f"blocks of {block} px" for block in BLOCKS), "two of one slide", "of two slides"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|", *layouts, sep="\n", flush=True)
    tiles = np.concatenate(strips)
    tiles = tiles[np.random.default_rng(0).permutation(len(tiles))]
    print(f"\n{len(tiles)} held-out tiles of mpp 0.5 and 2:")
    jitter = stain(tiles[:500], networks, config)
    for name, embed in networks.items():
        before, after = embed(seen), embed(tiles)
        print(f"- {name}: {jitter[name]}")
        print(f"- {name}: effective rank {effective_rank(torch.from_numpy(after)):.1f} of {after.shape[1]}")
        print(f"- {name}: colour read back linearly, R² of {readable(seen, tiles, before, after)}")


if __name__ == "__main__":
    main()
