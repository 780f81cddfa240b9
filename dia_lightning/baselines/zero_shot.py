"""Zero-shot: samples of p_θ itself, the base line of every figure."""

from __future__ import annotations

import torch

from dia_lightning.resources import UserError
from dia_lightning.sampling.base import Drawn, SamplerModule
from dia_lightning.types import Prompts, Reward


class ZeroShotModule(SamplerModule):
    """Draws from p_θ; with the defaults from exactly p_θ.

    Args:
        base_lm: hub id or folder of p_θ.
        reward: the reward to report.
        temperature: of the next-token distribution. top_k: keep the k likeliest tokens, 0 = all.
        top_p: keep the likeliest tokens that together have this probability, 1 = all.
        seed: of all randomness.
    """

    method = "zero_shot"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, False, seed)
        if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"--model.init_args: temperature {temperature}, top_k {top_k}, top_p {top_p} given; allowed: "
                "temperature above 0, top_k 0 or more, 0 < top_p ≤ 1"
            )
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        return self.draw_base(batch, generator, self.temperature, self.top_k, self.top_p)
