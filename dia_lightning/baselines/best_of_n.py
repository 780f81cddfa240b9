"""Best-of-n: the best of n samples of p_θ, or one of them by its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.baselines.checks import refuse_blanks
from dia_lightning.categorical import draw_categorical
from dia_lightning.lm import rows_at_once
from dia_lightning.rewards import call_reward
from dia_lightning.sampling.base import Drawn, SamplerModule, check, check_lam
from dia_lightning.sampling.crowd import rows_of
from dia_lightning.sampling.resampling import effective_size, log_mean_exp
from dia_lightning.target import seen_texts
from dia_lightning.types import Prompts, Reward


class BestOfNModule(SamplerModule):
    """Draws n texts of p_θ for each one wanted and keeps that of the highest reward (Stiennon et al., arXiv:2009.01325).

    With `lam` it keeps one drawn in proportion to exp(λ r) instead: self-normalised importance resampling, π in the limit
    of large n.

    Args:
        reward: the true reward, by which is chosen.
        base_lm: hub id or folder of p_θ.
        n: samples for each text.
        lam: λ, inverse temperature of the reward; null = take the maximum.
        compare_base: sample p_θ for the same prompts too and report both.
        shard_base_lm: each of several processes keeps a part of p_θ only, as for `GuidedSamplerModule`.
        seed: of all randomness.
    """

    method = "best_of_n"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        n: int = 16,
        lam: float | None = None,
        compare_base: bool = True,
        shard_base_lm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed, shard_base_lm)
        check("n", n, n >= 1, "1 or more")
        if lam is not None:
            check_lam(lam)
        self.n, self.lam = n, lam

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        refuse_blanks(batch, type(self).__name__)
        n_texts = len(batch.ids)
        rows = torch.arange(n_texts, device=batch.tokens.device)
        crowd = rows_of(batch, rows.repeat_interleave(self.n))
        tokens = self._candidates(crowd, max(n_texts, rows_at_once(batch.tokens)), generator)
        reward = call_reward(self._cached, seen_texts(self.lm, tokens, crowd), crowd.records)
        reward = reward.to(tokens.device, torch.float64).view(n_texts, self.n)
        chosen, diagnostics = reward.argmax(1), {}
        if self.lam is not None:
            log_w = self.lam * reward
            chosen = draw_categorical(log_w, generator)
            diagnostics = {"log_z": log_mean_exp(log_w), "ess": effective_size(log_w) / self.n}
        return Drawn(tokens[rows * self.n + chosen], None, diagnostics)

    def _candidates(self, crowd: Prompts, at_once: int, generator: torch.Generator) -> Tensor:
        """Samples of p_θ for the crowd, `at_once` texts at a time, so that n does not decide how large the caches are."""
        rows = torch.arange(len(crowd.ids), device=crowd.tokens.device)
        return torch.cat([self.draw_base(rows_of(crowd, some), generator).tokens for some in rows.split(at_once)])
