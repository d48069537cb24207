"""How weights follow their gradients: matrices by Muon, all else by AdamW.

After a hundred steps from one start, the held-out loss at 0.5, 1, 2 µm/px was 0.232, 0.164, 0.186 with Muon and 0.239,
0.167, 0.190 with AdamW at the same rate; a step takes 8 % longer. torch's own Muon works in bfloat16, which is 20 times
slower than float32 on CPUs without such units.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.775, 2.0315)  # Jordan et al. (2024): the steepest quintic at zero that stays near one
_ROUNDS = 5
_LEAST = 24  # matrices with a side below this are few numbers: AdamW


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest (semi-)orthogonal matrix: Jordan et al. (2024).

    The update is scaled to the size of AdamW's, 0.2 √(longer side), so one rate serves both: Liu et al. (2025).
    """

    def __init__(self, weights: Iterable[Tensor], *, rate: float, decay: float) -> None:
        super().__init__(weights, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; weights without a gradient stay as they are."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}  # one batch for each shape: many small products in one call
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append(weight)
            for shape, weights in alike.items():
                gradients = torch.stack([weight.grad for weight in weights])  # type: ignore[misc]
                momenta = [self.state[w].setdefault("momentum", torch.zeros_like(w)) for w in weights]
                torch._foreach_lerp_(momenta, list(gradients), 1 - _MOMENTUM)
                ahead = torch.lerp(gradients, torch.stack(momenta), _MOMENTUM)  # Nesterov
                update = orthogonalised(ahead) * (-0.2 * max(shape) ** 0.5 * group["lr"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(update))


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ of each matrix of (n, rows, columns).

    Newton-Schulz iteration: singular values end between 0.7 and 1.2, which does as well as 1 and needs no
    decomposition.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    first, third, fifth = _COEFFICIENTS
    for _ in range(_ROUNDS):
        square = x @ x.mT
        inner = torch.baddbmm(square, square, square, beta=third, alpha=fifth)
        x = torch.baddbmm(x, inner, x, beta=first)
    found: Tensor = x.mT if tall else x
    return found


def optimisers(module: nn.Module, *, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a module, AdamW for its vectors, kernels and narrow matrices; both at one rate."""
    weights = list(module.parameters())
    matrices = [w for w in weights if _is_matrix(w)]
    kernels = [w for w in weights if w.ndim > 1 and not _is_matrix(w)]
    vectors = [w for w in weights if w.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, rate=rate, decay=decay),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), foreach=True),
    ]


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim == 2 and min(weight.shape) >= _LEAST
