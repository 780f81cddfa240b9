"""Twisted SMC: particles that p_θ writes token by token, weighed on the way by the critic's
value of what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dia_lightning.errors import require
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import Decoding
from dia_lightning.numerics import draw_categorical
from dia_lightning.progress import steps
from dia_lightning.rewards.base import call_reward
from dia_lightning.samplers.base import Drawn, Models, Sampler, refuse_blanks, require_counts
from dia_lightning.samplers.prefix import PrefixValue, critic_of_prefixes, settled
from dia_lightning.sampling.annealing import (
    particles_of,
    pick_by_weight,
    weight_diagnostics,
)
from dia_lightning.sampling.resampling import RESAMPLING, effective_size, log_mean_exp
from dia_lightning.target import reward_inputs
from dia_lightning.types import Batch


@dataclass(frozen=True)
class Twist:
    """ψ and when it is used: exp(λ h) of an unfinished text, exp(λ r) of one at its end.

    value: h, in units of the reward; None weighs finished texts alone. reward: r, tokens (N, T) of
    the rows numbered (N,) → (N,). every: tokens between two weighings. ess: resample below this
    share of effective particles, 0 = never.
    resampling: name in `RESAMPLING`.
    """

    value: PrefixValue | None
    reward: Callable[[Tensor, Tensor], Tensor]
    lam: float
    every: int = 1
    ess: float = 0.5
    resampling: str = "systematic"


class TwistedParticles:
    """G populations of M texts on their way, with their weights.

    Attributes:
        writing: the texts, (G · M, T), a population's side by side.
        log_w: (G, M) float64 since the last resampling. log_z: (G,) float64, log of an unbiased
            estimate of Z = E_{p_θ}[exp(λ r)] once all is weighed.
        roots: (G, M) int64, the starting particle from which each descends. resampled: (G,)
            float64, how often.
    """

    def __init__(self, writing: Decoding, n_groups: int) -> None:
        device = writing.tokens.device
        self.writing = writing
        self.log_w = torch.zeros(
            n_groups, len(writing.tokens) // n_groups, dtype=torch.float64, device=device
        )
        self.log_z = torch.zeros(n_groups, dtype=torch.float64, device=device)
        self.roots = torch.arange(self.log_w.shape[1], device=device).expand_as(self.log_w)
        self.resampled = torch.zeros_like(self.log_z)
        self._log_psi, self._scored = (
            torch.zeros_like(self.log_w).flatten(),
            torch.zeros_like(writing.ended),
        )

    def weigh(self, twist: Twist, finished: Tensor) -> None:
        """Multiply each weight by ψ_t / ψ_s, s the last weighing; `finished` (G · M,) rows are
        at their end for good.
        """
        log_psi, tokens = self._log_psi.clone(), self.writing.tokens
        ended, going = (finished & ~self._scored).nonzero()[:, 0], (~finished).nonzero()[:, 0]
        if len(ended):
            log_psi[ended] = twist.lam * twist.reward(tokens[ended], ended).to(log_psi)
        if len(going) and twist.value is not None:
            x = tokens[going]
            known = settled(
                x, self.writing.prompt_mask[going], self.writing.place, self.writing.lm.end_id
            )
            log_psi[going] = twist.lam * twist.value(x, known).to(log_psi)
        self.log_w = self.log_w + (log_psi - self._log_psi).view_as(self.log_w)
        self._log_psi, self._scored = log_psi, finished

    def resample(self, twist: Twist, generator: torch.Generator) -> None:
        """Draw the particles anew, by weight, in each population whose weights have become too
        uneven.
        """
        n_groups, size = self.log_w.shape
        poor = effective_size(self.log_w) < twist.ess * size
        if not bool(poor.any()):
            return
        drawn, same = (
            RESAMPLING[twist.resampling](self.log_w, generator),
            torch.arange(size, device=poor.device),
        )
        ancestors = torch.where(poor[:, None], drawn, same)
        self.roots = self.roots.gather(1, ancestors)
        self.log_z = self.log_z + torch.where(poor, log_mean_exp(self.log_w), 0.0)
        self.log_w = torch.where(poor[:, None], 0.0, self.log_w)
        self.resampled = self.resampled + poor
        rows = (ancestors + size * torch.arange(n_groups, device=poor.device)[:, None]).flatten()
        self.writing.resample(rows)
        self._log_psi, self._scored = self._log_psi[rows], self._scored[rows]


def twisted_smc(
    lm: BaseLM,
    tokens: Tensor,
    prompt_mask: Tensor,
    n_groups: int,
    twist: Twist,
    generator: torch.Generator,
) -> TwistedParticles:
    """Particles with weights for π, by SMC with p_θ as proposal (Zhao et al., arXiv:2404.17546,
    algorithm 1).

    Args:
        tokens: (G · M, T) with prompts as in `BaseLM.generate`, one prompt a population. n_groups:
            G.
    """
    writing = Decoding(lm, tokens, prompt_mask)
    particles = TwistedParticles(writing, n_groups)
    first = int(prompt_mask.sum(1).min())
    for place in steps(range(tokens.shape[1] - 1), "tokens"):
        _write(writing, generator)
        if twist.value is not None and place >= first and (place + 1 - first) % twist.every == 0:
            particles.weigh(twist, writing.ended)
            particles.resample(twist, generator)
        if place % 8 == 7 and bool(writing.ended.all()):
            break
    else:
        _write(writing, generator)
    particles.weigh(twist, torch.ones_like(writing.ended))
    particles.log_z = particles.log_z + log_mean_exp(particles.log_w)
    return particles


def _write(writing: Decoding, generator: torch.Generator) -> None:
    # In p_θ's own precision, whatever the trainer's: the weights say how far π is from just this
    # p_θ.
    with torch.autocast(writing.tokens.device.type, enabled=False):
        writing.write(draw_categorical(writing.next_logits(), generator))


@dataclass(frozen=True)
class TwistedSMC(Sampler):
    """Twisted SMC on p_θ itself (Zhao et al., arXiv:2404.17546), exact in the limit of many
    particles.

    The texts of a batch that share a prompt are drawn from one population of `particles` times
    their number, by weight. The critic values unfinished texts; a `soft` one fits best: its value
    is the log-value of π itself.

    Args:
        particles: Size of the population of each text, 1 or more.
        every: Tokens between two weighings by the critic, 1 or more.
        ess: Resample below this share of effective particles, in [0, 1]; 0 = never.
        resampling: `systematic`, `stratified` or `multinomial`.
    """

    particles: int = 4
    every: int = 4
    ess: float = 0.5
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"
    name: ClassVar[str] = "twisted_smc"

    def __post_init__(self) -> None:
        require_counts(self, "particles", "every")
        require("ess", self.ess, 0 <= self.ess <= 1, "0 ≤ ess ≤ 1")
        require("resampling", self.resampling, self.resampling in RESAMPLING, ", ".join(RESAMPLING))

    def needs(self, lam: float) -> Set[str]:
        return {"critic"} if lam else frozenset()

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, self)
        crowd, n_groups, group = particles_of(batch, self.particles)
        twist = self._twist(models, crowd, generator)
        done = twisted_smc(models.lm, crowd.tokens, crowd.prompt_mask, n_groups, twist, generator)
        rows = pick_by_weight(done.log_w, self.resampling, group, generator)
        found = weight_diagnostics(done.log_z, done.log_w, done.roots, done.resampled)
        diagnostics = {name: values[group] for name, values in found.items()}
        return Drawn(done.writing.text()[rows], None, diagnostics)

    def _twist(self, models: Models, crowd: Batch, generator: torch.Generator) -> Twist:
        def reward(tokens: Tensor, rows: Tensor) -> Tensor:
            some = crowd.take(rows)
            return call_reward(models.reward, reward_inputs(models.lm, tokens, some), some.records)

        value, length = None, crowd.tokens.shape[1]
        if models.critic is not None:
            value = critic_of_prefixes(models.critic, models.embedding, length, generator)
        return Twist(value, reward, models.lam, self.every, self.ess, self.resampling)
