"""Resampling on float64 log-weights."""

from __future__ import annotations

import torch
from torch import Tensor


def log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, -1) - torch.log(torch.tensor(float(log_w.shape[-1])))


def systematic(log_w: Tensor, generator: torch.Generator) -> Tensor:
    cumulative = log_w.softmax(-1).cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    size = log_w.shape[-1]
    u = torch.rand(*log_w.shape[:-1], 1, generator=generator, dtype=torch.float64, device=log_w.device)
    points = (torch.arange(size, device=log_w.device) + u) / size
    return torch.searchsorted(cumulative, points).clamp_max(size - 1)


def next_temperature(rewards: Tensor, log_w: Tensor, lam: Tensor, lam_max: float, ess_fraction: float) -> Tensor:
    def ess(d: Tensor) -> Tensor:
        x = log_w + d[:, None] * rewards
        return (2 * torch.logsumexp(x, 1) - torch.logsumexp(2 * x, 1)).exp()

    top, size = torch.full_like(lam, lam_max), rewards.shape[-1]
    low, high = lam.clone(), top.clone()
    for _ in range(60):
        middle = (low + high) / 2
        good = ess(middle - lam) >= ess_fraction * size
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(ess(top - lam) >= ess_fraction * size, top, low)
