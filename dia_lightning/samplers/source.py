"""The texts to rewrite, as they are: where chains of moves start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dia_lightning.samplers.base import Drawn, Models, Sampler
from dia_lightning.sampling.decode import source_rows
from dia_lightning.types import Batch


@dataclass(frozen=True)
class Source(Sampler):
    """The text in each record's field `source`, unchanged; the start of `Chains` that rewrite
    it.
    """

    name: ClassVar[str] = "source"

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        return Drawn(source_rows(models.lm, batch))
