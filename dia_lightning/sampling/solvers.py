"""Reverse-process samplers: functions of (predict, schedule, z, times, generator), guided or not.

z (B, T, d) starts at the noise of times[0]; times (S + 1, B, T) or (S + 1, T) fall to 0, each position at its own pace. A
position at time 0 is clean and never changes, which is how prompts are held. `commit`, where given, replaces a position
that has just become clean by an embedding of its own choice (for text: of a token drawn from the logits).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.guidance import Predict, Prediction

Commit = Callable[[Prediction], Tensor]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def posterior_step(z: Tensor, z0: Tensor, schedule: Schedule, t: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    """z_s ~ q(z_s | z_t, z_0 = ẑ_0), the DDPM posterior (Ho et al., arXiv:2006.11239, eq. 6 – 7), per position.

    t, s (B, T) with s ≤ t; where t = 0 the position keeps its value.
    """
    alpha_s, sigma_s = schedule.alpha(s)[..., None], schedule.sigma(s)[..., None]
    sigma_t = schedule.sigma(t)[..., None]
    alpha_ts, var_ts = schedule.alpha_step(t, s)[..., None], schedule.var_step(t, s)[..., None]
    var_t = sigma_t.square().clamp_min(1e-12)
    mean = alpha_ts * sigma_s.square() / var_t * z + alpha_s * var_ts / var_t * z0
    std = (var_ts.sqrt() * sigma_s / sigma_t.clamp_min(1e-6)).clamp_min(0)
    return torch.where((t > 0)[..., None], mean + std * _normal(z, generator), z)


def _committed(z: Tensor, t: Tensor, s: Tensor, prediction: Prediction, commit: Commit | None) -> Tensor:
    """`z` with `commit`'s embeddings at the positions that arrive at time 0 in this step."""
    if commit is None:
        return z
    return torch.where(((t > 0) & (s == 0))[..., None], commit(prediction), z)


def ancestral(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None,
) -> Tensor:  # fmt: skip
    """DDPM ancestral sampling (Ho et al., arXiv:2006.11239, Algorithm 2): one posterior step per level. Returns z at t = 0."""
    z0_prev = None
    for t, s in pairwise(times):
        t, s = t.expand(z.shape[:2]), s.expand(z.shape[:2])
        prediction = predict(z, t, z0_prev)
        z0_prev = prediction.z0_network
        z = posterior_step(z, prediction.z0, schedule, t, s, generator)
        z = _committed(z, t, s, prediction, commit)
    return z


def langevin_step(z: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor, eta: float, generator: torch.Generator) -> Tensor:
    """Z ← z + η σ² s_π + σ √(2 η) ζ, the corrector of science.md; σ² s_π = α ẑ_0 − z, so nothing is divided by σ."""
    return z + eta * (alpha * z0 - z) + sigma * (2 * eta) ** 0.5 * _normal(z, generator)


def dia(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None, corrector_steps: int = 1, eta: float = 0.1,
) -> Tensor:  # fmt: skip
    """Predictor–corrector (Song et al., arXiv:2011.13456, Algorithm 3): a posterior step to level s, then `corrector_steps`
    Langevin steps of size `eta` at that level. Returns z at t = 0.
    """
    z0_prev = None
    for t, s in pairwise(times):
        t, s = t.expand(z.shape[:2]), s.expand(z.shape[:2])
        prediction = predict(z, t, z0_prev)
        z0_prev = prediction.z0_network
        z = posterior_step(z, prediction.z0, schedule, t, s, generator)
        z = _committed(z, t, s, prediction, commit)
        alpha, sigma = schedule.alpha(s)[..., None], schedule.sigma(s)[..., None]
        moving = (s > 0)[..., None]
        for _ in range(corrector_steps):
            correction = predict(z, s, z0_prev)
            z0_prev = correction.z0_network
            z = torch.where(moving, langevin_step(z, correction.z0, alpha, sigma, eta, generator), z)
    return z


Solver = Callable[..., Tensor]
SOLVERS: dict[str, Solver] = {"ancestral": ancestral, "dia": dia}
