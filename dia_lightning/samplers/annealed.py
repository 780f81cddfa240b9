"""The annealed population: samples of p_θ, raised to π step by step."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dia_lightning.errors import require
from dia_lightning.samplers.base import (
    Drawn,
    Models,
    Sampler,
    draw_base,
    refuse_blanks,
    require_counts,
)
from dia_lightning.samplers.moves import DenoiseAccept, Move, Suffix, names_of, needs_of
from dia_lightning.sampling.annealing import (
    anneal,
    cycle,
    from_base,
    particles_of,
    pick,
    resample_down,
)
from dia_lightning.sampling.diagnostics import log_z_upper
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch


@dataclass(frozen=True)
class Annealed(Sampler):
    """Draws a population from p_θ, raises λ step by step and moves it at each.

    Exact in the limit of many particles or moves (see `sampling.population.anneal`).

    Args:
        moves: Exact moves, taken in turn.
        particles: Size of the population, 1 or more. Each text has one; texts of one prompt share
            it.
        pool: Texts of p_θ drawn for each particle, 1 or more; the best by weight begin. Drawing
            costs less than moving.
        ess: Share of effective particles that each rise of λ keeps, between 0 and 1.
        rounds: Rounds of all moves at each temperature and at the end, 0 or more.
    """

    moves: list[Move] = field(default_factory=lambda: [Suffix(), DenoiseAccept()])
    particles: int = 4
    pool: int = 1
    ess: float = 0.5
    rounds: int = 1
    powers: ClassVar[bool] = True
    name: ClassVar[str] = "annealed"

    def __post_init__(self) -> None:
        require_counts(self, "particles", "pool")
        require("ess", self.ess, 0 < self.ess < 1, "between 0 and 1")
        require("rounds", self.rounds, self.rounds >= 0, "0 or more")

    def needs(self, lam: float) -> Set[str]:
        return needs_of(self.moves, lam) if self.rounds else frozenset()

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, self)
        moves = self.moves if self.rounds else []
        crowd, n_groups, group = particles_of(batch, self.particles * self.pool)
        target = self._target(models, crowd)
        drawn = draw_base(models.lm, crowd, generator).tokens
        state = from_base(target, drawn, crowd.prompt_mask)
        size = len(state.tokens) // n_groups // self.pool
        log_z_pool = state.lam.new_zeros(n_groups)
        if self.pool > 1:
            state, log_z_pool = resample_down(state, n_groups, size, target.lam, generator)
            target = self._target(models, particles_of(batch, self.particles)[0])
        kernels = [move.kernel(models, target) for move in moves]
        rounds = self.rounds if kernels else 0
        state, log_z, trace = anneal(target, kernels, state, n_groups, generator, self.ess, rounds)
        state, followed = cycle(kernels, state, rounds, generator)
        chosen, log_z = pick(group, size, generator), log_z_pool + log_z
        rates = followed.accepted[:, chosen]
        upper = log_z_upper(state.reward.unflatten(0, (n_groups, -1)), target.lam)
        diagnostics = {"log_z": log_z[group], "log_z_upper": upper[group]}
        n_temperatures = (self.pool > 1) + len(trace.lam)
        diagnostics |= {"temperatures": torch.full_like(log_z[group], n_temperatures)}
        diagnostics |= {f"accept_{n}": r for n, r in zip(names_of(moves), rates, strict=True)}
        return Drawn(state.tokens[chosen], rates.mean(0) if len(rates) else None, diagnostics)

    def _target(self, models: Models, crowd: Batch) -> TargetDensity:
        return TargetDensity(models.lm, models.reward, models.lam, crowd, models.alpha)
