"""Train the bundled encoder by VICReg: `train_encoder.py encoder.toml --work WORK --slides DATA -o FOLDER`.

Why VICReg and not DINO or iBOT: there is no teacher, so a step costs half of theirs on a CPU; it needs no large
batch; and its variance and covariance terms keep every dimension of the embedding alive and different from the
others, which is what a brush that is *conditioned* on the embedding wants. Positives are two views of nearby places
of one slide at one pitch, so what tissue looks like is kept and where exactly its nuclei lie is not; stain jitter is
mild, so colour is kept as well.

The work folder holds the decoded slides (.npy) and a checkpoint every two minutes: run the same command again to
go on. The schedule follows the clock, so that training always ends annealed. When it ends, the weights
(safetensors) and their description (JSON) stand in the output folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from wsi_brush.commit import fingerprint, sha256_of, write_json
from wsi_brush.grid import Grid
from wsi_brush.machine import find_device, keep_memory, name_of
from wsi_brush.slide import open_slide
from wsi_brush.stains import VECTORS

CHECKPOINT_SECONDS = 120.0
COLOURFUL = 18  # least spread of a tissue pixel's R, G and B, of 255
STEP = 16  # px between the corners of tiles on offer


# data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One slide, decoded at one pitch: (height, width, 3) uint8, and the column where the held-out strip begins.

    `averaged` is the same, averaged from the finest pitch instead of read from the slide's own pyramid. How good that
    pyramid is differs from scanner to scanner, so an encoder should see both, and see that they are the same tissue.
    """

    slide: str
    mpp: float
    rgb: NDArray[np.uint8]
    cut: int
    averaged: NDArray[np.uint8] | None = None

    def tiles(self, tile: int, tissue: float, *, columns: slice, step: int = STEP) -> NDArray[np.int64]:
        """Corners (k, 2) of the tiles that lie in `columns` and hold enough tissue; where the picture is smaller
        than a tile, the tile reaches over its edge, which is white and no tissue."""
        part = self.rgb[:, columns]
        colourful = part.max(axis=2).astype(np.int16) - part.min(axis=2) > COLOURFUL
        tops, lefts = (
            np.arange(0, max(side - tile, 0) + 1, step) - max(tile - side, 0) // 2 for side in part.shape[:2]
        )
        total = np.zeros((part.shape[0] + 1, part.shape[1] + 1), np.int64)
        total[1:, 1:] = colourful.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
        upper, lower = (np.clip(tops + more, 0, part.shape[0])[:, None] for more in (0, tile))
        left, right = (np.clip(lefts + more, 0, part.shape[1])[None] for more in (0, tile))
        inside = total[lower, right] - total[upper, right] - total[lower, left] + total[upper, left]
        rows, places = np.nonzero(inside > tissue * tile**2)
        return np.stack([tops[rows], lefts[places] + (columns.start or 0)], axis=1)

    def copy(self, square: Tensor, pixels: Tensor, top: int, left: int) -> None:
        """Into a white square (side, side, 3) what of `pixels`, these or the averaged ones, may be trained on there."""
        side = len(square)
        rows = slice(max(top, 0), min(top + side, self.rgb.shape[0]))
        columns = slice(max(left, 0), min(left + side, self.cut))
        if rows.start < rows.stop and columns.start < columns.stop:
            at = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
            square[at] = pixels[rows, columns]


