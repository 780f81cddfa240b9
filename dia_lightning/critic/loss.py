"""Objectives of the critic: the network's standardised value and its target (B,) → one loss per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The exponent is cut here; how often that happens is logged as `train/clipped`.
SOFT_CLIP = 20.0


def mse(value: Tensor, target: Tensor) -> Tensor:
    """(h − y)²: h → E[y | z_t]."""
    return (value - target).square()


def soft(value: Tensor, target: Tensor) -> Tensor:
    """Fits exp(h) to exp(y) for y = λ r, so that h → log E[exp(λ r) | z_t], the exact log-value of the target.

    The Itakura–Saito form exp(y − h) − (y − h) − 1 has its minimum at E[exp(y − h)] = 1 and needs no division by exp(h),
    but its gradient has the variance of exp(y): the exponent is clipped at `SOFT_CLIP`.
    """
    gap = (target - value).clamp_max(SOFT_CLIP)
    return torch.exp(gap) - gap - 1


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "soft": soft, "clean": mse}
