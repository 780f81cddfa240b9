"""Particle steering of the reverse diffusion: populations of paths, weighted and resampled on the
way, and log Z.

A path z_T, …, z_0 is proposed by ancestral steps q, guided or not, and ends with the weight

    w = exp(λ r(x_0)) Π_s p_ψ(z_s | z_t) / q(z_s | z_t),

so that weighted particles stand for p_ψ(x) exp(λ r(x)) / Z, Z = E_{p_ψ}[exp(λ r)], where p_ψ is the
law of the unguided sampler with the same times. Potentials of intermediate values decide only which
paths are continued on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.errors import require
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.numerics import draw_categorical
from dia_lightning.sampling.langevin import normal_like
from dia_lightning.sampling.resampling import LAM_MAX, RESAMPLING, effective_size, log_mean_exp
from dia_lightning.sampling.solvers import posterior


class Potential(NamedTuple):
    """How intermediate values weigh a path.

    update: (log of the product of the potentials so far, memory, λ_s v), (B,) each → the first two
        after this step.
    start: memory before the first step. tempered: λ_s rises to λ on the way (`Steering.tempering`)
        instead of being λ.
    """

    update: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    start: float = 0.0
    tempered: bool = False


def _difference(log_g: Tensor, memory: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return value, memory


def _max(log_g: Tensor, memory: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    memory = torch.maximum(memory, value)
    return log_g + memory, memory


def _sum(log_g: Tensor, memory: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    memory = memory + value
    return log_g + memory, memory


# Singhal et al., arXiv:2501.06848: G_s = exp(λ (v_s − v_t)), exp(λ max_{u ≥ s} v_u), exp(λ Σ_{u ≥
# s} v_u); and Kim et al., arXiv:2501.05803: targets p_s(z_s) exp(λ_s v_s), tempered. Whichever it
# is, the last potential is exp(λ r(x_0)) divided by the product of those before it.
POTENTIALS = {
    "difference": Potential(_difference),
    "max": Potential(_max, start=-torch.inf),
    "sum": Potential(_sum),
    "das": Potential(_difference, tempered=True),
}


def doubling(progress: float) -> float:
    """λ_s / λ after a share of the steps: (1 + γ)^k − 1 (Kim et al., arXiv:2501.05803), γ such
    that it ends at 1.
    """
    return 2.0**progress - 1


@dataclass(frozen=True)
class Steering:
    """What particles are steered to, and how.

    reward: r, the true one: tokens (B, T) → (B,), or z_0 (B, T, d) → (B,) where there are no
        tokens.
    value: v(z, t) → (B,), what a path now at z is expected to earn, λ left out (a critic of E[r |
        z_t]); any function leaves the result unbiased. None: nothing is weighed before the end.
    lam: λ ≥ 0.
    potential: one of POTENTIALS. every: weigh at every so many steps (`max` and `sum` add up, so
        over many steps they overshoot λ before the last potential takes it back).
    ess: resample where the effective sample size falls below this share of the population; 0 =
        never.
    resampling: one of RESAMPLING. tempering: progress in [0, 1] → λ_s / λ, of the potential `das`.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """

    reward: Callable[[Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor] | None
    lam: float
    potential: str = "difference"
    every: int = 1
    ess: float = 0.5
    resampling: str = "systematic"
    tempering: Callable[[float], float] = doubling

    def __post_init__(self) -> None:
        check_steering(self.lam, self.potential, self.every, self.ess, self.resampling)


def check_steering(lam: float, potential: str, every: int, ess: float, resampling: str) -> None:
    """Raises the UserError of `Steering`, which callables are not needed for."""
    require("lam", lam, 0 <= lam <= LAM_MAX, f"0 or more, up to {LAM_MAX:g}")
    require("potential", potential, potential in POTENTIALS, ", ".join(POTENTIALS))
    require("every", every, every >= 1, "1 or more")
    require("ess", ess, 0 <= ess <= 1, "0 ≤ ess ≤ 1")
    require("resampling", resampling, resampling in RESAMPLING, ", ".join(RESAMPLING))


class SteeringTrace(NamedTuple):
    """What happened in each of the K steps, G populations of N.

    ess: (K, G) float64, effective sample size of the weights after the step. resampled: (K, G)
    bool. ancestors: (K, G, N) int64, which particle of this step each particle of the next one
    continues (`lineage` follows them back).
    """

    ess: Tensor
    resampled: Tensor
    ancestors: Tensor


class Particles(NamedTuple):
    """G populations of N particles at t = 0, B = G · N rows, those of one population side by side.

    z: (B, T, d). log_w: (G, N) float64, weights that sum to 1. reward: (B,) float64. log_z: (G,)
    float64 estimates of log E_{p_ψ}[exp(λ r)], whose exponentials are unbiased. positions: (K + 1,
    B, T, d), particles before each resampling.
    """

    z: Tensor
    log_w: Tensor
    reward: Tensor
    log_z: Tensor
    trace: SteeringTrace
    positions: Tensor | None


@torch.no_grad()
def smc(
    predict: Predict, schedule: Schedule, z: Tensor, times: Tensor, generator: torch.Generator,
    steering: Steering, embedding: TokenEmbedding | None = None, n_groups: int = 1,
    retained: Tensor | None = None, keep: bool = False,
) -> Particles:  # fmt: skip
    """Sequential Monte Carlo over the paths of `ancestral` (Singhal et al., arXiv:2501.06848; Kim
    et al., arXiv:2501.05803).

    Populations never mix. One of a single particle is never resampled: it is `ancestral` to the
    bit.

    Args:
        predict: `guided` or not; `z0_network` and `logits_network` define p_ψ, and the proposal is
            p_ψ's step with its mean moved by std² ∇h, ∇h = (ẑ_0 − ẑ_0 of the network) α/σ², and
            with the guided logits.
        z: (G · N, T, d), times: (K + 1, B, T) or (K + 1, T), as for the solvers in `solvers`.
        embedding: of the tokens; a position that arrives at t = 0 becomes E of a token drawn from
            the logits. Without one it arrives at the network's own ẑ_0, and `steering.reward` is
            asked about z.
        n_groups: G.
        retained: (K + 1, G, T, d), a path for each population that its particle 0 takes, never to
            be resampled away (conditional SMC, Andrieu et al. 2010); needs the resampling
            `multinomial`.
        keep: return the particles' positions at all steps.
    """
    steps, size, potential = len(times) - 1, len(z) // n_groups, POTENTIALS[steering.potential]
    log_w = torch.zeros(n_groups, size, dtype=torch.float64, device=z.device)
    log_z, log_g = log_w.new_zeros(n_groups), log_w.new_zeros(len(z))
    memory, z0_prev = torch.full_like(log_g, potential.start), None
    first = size * torch.arange(n_groups, device=z.device)[:, None]
    z = z if retained is None else _with_retained(z, retained[0])
    fixed = None if retained is None or embedding is None else embedding.decode(retained[-1])
    positions, ess, resampled, ancestors = [z] if keep else [], [], [], []
    for k, (t, s) in enumerate(pairwise(times), 1):
        t, s = t.expand(z.shape[:2]), s.expand(z.shape[:2])
        prediction = predict(z, t, z0_prev)
        z0_prev, before = prediction.z0_network, log_g
        arrived = None if retained is None else retained[k]
        z, log_ratio = _propose(prediction, schedule, z, t, s, generator, embedding, arrived, fixed)
        if k == steps:
            reward = steering.reward(z if embedding is None else embedding.decode(z)).double()
            log_g = steering.lam * reward
        elif steering.value is not None and k % steering.every == 0:
            lam = steering.lam * (steering.tempering(k / steps) if potential.tempered else 1.0)
            log_g, memory = potential.update(log_g, memory, lam * steering.value(z, s).double())
        increment = log_ratio + log_g - before
        # A value that is no number, or a path that p_ψ cannot take, is a path of weight 0.
        log_w = log_w + torch.where(increment.isfinite(), increment, -torch.inf).unflatten(
            0, (n_groups, size)
        )
        positions += [z] if keep else []
        ess.append(effective_size(log_w))
        chosen, low = _resample(log_w, steering, generator, k == steps, retained is not None)
        rows = (chosen + first).flatten()
        z, z0_prev, log_g, memory = z[rows], z0_prev[rows], log_g[rows], memory[rows]
        log_z = log_z + torch.where(low, log_mean_exp(log_w), 0.0)
        log_w = torch.where(low[:, None], 0.0, log_w)
        resampled.append(low)
        ancestors.append(chosen)
    trace = SteeringTrace(torch.stack(ess), torch.stack(resampled), torch.stack(ancestors))
    everywhere = torch.stack(positions) if keep else None
    return Particles(
        z, log_w.log_softmax(1), reward, log_z + log_mean_exp(log_w), trace, everywhere
    )


def _propose(
    prediction: Prediction, schedule: Schedule, z: Tensor, t: Tensor, s: Tensor,
    generator: torch.Generator, embedding: TokenEmbedding | None, retained: Tensor | None,
    fixed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z_s ~ q, and log p_ψ(z_s | z_t) − log q(z_s | z_t), (B,) float64; the retained particles
    take their given path.
    """
    mean_plain, std = posterior(z, prediction.z0_network, schedule, t, s)
    arrives, between = ((t > 0) & (s == 0))[..., None], ((s > 0) & (s < t))[..., None]
    # p_ψ(z_s | z_t) exp(⟨∇h, z_s⟩) has the mean moved by std² ∇h. The posterior of the guided ẑ_0
    # would move it by (α_s/α_t) σ²_{t|s} ∇h, which near pure noise is hundreds of times as much and
    # leaves no weights.
    gradient = (schedule.alpha(t) / schedule.sigma(t).square().clamp_min(1e-12))[..., None]
    gradient = gradient * (prediction.z0 - prediction.z0_network)
    mean = torch.where(between, mean_plain + std.square() * gradient, mean_plain)
    new = torch.where((t > 0)[..., None], mean + std * normal_like(z, generator), z)
    log_ratio = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    if embedding is not None:
        tokens = draw_categorical(prediction.logits, generator)
        tokens = tokens if fixed is None else _with_retained(tokens, fixed)
        new = torch.where(arrives, embedding(tokens), new)
        log_ratio = torch.where(arrives[..., 0], _log_ratio_of(tokens, prediction), 0.0).sum(1)
    new = new if retained is None else _with_retained(new, retained)
    square = (new - mean).double().square() - (new - mean_plain).double().square()
    gaussian = square / (2 * torch.where(between, std, 1.0).double().square())
    return new, log_ratio + torch.where(between, gaussian, 0.0).sum((1, 2))


