"""Twisted SMC: particles that p_θ writes token by token, weighed on the way by the value of what
they have.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dia_lightning.errors import require
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import Decoding
from dia_lightning.numerics import draw_categorical
from dia_lightning.progress import steps
from dia_lightning.rewards.base import call_reward
from dia_lightning.samplers.base import (
    Drawn,
    Models,
    Population,
    Sampler,
    refuse_blanks,
    require_counts,
)
from dia_lightning.samplers.prefix import PrefixTwist, RewardOnPrefix, RowValue, settled
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
    """ψ and when it is used: exp(λ h) of an unfinished text, exp(λ r) of one at its end; times
    p_θ^(α − 1) of what is written, for the power target.

    value: h, in units of the reward; None weighs finished texts alone. reward: r, tokens (N, T) of
    the rows numbered (N,) → (N,). every: tokens between two weighings, or `word`: a row is weighed
    up to its last whole word, when the next one begins. ess: resample below this share of effective
    particles, 0 = never.
    resampling: name in `RESAMPLING`.
    """

    value: RowValue | None
    reward: Callable[[Tensor, Tensor], Tensor]
    lam: float
    every: int | Literal["word"] = 1
    ess: float = 0.5
    resampling: str = "systematic"
    alpha: float = 1.0

    def is_due(self, written: int) -> bool:
        """Whether particles are weighed after so many tokens."""
        told = self.value is not None or self.alpha != 1
        return told and (self.every == "word" or written % self.every == 0)


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
        self.log_p = torch.zeros_like(self._log_psi)

    def write(self, generator: torch.Generator) -> None:
        """Let each text go on by a token of p_θ."""
        # In p_θ's own precision, whatever the trainer's: the weights say how far π is from just
        # this p_θ.
        writing = self.writing
        with torch.autocast(writing.tokens.device.type, enabled=False):
            logits = writing.next_logits()
            drawn = draw_categorical(logits, generator)
            free = ~writing.prompt_mask[:, writing.place] & ~writing.ended
            log_p = logits.double().log_softmax(-1).gather(1, drawn[:, None])[:, 0]
            self.log_p = self.log_p + torch.where(free, log_p, 0.0)
            writing.write(drawn)

    def weigh(self, twist: Twist, finished: Tensor) -> None:
        """Multiply each weight by ψ_t / ψ_s, s the last weighing; `finished` (G · M,) rows are
        at their end for good.
        """
        writing, log_psi, going = self.writing, self._log_psi.clone(), ~finished
        tokens, place = writing.tokens, writing.place
        if twist.every == "word":
            # Where the last token begins a word, what stands before it is whole.
            place -= 1
            going = going & writing.lm.word_starts.to(going.device)[tokens[:, place]]
        ended, due = (finished & ~self._scored).nonzero()[:, 0], going.nonzero()[:, 0]
        if len(ended):
            log_psi[ended] = twist.lam * twist.reward(tokens[ended], ended).to(log_psi)
        if twist.alpha != 1:
            log_psi[due] = 0.0
        if len(due) and twist.value is not None:
            x = tokens[due]
            known = settled(x, writing.prompt_mask[due], place, writing.lm.end_id)
            log_psi[due] = twist.lam * twist.value(x, known, due).to(log_psi)
        if twist.alpha != 1:
            weighed = torch.cat([ended, due])
            log_psi[weighed] += (twist.alpha - 1) * self.log_p[weighed]
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
        self.log_p = self.log_p[rows]


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
        particles.write(generator)
        if place >= first and twist.is_due(place + 1 - first):
            particles.weigh(twist, writing.ended)
            particles.resample(twist, generator)
        if place % 8 == 7 and bool(writing.ended.all()):
            break
    else:
        particles.write(generator)
    particles.weigh(twist, torch.ones_like(writing.ended))
    particles.log_z = particles.log_z + log_mean_exp(particles.log_w)
    return particles


@dataclass(frozen=True)
class TwistedSMC(Sampler):
    """Twisted SMC on p_θ itself (Zhao et al., arXiv:2404.17546), exact in the limit of many
    particles.

    The texts of a batch that share a prompt are drawn from one population of `particles` times
    their number, by weight. On the way particles are weighed by the twist's value of the text so
    far, at its end by the true reward. So a poor twist costs particles and not exactness.

    Args:
        twist: Value of an unfinished text: `RewardOnPrefix` or `Critic`.
        particles: Size of the population of each text, 1 or more.
        every: Tokens between two weighings by the twist, 1 or more; or `word`: a text is weighed at
            the end of each of its words.
        ess: Resample below this share of effective particles, in [0, 1]; 0 = never.
        resampling: `systematic`, `stratified` or `multinomial`.
    """

    twist: PrefixTwist = field(default_factory=RewardOnPrefix)
    particles: int = 4
    every: int | Literal["word"] = 4
    ess: float = 0.5
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"
    powers: ClassVar[bool] = True
    name: ClassVar[str] = "twisted_smc"

    def __post_init__(self) -> None:
        require_counts(self, "particles")
        every = self.every == "word" or (isinstance(self.every, int) and self.every >= 1)
        require("every", self.every, every, "1 or more, or word")
        require("ess", self.ess, 0 <= self.ess <= 1, "0 ≤ ess ≤ 1")
        require("resampling", self.resampling, self.resampling in RESAMPLING, ", ".join(RESAMPLING))

    def needs(self, lam: float) -> Set[str]:
        return self.twist.needs(lam)

    def check(self, models: Models) -> None:
        self.twist.check(models)

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        crowd, n_groups, group = particles_of(batch, self.particles)
        done = self._write(models, crowd, n_groups, generator)
        rows = pick_by_weight(done.log_w, self.resampling, group, generator)
        found = weight_diagnostics(done.log_z, done.log_w, done.roots, done.resampled)
        diagnostics = {name: values[group] for name, values in found.items()}
        return Drawn(done.writing.text()[rows], None, diagnostics)

    def population(
        self, models: Models, crowd: Batch, n_groups: int, generator: torch.Generator
    ) -> Population:
        """Particles with weights for π itself, for `crowd` as `particles_of` makes it."""
        done = self._write(models, crowd, n_groups, generator)
        lam = models.lam if models.alpha == 1 else 1.0  # see `TargetDensity`
        return Population(done.writing.text(), done.log_w, lam, done.log_z)

    def _write(
        self, models: Models, crowd: Batch, n_groups: int, generator: torch.Generator
    ) -> TwistedParticles:
        def reward(tokens: Tensor, rows: Tensor) -> Tensor:
            some = crowd.take(rows)
            return call_reward(models.reward, reward_inputs(models.lm, tokens, some), some.records)

        refuse_blanks(crowd, self)
        value = self.twist.value(models, crowd, generator) if models.lam else None
        twist = Twist(
            value, reward, models.lam, self.every, self.ess, self.resampling, models.alpha
        )
        return twisted_smc(models.lm, crowd.tokens, crowd.prompt_mask, n_groups, twist, generator)
