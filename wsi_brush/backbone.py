"""The networks of encoders: how they are made, what of their answer is the embedding, what their tensors are called.

All are timm's. Two things that published encoders have and timm's models of that name do not are asked for by word:
`stem="convolutional"` (CTransPath) and `mlp="swiglu"` (DINOv2's largest, Virchow, UNI 2). Networks that were published
for the transformers library are timm's under other names (`from_transformers`), so that no code from the hub is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

POOLINGS = ("own", "cls", "cls+mean", "layer3")


class ConvolutionalStem(nn.Module):
    """Patches of 4 pixels through convolutions (Xiao et al. 2021), as CTransPath has them (Wang et al. 2022): two of
    stride 2, each with batch normalisation and ReLU, and a linear layer. (n, 3, h, w) -> (n, h / 4, w / 4, embed_dim).
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int,
        norm_layer: Callable[[int], nn.Module], **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if patch_size != 4:
            raise TypeError(f"a convolutional stem has patches of 4 pixels, not of {patch_size}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size, self.grid_size = (height, width), (4, 4), (height // 4, width // 4)
        layers: list[nn.Module] = []
        channels = (in_chans, embed_dim // 8, embed_dim // 4)
        for inner, outer in pairwise(channels):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """What it says of each patch."""
        found: Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 1))
        return found


_STEMS = {"plain": None, "convolutional": ConvolutionalStem}
_MLPS = ("plain", "swiglu")


def build(architecture: str, kwargs: Mapping[str, Any], *, stem: str = "plain", mlp: str = "plain") -> nn.Module:
    """A network of timm, untrained.

    Raises:
        KeyError: if a word is not known; the message says which are.
        RuntimeError, TypeError: as timm, which does not know the architecture or an argument.
    """
    import timm
    from timm.layers.mlp import SwiGLUPacked

    if stem not in _STEMS:
        raise KeyError(f"stem {stem!r} is not known; expected {', '.join(_STEMS)}")
    if mlp not in _MLPS:
        raise KeyError(f"mlp {mlp!r} is not known; expected {', '.join(_MLPS)}")
    more: dict[str, Any] = {"embed_layer": _STEMS[stem]} if stem != "plain" else {}
    if mlp == "swiglu":
        more |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return timm.create_model(architecture, pretrained=False, **kwargs, **more)


class Pooled(nn.Module):
    """What of a network's answer is the embedding: (n, 3, h, w) -> (n, dim).

    cls: the class token after the last normalisation; cls+mean: that, and the mean of the tokens of patches (registers
    are neither); layer3: the mean of a ResNet's third stage; own: what the network returns.
    """

    def __init__(self, network: nn.Module, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise KeyError(f"pooling {pooling!r} is not known; expected {', '.join(POOLINGS)}")
        if pooling in ("cls", "cls+mean") and not getattr(network, "num_prefix_tokens", 0):
            raise TypeError(f"a {type(network).__name__} has no class token for pooling {pooling!r}")
        self.network, self.pooling = network, pooling

    def forward(self, pixels: Tensor) -> Tensor:
        """The embeddings."""
        network: Any = self.network
        if self.pooling == "own":
            found: Tensor = network(pixels)
            return found
        if self.pooling == "layer3":
            (stage,) = network.forward_intermediates(pixels, indices=[3], stop_early=True, intermediates_only=True)
            return torch.as_tensor(stage).mean((2, 3))
        tokens: Tensor = network.forward_features(pixels)
        if self.pooling == "cls":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, network.num_prefix_tokens :].mean(1)], 1)


def without_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors but for those of a classifier."""
    return {name: value for name, value in tensors.items() if not name.startswith(("fc.", "head.fc.", "head.weight"))
            and name != "head.bias"}  # fmt: skip


_RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
_PARTS = ("query", "key", "value")


def from_transformers(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors of transformers' ViTModel, Dinov2Model or Dinov2WithRegistersModel as timm's `network` has them.

    Where the positions are another grid than the network's they are resampled as that library does for a tile of that
    size: bicubic, with antialiasing where there are registers.

    Raises:
        KeyError: if a tensor is missing.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(("embeddings.cls", "embeddings.pos", "embeddings.mask", "pooler.")) or "attention." in name:
            continue
        found[_rename(name)] = value
    for name in tensors:
        if ".attention.attention.query." in name:
            parts = [tensors[name.replace(".query.", f".{part}.")] for part in _PARTS]
            block, kind = name.split(".")[2], name.rpartition(".")[2]
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
        elif ".attention.output." in name:
            found[_rename(name)] = tensors[name]
    cls, positions = tensors["embeddings.cls_token"], tensors["embeddings.position_embeddings"]
    registers = "reg_token" in found
    length = network.state_dict()["pos_embed"].shape[1] - (0 if registers else 1)
    first, rest = positions[:, :1], _resampled(positions[:, 1:], length, antialias=registers)
    # timm adds positions to patches alone where there are registers; the class token's is a constant.
    found["cls_token"] = cls + first if registers else cls
    found["pos_embed"] = rest if registers else torch.cat([first, rest], 1)
    return found


def _rename(name: str) -> str:
    for pattern, other in _RENAMED:
        name = re.sub(pattern, other, name)
    return name


def _resampled(positions: Tensor, length: int, *, antialias: bool) -> Tensor:
    """Positions (1, side², dim) of a square grid on one of `length`."""
    if positions.shape[1] == length:
        return positions
    old, new = (round(count**0.5) for count in (positions.shape[1], length))
    grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=antialias)
    return grid.permute(0, 2, 3, 1).reshape(1, length, -1)
