"""The annealed population: samples of p_θ, raised to π step by step."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dia_lightning.errors import UserError, require
from dia_lightning.samplers.base import (
    WEIGHTED,
    Drawn,
    Models,
    Population,
    Sampler,
    draw_base,
    require_counts,
)
from dia_lightning.samplers.base_model import BaseModel
from dia_lightning.samplers.moves import Move, Suffix, Window, names_of, needs_of
from dia_lightning.sampling.annealing import (
    ancestry,
    anneal,
    cycle,
    from_base,
    particles_of,
    pick,
    pick_islands,
    resample,
    resample_down,
)
from dia_lightning.sampling.blanks import RightSide, lay_out
from dia_lightning.sampling.diagnostics import log_z_reverse
from dia_lightning.sampling.particles import lineage
from dia_lightning.sampling.resampling import effective_size, log_mean_exp
from dia_lightning.sampling.state import State, take
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch, has_blanks, must_go_on

_BASE = "BaseModel where prompts have blanks"


@dataclass(frozen=True)
class Annealed(Sampler):
    """Draws a population from p_θ, raises λ step by step and moves it at each.

    Exact in the limit of many particles or moves (see `sampling.population.anneal`), and in that
    of many populations a prompt.

    Args:
        moves: Exact moves, taken in turn; null = `Suffix`, and where there are blanks a `Window` of
            8 that varies too.
        particles: Particles for each text, 1 or more.
        least: Smallest population, 1 or more: where fewer texts share one, each has more particles.
        pool: Texts of p_θ drawn for each particle, 1 or more; the best by weight begin. Drawing
            costs less than moving.
        ess: Share of effective particles that each rise of λ keeps, between 0 and 1.
        rounds: Rounds of all moves at each temperature and at the end, 0 or more.
        texts: Texts of one prompt that share a population, 0 or more; 0 = all of a batch. The
            populations of a prompt are combined by their estimates of Z.
        start: Sampler of the population to begin with: `BaseModel` (p_θ, λ = 0), or one whose
            texts have weights for a λ.
    """

    moves: list[Move] | None = None
    particles: int = 2
    least: int = 8
    pool: int = 1
    ess: float = 0.5
    rounds: int = 1
    texts: int = 0
    start: Sampler = field(default_factory=BaseModel)
    powers: ClassVar[bool] = True
    name: ClassVar[str] = "annealed"

    def __post_init__(self) -> None:
        require_counts(self, "particles", "least", "pool")
        require("ess", self.ess, 0 < self.ess < 1, "between 0 and 1")
        require("rounds", self.rounds, self.rounds >= 0, "0 or more")
        require("texts", self.texts, self.texts >= 0, "0 or more")
        weighted = type(self.start).population is not Sampler.population
        require("start", type(self.start).__name__, weighted, WEIGHTED)
        usual, given = (
            getattr(type(self.start), "particles", None),
            getattr(self.start, "particles", None),
        )
        require("start.particles", given, given == usual, f"{usual}, those of Annealed count")
        if isinstance(self.start, BaseModel):
            allowed = "BaseModel with its defaults, which is p_θ"
            require("start", self.start, self.start == BaseModel(), allowed)

    def needs(self, lam: float) -> Set[str]:
        moves = self.moves or [] if self.rounds else []
        return {*self.start.needs(lam), *needs_of(moves, lam)}

    def check(self, models: Models) -> None:
        self.start.check(models)

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        moves = self._moves_for(batch)
        crowd, n_groups, group = particles_of(
            batch, self.particles, self.texts, self.least, self.pool
        )
        islands = n_groups // (int(group.max()) + 1)
        begun = self._begin(models, crowd, moves, n_groups, islands, generator)
        if self.pool > 1:
            crowd = particles_of(batch, self.particles, self.texts, self.least)[0]
        target = self._target(models, crowd)
        kernels = [move.kernel(models, target) for move in moves]
        rounds, state = self.rounds if kernels else 0, begun.state
        if begun.weighted:
            state, _ = cycle(kernels, state, rounds, generator)
        state, log_z, trace = anneal(
            target, kernels, state, n_groups, generator, self.ess, rounds, islands
        )
        state, followed = cycle(kernels, state, rounds, generator)
        log_z = (begun.log_z + log_z).view(-1, islands)
        log_right = begun.log_right.view(-1, islands)
        # Unbiased are these products.
        log_both = log_right + log_z
        population = pick_islands(group, log_both, generator)
        chosen = pick(population, len(state.tokens) // n_groups, generator)
        rates = followed.accepted[:, chosen]
        reverse = log_z_reverse(state.reward.view(*log_z.shape, -1), target.lam)
        found = {
            "log_z": log_mean_exp(log_both) - log_mean_exp(log_right),
            "log_z_reverse": -torch.logsumexp(log_both.log_softmax(1) - reverse, 1),
            "temperatures": log_z.new_full((len(log_z),), begun.resampled + len(trace.lam)),
            **ancestry(begun.ess, begun.ancestors, trace, log_both, population),
        }
        diagnostics = {name: values[group] for name, values in found.items()}
        diagnostics |= {f"accept_{n}": r for n, r in zip(names_of(moves), rates, strict=True)}
        state, tokens = take(state, chosen), state.tokens[chosen]
        if has_blanks(batch):
            right = must_go_on(batch.prompt_mask).any(1)
            log_right = log_mean_exp(log_right)[group].masked_fill(~right, torch.nan)
            diagnostics |= {"log_p_right": log_right, "log_p_fill": state.log_base - log_right}
        rate = rates.mean(0) if len(rates) else None
        return Drawn(tokens, rate, diagnostics, state.prompt_mask)

    def _moves_for(self, batch: Batch) -> Sequence[Move]:
        """The moves, which must be able to fill what blanks there are."""
        if self.moves is None:
            blanks = [Window(8, vary=True)] if has_blanks(batch) else []
            return [Suffix(), *blanks] if self.rounds else []
        moves = self.moves
        if not self.rounds:
            return []
        if has_blanks(batch) and all(move.left_to_right for move in moves):
            names = ", ".join(type(move).__name__ for move in moves) or "none"
            raise UserError(
                f"moves: {names} given, allowed with blanks or a length: those with one that"
                " redraws the middle of a text, such as Window"
            )
        if batch.elastic is not None and not any(move.varies for move in moves):
            names = ", ".join(type(move).__name__ for move in moves)
            raise UserError(
                f"moves: {names} given, allowed with a [blank] of any length: those with one that"
                " changes lengths, such as Window with vary"
            )
        return moves

    def _fill(
        self, models: Models, crowd: Batch, moves: Sequence[Move], n_groups: int, islands: int,
        generator: torch.Generator,
    ) -> _Filled:  # fmt: skip
        """Particles of p_θ given what stands on both sides of their blanks."""
        bridge, laid = RightSide(models.lm, crowd), lay_out(crowd, models.lm.end_id, generator)
        drawn = draw_base(models.lm, laid, generator).tokens
        kernels = [move.kernel(models, bridge) for move in moves]
        state = from_base(bridge, drawn, laid.prompt_mask)
        state, log_right, trace = anneal(
            bridge, kernels, state, n_groups, generator, self.ess, self.rounds, islands
        )
        state, _ = cycle(kernels, state, self.rounds, generator)
        n = len(state.tokens) // n_groups
        # Rows without anything on the right rise to β = 1 in one step that loses nothing.
        return _Filled(
            state, log_right, (trace.ess / n).amin(0).clamp_max(1), lineage(trace.ancestors)[0]
        )

    def _begin(
        self, models: Models, crowd: Batch, moves: Sequence[Move], n_groups: int, islands: int,
        generator: torch.Generator,
    ) -> _Begun:  # fmt: skip
        """The population with which annealing begins, equally weighted, `particles` a text."""
        target, mask = self._target(models, crowd), crowd.prompt_mask
        log_right = torch.zeros(n_groups, dtype=torch.float64, device=mask.device)
        ess, own = torch.ones_like(log_right), torch.arange(len(mask) // n_groups)
        own = own.to(mask.device).expand(n_groups, -1)
        if has_blanks(crowd):
            require("start", type(self.start).__name__, isinstance(self.start, BaseModel), _BASE)
            filled, log_right, ess, own = self._fill(
                models, crowd, moves, n_groups, islands, generator
            )
            drawn = Population(filled.tokens, log_right.new_zeros(n_groups, 1), 0.0, log_right * 0)
            mask = filled.prompt_mask
        else:
            drawn = self.start.population(models, crowd, n_groups, generator)
        given, allowed = f"a population at λ = {drawn.lam:g}", f"up to {target.lam:g}"
        require("start", given, drawn.lam <= target.lam, allowed)
        state = from_base(target, drawn.tokens, mask, drawn.lam)
        size = len(state.tokens) // n_groups // self.pool
        if bool((drawn.log_w != drawn.log_w[:, :1]).any()):
            state, ancestors = resample(state, drawn.log_w, size, generator)
            share = effective_size(drawn.log_w) / size
            share = share.clamp_max(1)
            return _Begun(state, drawn.log_z, log_right, share, ancestors, True, True)
        if self.pool > 1:
            down = resample_down(state, n_groups, size, target.lam, generator, islands)
            share, log_z = effective_size(down.log_w) / size, log_mean_exp(down.log_w)
            share = share.clamp_max(ess)
            log_z, own = drawn.log_z + log_z, own.gather(1, down.ancestors)
            return _Begun(down.state, log_z, log_right, share, own, True)
        return _Begun(state, drawn.log_z, log_right, ess, own)

    def _target(self, models: Models, crowd: Batch) -> TargetDensity:
        return TargetDensity(models.lm, models.reward, models.lam, crowd, models.alpha)


class _Filled(NamedTuple):
    """Populations with their blanks filled. log_right: (G,) estimates of log p_θ(right | left).
    ess: (G,) least effective share. ancestors: (G, M) starting point of each particle.
    """

    state: State
    log_right: Tensor
    ess: Tensor
    ancestors: Tensor


class _Begun(NamedTuple):
    """A population to anneal. log_z: (G,) of its λ. log_right: (G,) log p_θ of what stands on the
    right of blanks. ess: (G,) least effective share left by resampling, if any. ancestors: (G, M)
    starting point of each particle. resampled: whether it was; weighted: because its start was
    weighted.
    """

    state: State
    log_z: Tensor
    log_right: Tensor
    ess: Tensor
    ancestors: Tensor
    resampled: bool = False
    weighted: bool = False
