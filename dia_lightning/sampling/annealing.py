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
from dia_lightning.sampling.particles import lineage
from dia_lightning.sampling.resampling import (
    RESAMPLING,
    effective_size,
    log_mean_exp,
    next_temperature,
    systematic,
)
from dia_lightning.sampling.state import Kernel, State, start, take
from dia_lightning.target import Target, TargetDensity
from dia_lightning.types import Batch, must_go_on


class AnnealingTrace(NamedTuple):
    """What happened, one entry a temperature. lam: (K, G) λ reached. ess: (K, G) effective sample
    size of the reweighting.
    accepted: (K, n_kernels) share of moves that were accepted. ancestors: (K, G, M) particle of
    the population from which each was resampled.
    """

    lam: Tensor
    ess: Tensor
    accepted: Tensor
    ancestors: Tensor


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


def from_base(
    target: Target | TargetDensity, tokens: Tensor, prompt_mask: Tensor, lam: float = 0.0
) -> State:
    """Samples of p_θ as particles at λ = 0, (G · M, T), the M of one population side by side; or
    those of a population at another λ.
    """
    at = torch.full((len(tokens),), lam, dtype=torch.float64, device=tokens.device)
    if not isinstance(target, TargetDensity):
        return start(target, tokens, prompt_mask, at)
    with torch.autocast(tokens.device.type, enabled=False):
        read = target.lm.read(tokens, prompt_mask)
    return State(tokens, prompt_mask, *target.terms(tokens, prompt_mask, read), at, read)


class Resampled(NamedTuple):
    """Particles resampled at a higher λ. log_w: (G, M) log-weights of those that were there.
    ancestors: (G, N) which of them each of the N new ones was.
    """

    state: State
    log_w: Tensor
    ancestors: Tensor


def resample_down(
    state: State, n_groups: int, size: int, lam_max: float, generator: torch.Generator,
    islands: int = 1,
) -> Resampled:  # fmt: skip
    """The first temperature of many texts for a few particles: λ as high as M texts make `size`
    effective ones, so that `size` < M are left; `islands` as in `anneal`.

    `log_mean_exp(log_w)` estimates log E_{p_θ}[exp(λ r)] at that λ.
    """
    share = size * n_groups / len(state.tokens)
    return _hotter(state, n_groups, lam_max, share, size, generator, islands)


def resample(
    state: State, log_w: Tensor, size: int, generator: torch.Generator
) -> tuple[State, Tensor]:
    """`size` particles a population, drawn by their log-weights (G, M), and what (G, size) each
    was.
    """
    n_groups, n = log_w.shape
    ancestors = systematic(log_w, generator, size)
    rows = ancestors + n * torch.arange(n_groups, device=log_w.device)[:, None]
    return take(state, rows.flatten()), ancestors


