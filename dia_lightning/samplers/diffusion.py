"""The guided reverse diffusion."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dia_lightning.errors import require
from dia_lightning.samplers.base import Drawn, Models, Sampler, require_reverse_process
from dia_lightning.samplers.guide import ClassifierFree, CriticGuidance, Guidance
from dia_lightning.samplers.solver import PredictorCorrector, Solver
from dia_lightning.sampling.decode import draw_texts, source_rows
from dia_lightning.types import Batch


@dataclass(frozen=True)
class Diffusion(Sampler):
    """Runs the guided reverse process from noise to text (science.md); approximate.

    Args:
        solver: Solver of the reverse process.
        guidance: Guidance towards the reward.
        steps: Noise levels that each text passes, 1 or more.
        stagger: Lead of left positions over right ones, in positions, 0 or more; 0 = all together
            (see `staggered`).
        strength: Noise level u to start from, above 0 up to 1; below 1 it starts at the record's
            `source`, noised so far.
        temperature: Temperature of the denoiser's token distribution, above 0; 1 = as trained.
        final: Token where a position becomes clean: drawn (`sample`) or the likeliest (`argmax`).
    """

    solver: Solver = field(default_factory=PredictorCorrector)
    guidance: Guidance = field(default_factory=CriticGuidance)
    steps: int = 64
    stagger: float = 40.0
    strength: float = 1.0
    temperature: float = 1.0
    final: Literal["sample", "argmax"] = "sample"
    name: ClassVar[str] = "diffusion"

    def __post_init__(self) -> None:
        require_reverse_process(self)
        require("strength", self.strength, 0 < self.strength <= 1, "0 < strength ≤ 1")
        require("final", self.final, self.final in ("sample", "argmax"), "sample, argmax")

    @property
    def method(self) -> str:
        free = isinstance(self.guidance, ClassifierFree)
        return "classifier_free" if free else self.solver.name

    def needs(self, lam: float) -> Set[str]:
        return self.guidance.needs(lam)

    def check(self, models: Models) -> None:
        self.guidance.check(models)

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        network, accepted = models.denoiser, list[Tensor]()
        assert network is not None
        options: dict[str, Any] = self.solver.options()
        if self.solver.name == "dia":
            options["note"] = accepted.append
        if self.strength < 1:
            options |= {"begin": source_rows(models.lm, batch), "strength": self.strength}
        tokens = draw_texts(
            self.guidance.predictor(models, self.temperature), batch, models.embedding,
            network.schedule, models.lm.end_id, generator, self.solver.name, self.steps,
            self.stagger, self.final == "sample", **options,
        )  # fmt: skip
        return Drawn(tokens, diagnostics={"accept_mala": accepted[0]} if accepted else None)
