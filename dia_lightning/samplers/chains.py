"""Chains of exact moves, from wherever another sampler ends."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dia_lightning.errors import require
from dia_lightning.samplers.base import Drawn, Models, Sampler, refuse_blanks, require_counts
from dia_lightning.samplers.base_model import BaseModel
from dia_lightning.samplers.moves import Move, Suffix, names_of, needs_of
from dia_lightning.sampling.annealing import cycle
from dia_lightning.sampling.diagnostics import by_prompt
from dia_lightning.sampling.state import Kernel, start
from dia_lightning.sampling.tempering import Tempering
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch


@dataclass(frozen=True)
class Chains(Sampler):
    """Moves the texts of another sampler towards π; exact in the limit of many rounds.

    Args:
        start: Sampler of the texts with which the chains begin: `BaseModel`, `Source` (rewrites),
            `Diffusion`, …
        moves: Exact moves, taken in turn.
        rounds: Rounds of all moves, 0 or more.
        temperatures: Chains for each text, at λ/K, 2λ/K, …, λ, which swap their texts (parallel
            tempering); 1 = one chain at λ.
    """

    start: Sampler = field(default_factory=BaseModel)
    moves: list[Move] = field(default_factory=lambda: [Suffix()])
    rounds: int = 20
    temperatures: int = 1
    powers: ClassVar[bool] = True
    name: ClassVar[str] = "base_lm"

    def __post_init__(self) -> None:
        require("rounds", self.rounds, self.rounds >= 0, "0 or more")
        require_counts(self, "temperatures")

    @property
    def method(self) -> str:
        return self.name if self.start == BaseModel() else self.start.method

    def needs(self, lam: float) -> Set[str]:
        moved = needs_of(self.moves, lam) if self.rounds else frozenset()
        return {*self.start.needs(lam), *moved}

    def check(self, models: Models) -> None:
        self.start.check(models)
        fits = self.temperatures == 1 or models.lam > 0
        require("temperatures", self.temperatures, fits, "1 where λ is 0")
        fits = models.alpha == 1 or bool(self.rounds and self.moves)
        require("alpha", models.alpha, fits, "1 without moves")

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        """Exact moves from where `start` ended, with what they tell of their convergence."""
        moves = self.moves if self.rounds else []
        if isinstance(self.start, BaseModel) or any(move.left_to_right for move in moves):
            refuse_blanks(batch, self)
        begin = self.start.draw(models, batch, generator)
        if not moves:
            return begin
        k, device = self.temperatures, begin.tokens.device
        rows = torch.arange(len(begin.tokens), device=device).repeat_interleave(k)
        crowd = batch if k == 1 else batch.take(rows)
        target = TargetDensity(models.lm, models.reward, models.lam, crowd, models.alpha)
        kernels: list[Kernel] = [move.kernel(models, target) for move in moves]
        names, state = names_of(moves), start(target, begin.tokens[rows], crowd.prompt_mask)
        if k > 1:
            ladder = Tempering(target, kernels, [target.lam * (i + 1) / k for i in range(k)])
            kernels, names = [ladder], ["tempered"]
            state = ladder.init(state.tokens, crowd.prompt_mask)
        state, followed = cycle(kernels, state, self.rounds, generator)
        # The chains at λ are the last of each text's.
        last = slice(k - 1, None, k)
        accepted = followed.accepted[:, last]
        diagnostics = {f"accept_{n}": rate for n, rate in zip(names, accepted, strict=True)}
        diagnostics |= begin.diagnostics or {}
        reward = "reward" if models.alpha == 1 else "log_weight"
        traces = {reward: followed.reward, "log_p": followed.log_base}
        told = {name: trace[:, last] for name, trace in traces.items()}
        return Drawn(
            state.tokens[last], accepted.mean(0), diagnostics | by_prompt(batch.prompts, told)
        )
