"""Best-of-n: the best of n samples of p_θ, or one of them by its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dia_lightning.lm.row_cache import rows_at_once
from dia_lightning.numerics import draw_categorical
from dia_lightning.rewards.base import call_reward
from dia_lightning.samplers.base import (
    Drawn,
    Models,
    Sampler,
    draw_base,
    refuse_blanks,
    require_counts,
)  # fmt: skip
from dia_lightning.sampling.resampling import effective_size, log_mean_exp
from dia_lightning.target import reward_inputs
from dia_lightning.types import Batch


@dataclass(frozen=True)
class BestOfN(Sampler):
    """Keeps the best of n texts of p_θ for each one wanted (Stiennon et al., arXiv:2009.01325).

    Args:
        n: Samples of p_θ for each text, 1 or more.
        weighted: Keep one drawn in proportion to exp(λ r) instead of the best: π in the limit of
            large n.
    """

    n: int = 16
    weighted: bool = False
    name: ClassVar[str] = "best_of_n"

    def __post_init__(self) -> None:
        require_counts(self, "n")

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, self)
        n_texts = len(batch.ids)
        rows = torch.arange(n_texts, device=batch.tokens.device)
        candidates = batch.take(rows.repeat_interleave(self.n))
        at_once = max(n_texts, rows_at_once(batch.tokens))
        tokens = self._candidates(models, candidates, at_once, generator)
        seen = reward_inputs(models.lm, tokens, candidates)
        reward = call_reward(models.reward, seen, candidates.records)
        reward = reward.to(tokens.device, torch.float64).view(n_texts, self.n)
        chosen, diagnostics = reward.argmax(1), {}
        if self.weighted:
            log_w = models.lam * reward
            chosen = draw_categorical(log_w, generator)
            diagnostics = {"log_z": log_mean_exp(log_w), "ess": effective_size(log_w) / self.n}
        return Drawn(tokens[rows * self.n + chosen], None, diagnostics)

    def _candidates(
        self, models: Models, batch: Batch, at_once: int, generator: torch.Generator
    ) -> Tensor:
        """Samples of p_θ, `at_once` at a time, so that n does not decide how large the caches
        are.
        """
        rows = torch.arange(len(batch.ids), device=batch.tokens.device)
        parts = [batch.take(some) for some in rows.split(at_once)]
        return torch.cat([draw_base(models.lm, part, generator).tokens for part in parts])
