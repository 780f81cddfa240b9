"""Particle Gibbs over the paths of the reverse diffusion: a Markov chain on paths whose texts
have the law that SMC weighs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.guidance import Predict
from dia_lightning.numerics import draw_categorical
from dia_lightning.sampling.particles import Particles, Steering, lineage, paths, smc


class GibbsState(NamedTuple):
    """G chains. path: (K + 1, G, T, d), z at each time. reward: (G,) float64, r of where it
    ends.
    """

    path: Tensor
    reward: Tensor


class GibbsInfo(NamedTuple):
    """One step. renewed: (G,) float64, the share of the path's K steps that are new. ess: (K, G)
    as in `particles.Trace`.
    """

    renewed: Tensor
    ess: Tensor


class ParticleGibbsKernel:
    """Keep the path that is held, run N − 1 other particles beside it, draw one path of the N by
    its weight.

    Leaves p_ψ(path) exp(λ r(x_0)) / Z invariant for any N ≥ 2, any potential and any value function
    (Andrieu, Doucet and Holenstein 2010; for masked diffusion: arXiv:2507.08390). The early steps
    of a path change only if another one's descendants survive to the end: N must grow with the
    number of resamplings.

    Args:
        predict, schedule, times, steering, embedding: as for `smc`; resampling must be
            `multinomial`.
        start: generator → (G · N, T, d), fresh starting points for all particles, N ≥ 2.
        n_groups: G, chains side by side.

    Raises:
        ValueError: for another resampling, whose conditional law is not the unconditional one with
            a particle fixed.
    """

    def __init__(
        self, predict: Predict, schedule: Schedule, times: Tensor, steering: Steering,
        start: Callable[[torch.Generator], Tensor], embedding: TokenEmbedding | None = None,
        n_groups: int = 1,
    ) -> None:  # fmt: skip
        if steering.resampling != "multinomial":
            raise ValueError(
                f"resampling: {steering.resampling} given, particle Gibbs allows: multinomial"
            )
        self.predict, self.schedule, self.times, self.steering = predict, schedule, times, steering
        self.start, self.embedding, self.n_groups = start, embedding, n_groups

    def first(self, generator: torch.Generator) -> GibbsState:
        """Chains at paths from plain `smc`, one a population by its weight, to begin with."""
        return self._picked(self._run(generator, None), generator)[0]

    def init(self, path: Tensor) -> GibbsState:
        """Chains at `path` (K + 1, G, T, d)."""
        end = path[-1] if self.embedding is None else self.embedding.decode(path[-1])
        return GibbsState(path, self.steering.reward(end).double())

    def step(self, state: GibbsState, generator: torch.Generator) -> tuple[GibbsState, GibbsInfo]:
        particles = self._run(generator, state.path)
        state, final = self._picked(particles, generator)
        chains = torch.arange(self.n_groups, device=final.device)
        renewed = (lineage(particles.trace.ancestors)[:, chains, final] != 0).double().mean(0)
        return state, GibbsInfo(renewed, particles.trace.ess)

    def _picked(
        self, particles: Particles, generator: torch.Generator
    ) -> tuple[GibbsState, Tensor]:
        """One path of each population by its weight, and which particle ends it (G,)."""
        final = draw_categorical(particles.log_w, generator)
        chains = torch.arange(self.n_groups, device=final.device)
        reward = particles.reward.unflatten(0, (self.n_groups, -1))[chains, final]
        return GibbsState(paths(particles, final), reward), final

    def _run(self, generator: torch.Generator, retained: Tensor | None) -> Particles:
        z = self.start(generator)
        return smc(
            self.predict,
            self.schedule,
            z,
            self.times,
            generator,
            self.steering,
            self.embedding,
            self.n_groups,
            retained,
            True,
        )
