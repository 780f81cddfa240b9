"""Reverse-process samplers: functions of (predict, schedule, z, times, generator), guided or not.

z (B, T, d) starts at the noise of times[0]; times (S + 1, B, T) or (S + 1, T) fall to 0, each
position at its own pace. A position at time 0 is clean and never changes, which is how prompts are
held. `commit`, where given, replaces a position that has just become clean by an embedding of its
own choice (for text: of a token drawn from the logits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dia_lightning import progress
from dia_lightning.diffusion.convert import eps_from_z0, score_from_z0, z0_from_eps
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.sampling.corrector import CORRECTORS
from dia_lightning.sampling.langevin import StepSize, as_step_size, normal_like

Commit = Callable[[Prediction], Tensor]


def _steps(z: Tensor, times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(t, s), each (B, T), s ≤ t: the levels that every step leaves and reaches."""
    for t, s in progress.steps(list(pairwise(times)), "noise levels"):
        yield t.expand(z.shape[:2]), s.expand(z.shape[:2])


def _level(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """α_t, σ_t as (B, T, 1)."""
    return schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]


def posterior(
    z: Tensor, z0: Tensor, schedule: Schedule, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (B, T, d) and standard deviation (B, T, 1) of q(z_s | z_t, z_0 = ẑ_0), the DDPM
    posterior (Ho et al., arXiv:2006.11239, eq. 6 – 7), per position. t, s (B, T) with s ≤ t; the
    deviation is 0 where s = 0 and where s = t.
    """
    (alpha_s, sigma_s), (_, sigma_t) = _level(schedule, s), _level(schedule, t)
    alpha_ts, var_ts = schedule.alpha_step(t, s)[..., None], schedule.var_step(t, s)[..., None]
    var_t = sigma_t.square().clamp_min(1e-12)
    mean = alpha_ts * sigma_s.square() / var_t * z + alpha_s * var_ts / var_t * z0
    return mean, (var_ts.sqrt() * sigma_s / sigma_t.clamp_min(1e-6)).clamp_min(0)


def posterior_step(
    z: Tensor, z0: Tensor, schedule: Schedule, t: Tensor, s: Tensor, generator: torch.Generator
) -> Tensor:
    """z_s drawn from the `posterior`; where t = 0 the position keeps its value."""
    mean, std = posterior(z, z0, schedule, t, s)
    return torch.where((t > 0)[..., None], mean + std * normal_like(z, generator), z)


def _committed(
    z: Tensor, t: Tensor, s: Tensor, prediction: Prediction, commit: Commit | None
) -> Tensor:
    """`z` with `commit`'s embeddings at the positions that arrive at time 0 in this step."""
    if commit is None:
        return z
    return torch.where(((t > 0) & (s == 0))[..., None], commit(prediction), z)


def ancestral(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None,
) -> Tensor:  # fmt: skip
    """DDPM ancestral sampling (Ho et al., arXiv:2006.11239, Algorithm 2): one posterior step per
    level. Returns z at t = 0.
    """
    z0_prev = None
    for t, s in _steps(z, times):
        prediction = predict(z, t, z0_prev)
        z0_prev = prediction.z0_network
        z = posterior_step(z, prediction.z0, schedule, t, s, generator)
        z = _committed(z, t, s, prediction, commit)
    return z


def ddim_step(
    z: Tensor,
    z0: Tensor,
    schedule: Schedule,
    t: Tensor,
    s: Tensor,
    eta: float,
    generator: torch.Generator,
) -> Tensor:
    """z_s = α_s ẑ_0 + √(σ_s² − σ̃²) ε + σ̃ ζ, σ̃ = η σ_{t|s} σ_s / σ_t (Song et al.,
    arXiv:2010.02502, eq. 12 and 16).

    t, s (B, T) with s ≤ t; a position with s = t keeps its value. η = 0 asks for no noise; η = 1 is
    `posterior_step`.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _level(schedule, t), _level(schedule, s)
    sigma_t = sigma_t.clamp_min(1e-6)
    std = eta * schedule.var_step(t, s)[..., None].sqrt() * sigma_s / sigma_t
    direction = (sigma_s.square() - std.square()).clamp_min(0).sqrt() * eps_from_z0(
        z, z0, alpha_t, sigma_t
    )
    noise = std * normal_like(z, generator) if eta else 0.0
    return torch.where((s < t)[..., None], alpha_s * z0 + direction + noise, z)


def ddim(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """DDIM (Song et al., arXiv:2010.02502): η = 0 follows the probability-flow ODE, first order;
    η = 1 is `ancestral`.
    """
    z0_prev = None
    for t, s in _steps(z, times):
        prediction = predict(z, t, z0_prev)
        z0_prev = prediction.z0_network
        z = ddim_step(z, prediction.z0, schedule, t, s, eta, generator)
        z = _committed(z, t, s, prediction, commit)
    return z


def _log_snr_step(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """h = λ_s − λ_t ≥ 0 of each position, (B, T), λ = log(α/σ), which is infinite at t = 0:
    there, a large number instead.
    """
    lam_t, lam_s = ((schedule.alpha(u) / schedule.sigma(u).clamp_min(1e-6)).log() for u in (t, s))
    return lam_s - lam_t


def dpmpp_2m(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, Algorithm 2): the probability-flow ODE, second
    order, no noise.

    z_s = (σ_s/σ_t) z − α_s (e^{−h} − 1) D, D = ẑ_0 + (h / 2 h') (ẑ_0 − ẑ_0'), the prime marking the
    step before. D = ẑ_0 in
    the first step that a position moves, and in its last: there h = ∞, and z_0 = D.
    """
    z0_prev, before, h_before = None, z, torch.zeros_like(times[0].expand(z.shape[:2]))
    for t, s in _steps(z, times):
        prediction = predict(z, t, z0_prev)
        z0_prev, z0, h = prediction.z0_network, prediction.z0, _log_snr_step(schedule, t, s)
        weight = torch.where((h_before > 0) & (s > 0), h / (2 * h_before.clamp_min(1e-12)), 0.0)[
            ..., None
        ]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = _level(schedule, t), _level(schedule, s)
        shrink = sigma_s / sigma_t.clamp_min(
            1e-6
        )  # σ_s/σ_t; and α_s e^{−h} = α_t σ_s/σ_t, finite at s = 0 too
        moved = shrink * z + (alpha_s - alpha_t * shrink) * (z0 + weight * (z0 - before))
        z = _committed(torch.where((s < t)[..., None], moved, z), t, s, prediction, commit)
        before, h_before = z0, h
    return z


def dia(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None, corrector_steps: int = 1, eta: float | StepSize = 0.1,
    corrector: str = "ula", note: Callable[[Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Predictor–corrector (Song et al., arXiv:2011.13456, Algorithm 3): a posterior step to level
    s, then `corrector_steps` Langevin steps at that level. Returns z at t = 0.

    eta: their size η relative to σ², a number or a schedule such as `langevin.Polynomial`, which
        counts the corrector steps
    of the whole run. corrector: one of `CORRECTORS`. note: told at the end, by one that may reject,
    its mean acceptance (B,) over the levels at which the row moves.
    """
    step_size, correct, z0_prev, acceptance = as_step_size(eta), CORRECTORS[corrector], None, None
    accepted, moved = (z.new_zeros(len(z), dtype=torch.float64) for _ in range(2))
    for i, (t, s) in enumerate(_steps(z, times)):
        prediction = predict(z, t, z0_prev)
        z0_prev = prediction.z0_network
        z = posterior_step(z, prediction.z0, schedule, t, s, generator)
        z = _committed(z, t, s, prediction, commit)
        eta_of = partial(_from, step_size, i * corrector_steps)
        z, z0_prev, acceptance = correct(
            predict, schedule, z, s, z0_prev, eta_of, corrector_steps, generator
        )
        if acceptance is not None:
            moves = (s > 0).any(1)
            accepted, moved = accepted + acceptance * moves, moved + moves
    if note is not None and acceptance is not None:
        note(accepted / moved.clamp_min(1))
    return z


def _from(step_size: StepSize, first: int, k: int) -> float:
    return step_size(first + k)


def dia_literal(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    commit: Commit | None = None, eta: float = 0.1,
    reading: Literal["marginal", "per_step"] = "marginal",
) -> Tensor:  # fmt: skip
    """The proposal's update exactly as printed; wrong by design, kept for the ablation.

        z ← μ + η b² s_π(z_t, t) + b √(2 η) ζ,   μ = (z_t − b ε_ψ(z_t, t)) / a,   s_π = −ε_ψ/σ_t + λ
        ∇h

    with ε_ψ the network's own noise (guidance enters once, in s_π) and, by `reading` of the printed
    α_t, σ_t, (a, b) = (α_t, σ_t) or (α_{t|s}, σ_{t|s}). Every step of a run does this, the last
    too; a position with s = t is held.

    What is wrong: `marginal` makes μ an estimate of z_0 and calls it z_s (the factor α_s and the
    noise of level s are missing); `per_step` takes b ε_ψ from z where the posterior mean takes
    (b²/σ_t) ε_ψ. Both then add the score of level t to a point of another level, and noise whose
    variance 2 η b² has nothing to do with that level's.

    Raises:
        ValueError: for another reading.
    """
    if reading not in ("marginal", "per_step"):
        raise ValueError(f"reading: {reading!r} given, allowed: marginal, per_step")
    z0_prev = None
    for t, s in _steps(z, times):
        prediction = predict(z, t, z0_prev)
        z0_prev = prediction.z0_network
        alpha, sigma = _level(schedule, t)
        sigma = sigma.clamp_min(1e-6)
        a, b = alpha, sigma
        if reading == "per_step":
            a, b = schedule.alpha_step(t, s)[..., None], schedule.var_step(t, s)[..., None].sqrt()
        mu = z0_from_eps(z, eps_from_z0(z, z0_prev[: len(z)], alpha, sigma), a, b)
        moved = mu + eta * b.square() * score_from_z0(z, prediction.z0, alpha, sigma)
        moved = moved + b * (2 * eta) ** 0.5 * normal_like(z, generator)
        z = _committed(torch.where((s < t)[..., None], moved, z), t, s, prediction, commit)
    return z


Solver = Callable[..., Tensor]
SOLVERS: dict[str, Solver] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dia": dia,
    "dia_literal": dia_literal,
}


def solve(
    method: str, predict: Predict, schedule: Schedule, z: Tensor, times: Tensor,
    generator: torch.Generator, commit: Commit | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Run the solver called `method`, one of `SOLVERS`, with its options; z (B, T, d) at times[0] →
    z at t = 0.

    Raises:
        ValueError: for a name that is none of `SOLVERS`.
    """
    if method not in SOLVERS:
        raise ValueError(f"method: {method!r} given, allowed: {', '.join(SOLVERS)}")
    return SOLVERS[method](predict, schedule, z, times, generator, commit, **options)
