"""Networks of encoders: pooling as its words say, transformers' networks as timm's, nothing that is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from wsi_brush.backbone import Pooled, build, from_transformers, without_head

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def pixels(side: int = 56, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=(count, 3, side, side)).astype(np.float32))


def stirred(network: nn.Module) -> nn.Module:
    """Every number of a network its own, so that none is left out unseen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator) + (1.0 if "var" in name else 0.0))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_var.abs_()
    return network.eval()


@torch.inference_mode()
@pytest.mark.parametrize("registers", [0, 4])
def test_class_token_and_mean_of_patches(registers: int) -> None:
    network: Any = stirred(build("vit_tiny_patch16_224", SMALL | {"img_size": 64, "reg_tokens": registers}))
    tokens = network.norm(_blocks(network, pixels(64)))
    assert tokens.shape == (2, 1 + registers + 16, 32)
    patches = tokens[:, 1 + registers :]
    torch.testing.assert_close(Pooled(network, "cls")(pixels(64)), tokens[:, 0])
    expected = torch.cat([tokens[:, 0], patches.sum(1) / 16], 1)
    torch.testing.assert_close(Pooled(network, "cls+mean")(pixels(64)), expected)
    torch.testing.assert_close(Pooled(network, "own")(pixels(64)), tokens[:, 0])  # timm's own is the class token


def _blocks(network: Any, seen: torch.Tensor) -> torch.Tensor:
    """A ViT of timm block by block, without its forward functions."""
    patches = network.patch_embed(seen)
    first = [network.cls_token.expand(len(seen), -1, -1)]
    if network.reg_token is not None:
        first.append(network.reg_token.expand(len(seen), -1, -1))
    tokens = torch.cat([*first, patches], 1) + network.pos_embed
    for block in network.blocks:
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens


@torch.inference_mode()
def test_the_third_stage_of_a_resnet() -> None:
    network = stirred(timm.create_model("resnet10t", pretrained=False, num_classes=0))
    stages = timm.create_model("resnet10t", pretrained=False, features_only=True, out_indices=[3])
    stages.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("layer4")})
    (third,) = stages.eval()(pixels(64))
    found = Pooled(network, "layer3")(pixels(64))
    torch.testing.assert_close(found, third.mean((2, 3)))
    assert found.shape == (2, 256)


def test_words_that_are_not_known_and_poolings_that_cannot_be() -> None:
    network = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    with pytest.raises(KeyError, match="pooling 'max' is not known; expected own, cls"):
        Pooled(network, "max")
    with pytest.raises(TypeError, match="no class token"):
        Pooled(network, "cls")
    with pytest.raises(KeyError, match="mlp 'wide' is not known"):
        build("resnet10t", {}, mlp="wide")
    with pytest.raises(KeyError, match="stem 'woven' is not known"):
        build("resnet10t", {}, stem="woven")


@torch.inference_mode()
def test_a_gated_mlp_is_silu_of_one_half_times_the_other() -> None:
    network: Any = stirred(build("vit_tiny_patch16_224", SMALL | {"img_size": 64, "mlp_ratio": 5.3375}, mlp="swiglu"))
    mlp, seen = network.blocks[0].mlp, torch.randn(2, 5, 32)
    one, other = mlp.fc1(seen).chunk(2, -1)
    torch.testing.assert_close(mlp(seen), mlp.fc2(one * torch.sigmoid(one) * other))
    assert mlp.fc1.out_features == int(32 * 5.3375)


def test_a_classifier_is_left_out_and_nothing_else() -> None:
    names = ["fc.weight", "fc.bias", "head.weight", "head.bias", "head.fc.weight", "fc_norm.weight", "headless.weight"]
    assert set(without_head(dict.fromkeys(names, torch.zeros(1)))) == {"fc_norm.weight", "headless.weight"}


# transformers' networks ---------------------------------------------------------------------------

GATED = {"use_swiglu_ffn": True, "patch_size": 14}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    "phikon": ("ViT", {}, "vit_base_patch16_224", {}, "plain"),
    "phikon-v2": ("Dinov2", {"patch_size": 16}, "vit_large_patch16_224", {"init_values": 1e-5}, "plain"),
    "midnight": ("Dinov2", GATED, "vit_giant_patch14_dinov2", {"mlp_ratio": 5.5}, "swiglu"),
    "hibou": ("Dinov2WithRegisters", GATED, "vit_base_patch14_reg4_dinov2", {"mlp_ratio": 5.5}, "swiglu"),
}


@torch.inference_mode()
@pytest.mark.parametrize("side", [56, 112], ids=["its own grid", "a finer grid"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_networks_are_timms_under_other_names(name: str, side: int, tmp_path: Path) -> None:
    """Against that library's own network, with random numbers; a finer grid of positions is resampled."""
    transformers = pytest.importorskip("transformers")
    kind, given, architecture, kwargs, mlp = TRANSFORMERS[name]
    patch = given.get("patch_size", 16)
    side = side // 14 * patch
    if kind == "ViT" and side != 4 * patch:
        pytest.skip("ViTModel does not resample by itself")
    seen_side = 4 * patch
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": side}
    sizes |= {"intermediate_size": 128} if kind == "ViT" else {"mlp_ratio": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, **given)
    options = {"add_pooling_layer": False} if kind == "ViT" else {}
    published = stirred(getattr(transformers, f"{kind}Model")(config, **options))
    network = build(architecture, SMALL | {"img_size": seen_side} | kwargs, mlp=mlp)
    published.save_pretrained(tmp_path)  # type: ignore[operator]
    network.load_state_dict(from_transformers(load_file(tmp_path / "model.safetensors"), network))
    seen = pixels(seen_side)
    tokens = published(pixel_values=seen).last_hidden_state
    found = Pooled(network.eval(), "cls+mean")(seen)
    first = 5 if name == "hibou" else 1
    expected = torch.cat([tokens[:, 0], tokens[:, first:].mean(1)], 1)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert expected.std() > 0.1
