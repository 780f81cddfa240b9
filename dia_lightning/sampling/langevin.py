"""Langevin kernels on a density known by its score: `init(position) → State`, `step(state,
generator) → (State, Info)`.

A position is a batch of independent chains (B, …). A step proposes x' = x + η Σ² s(x) + Σ √(2 η) ζ,
ζ ~ N(0, I), with s the score and Σ the `scale`; a coordinate of scale 0 is held. η is a number, a
schedule in the step k = 0, 1, …, or learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]  # (B, …) → (B, …), ∇ log π
LogDensity = Callable[[Tensor], Tensor]  # (B, …) → (B,), log π up to a constant
StepSize = Callable[[int], float]  # step k = 0, 1, … → η
StateT = TypeVar("StateT")
InfoT = TypeVar("InfoT")


@dataclass(frozen=True)
class LatentKernel(Generic[StateT, InfoT]):
    """A Markov kernel as two functions, in blackjax's shape.

    init: position (B, …) → state. step: (state, generator) → (next state, what happened).
    """

    init: Callable[[Tensor], StateT]
    step: Callable[[StateT, torch.Generator], tuple[StateT, InfoT]]


@dataclass(frozen=True)
class Constant:
    """η at every step."""

    eta: float

    def __post_init__(self) -> None:
        _check("eta", self.eta, 0 <= self.eta < math.inf, "0 or more, finite")

    def __call__(self, k: int) -> float:
        return self.eta


@dataclass(frozen=True)
class Polynomial:
    """η_0 / (k + k_0)^γ with γ ∈ (½, 1], so that Σ η = ∞ (the chain forgets where it began) and
    Σ η² < ∞ (its bias fades).
    """

    eta_0: float
    k_0: float = 1.0
    gamma: float = 0.55

    def __post_init__(self) -> None:
        _check("eta_0", self.eta_0, 0 < self.eta_0 < math.inf, "above 0, finite")
        _check("k_0", self.k_0, 0 < self.k_0 < math.inf, "above 0, finite")
        _check(
            "gamma",
            self.gamma,
            0.5 < self.gamma <= 1,
            "½ < gamma ≤ 1, else Σ η is finite or Σ η² infinite",
        )

    def __call__(self, k: int) -> float:
        return self.eta_0 / (k + self.k_0) ** self.gamma


def as_step_size(eta: float | StepSize) -> StepSize:
    """A schedule; a number is a constant one."""
    return eta if callable(eta) else Constant(eta)


class DualState(NamedTuple):
    """Progress of dual averaging. All are 0-d float64 tensors.

    log_eta: log of the η to use now; after burn-in, the average for good. log_eta_mean: log η̄_m,
        the weighted average.
    error: H̄_m, the running mean of (target − acceptance).
    """

    log_eta: Tensor
    log_eta_mean: Tensor
    error: Tensor


@dataclass(frozen=True)
class DualAveraging:
    """Step size by dual averaging (Hoffman and Gelman 2014, §3.2, eq. 6), one η for all chains.

    Args:
        eta_0: where to begin. burn_in: steps that adapt; from then on η = η̄ and the chain is a
            Markov chain again.
        target: mean acceptance δ; 0.574 is best for MALA in many dimensions (Roberts and Rosenthal
            1998).
        gamma, m_0, kappa: the paper's γ, t_0 and κ.
    """

    eta_0: float
    burn_in: int
    target: float = 0.574
    gamma: float = 0.05
    m_0: float = 10.0
    kappa: float = 0.75

    def __post_init__(self) -> None:
        _check("eta_0", self.eta_0, 0 < self.eta_0 < math.inf, "above 0, finite")
        _check("burn_in", self.burn_in, self.burn_in >= 1, "1 or more")
        _check("target", self.target, 0 < self.target < 1, "between 0 and 1")

    def init(self, device: torch.device) -> DualState:
        log_eta = torch.full((), math.log(self.eta_0), dtype=torch.float64, device=device)
        return DualState(log_eta, torch.zeros_like(log_eta), torch.zeros_like(log_eta))

    def update(self, state: DualState, acceptance: Tensor, k: int) -> DualState:
        """After step k with `acceptance` (B,), the probabilities of its moves."""
        if k >= self.burn_in:
            return state
        m = k + 1
        weight, forget = 1 / (m + self.m_0), m**-self.kappa
        error = (1 - weight) * state.error + weight * (self.target - acceptance.double().mean())
        log_eta = math.log(10 * self.eta_0) - m**0.5 / self.gamma * error
        log_eta_mean = forget * log_eta + (1 - forget) * state.log_eta_mean
        return DualState(log_eta_mean if m == self.burn_in else log_eta, log_eta_mean, error)


class UlaState(NamedTuple):
    """position: (B, …). k: steps taken."""

    position: Tensor
    k: int


class UlaInfo(NamedTuple):
    """eta: the step size used."""

    eta: float


class MalaState(NamedTuple):
    """Chains and what is known of them.

    position, score: (B, …). log_density: (B,) float64, log π at `position` up to a constant;
        without a `log_density`, the sum
    of the estimated changes since `init`. k: steps taken. dual: of the adapted step size, None
        where it is not adapted.
    """

    position: Tensor
    score: Tensor
    log_density: Tensor
    k: int
    dual: DualState | None


class MalaInfo(NamedTuple):
    """One step of MALA.

    accepted: (B,) bool. acceptance: (B,) float64, probability of the move. log_ratio: (B,) float64,
    log of the Metropolis–Hastings ratio, −inf where it is not a number. eta: the step size used, a
    float or a 0-d tensor.
    proposal: (B, …), the position proposed.
    """

    accepted: Tensor
    acceptance: Tensor
    log_ratio: Tensor
    eta: float | Tensor
    proposal: Tensor


def ula(
    score: Score, eta: float | StepSize, scale: float | Tensor = 1.0
) -> LatentKernel[UlaState, UlaInfo]:
    """The unadjusted Langevin algorithm: x ← x + η Σ² s(x) + Σ √(2 η) ζ, biased by O(η) at a
    constant η.

    Args:
        score: ∇ log π.
        eta: η, a number or a schedule.
        scale: Σ, broadcasts to a position.
    """
    step_size = as_step_size(eta)

    def init(position: Tensor) -> UlaState:
        return UlaState(position, 0)

    def step(state: UlaState, generator: torch.Generator) -> tuple[UlaState, UlaInfo]:
        eta, noise = step_size(state.k), normal_like(state.position, generator)
        position = _move(state.position, score(state.position), eta, scale, noise)
        return UlaState(position, state.k + 1), UlaInfo(eta)

    return LatentKernel(init, step)


def mala(
    score: Score,
    eta: float | StepSize | DualAveraging,
    log_density: LogDensity | None = None,
    scale: float | Tensor = 1.0,
    points: int = 2,
) -> LatentKernel[MalaState, MalaInfo]:
    """The Metropolis-adjusted Langevin algorithm (Roberts and Tweedie 1996).

    With `log_density` it leaves π invariant exactly. Without, log π(x') − log π(x) is the integral
    of the score along the segment by the trapezoid rule (Du et al., arXiv:2302.11552), exact where
    the score is linear; where it bends within a step, two points leave a bias like ULA's.

    Args:
        score: ∇ log π.
        eta: η, a number, a schedule, or `DualAveraging` (in burn-in only).
        log_density: log π up to a constant.
        scale: Σ, broadcasts to a position.
        points: of the trapezoid rule, both ends included; 2 asks for no further score.
    """
    _check("points", points, points >= 2, "2 or more")
    dual = eta if isinstance(eta, DualAveraging) else None
    step_size = Constant(eta.eta_0) if isinstance(eta, DualAveraging) else as_step_size(eta)

    def init(position: Tensor) -> MalaState:
        zero = position.new_zeros(len(position), dtype=torch.float64)
        known = zero if log_density is None else log_density(position).double()
        return MalaState(
            position, score(position), known, 0, dual.init(position.device) if dual else None
        )

    def step(state: MalaState, generator: torch.Generator) -> tuple[MalaState, MalaInfo]:
        eta = step_size(state.k) if state.dual is None else state.dual.log_eta.exp()
        noise = normal_like(state.position, generator)
        proposal = _move(state.position, state.score, eta, scale, noise)
        new_score = score(proposal)
        if log_density is None:
            change = trapezoid_change(
                score, state.position, proposal, state.score, new_score, points
            )
            new_log_density = state.log_density + change
        else:
            new_log_density = log_density(proposal).double()
        log_ratio = (
            new_log_density
            - state.log_density
            + _log_proposal_ratio(state.score, new_score, eta, scale, noise)
        )
        info = _accept(log_ratio, eta, proposal, generator)
        take = info.accepted.reshape(-1, *[1] * (proposal.dim() - 1))
        adapted = dual.update(state.dual, info.acceptance, state.k) if dual and state.dual else None
        new = MalaState(
            torch.where(take, proposal, state.position),
            torch.where(take, new_score, state.score),
            torch.where(info.accepted, new_log_density, state.log_density),
            state.k + 1,
            adapted,
        )
        return new, info

    return LatentKernel(init, step)


def _accept(
    log_ratio: Tensor, eta: float | Tensor, proposal: Tensor, generator: torch.Generator
) -> MalaInfo:
    """Accept with probability min(1, exp(log_ratio))."""
    # NaN is a rejection, and so is −inf.
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    u = torch.rand(
        log_ratio.shape, generator=generator, device=log_ratio.device, dtype=torch.float64
    )
    return MalaInfo(u.log() < log_ratio, log_ratio.clamp_max(0).exp(), log_ratio, eta, proposal)


def trapezoid_change(
    score: Score, x: Tensor, y: Tensor, score_x: Tensor, score_y: Tensor, points: int
) -> Tensor:
    """log π(y) − log π(x) = ∫_0^1 ⟨s(x + u (y − x)), y − x⟩ du by the trapezoid rule, (B,)
    float64 (arXiv:2302.11552).
    """
    way = y - x
    total = (_dot(score_x, way) + _dot(score_y, way)) / 2
    for i in range(1, points - 1):
        total = total + _dot(score(x + way * (i / (points - 1))), way)
    return total / (points - 1)


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) draws of x's shape, type and device."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _move(
    x: Tensor, score: Tensor, eta: float | Tensor, scale: float | Tensor, noise: Tensor
) -> Tensor:
    return x + eta * scale**2 * score + scale * (2 * eta) ** 0.5 * noise


def _log_proposal_ratio(
    score: Tensor, new_score: Tensor, eta: float | Tensor, scale: float | Tensor, noise: Tensor
) -> Tensor:
    """log q(x | x') − log q(x' | x), (B,) float64: the way back needs the noise −ζ − √(η/2) Σ
    (s(x) + s(x')).
    """
    # Written with the noise, so that nothing is divided by Σ and no digits are lost in x' − x.
    back = noise.double() + (eta / 2) ** 0.5 * scale * (score.double() + new_score.double())
    return (_dot(noise, noise) - _dot(back, back)) / 2


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).reshape(len(a), -1).sum(1)


def _check(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}: {value} given, allowed: {allowed}")
