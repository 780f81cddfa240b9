"""An annealed population on p_θ itself: samples at λ = 0, λ raised step by step, reweighted,
resampled, moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning import progress
from dia_lightning.numerics import FirstTime
from dia_lightning.sampling.resampling import (
    RESAMPLING,
    effective_size,
    log_mean_exp,
    next_temperature,
    systematic,
)
from dia_lightning.sampling.state import Kernel, State, start, take
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch


class AnnealingTrace(NamedTuple):
    """What happened, one entry a temperature. lam: (K, G) λ reached. ess: (K, G) effective sample
    size of the reweighting.
    accepted: (K, n_kernels) share of moves that were accepted.
    """

    lam: Tensor
    ess: Tensor
    accepted: Tensor


class Followed(NamedTuple):
    """Chains along their steps. accepted: (n_kernels, B) share of accepted moves. log_base,
    reward: (S, B) after each step.
    """

    accepted: Tensor
    log_base: Tensor
    reward: Tensor


def cycle(
    kernels: Sequence[Kernel], state: State, steps: int, generator: torch.Generator
) -> tuple[State, Followed]:
    """`steps` rounds of all kernels in turn.

    Raises:
        NotFinite: if an acceptance ratio was NaN, naming the kernel, the first such round and its
            rows; after the last round, so that the device is waited for once.
    """
    n = len(state.tokens)
    accepted = torch.zeros(len(kernels), n, dtype=torch.float64, device=state.tokens.device)
    undefined, terms = FirstTime(), []
    for step in progress.steps(range(1, steps + 1), "rounds of moves"):
        for i, kernel in enumerate(kernels):
            state, info = kernel.step(state, generator)
            accepted[i] += info.accepted
            if info.undefined is not None:
                undefined.note(
                    f"the acceptance ratio of {type(kernel).__name__}", info.undefined, step
                )
        terms.append(torch.stack([state.log_base, state.reward]))
    undefined.check("round")
    log_base, reward = torch.stack(terms, 1) if terms else accepted.new_zeros(2, 0, n)
    return state, Followed(accepted / max(1, steps), log_base, reward)


def from_base(target: TargetDensity, tokens: Tensor, prompt_mask: Tensor) -> State:
    """Samples of p_θ as particles at λ = 0, (G · M, T), the M of one population (one prompt)
    side by side.
    """
    return start(
        target,
        tokens,
        prompt_mask,
        torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device),
    )


def resample_down(
    state: State, n_groups: int, size: int, lam_max: float, generator: torch.Generator
) -> tuple[State, Tensor]:
    """The first temperature of many texts for a few particles: λ as high as M texts make `size`
    effective ones.

    Returns:
        `size` < M particles a population, equally weighted at that λ; (G,) estimates of log
        E_{p_θ}[exp(λ r)] at it.
    """
    state, log_w = _hotter(
        state, n_groups, lam_max, size * n_groups / len(state.tokens), size, generator
    )
    return state, log_mean_exp(log_w)


def _hotter(
    state: State, n_groups: int, lam_max: float, ess: float, n: int, generator: torch.Generator
) -> tuple[State, Tensor]:
    """n particles a population, resampled at the λ to which it can rise at an effective share of
    `ess`; log-weights (G, M).
    """
    reward, lam = (field.unflatten(0, (n_groups, -1)) for field in (state.reward, state.lam))
    higher = next_temperature(reward, torch.zeros_like(reward), lam[:, 0], lam_max, ess)
    log_w = (higher[:, None] - lam) * reward
    ancestors = (
        systematic(log_w, generator, n)
        + reward.shape[1] * torch.arange(n_groups, device=log_w.device)[:, None]
    )
    return take(state, ancestors.flatten())._replace(lam=higher.repeat_interleave(n)), log_w


def anneal(
    target: TargetDensity, kernels: Sequence[Kernel], state: State, n_groups: int,
    generator: torch.Generator, ess: float = 0.5, moves: int = 1,
) -> tuple[State, Tensor, AnnealingTrace]:  # fmt: skip
    """SMC sampler (Del Moral, Doucet, Jasra 2006, § 3.3.2.3) to π with adaptive temperatures.

    λ of each population rises as far as the effective sample size of the reweighting exp(Δλ r)
    stays at `ess` of its particles; then they are resampled and moved `moves` times by each kernel
    at the new λ.

    Args:
        target: π, whose λ is the last temperature. kernels: moves that leave it invariant at every
            λ.
        state: G · M particles, equally weighted, one λ a population, such as `from_base`. n_groups:
            G. ess: in (0, 1).

    Returns:
        The particles at λ, equally weighted; (G,) float64 estimates of log (Z / Z of the state's
        λ), for exact samples of p_θ log E_{p_θ}[exp(λ r)], whose exponentials are unbiased but for
        the adaptation; the trace.
    """
    if not 0 < ess < 1:
        raise ValueError(f"ess must be between 0 and 1, got {ess}")
    n = len(state.tokens) // n_groups
    lam = state.lam[::n]
    log_z = torch.zeros_like(lam)
    trace: list[tuple[Tensor, Tensor, Tensor]] = []
    heat = progress.bar("λ of the population", total=float(target.lam))
    while bool((lam < target.lam).any()):
        state, log_w = _hotter(state, n_groups, target.lam, ess, n, generator)
        lam, log_z = state.lam[::n], log_z + log_mean_exp(log_w)
        heat.update(0 if heat.disable else float(lam.min()) - heat.n)
        state, followed = cycle(kernels, state, moves, generator)
        trace.append((lam, effective_size(log_w), followed.accepted.mean(1)))
    heat.close()
    empty = (lam.new_zeros(0, n_groups), lam.new_zeros(0, n_groups), lam.new_zeros(0, len(kernels)))
    return (
        state,
        log_z,
        (
            AnnealingTrace(*(torch.stack(part) for part in zip(*trace, strict=True)))
            if trace
            else AnnealingTrace(*empty)
        ),
    )


def particles_of(batch: Batch, particles: int) -> tuple[Batch, int, Tensor]:
    """The particles' prompts, `particles` a text, one population after the other, a population for
    the texts that share a prompt; the number of populations; the population of each text (B,).
    """
    # Texts of one prompt share its record; records that merely look alike are told apart by their
    # prompts or not at all.
    keys = [
        (prompt, id(record) if record else 0)
        for prompt, record in zip(batch.prompts, batch.records, strict=True)
    ]
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    group = torch.tensor([distinct[key] for key in keys], device=batch.tokens.device)
    first = torch.tensor([keys.index(key) for key in distinct], device=batch.tokens.device)
    size = particles * int(group.bincount().max())
    rows = first.repeat_interleave(size)
    return replace(batch.take(rows), ids=list(range(len(rows)))), len(distinct), group


def pick(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(B,) one particle for each text, no particle twice: a random one of its population of
    `size`.
    """
    n_groups = int(group.max()) + 1
    order = torch.rand(n_groups, size, generator=generator, device=group.device).argsort(1)
    # The number of a text among those of its population.
    place = (group[:, None] == group).tril(-1).sum(1)
    return group * size + order[group, place]


def pick_by_weight(
    log_w: Tensor, resampling: str, group: Tensor, generator: torch.Generator
) -> Tensor:
    """(B,) a particle for each text, from its population (G, M) resampled in proportion to
    exp(log_w).
    """
    size = log_w.shape[1]
    start = size * torch.arange(len(log_w), device=log_w.device)[:, None]
    return (RESAMPLING[resampling](log_w, generator) + start).flatten()[
        pick(group, size, generator)
    ]


def weight_diagnostics(
    log_z: Tensor, log_w: Tensor, roots: Tensor, resampled: Tensor
) -> dict[str, Tensor]:
    """By population, (G,) each: log Z; of its size, the effective share of the final weights
    (`ess`) and the share of the starting points `roots` (G, M) that it still descends from; the
    number of resamplings (`resampled`).
    """
    share = torch.zeros_like(log_w).scatter(1, roots, 1.0).mean(1)
    return {
        "log_z": log_z,
        "ess": effective_size(log_w) / log_w.shape[1],
        "roots": share,
        "resampled": resampled,
    }