def _log_ratio_of(tokens: Tensor, prediction: Prediction) -> Tensor:
    """log p_ψ(token) − log q(token) at every position, (B, T) float64."""
    plain = prediction.logits_network
    if plain is None or plain is prediction.logits:
        return torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    log_p, log_q = (
        x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].double()
        for x in (plain, prediction.logits)
    )
    return log_p - log_q


def _resample(
    log_w: Tensor, steering: Steering, generator: torch.Generator, last: bool, conditional: bool
) -> tuple[Tensor, Tensor]:
    """Ancestors (G, N), and which populations (G,) are resampled."""
    n_groups, size = log_w.shape
    same = torch.arange(size, device=log_w.device).expand(n_groups, size)
    if last or size == 1 or steering.ess == 0:
        return same, torch.zeros(n_groups, dtype=torch.bool, device=log_w.device)
    low = (
        effective_size(log_w) < steering.ess * size
    )  # not a number, so not low, where no particle has weight
    chosen = RESAMPLING[steering.resampling](log_w, generator)
    if conditional:
        chosen[:, 0] = 0
    return torch.where(low[:, None], chosen, same), low


def _with_retained(rows: Tensor, retained: Tensor) -> Tensor:
    """Rows (G · N, …) with `retained` (G, …) in the place of each population's particle 0."""
    rows = rows.clone().unflatten(0, (len(retained), -1))
    rows[:, 0] = retained
    return rows.flatten(0, 1)


def lineage(ancestors: Tensor) -> Tensor:
    """The particle that the path of each final particle was at every step, (K, G, N) → (K, G, N)
    int64.
    """
    slots = [ancestors[-1]]
    for chosen in ancestors[:-1].flip(0):
        slots.append(chosen.gather(1, slots[-1]))
    return torch.stack(slots[::-1])


def paths(particles: Particles, final: Tensor) -> Tensor:
    """The paths (K + 1, G, T, d) that end in the particles `final` (G,) of each population;
    needs `keep`.
    """
    if particles.positions is None:
        raise ValueError("paths: the positions were not kept, call smc with keep=True")
    slots = lineage(particles.trace.ancestors)
    n_groups, size = slots.shape[1:]
    slots = torch.cat([slots[:1], slots])[:, torch.arange(n_groups), final]
    rows = slots + size * torch.arange(n_groups, device=slots.device)
    return particles.positions[torch.arange(len(rows), device=rows.device)[:, None], rows]
