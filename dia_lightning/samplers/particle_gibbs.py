"""Chains on paths of the reverse diffusion: particle Gibbs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dia_lightning import progress
from dia_lightning.errors import require
from dia_lightning.guidance import Watched
from dia_lightning.samplers.base import (
    Drawn,
    Models,
    refuse_blanks,
    require_reverse_process,
)
from dia_lightning.samplers.guide import CriticGuidance, Guidance
from dia_lightning.samplers.particle_steering import Steered, canonical, steering_of
from dia_lightning.sampling.decode import starting_point
from dia_lightning.sampling.diagnostics import by_prompt
from dia_lightning.sampling.particle_gibbs import ParticleGibbsKernel
from dia_lightning.sampling.particles import check_steering
from dia_lightning.types import Batch


@dataclass(frozen=True)
class ParticleGibbs(Steered):
    """Draws from p_ψ(x) exp(λ r(x)), p_ψ the denoiser's own law; exact in the limit of many
    rounds, with few particles too.

    Each text is a chain of its own. It begins as `ParticleSteering` draws; then every round runs
    the population again beside the path that it holds, and takes one path by its weight (Andrieu,
    Doucet and Holenstein 2010). The paths of all particles are kept in memory.

    Args:
        guidance: Guidance of the proposal; the weights correct for it.
        potential: `difference`, `max`, `sum` (Feynman–Kac steering, arXiv:2501.06848) or `das`
            (tempered, arXiv:2501.05803).
        particles: Size of the population of each text, 2 or more; the path held is one of them.
        rounds: Rounds after the first population, 0 or more.
        every: Steps between two weighings by the critic, 1 or more.
        ess: Resample below this share of effective particles, in [0, 1]; 0 = never.
        steps: Noise levels that each text passes, 1 or more.
        stagger: Lead of left positions over right ones, in positions, 0 or more (see `staggered`).
        temperature: Temperature of the denoiser's token distribution, above 0; 1 = as trained.
    """

    guidance: Guidance = field(default_factory=CriticGuidance)
    potential: Literal["difference", "max", "sum", "das"] = "das"
    particles: int = 4
    rounds: int = 10
    every: int = 1
    ess: float = 0.5
    steps: int = 64
    stagger: float = 4.0
    temperature: float = 1.0
    name: ClassVar[str] = "particle_gibbs"

    def __post_init__(self) -> None:
        require("particles", self.particles, self.particles >= 2, "2 or more")
        require("rounds", self.rounds, self.rounds >= 0, "0 or more")
        require_reverse_process(self)
        check_steering(0.0, self.potential, self.every, self.ess, "multinomial")

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, self)
        assert models.denoiser is not None
        n, embedding, schedule = len(batch.ids), models.embedding, models.denoiser.schedule
        rows = torch.arange(n, device=batch.tokens.device).repeat_interleave(self.particles)
        crowd = batch.take(rows)

        def noise(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return starting_point(crowd, embedding, schedule, self.steps, self.stagger, generator)

        predict = Watched(self.guidance.predictor(models, self.temperature))
        kernel = ParticleGibbsKernel(
            predict, schedule, noise(generator)[1],
            steering_of(models, crowd, self, "multinomial"),
            lambda generator: noise(generator)[0], embedding, n,
        )  # fmt: skip
        state = kernel.first(generator)
        renewed, rewards = torch.zeros_like(state.reward), [state.reward]
        for _ in progress.steps(range(self.rounds), "rounds of particle Gibbs"):
            state, info = kernel.step(state, generator)
            renewed += info.renewed / self.rounds
            rewards.append(state.reward)
        predict.check()
        tokens = embedding.decode(state.path[-1])
        diagnostics = by_prompt(batch.prompts, {"reward": torch.stack(rewards)})
        if self.rounds:
            diagnostics["renewed"] = renewed
        tokens = canonical(models, tokens, batch.tokens, batch.prompt_mask)
        return Drawn(tokens, None, diagnostics)
