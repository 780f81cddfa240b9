"""Samples of p_θ itself, the base line of every figure; or of another policy, seen by p_θ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dia_lightning.errors import require
from dia_lightning.samplers.base import Drawn, Models, Population, Sampler, draw_base
from dia_lightning.types import Batch


@dataclass(frozen=True)
class BaseModel(Sampler):
    """Draws from p_θ; with the defaults from exactly p_θ.

    Args:
        temperature: Temperature of the next-token distribution, above 0; 1 = p_θ.
        top_k: Keep the k likeliest tokens; 0 = all.
        top_p: Keep the likeliest tokens that together have this probability, above 0 up to 1; 1 =
            all.
        policy: Folder of a fine-tuned p_θ to sample in its place. Its texts are scored under p_θ,
            so it needs the same tokenizer.
        label: Name of the method in the outputs; for a policy its own, for example `ppo`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    policy: str | None = None
    label: str = "zero_shot"
    name: ClassVar[str] = "zero_shot"

    def __post_init__(self) -> None:
        require("temperature", self.temperature, self.temperature > 0, "above 0")
        require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "0 < top_p ≤ 1")
        named = bool(self.label) and (self.policy is not None) != (self.label == "zero_shot")
        allowed = "zero_shot without a policy, with one another name, for example ppo"
        require("label", repr(self.label), named, allowed)

    @property
    def method(self) -> str:
        return self.label

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        lm = models.policy or models.lm
        return draw_base(lm, batch, generator, self.temperature, self.top_k, self.top_p)

    def population(
        self, models: Models, crowd: Batch, n_groups: int, generator: torch.Generator
    ) -> Population:
        """Samples of p_θ as particles at λ = 0, for `crowd` as `particles_of` makes it.

        Raises:
            UserError: if these settings draw from another law than p_θ.
        """
        require("start", self, self == BaseModel(), "BaseModel with its defaults, which is p_θ")
        tokens = draw_base(models.lm, crowd, generator).tokens
        log_w = torch.zeros(n_groups, len(tokens) // n_groups, dtype=torch.float64)
        log_w = log_w.to(tokens.device)
        return Population(tokens, log_w, 0.0, log_w[:, 0])
