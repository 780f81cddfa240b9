"""Particle steering of the reverse diffusion: Feynman–Kac steering and DAS."""

from __future__ import annotations

from abc import ABC
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dia_lightning.guidance import Watched
from dia_lightning.rewards.base import call_reward
from dia_lightning.samplers.base import (
    Drawn,
    Models,
    Sampler,
    refuse_blanks,
    require_counts,
    require_reverse_process,
)
from dia_lightning.samplers.guide import CriticGuidance, Guidance
from dia_lightning.sampling.annealing import particles_of, pick_by_weight, weight_diagnostics
from dia_lightning.sampling.decode import starting_point
from dia_lightning.sampling.particles import Steering, check_steering, lineage, smc
from dia_lightning.target import reward_inputs
from dia_lightning.types import Batch, fill_after_end


class Steered(Sampler, ABC):
    """A sampler whose particles a guidance proposes and the critic weighs."""

    guidance: Guidance

    def needs(self, lam: float) -> Set[str]:
        return {"denoiser", *(["critic"] if lam else []), *self.guidance.needs(lam)}

    def check(self, models: Models) -> None:
        self.guidance.check(models)


@dataclass(frozen=True)
class ParticleSteering(Steered):
    """Draws from p_ψ(x) exp(λ r(x)), p_ψ the denoiser's own law; exact in the limit of many
    particles.

    The texts of a batch that share a prompt are drawn from one population of `particles` times
    their number, by weight. The critic values unfinished texts; the true reward decides the final
    weights.

    Args:
        guidance: Guidance of the proposal; the weights correct for it.
        potential: `difference`, `max`, `sum` (Feynman–Kac steering, arXiv:2501.06848) or `das`
            (tempered, arXiv:2501.05803).
        particles: Size of the population of each text, 1 or more.
        every: Steps between two weighings by the critic, 1 or more.
        ess: Resample below this share of effective particles, in [0, 1]; 0 = never.
        resampling: `systematic`, `stratified` or `multinomial`.
        steps: Noise levels that each text passes, 1 or more.
        stagger: Lead of left positions over right ones, in positions, 0 or more (see `staggered`).
        temperature: Temperature of the denoiser's token distribution, above 0; 1 = as trained.
    """

    guidance: Guidance = field(default_factory=CriticGuidance)
    potential: Literal["difference", "max", "sum", "das"] = "das"
    particles: int = 4
    every: int = 1
    ess: float = 0.5
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"
    steps: int = 64
    stagger: float = 4.0
    temperature: float = 1.0
    name: ClassVar[str] = "smc"

    def __post_init__(self) -> None:
        require_counts(self, "particles")
        require_reverse_process(self)
        check_steering(0.0, self.potential, self.every, self.ess, self.resampling)

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, self)
        assert models.denoiser is not None
        crowd, n_groups, group = particles_of(batch, self.particles)
        schedule, embedding = models.denoiser.schedule, models.embedding
        z, times = starting_point(crowd, embedding, schedule, self.steps, self.stagger, generator)
        predict = Watched(self.guidance.predictor(models, self.temperature))
        steering = steering_of(models, crowd, self, self.resampling)
        drawn = smc(predict, schedule, z, times, generator, steering, embedding, n_groups)
        predict.check()
        chosen = pick_by_weight(drawn.log_w, self.resampling, group, generator)
        given, mask = crowd.tokens[chosen], crowd.prompt_mask[chosen]
        tokens = canonical(models, embedding.decode(drawn.z[chosen]), given, mask)
        ancestors, resampled = (
            lineage(drawn.trace.ancestors)[0],
            drawn.trace.resampled.double().sum(0),
        )
        found = weight_diagnostics(drawn.log_z, drawn.log_w, ancestors, resampled)
        return Drawn(tokens, None, {name: values[group] for name, values in found.items()})


def steering_of(models: Models, crowd: Batch, settings: Any, resampling: str) -> Steering:
    """What the particles of `crowd` are steered to, with the `potential`, `every` and `ess` of
    `settings`.
    """

    def reward(tokens: Tensor) -> Tensor:
        tokens = canonical(models, tokens, crowd.tokens, crowd.prompt_mask)
        seen = reward_inputs(models.lm, tokens, crowd)
        return call_reward(models.reward, seen, crowd.records).to(tokens.device)

    potential, every, ess = settings.potential, settings.every, settings.ess
    return Steering(reward, models.critic, models.lam, potential, every, ess, resampling)


def canonical(models: Models, tokens: Tensor, given: Tensor, prompt_mask: Tensor) -> Tensor:
    """Decoded tokens (B, T) with their prompts, `given` at `prompt_mask`, in canonical form."""
    return fill_after_end(torch.where(prompt_mask, given, tokens), prompt_mask, models.lm.end_id)
