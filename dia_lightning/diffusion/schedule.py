"""Noise schedules: marginal α_t, σ_t with α² + σ² = 1, the per-step quantities, and the time of
every token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dia_lightning.errors import UserError

# Noise at t = 1 leaves a trace of the signal: 1/α stays finite, where the guidance needs it.
_END = 2e-3


class Schedule(nn.Module):
    """A map t ∈ [0, 1] → (α_t, σ_t) and a monotone map u → t that spends steps where they matter.

    u is the time in which samplers step and training draws; without `set_warp` it is t itself. The
    warp is the normalised running loss of the denoiser as a function of t, inverted (time warping
    of CDCD, arXiv:2211.15089, §3.3).

    Attributes:
        knots: (K + 1,) float32, t at u = 0, 1/K, …, 1; part of every checkpoint.
    """

    knots: Tensor

    def __init__(self, n_knots: int = 64) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(0, 1, n_knots + 1))

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).clamp_min(0).sqrt()

    def alpha_step(self, t: Tensor, s: Tensor) -> Tensor:
        """α_{t|s} = α_t / α_s for s ≤ t."""
        return self.alpha(t) / self.alpha(s)

    def var_step(self, t: Tensor, s: Tensor) -> Tensor:
        """σ²_{t|s} = σ_t² − α²_{t|s} σ_s² for s ≤ t."""
        return (
            self.sigma(t).square() - (self.alpha_step(t, s) * self.sigma(s)).square()
        ).clamp_min(0)

    def warp(self, u: Tensor) -> Tensor:
        """t(u): linear between the knots, exact at 0 and 1."""
        n = len(self.knots) - 1
        cell = (u * n).floor().clamp(0, n - 1).long()
        low, high = self.knots[cell], self.knots[cell + 1]
        return low + (high - low) * (u * n - cell)

    def unwarp(self, t: Tensor) -> Tensor:
        """u(t), the inverse of `warp`."""
        n = len(self.knots) - 1
        cell = (torch.searchsorted(self.knots, t.contiguous(), right=True) - 1).clamp(0, n - 1)
        low, high = self.knots[cell], self.knots[cell + 1]
        return (cell + (t - low) / (high - low)) / n

    def set_warp(self, knots: Tensor) -> None:
        """Replace the knots; they must rise strictly from 0 to 1."""
        if knots[0] != 0 or knots[-1] != 1 or not bool((knots.diff() > 0).all()):
            raise ValueError(f"knots must rise strictly from 0 to 1, got {knots.tolist()}")
        self.knots.copy_(knots)


class Cosine(Schedule):
    """α_t = cos(π t / 2) (Nichol and Dhariwal, arXiv:2102.09672, eq. 17), ended just short of α
    = 0.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * (math.pi / 2 * (1 - _END)))


class Sqrt(Schedule):
    """α_t² = 1 − √t (Diffusion-LM, Li et al., arXiv:2205.14217, App. A, its offset 10⁻⁴ dropped
    so that t = 0 is clean).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - (1 - _END**2) * t.sqrt()).sqrt()


class Linear(Schedule):
    """β_t linear from 0.1 to 20: log α_t = −¼ t² (20 − 0.1) − ½ t 0.1 (Song et al.,
    arXiv:2011.13456, eq. 33).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.25 * t.square() * 19.9 - 0.05 * t)


SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "sqrt": Sqrt, "linear": Linear}


def make_schedule(name: str) -> Schedule:
    """The schedule called `name`.

    Raises:
        UserError: for a name that is none of `SCHEDULES`.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule: {name!r} given, allowed: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]()


def staggered(u: Tensor, length: int, stagger: Tensor) -> Tensor:
    """The time of each position when left positions run ahead: u (…,) , stagger w (…,) → (…,
    length) in [0, 1].

    u_i = clip((1 + w) u − w (1 − i/(T−1))): at u = 1 all positions are pure noise, at u = 0 all are
    clean, and in between about a share 1/w of them is on its way. w = 0 moves all together; w → ∞
    goes token by token from the left (Diffusion Forcing, Chen et al., arXiv:2407.01392, its
    "pyramid").
    """
    place = (
        torch.linspace(0, 1, length, device=u.device)
        if length > 1
        else torch.ones(1, device=u.device)
    )
    u, w = u[..., None], stagger[..., None]
    return ((1 + w) * u - w * (1 - place)).clamp(0, 1)


def time_grid(schedule: Schedule, steps: int, length: int, stagger: float) -> Tensor:
    """(steps + 1, T) noise times from pure noise to clean, evenly spaced in the warped time u of
    each position.
    """
    u = torch.linspace(1, 0, steps + 1, device=schedule.knots.device)
    return schedule.warp(staggered(u, length, torch.full_like(u, stagger)))
