"""SMC: particle steering of the reverse diffusion as `predict_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.baselines.checks import refuse_blanks
from dia_lightning.guidance import CAP_MAX, Predict, Watched, guided, unguided
from dia_lightning.resources import UserError
from dia_lightning.rewards import call_reward
from dia_lightning.sampling.base import Drawn, SamplerModule, check, check_stagger
from dia_lightning.sampling.crowd import crowd_of, pick_by_weight, weight_diagnostics
from dia_lightning.sampling.decode import starting_point
from dia_lightning.sampling.loading import embedding_for, load_denoiser, load_value
from dia_lightning.sampling.particles import Steering, check_steering, lineage, smc
from dia_lightning.target import seen_texts
from dia_lightning.types import Prompts, Reward, fill_after_end


class SMCModule(SamplerModule):
    """Draws from p_ψ(x) exp(λ r(x)), exactly in the limit of many particles, p_ψ being the denoiser's own sampler.

    The texts of a batch that share a prompt are drawn from one population of `particles` times their number, by weight.

    Args:
        base_lm: hub id or folder of p_θ; scores the texts.
        denoiser: checkpoint (folder or `.ckpt`) of a denoiser trained for base_lm.
        critic: checkpoint of a critic trained on `reward`, which values unfinished texts; needed unless lam is 0.
        reward: the true reward, which the final weights use.
        lam: λ, inverse temperature of the reward; 0 = the denoiser's own texts.
        particles: size of the population per text.
        potential: `difference`, `max`, `sum` (Feynman–Kac steering) or `das` (tempered), see `sampling.particles`.
        every: the critic weighs the particles at every so many steps.
        ess: resample below this share of effective particles; 0 = never.
        resampling: `systematic`, `stratified` or `multinomial`.
        steps: noise levels each text passes. stagger: how far left positions run ahead of right ones (see `staggered`).
        guidance_scale: factor on λ ∇h in the proposal; the weights correct for it. 0 = unguided.
        guidance_cap: longest guidance gradient per token (see `guided`).
        temperature: of the denoiser's token distribution; 1 = as trained.
        compare_base: sample p_θ for the same prompts too and report both.
        shard_base_lm: each of several processes keeps a part of p_θ only, as for `GuidedSamplerModule`.
        seed: of all randomness.
    """

    method = "smc"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str = "checkpoints/tiny/denoiser",
        critic: str | None = "checkpoints/tiny/critic",
        lam: float = 4.0,
        particles: int = 4,
        potential: str = "das",
        every: int = 1,
        ess: float = 0.5,
        resampling: str = "systematic",
        steps: int = 64,
        stagger: float = 4.0,
        guidance_scale: float = 1.0,
        guidance_cap: float = 100.0,
        temperature: float = 1.0,
        compare_base: bool = True,
        shard_base_lm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed, shard_base_lm)
        limits = {"particles": (particles >= 1, "1 or more"), "steps": (steps >= 1, "1 or more")}
        limits |= {"guidance_scale": (guidance_scale >= 0, "0 or more"), "temperature": (temperature > 0, "above 0")}
        limits |= {"guidance_cap": (0 < guidance_cap <= CAP_MAX, f"above 0, up to {CAP_MAX:g}")}
        check_stagger(stagger)
        for name, (ok, allowed) in limits.items():
            check(name, locals()[name], ok, allowed)
        try:
            check_steering(lam, potential, every, ess, resampling)
        except ValueError as error:
            raise UserError(f"--model.init_args.{error}") from None
        self.denoiser, self.critic, self.lam, self.particles = denoiser, critic, lam, particles
        self.potential, self.every, self.ess, self.resampling = potential, every, ess, resampling
        self.steps, self.stagger, self.temperature = steps, stagger, temperature
        self.guidance_scale, self.guidance_cap = guidance_scale, guidance_cap
        self.embedding = embedding_for(self.lm, denoiser)
        self.denoiser_network = load_denoiser(denoiser, self.embedding, self.lm)
        self.value = load_value(critic, self.embedding, reward.name, lam, self.lm) if lam else None

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, "SMCModule")
        crowd, n_groups, group = crowd_of(batch, self.particles)
        schedule = self.denoiser_network.schedule
        z, times = starting_point(crowd, self.embedding, schedule, self.steps, self.stagger, generator)
        steering, predict = self._steering(crowd), Watched(self._predictor())
        drawn = smc(predict, schedule, z, times, generator, steering, self.embedding, n_groups)
        predict.check()
        chosen = pick_by_weight(drawn.log_w, self.resampling, group, generator)
        tokens = self._canonical(self.embedding.decode(drawn.z[chosen]), crowd.tokens[chosen], crowd.prompt_mask[chosen])
        trace = drawn.trace
        found = weight_diagnostics(drawn.log_z, drawn.log_w, lineage(trace.ancestors)[0], trace.resampled.double().sum(0))
        diagnostics = {name: values[group] for name, values in found.items()}
        return Drawn(tokens, None, diagnostics)

    def _predictor(self) -> Predict:
        """The proposal: the denoiser, guided where λ > 0 and guidance_scale > 0."""
        predict, value = unguided(self.denoiser_network, self.embedding, self.temperature), self.value
        factor = self.lam * self.guidance_scale
        if value is None or not factor:
            return predict
        schedule = self.denoiser_network.schedule
        return guided(predict, lambda z, t: factor * value(z, t), schedule, self.embedding, self.guidance_cap)

    def _steering(self, crowd: Prompts) -> Steering:
        def reward(tokens: Tensor) -> Tensor:
            tokens = self._canonical(tokens, crowd.tokens, crowd.prompt_mask)
            return call_reward(self._cached, seen_texts(self.lm, tokens, crowd), crowd.records).to(tokens.device)

        return Steering(reward, self.value, self.lam, self.potential, self.every, self.ess, self.resampling)

    def _canonical(self, tokens: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        return fill_after_end(torch.where(prompt_mask, prompt, tokens), prompt_mask, self.lm.end_id)