def _hotter(
    state: State, n_groups: int, lam_max: float, ess: float, n: int, generator: torch.Generator,
    islands: int,
) -> Resampled:  # fmt: skip
    """n particles a population, resampled at the λ to which `islands` populations together can
    rise at an effective share of `ess`.
    """
    reward, lam = (field.unflatten(0, (n_groups, -1)) for field in (state.reward, state.lam))
    together = reward.reshape(n_groups // islands, -1)
    higher = next_temperature(
        together, torch.zeros_like(together), lam[::islands, 0], lam_max, ess
    ).repeat_interleave(islands)
    log_w = (higher[:, None] - lam) * reward
    state, ancestors = resample(state, log_w, n, generator)
    return Resampled(state._replace(lam=higher.repeat_interleave(n)), log_w, ancestors)


def anneal(
    target: TargetDensity, kernels: Sequence[Kernel], state: State, n_groups: int,
    generator: torch.Generator, ess: float = 0.5, moves: int = 1, islands: int = 1,
) -> tuple[State, Tensor, AnnealingTrace]:  # fmt: skip
    """SMC sampler (Del Moral, Doucet, Jasra 2006, § 3.3.2.3) to π with adaptive temperatures.

    λ of each population rises as far as the effective sample size of the reweighting exp(Δλ r)
    stays at `ess` of its particles; then they are resampled and moved `moves` times by each kernel
    at the new λ.

    Args:
        target: π, whose λ is the last temperature. kernels: moves that leave it invariant at every
            λ.
        state: G · M particles, equally weighted, one λ a population, such as `from_base`. n_groups:
            G. ess: in (0, 1). islands: populations side by side that choose their λ's together, so
            that their Ẑ can be compared: a choice by a few particles of their own would bias it.

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
    trace: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    heat = progress.bar("λ of the population", total=float(target.lam))
    while bool((lam < target.lam).any()):
        state, log_w, ancestors = _hotter(state, n_groups, target.lam, ess, n, generator, islands)
        lam, log_z = state.lam[::n], log_z + log_mean_exp(log_w)
        heat.update(0 if heat.disable else float(lam.min()) - heat.n)
        state, followed = cycle(kernels, state, moves, generator)
        trace.append((lam, effective_size(log_w), followed.accepted.mean(1), ancestors))
    heat.close()
    if trace:
        return state, log_z, AnnealingTrace(*(torch.stack(x) for x in zip(*trace, strict=True)))
    shapes = ((n_groups,), (n_groups,), (len(kernels),), (n_groups, n))
    return state, log_z, AnnealingTrace(*(lam.new_zeros(0, *shape) for shape in shapes))


def particles_of(
    batch: Batch, particles: int, texts: int = 0, least: int = 1, times: int = 1
) -> tuple[Batch, int, Tensor]:
    """The particles' prompts, `particles` a text but `least` a population at least, all of them
    `times` over, one population after the other; the number of populations; the prompt of each
    text (B,), numbered.

    All texts of a prompt share one population, or `texts` of them do: then each prompt has as many
    populations as the one with most texts needs, side by side (islands).
    """
    # Texts of one prompt share its record; records that merely look alike are told apart by their
    # prompts or not at all. A length that is given may differ from text to text.
    keys = [
        (prompt, id(record) if record else 0, tuple(row))
        for prompt, record, row in zip(
            batch.prompts, batch.records, must_go_on(batch.prompt_mask).tolist(), strict=True
        )
    ]
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    group = torch.tensor([distinct[key] for key in keys], device=batch.tokens.device)
    first = torch.tensor([keys.index(key) for key in distinct], device=batch.tokens.device)
    most = int(group.bincount().max())
    together = min(texts or most, most)
    islands = -(-most // together)
    size = max(particles * together, least) * times
    rows = first.repeat_interleave(size * islands)
    crowd = replace(batch.take(rows), ids=list(range(len(rows))))
    return crowd, len(distinct) * islands, group


def pick_islands(group: Tensor, log_z: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) a population for each text, from the islands of its prompt, in proportion to their Ẑ
    (Vergé et al., arXiv:1306.3911): E[Ẑ φ] / E[Ẑ] = π(φ) of each, however few its particles.

    Args:
        group: (B,) the prompt of each text. log_z: (P, I) of the islands of each prompt.
    """
    n_islands = log_z.shape[1]
    if n_islands == 1:
        return group
    chosen = torch.zeros_like(group)
    for prompt, weights in enumerate(log_z):
        (rows,) = (group == prompt).nonzero(as_tuple=True)
        drawn = systematic(weights, generator, len(rows))
        # Systematic points come in order; shuffled, each text by itself has the right law too.
        order = torch.rand(len(rows), generator=generator, device=group.device).argsort()
        chosen[rows] = prompt * n_islands + drawn[order]
    return chosen


def pick(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(B,) one particle for each text, a random one of its population of `size`; none twice while
    there are others.
    """
    n_groups = int(group.max()) + 1
    order = torch.rand(n_groups, size, generator=generator, device=group.device).argsort(1)
    # The number of a text among those of its population.
    place = (group[:, None] == group).tril(-1).sum(1)
    return group * size + order[group, place % size]


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


def ancestry(
    ess: Tensor, ancestors: Tensor, trace: AnnealingTrace, log_z: Tensor, population: Tensor
) -> dict[str, Tensor]:
    """By prompt, (P,) each: the least effective share of all reweightings, that of the islands by
    their Ẑ included (`ess`); of as many starting points as there are particles, the share from
    which the particles of the chosen islands still descend (`roots`).

    Args:
        ess: (G,) effective share left by what went before. ancestors: (G, M) starting points of
            the particles that were annealed. log_z: (P, I) of the islands, G = P · I. population:
            (B,) the island chosen for each text.
    """
    n_prompts, islands = log_z.shape
    size = ancestors.shape[1]
    least = torch.cat([ess[None], trace.ess / size]).amin(0).view(n_prompts, islands).amin(1)
    if len(trace.ancestors):
        ancestors = ancestors.gather(1, lineage(trace.ancestors)[0])
    ordered = ancestors.sort(1).values
    roots = (1 + (ordered.diff(dim=1) != 0).sum(1)).double() / size
    used = torch.zeros_like(ess).scatter(0, population, 1.0)
    return {
        "ess": torch.minimum(least, effective_size(log_z) / islands),
        "roots": (roots * used).view(n_prompts, islands).mean(1),
    }
