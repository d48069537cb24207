"""The optimisers: updates are orthogonal and of AdamW's size, and every weight has exactly one of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsi_brush.denoiser import Denoiser, DenoiserConfig
from wsi_brush.optimiser import Muon, optimisers, orthogonalised


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_update_is_nearly_orthogonal_and_keeps_directions(rows: int, columns: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = 2, max(rows, columns), min(rows, columns)
    left = torch.linalg.qr(torch.randn(2, shape[1], shape[1], generator=generator))[0][:, :, : shape[2]]
    right = torch.linalg.qr(torch.randn(2, shape[2], shape[2], generator=generator))[0]
    values = scale * (0.2 + torch.rand(2, shape[2], generator=generator))
    matrices = left * values[:, None] @ right.mT
    turned = (lambda m: m) if rows >= columns else (lambda m: m.mT)
    found = turned(orthogonalised(turned(matrices)))
    inner = left.mT @ found @ right  # diagonal, its values near one
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=2e-3)


def test_a_zero_gradient_is_no_step_but_decay() -> None:
    weight = nn.Parameter(torch.ones(30, 40))
    weight.grad = torch.zeros_like(weight)
    Muon([weight], rate=0.1, decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((30, 40), 0.95))


def test_a_step_has_the_size_of_adamws() -> None:
    """Root mean square 0.2 times the rate, for square and oblong matrices (Liu et al. 2025, Eq. 4)."""
    torch.manual_seed(0)
    for shape in ((64, 64), (48, 192), (192, 48)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        Muon([weight], rate=1.0, decay=0.0).step()
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_a_step_follows_the_gradients_before_it() -> None:
    """Nesterov's momentum of 0.95: after two gradients, 0.9025 of the first and 1.95 of the second."""
    first, second = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(30, 40))
    muon = Muon([weight], rate=1.0, decay=0.0)
    for gradient in (first, second):
        weight.grad = gradient
        before = weight.detach().clone()
        muon.step()
    step = before - weight.detach()
    expected = orthogonalised((0.9025 * first + 1.95 * second)[None])[0] * 0.2 * 40**0.5
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-4)


def test_every_weight_has_one_optimiser_and_vectors_do_not_decay() -> None:
    denoiser = Denoiser(DenoiserConfig(dim=24, width=24, heads=2))
    muon, adam = optimisers(denoiser, rate=1e-3, decay=0.01)
    groups = [*muon.param_groups, *adam.param_groups]
    given = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(given) == sorted(id(weight) for weight in denoiser.parameters())
    assert all(weight.ndim == 2 for weight in muon.param_groups[0]["params"])
    assert len(muon.param_groups[0]["params"]) > 30
    assert all(weight.ndim > 1 for group in groups if group["weight_decay"] for weight in group["params"])