def decode(folder: Path, work: Path, mpps: list[float], train_until: float) -> list[Picture]:
    """Every slide of PROVENANCE.tsv at every pitch; decoded once, then read from the work folder."""
    with (folder / "PROVENANCE.tsv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["file"].startswith("slides/")]
    pictures: list[Picture] = []
    for row in rows:
        estimate = float(row["mpp_estimated"]) if row["mpp_estimated"] else None
        slide = None
        for mpp in mpps:
            kept = work / "decoded" / f"{Path(row['file']).name}-{mpp:g}.npy"
            about = kept.with_suffix(".json")
            if not about.exists():
                slide = slide or open_slide(folder / row["file"], assume_mpp=estimate)
                height, width = (round(side * slide.grid.mpp / mpp) for side in slide.grid.shape)
                kept.parent.mkdir(parents=True, exist_ok=True)
                rgb = np.empty((height, width, 3), np.uint8)
                whole = Grid(mpp, 0, 0, height, width)
                for window in whole.tiles(2048):
                    rgb[window.within(whole)] = slide.read(window)
                np.save(kept, rgb)
                # Two pixels less: anti-aliasing looks a little further than the pixel it makes.
                cut = math.floor(train_until * slide.grid.width * slide.grid.mpp / mpp) - 2
                write_json(about, {"cut": cut, "mpp": mpp, "level0_mpp": slide.grid.mpp})
            name, rgb = Path(row["file"]).name, np.load(kept)
            averaged = _average(pictures[-1], kept, rgb.shape[:2], mpp) if mpp > mpps[0] else None
            pictures.append(Picture(name, mpp, rgb, json.loads(about.read_text())["cut"], averaged))
    return pictures


def _average(finer: Picture, kept: Path, shape: tuple[int, ...], mpp: float) -> NDArray[np.uint8]:
    """The next coarser pitch as the mean of whole blocks of the finer one; kept in the work folder as well."""
    path = kept.with_name(f"{kept.stem}-averaged.npy")
    if not path.exists():
        factor = round(mpp / finer.mpp)
        full = np.full((shape[0] * factor, shape[1] * factor, 3), 255, np.uint8)
        source = (finer.rgb if finer.averaged is None else finer.averaged)[: full.shape[0], : full.shape[1]]
        full[: source.shape[0], : source.shape[1]] = source
        blocks = full.reshape(shape[0], factor, shape[1], factor, 3)
        np.save(path, np.rint(blocks.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8))
    return np.asarray(np.load(path))


class Sampler:
    """Pairs of source squares: balanced over pitches, then slides; the two of a pair lie near each other."""

    def __init__(self, pictures: list[Picture], config: dict[str, Any], seed: int, device: str = "cpu") -> None:
        """device: where the pictures are held and the squares wanted."""
        data, self.device = config["data"], device
        self.random = np.random.default_rng(seed)
        self.offset: int = config["views"]["offset"]
        self.side = math.ceil(config["tile"] * config["views"]["scale"][1])
        self.share: list[float] = data["share"]
        self.offers: list[list[tuple[Picture, NDArray[np.int64]]]] = []
        for mpp in data["mpp"]:
            chosen = [picture for picture in pictures if picture.mpp == mpp]
            corners = [p.tiles(config["tile"], data["tissue"], columns=slice(0, p.cut)) for p in chosen]
            self.offers.append([offer for offer in zip(chosen, corners, strict=True) if len(offer[1])])
        self.half = config["tile"] // 2
        self.pixels = {
            (picture.slide, picture.mpp, averaged): torch.from_numpy(rgb).to(device)
            for picture in pictures
            for averaged, rgb in enumerate((picture.rgb, picture.averaged))
            if rgb is not None
        }

    def pairs(self, count: int) -> Tensor:
        """(2 * count, side, side, 3) uint8: first all first members, then all second ones."""
        squares = torch.full((2 * count, self.side, self.side, 3), 255, dtype=torch.uint8, device=self.device)
        for number, pitch in enumerate(self.random.choice(len(self.offers), count, p=self.share)):
            picture, corners = self.offers[pitch][self.random.integers(len(self.offers[pitch]))]
            centre = corners[self.random.integers(len(corners))] + self.half + self.random.integers(0, STEP, 2)
            self._draw(squares[number], picture, centre)
            near = centre + self.random.integers(-self.offset, self.offset + 1, 2)
            self._draw(squares[count + number], picture, near)
        return squares

    def tiles(self, count: int, tile: int) -> NDArray[np.uint8]:
        """(count, tile, tile, 3): tiles as they are, balanced in the same way."""
        places = self.side // 2 - tile // 2
        return self.pairs(count)[:count, places : places + tile, places : places + tile].cpu().numpy()

    def _draw(self, square: Tensor, picture: Picture, centre: NDArray[np.int64]) -> None:
        corner = []
        for middle, extent in zip(centre, (picture.rgb.shape[0], picture.cut), strict=True):
            room = extent - self.side
            corner.append(min(max(int(middle) - self.side // 2, 0), room) if room >= 0 else room // 2)
        averaged = self.random.integers(2) and picture.averaged is not None
        picture.copy(square, self.pixels[picture.slide, picture.mpp, int(averaged)], corner[0], corner[1])


# views --------------------------------------------------------------------------------------------


def make_views(squares: Tensor, size: int, config: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Augment (n, side, side, 3) uint8 squares to (n, 3, size, size) normalised views, each in its own way."""
    views = config["views"]
    count, side = squares.shape[:2]
    device = squares.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    low, high = views["scale"]
    scale = torch.exp(math.log(low) + uniform(count) * math.log(high / low)) * (size / side)
    chosen = torch.randint(8, (count,), generator=generator, device=device)
    turn = functional.pad(_dihedral().to(device)[chosen] * scale[:, None, None], (0, 1))
    where = functional.affine_grid(turn, [count, 3, size, size], align_corners=False)
    pixels = squares.permute(0, 3, 1, 2).float().contiguous()
    pixels = functional.grid_sample(pixels, where, mode="bilinear", padding_mode="border", align_corners=False)
    stains = torch.tensor(VECTORS, dtype=torch.float32, device=device)
    factor = 1 + views["stain"] * (2 * uniform(count, 3) - 1)
    mix = stains.T @ torch.diag_embed(factor) @ torch.linalg.inv(stains.T)
    shade = views["brightness"] * (2 * uniform(count, 1, 1) - 1)
    density = -torch.log((pixels.flatten(2) + 1) / 256)
    pixels = torch.exp(-torch.baddbmm(shade.expand(count, 3, 1), mix, density)).clamp_(0, 1).view_as(pixels)
    blurred = functional.avg_pool2d(
        functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), "replicate"), 2, 1), 2, 1
    )
    pixels = torch.lerp(pixels, blurred, views["blur"] * uniform(count, 1, 1, 1))
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def _dihedral() -> Tensor:
    turns = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]).round() for a in _QUARTERS]
    return torch.stack(turns + [turn @ torch.diag(torch.tensor([1.0, -1.0])) for turn in turns])


_QUARTERS = [quarter * math.pi / 2 for quarter in range(4)]


# objective ----------------------------------------------------------------------------------------


def vicreg(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of two (n, d) expansions (Bardes, Ponce and LeCun 2022)."""
    invariance = functional.mse_loss(first, second)
    variance = covariance = torch.zeros((), device=first.device)
    for one in (first, second):
        centred = one - one.mean(dim=0)
        variance = variance + functional.relu(1 - (centred.var(dim=0) + 1e-4).sqrt()).mean() / 2
        square = (centred.T @ centred / (len(one) - 1)).square()
        covariance = covariance + (square.sum() - square.diagonal().sum()) / one.shape[1]
    return invariance, variance, covariance


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the normalised eigenvalues of the covariance: how many dimensions are really in use."""
    spread = torch.linalg.svdvals(embeddings.double() - embeddings.double().mean(dim=0)).square()
    share = spread / spread.sum()
    return math.exp(-(share * torch.log(share.clamp_min(1e-12))).sum().item())


# training -----------------------------------------------------------------------------------------


class Training:
    """The network, its expander and optimiser, and how far they are."""

    def __init__(self, config: dict[str, Any], work: Path, device: str) -> None:
        self.config, self.work, self.device = config, work, device
        torch.manual_seed(config["seed"])
        network: Any = timm.create_model(config["architecture"], num_classes=0)
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)
        self.dim = int(network.num_features)
        width = config["optimisation"]["expander"]
        self.expander = nn.Sequential(
            nn.Linear(self.dim, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
        ).to(device)
        named = [*self.network.named_parameters(), *self.expander.named_parameters()]
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": config["optimisation"]["decay"]},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99))
        self.step, self.seconds, self.saves = 0, 0.0, 0

    @property
    def progress(self) -> float:
        """From 0 to 1, by the clock."""
        return min(1.0, self.seconds / (60 * float(self.config["optimisation"]["minutes"])))

    def rate(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = self.config["optimisation"]["warmup"]
        ramp = min(1.0, (self.progress + 1e-3) / warmup)
        return float(self.config["optimisation"]["rate"] * ramp * (1 + math.cos(math.pi * self.progress)) / 2)

    def save(self) -> None:
        """Write a checkpoint; the JSON comes last and names the hash of the tensors."""
        tensors = {f"network.{name}": value.contiguous() for name, value in self.network.state_dict().items()}
        tensors |= {f"expander.{name}": value for name, value in self.expander.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
        self.saves += 1  # two generations: the one that checkpoint.json names is never the one being written
        generation = f"checkpoint-{self.saves % 2}.safetensors"
        save_file(tensors, self.work / generation)
        about: dict[str, Any] = {
            "file": generation,
            "sha256": sha256_of(self.work / generation),
            "config": fingerprint(self.config),
        }
        about |= {"step": self.step, "seconds": self.seconds, "saves": self.saves}
        write_json(self.work / "checkpoint.json", about)

    def resume(self) -> None:
        """Go on from the work folder's checkpoint, if it was made with the same configuration."""
        path = self.work / "checkpoint.json"
        if not path.exists():
            return
        about = json.loads(path.read_text())
        if about["config"] != fingerprint(self.config):
            raise SystemExit(f"{path}: made with another configuration; remove it or use another --work")
        if about["sha256"] != sha256_of(self.work / about["file"]):
            raise SystemExit(f"{path}: {about['file']} is damaged; remove both and train again")
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "expander": {}, "optimiser": {}}
        for name, value in load_file(self.work / about["file"]).items():
            part, rest = name.split(".", 1)
            parts[part][rest] = value
        self.network.load_state_dict(parts["network"])
        self.expander.load_state_dict(parts["expander"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimiser"].items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        whole = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        self.step, self.seconds, self.saves = about["step"], about["seconds"], about["saves"]


def write_weights(training: Training, sampler: Sampler, folder: Path) -> None:
    """Write encoder.safetensors (matrices in half precision) and encoder.json, which pins its SHA-256.

    `embedding.mean` and `embedding.std` of training tiles go along: the encoder standardises what it returns.
    """
    config = training.config
    tiles = torch.from_numpy(sampler.tiles(1024, config["tile"])).to(training.device).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(config[key], device=training.device).view(3, 1, 1) for key in ("mean", "std"))
    training.network.eval()
    with torch.inference_mode():
        seen = torch.cat([training.network((part / 255 - mean) / std) for part in tiles.split(64)])
    training.network.train()
    tensors = {
        name: (value.half() if value.ndim > 1 else value.float()).cpu().contiguous().clone()
        for name, value in training.network.state_dict().items()
        if value.is_floating_point()
    }
    tensors |= {"embedding.mean": seen.mean(dim=0).cpu(), "embedding.std": seen.std(dim=0).clamp_min(1e-3).cpu()}
    partial = folder / "encoder.safetensors.partial"
    save_file(tensors, partial)
    about = {
        "name": config["name"],
        "architecture": config["architecture"],
        "kwargs": {"num_classes": 0},
        "tile": config["tile"],
        "mean": config["mean"],
        "std": config["std"],
        "dim": training.dim,
        "sha256": sha256_of(partial),
        "licence": f"MIT (weights); data: see {config.get('card', 'encoder.md')}",
        "training": {
            "method": "VICReg",
            "mpp": config["data"]["mpp"],
            "steps": training.step,
            "pairs": config["optimisation"]["pairs"],
            "minutes": round(training.seconds / 60, 1),
            "device": name_of(torch.device(training.device)),
            "config": fingerprint(config),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        },
    }
    partial.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(partial, folder / "encoder.safetensors")
    write_json(folder / "encoder.json", about)


def train(config: dict[str, Any], pictures: list[Picture], work: Path, out: Path, device: str) -> None:
    """Train until the clock says so, then write the weights."""
    how = config["optimisation"]
    training = Training(config, work, device)
    training.resume()
    sampler = Sampler(pictures, config, seed=config["seed"] + training.step, device=device)
    for mpp, offers in zip(config["data"]["mpp"], sampler.offers, strict=True):
        print(f"mpp {mpp:g}:", ", ".join(f"{p.slide} {len(c)}" for p, c in offers), flush=True)
    generator = torch.Generator(device).manual_seed(config["seed"] + training.step)
    saved = training.seconds
    while training.progress < 1:
        began = time.monotonic()
        size = how["size"][int(training.progress >= how["switch"])]
        with torch.no_grad():
            views = make_views(sampler.pairs(how["pairs"]), size, config, generator)
        for group in training.optimiser.param_groups:
            group["lr"] = training.rate()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=how.get("precision") == "bfloat16"):
            embeddings = training.network(views)
        embeddings = embeddings.float()
        terms = vicreg(*training.expander(embeddings).chunk(2))
        loss = torch.stack([weight * term for weight, term in zip(how["weights"], terms, strict=True)]).sum()
        training.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*training.network.parameters(), *training.expander.parameters()], 10.0)
        training.optimiser.step()
        training.step += 1
        training.seconds += time.monotonic() - began
        if training.step % 20 == 1:
            figures = " ".join(f"{name} {t.item():.4f}" for name, t in zip(("inv", "var", "cov"), terms, strict=True))
            rank = effective_rank(embeddings.detach()[: how["pairs"]])
            speed = 2 * how["pairs"] / (time.monotonic() - began)
            print(
                f"step {training.step} {training.seconds / 60:.1f} min rate {group['lr']:.5f} {figures} "
                f"rank {rank:.1f} {speed:.0f} views/s",
                flush=True,
            )
        if training.seconds - saved > CHECKPOINT_SECONDS:
            training.save()
            write_weights(training, sampler, work)
            saved = training.seconds
    training.save()
    out.mkdir(parents=True, exist_ok=True)
    write_weights(training, sampler, out)
    print(f"done: {out / 'encoder.safetensors'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("--slides", type=Path, required=True, help="folder with PROVENANCE.tsv and slides/")
    parser.add_argument("--work", type=Path, required=True, help="decoded slides and checkpoints")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for encoder.safetensors and encoder.json")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    keep_memory()
    config = tomllib.loads(arguments.config.read_text())
    torch.set_num_threads(config["optimisation"]["threads"])
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = decode(arguments.slides, arguments.work, config["data"]["mpp"], config["data"]["train_until"])
    train(config, pictures, arguments.work, arguments.out, str(find_device(arguments.device)))


if __name__ == "__main__":
    main()
