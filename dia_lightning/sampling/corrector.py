"""Langevin steps at one noise level, the correctors of `solvers.dia`; each position has its own
level, and is held at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.convert import score_from_z0
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.sampling.langevin import StepSize, mala, normal_like


class Corrected(NamedTuple):
    """Where a corrector ended.

    z: (B, T, d). z0_network: the network's estimate there, on which its next call is conditioned.
    acceptance: (B,) float64, mean probability of the moves, of a corrector that may reject.
    """

    z: Tensor
    z0_network: Tensor
    acceptance: Tensor | None = None


# (predict, schedule, z, s (B, T), z0_network of the call before, η of its step j, number of steps,
# generator)
Corrector = Callable[
    [Predict, Schedule, Tensor, Tensor, Tensor, StepSize, int, torch.Generator], Corrected
]


def langevin_step(
    z: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor, eta: float, generator: torch.Generator
) -> Tensor:
    """Z ← z + η σ² s_π + σ √(2 η) ζ, the corrector of science.md; σ² s_π = α ẑ_0 − z, so nothing
    is divided by σ.
    """
    return z + eta * (alpha * z0 - z) + sigma * (2 * eta) ** 0.5 * normal_like(z, generator)


def ula_corrector(
    predict: Predict, schedule: Schedule, z: Tensor, s: Tensor, z0_prev: Tensor,
    step_size: StepSize, steps: int, generator: torch.Generator,
) -> Corrected:  # fmt: skip
    """`steps` unadjusted Langevin steps, one call of the model each; biased by O(η)."""
    alpha, sigma = schedule.alpha(s)[..., None], schedule.sigma(s)[..., None]
    for j in range(steps):
        prediction = predict(z, s, z0_prev)
        z0_prev = prediction.z0_network
        z = torch.where(
            (s > 0)[..., None],
            langevin_step(z, prediction.z0, alpha, sigma, step_size(j), generator),
            z,
        )
    return Corrected(z, z0_prev)


def mala_corrector(
    predict: Predict, schedule: Schedule, z: Tensor, s: Tensor, z0_prev: Tensor,
    step_size: StepSize, steps: int, generator: torch.Generator,
) -> Corrected:  # fmt: skip
    """The same steps, each accepted or rejected for the whole row with the trapezoid rule on s_π
    (see `langevin.mala`).

    steps + 1 calls of the model, all conditioned on the same `z0_prev`, since otherwise the score
    would change while the chain moves. The predictor asks again where it ends, conditioned on the
    estimate there: without, a text would be conditioned on estimates half as often as with
    `ula_corrector`, which costs the tiny kit 0.8 nats a token.
    """
    alpha, sigma, moves = (
        schedule.alpha(s)[..., None],
        schedule.sigma(s)[..., None],
        (s > 0)[..., None],
    )
    asked: Prediction

    def score(x: Tensor) -> Tensor:
        nonlocal asked
        asked = predict(x, s, z0_prev)
        return torch.where(moves, score_from_z0(x, asked.z0, alpha, sigma.clamp_min(1e-6)), 0.0)

    kernel = mala(score, step_size, scale=torch.where(moves, sigma, 0.0))
    state = kernel.init(z)
    z0_network, acceptance = asked.z0_network, z.new_zeros(len(z), dtype=torch.float64)
    for _ in range(steps):
        state, info = kernel.step(state, generator)
        z0_network = torch.where(info.accepted[:, None, None], asked.z0_network, z0_network)
        acceptance = acceptance + info.acceptance / steps
    return Corrected(state.position, z0_network, acceptance)


CORRECTORS: dict[str, Corrector] = {"ula": ula_corrector, "mala": mala_corrector}
