"""Objectives of the critic; all take standardised rewards and return one loss per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# exp of a standardised reward is cut here; how often that happens is logged as `train/clipped`.
SOFT_CLIP = 20.0


def mse(value: Tensor, reward: Tensor, lam: float) -> Tensor:
    """(h − r)²: h → E[r | z_t]. value, reward (B,)."""
    return (value - reward).square()


def soft(value: Tensor, reward: Tensor, lam: float) -> Tensor:
    """Fits exp(h) to exp(λ r), so that h → log E[exp(λ r) | z_t], the exact log-value of the target.

    The Itakura–Saito form exp(λ r − h) − (λ r − h) − 1 has its minimum at E[exp(λ r − h)] = 1 and needs no division by
    exp(h), but its gradient has the variance of exp(λ r): the exponent is clipped at `SOFT_CLIP`.
    """
    gap = (lam * reward - value).clamp_max(SOFT_CLIP)
    return torch.exp(gap) - gap - 1


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"mse": mse, "soft": soft, "clean": mse}
