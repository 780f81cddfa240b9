"""GuidedSamplerModule: aligned text as `predict_step`, by an annealed population or by guided diffusion, and exact moves."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.guidance import CAP_MAX, LogValue, Predict, guided, true_gradient, unguided
from dia_lightning.resources import UserError
from dia_lightning.sampling.base import Drawn, SamplerModule, check, check_lam, check_stagger
from dia_lightning.sampling.corrector import CORRECTORS
from dia_lightning.sampling.crowd import crowd_of, pick, rows_of
from dia_lightning.sampling.decode import draw_texts, source_rows
from dia_lightning.sampling.denoise_accept import Kernel, start
from dia_lightning.sampling.diagnostics import by_prompt, log_z_upper
from dia_lightning.sampling.langevin import Polynomial
from dia_lightning.sampling.loading import RewardValue, embedding_for, load_denoiser, load_value
from dia_lightning.sampling.moves import REFINE, Moves, check_refine, make_kernels
from dia_lightning.sampling.population import anneal, cycle, from_base, thin
from dia_lightning.sampling.proposal import DenoiserProposal
from dia_lightning.sampling.solvers import SOLVERS
from dia_lightning.sampling.tempering import Tempering
from dia_lightning.target import TargetDensity
from dia_lightning.types import Prompts, Reward, must_go_on

STARTS = ("annealed", "base_lm", "source")
GRADIENTS = ("critic", "true", "straight_through")


class GuidedSamplerModule(SamplerModule):
    """Draws from π(x) ∝ p_θ(x) exp(λ r(x)).

    `annealed` draws a population from p_θ, raises λ step by step and moves it by `refine` at each (see
    `population.anneal`): exact in the limit of many particles or moves. A solver's name runs the guided reverse process
    (science.md, "Reverse process"), which is approximate; `refine` then moves its texts by exact kernels towards π.

    Args:
        reward: the true reward r, any.
        base_lm: hub id, folder or `.gguf` file of p_θ, or `smollm2` (see `BaseLM.load`).
        denoiser: checkpoint (folder or `.ckpt`) of a denoiser for base_lm; for a solver and for denoise_accept.
        critic: checkpoint of a critic trained on `reward`; for guidance and for `moves.tilt`.
        sampler: `annealed`; `base_lm`, samples of p_θ to be refined; `source`, the text to rewrite in each record's field
            `source`, to be refined; or a solver: `ancestral`, `ddim`, `dpmpp_2m`, `dia` (predictor and Langevin
            corrector), `dia_literal`.
        lam: λ, inverse temperature of the reward; 0 = p_θ itself.
        particles: of `annealed`, size of the population per text. Texts that share a prompt share a population.
        pool: of `annealed`, texts of p_θ drawn for each particle; the best of them by weight begin. Drawing costs less than
            moving, so that many texts for few particles reach further in the same time.
        ess: of `annealed`, each rise of λ keeps this share of effective particles.
        refine: exact moves: `suffix`, `denoise_accept`, both in turn (`cycle`) or `none`.
        refine_steps: rounds of them: after a solver, or at each temperature and at the end of `annealed`.
        rungs: of the refinement of a start, chains for each text at λ/rungs, 2λ/rungs, …, λ that swap their texts (parallel
            tempering); 1 = a single chain at λ.
        moves: options of denoise_accept.
        steps: of a solver, noise levels each text passes.
        strength: of a solver, the noise level u it starts from; below 1 it starts at the record's `source`, noised so far.
        stagger: how far left positions run ahead of right ones; 0 = all positions together (see `staggered`).
        corrector: of `dia`, Langevin steps as they are (`ula`) or accepted and rejected (`mala`, with `accept_mala` told).
        corrector_steps: of `dia`, how many at each level.
        eta: of `dia` and `dia_literal`, their size η relative to σ²; of `ddim`, its noise, from 0 (ODE) to 1 (`ancestral`).
        eta_decay: of `dia`, γ of the size η/(k + 1)^γ of the run's corrector step k, above ½ up to 1; 0 = η at every step.
        reading: of `dia_literal`, what the printed α_t, σ_t mean: `marginal` or `per_step`.
        gradient: what guides a solver: the `critic`'s gradient, or, for a reward with a method `soft`, its own (`true`,
            `straight_through`; see `guidance.true_gradient`).
        guidance_scale: factor on the gradient; 1 = science.md's score. A critic's gradient at one point falls far short of
            what exchanging a token changes (on the tiny kit some fifteen times), which larger values make up for.
        guidance_decay: guidance is scaled by (1 − u)^decay at noise level u; 0 = the same at all.
        guidance_cap: longest guidance gradient per token (see `guided`).
        guidance_window: noise levels u between which guidance acts, 0 = clean, 1 = noise.
        temperature: of the denoiser's token distribution; 1 = as trained.
        final: tokens are drawn (`sample`) or the likeliest (`argmax`) where a position becomes clean.
        compare_base: sample p_θ for the same prompts too and report both.
        shard_base_lm: each of several processes keeps a part of p_θ's blocks only and gathers a block from all when it runs:
            for a p_θ too large for one GPU (see docs/scaling.md). Not with networks that adapt those blocks.
        seed: of all randomness.
    """

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str | None = "checkpoints/tiny/denoiser",
        critic: str | None = "checkpoints/tiny/critic",
        sampler: str = "annealed",
        lam: float = 6.0,
        particles: int = 4,
        pool: int = 1,
        ess: float = 0.5,
        refine: str = "cycle",
        refine_steps: int = 1,
        rungs: int = 1,
        moves: Moves | None = None,
        steps: int = 64,
        strength: float = 1.0,
        stagger: float = 40.0,
        corrector: str = "ula",
        corrector_steps: int = 1,
        eta: float = 0.1,
        eta_decay: float = 0.0,
        reading: str = "marginal",
        gradient: str = "critic",
        guidance_scale: float = 1.0,
        guidance_decay: float = 0.0,
        guidance_cap: float = 100.0,
        guidance_window: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        final: str = "sample",
        compare_base: bool = True,
        shard_base_lm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed, shard_base_lm)
        self.denoiser, self.critic, self.sampler, self.lam = denoiser, critic, sampler, lam
        self.particles, self.pool, self.ess, self.refine, self.refine_steps = particles, pool, ess, refine, refine_steps
        self.moves, self.steps, self.stagger, self.corrector_steps = moves or Moves(), steps, stagger, corrector_steps
        self.strength, self.rungs, self.corrector, self.eta_decay = strength, rungs, corrector, eta_decay
        self.eta, self.reading, self.gradient, self.guidance_scale = eta, reading, gradient, guidance_scale
        self.guidance_decay, self.guidance_cap, self.guidance_window = guidance_decay, guidance_cap, guidance_window
        self.temperature, self.final, self.method = temperature, final, sampler
        self._check_options()
        self._load_networks()

    def _check_options(self) -> None:
        check("sampler", self.sampler, self.sampler in (*STARTS, *SOLVERS), ", ".join((*STARTS, *SOLVERS)))
        check("final", self.final, self.final in ("sample", "argmax"), "sample, argmax")
        check("reading", self.reading, self.reading in ("marginal", "per_step"), "marginal, per_step")
        check("gradient", self.gradient, self.gradient in GRADIENTS, ", ".join(GRADIENTS))
        check("corrector", self.corrector, self.corrector in CORRECTORS, ", ".join(CORRECTORS))
        check("eta", self.eta, 0 <= self.eta <= 1, "0 ≤ eta ≤ 1")
        check("eta", self.eta, self.eta > 0 or not self.eta_decay, "above 0 where it decays (eta_decay)")
        check("eta_decay", self.eta_decay, self.eta_decay == 0 or 0.5 < self.eta_decay <= 1, "0, or ½ < eta_decay ≤ 1")
        check("ess", self.ess, 0 < self.ess < 1, "between 0 and 1")
        check("strength", self.strength, 0 < self.strength <= 1, "0 < strength ≤ 1")
        check_lam(self.lam)
        check_stagger(self.stagger)
        for name in ("refine_steps", "corrector_steps", "guidance_decay"):
            check(name, getattr(self, name), 0 <= getattr(self, name) < float("inf"), "0 or more, finite")
        check("rungs", self.rungs, self.rungs == 1 or self.lam > 0, "1 where λ is 0")
        for name in ("particles", "pool", "steps", "rungs"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check("guidance_cap", self.guidance_cap, 0 < self.guidance_cap <= CAP_MAX, f"above 0, up to {CAP_MAX:g}")
        for name in ("guidance_scale", "temperature"):
            check(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        low, high = self.guidance_window
        check("guidance_window", list(self.guidance_window), 0 <= low < high <= 1, "two numbers, 0 ≤ first < second ≤ 1")

    def _load_networks(self) -> None:
        solver, moved = self.sampler in SOLVERS, bool(self.refine_steps)
        self._refine = self.refine if moved else "none"
        needs_denoiser = check_refine(self.refine, self.denoiser, self.moves, self.critic) and moved
        if solver and self.denoiser is None:
            raise UserError(f"--model.init_args.denoiser: none given, needed for --model.init_args.sampler {self.sampler}")
        denoiser = self.denoiser if solver or needs_denoiser else None
        self.embedding = embedding_for(self.lm, denoiser)
        self.denoiser_network = None if denoiser is None else load_denoiser(denoiser, self.embedding, self.lm)
        self.value: RewardValue | None = None
        if self.lam and ((solver and self.gradient == "critic") or (needs_denoiser and self.moves.tilt)):
            self.value = load_value(self.critic, self.embedding, self.reward.name, self.lam, self.lm)
        if self.gradient != "critic" and not hasattr(self.reward, "soft"):
            raise UserError(
                f"--model.init_args.gradient: {self.gradient} given, but the reward {self.reward.name!r} has no method `soft`; "
                "allowed for it: critic"
            )
        if self.gradient != "critic" and hasattr(self.reward, "check_tokenizer"):
            self.reward.check_tokenizer(self.lm.tokenizer)

    def predictor(self) -> Predict:
        """The denoiser, guided where λ > 0."""
        network = self.denoiser_network
        assert network is not None
        predict = unguided(network, self.embedding, self.temperature)
        if not self.lam:
            return predict
        log_value = self._log_value(network)
        decay = self.guidance_decay
        return guided(
            predict, log_value, network.schedule, self.embedding, self.guidance_cap, self.guidance_window,
            (lambda u: (1 - u) ** decay) if decay else None,
        )  # fmt: skip

    def _log_value(self, network: DenoiserNetwork) -> LogValue:
        factor, value = self.lam * self.guidance_scale, self.value
        if value is not None:
            return lambda z, t: factor * value(z, t)
        soft: Any = self.reward
        straight = self.gradient == "straight_through"
        return true_gradient(soft, network, self.embedding, factor, straight, self.temperature)

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        left_to_right = self.sampler in ("annealed", "base_lm") or "suffix" in REFINE[self._refine]
        if left_to_right and bool(must_go_on(batch.prompt_mask).any()):
            raise UserError(
                f"--data.init_args: blanks or a length given, but p_θ writes from left to right (--model.init_args.sampler "
                f"{self.sampler}, refine {self._refine}); allowed: a solver or source, with refine denoise_accept or none"
            )
        if self.sampler == "annealed":
            return self._anneal(batch, generator)
        begin = self._begin(batch, generator)
        return begin if self._refine == "none" else self._refined(begin, batch, generator)

    def _begin(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        if self.sampler == "base_lm":
            return self.draw_base(batch, generator)
        return Drawn(source_rows(self.lm, batch)) if self.sampler == "source" else self._diffuse(batch, generator)

    def _diffuse(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        network, known = self.denoiser_network, inspect.signature(SOLVERS[self.sampler]).parameters
        assert network is not None
        options: dict[str, Any] = {n: getattr(self, n) for n in ("corrector_steps", "eta", "reading") if n in known}
        accepted: list[Tensor] = []
        if self.sampler == "dia":
            eta = Polynomial(self.eta, gamma=self.eta_decay) if self.eta_decay else self.eta
            options |= {"eta": eta, "corrector": self.corrector, "note": accepted.append}
        if self.strength < 1:
            options |= {"begin": source_rows(self.lm, batch), "strength": self.strength}
        tokens = draw_texts(
            self.predictor(), batch, self.embedding, network.schedule, self.lm.end_id, generator,
            self.sampler, self.steps, self.stagger, self.final == "sample", **options,
        )  # fmt: skip
        return Drawn(tokens, diagnostics={"accept_mala": accepted[0]} if accepted else None)

    def _kernels(self, target: TargetDensity) -> list[Kernel]:
        network = self.denoiser_network
        if network is None:
            return make_kernels(self._refine, self.moves, target, None, self.embedding, None)
        return make_kernels(
            self._refine, self.moves, target, DenoiserProposal(network), self.embedding, network.schedule, self.value
        )

    def _target(self, batch: Prompts) -> TargetDensity:
        return TargetDensity(self.lm, self._cached, self.lam, batch, with_base="denoise_accept" in REFINE[self._refine])

    def _anneal(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        crowd, n_groups, group = crowd_of(batch, self.particles * self.pool)
        target = self._target(crowd)
        state = from_base(target, self.draw_base(crowd, generator).tokens, crowd.prompt_mask)
        size, log_z_pool = len(state.tokens) // n_groups // self.pool, state.lam.new_zeros(n_groups)
        if self.pool > 1:
            state, log_z_pool = thin(state, n_groups, size, self.lam, generator)
            target = self._target(crowd_of(batch, self.particles)[0])
        kernels = self._kernels(target)
        rounds = self.refine_steps if kernels else 0
        state, log_z, trace = anneal(target, kernels, state, n_groups, generator, self.ess, rounds)
        state, followed = cycle(kernels, state, rounds, generator)
        chosen, log_z = pick(group, size, generator), log_z_pool + log_z
        rates = followed.accepted[:, chosen]
        upper = log_z_upper(state.reward.unflatten(0, (n_groups, -1)), self.lam)
        diagnostics = {"log_z": log_z[group], "log_z_upper": upper[group]}
        diagnostics |= {"temperatures": torch.full_like(log_z[group], (self.pool > 1) + len(trace.lam))}
        diagnostics |= {f"accept_{name}": rate for name, rate in zip(REFINE[self._refine], rates, strict=True)}
        return Drawn(state.tokens[chosen], rates.mean(0) if len(rates) else None, diagnostics)

    def _refined(self, begin: Drawn, batch: Prompts, generator: torch.Generator) -> Drawn:
        """Exact moves from where the diffusion (or p_θ) ended, with what they tell of their convergence."""
        rows = torch.arange(len(begin.tokens), device=begin.tokens.device).repeat_interleave(self.rungs)
        crowd = batch if self.rungs == 1 else rows_of(batch, rows)
        target = self._target(crowd)
        kernels = moves = self._kernels(target)
        names, state = REFINE[self._refine], start(target, begin.tokens[rows], crowd.prompt_mask)
        if self.rungs > 1:
            ladder = Tempering(target, kernels, [self.lam * (k + 1) / self.rungs for k in range(self.rungs)])
            moves, names, state = [ladder], ("tempered",), ladder.init(state.tokens, crowd.prompt_mask)
        state, followed = cycle(moves, state, self.refine_steps, generator)
        # The chains at λ are the last of each text's.
        last = slice(self.rungs - 1, None, self.rungs)
        accepted = followed.accepted[:, last]
        diagnostics = {f"accept_{name}": rate for name, rate in zip(names, accepted, strict=True)} | (begin.diagnostics or {})
        traces = {"reward": followed.reward} | ({"log_p": followed.log_base} if target.with_base else {})
        diagnostics |= by_prompt(batch.prompts, {name: trace[:, last] for name, trace in traces.items()})
        return Drawn(state.tokens[last], accepted.mean(0), diagnostics)
