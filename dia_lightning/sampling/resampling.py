"""Resampling on float64 log-weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Times the largest float32 it is still a number.
LAM_MAX = 1e100


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log (1/M) Σ_m exp(log_w_m) over the last dimension, (…, M) → (…)."""
    return torch.logsumexp(log_w, -1) - math.log(log_w.shape[-1])


def effective_size(log_w: Tensor) -> Tensor:
    """Effective sample size (Σ w)² / Σ w², between 1 and M, (…, M) → (…)."""
    log_w = log_w - log_w.amax(-1, keepdim=True)  # whose double would overflow
    return (2 * torch.logsumexp(log_w, -1) - torch.logsumexp(2 * log_w, -1)).exp()


def _pick(log_w: Tensor, points: Tensor) -> Tensor:
    """The particle on whose stretch of [0, 1) each point lies, (…, M) → (…, M) int64; one of
    weight 0 has none.
    """
    cumulative = log_w.double().softmax(-1).cumsum(-1)
    # Division makes the last value 1, and with it those of the particles of weight 0 at the end.
    cumulative = cumulative / cumulative[..., -1:]
    below_one = 1 - torch.finfo(torch.float64).eps / 2
    return torch.searchsorted(cumulative, points.clamp_max(below_one), right=True).clamp_max(
        log_w.shape[-1] - 1
    )


def _uniform(log_w: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(
        *log_w.shape[:-1], count, generator=generator, dtype=torch.float64, device=log_w.device
    )


def systematic(log_w: Tensor, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Ancestors (…, size) int64, M unless told, for log_w (…, M) float64, by one uniform draw a
    population (Carpenter et al. 1999).
    """
    size = size or log_w.shape[-1]
    u = _uniform(log_w, 1, generator)
    return _pick(log_w, (torch.arange(size, device=log_w.device) + u) / size)


def stratified(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Ancestors (…, M) int64 for log_w (…, M) float64, by one uniform draw in each M-th of [0,
    1) (Kitagawa 1996).
    """
    size = log_w.shape[-1]
    u = _uniform(log_w, size, generator)
    return _pick(log_w, (torch.arange(size, device=log_w.device) + u) / size)


def multinomial(log_w: Tensor, generator: torch.Generator) -> Tensor:
    """Ancestors (…, M) int64 for log_w (…, M) float64, drawn independently (Gordon et al. 1993)."""
    return _pick(log_w, _uniform(log_w, log_w.shape[-1], generator))


Resampling = Callable[[Tensor, torch.Generator], Tensor]
RESAMPLING: dict[str, Resampling] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
}


def next_temperature(
    rewards: Tensor, log_w: Tensor, lam: Tensor, lam_max: float, ess_fraction: float
) -> Tensor:
    """The largest λ' in [λ, lam_max] at which the weights exp(log_w + (λ' − λ) r) keep
    `ess_fraction` of the particles.

    Found by bisection. rewards, log_w (G, M) and lam (G,) float64 → (G,). Where even the smallest
    step that bisection knows leaves fewer (rewards of 0 and −1e30, say), it is that step, so that λ
    always rises.
    """

    def ess(d: Tensor) -> Tensor:
        return effective_size(log_w + d[:, None] * rewards)

    top, size = torch.full_like(lam, lam_max), rewards.shape[-1]
    low, high = lam.clone(), top.clone()
    for _ in range(60):
        middle = (low + high) / 2
        good = ess(middle - lam) >= ess_fraction * size
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(
        ess(top - lam) >= ess_fraction * size, top, torch.where(low > lam, low, high)
    )
