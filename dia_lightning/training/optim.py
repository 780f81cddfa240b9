"""The one optimiser recipe of all modules: AdamW with linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dia_lightning.errors import UserError


@dataclass(frozen=True)
class AdamW:
    """AdamW (betas 0.9, 0.98) with linear warm-up, then cosine to 5 % of the rate at the last step.

    Args:
        lr: highest learning rate, above 0.
        weight_decay: of matrices, 0 or more; biases, norms and other vectors are not decayed.
        warmup_steps: optimiser steps in which the rate rises to lr, 0 or more.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200

    def __post_init__(self) -> None:
        for option, fits, allowed in (
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
        ):
            if not fits:
                raise UserError(f"{option}: {getattr(self, option)} given, allowed: {allowed}")

    def configure(
        self, parameters: Iterable[tuple[str, nn.Parameter]], total_steps: int
    ) -> dict[str, Any]:
        """Optimiser and schedule in the form that Lightning wants, for `total_steps` steps.

        Raises:
            UserError: if their number is unknown (neither `max_steps` nor `max_epochs` given).
        """
        if not 0 < total_steps < 1 << 60:
            raise UserError(
                "trainer.max_steps: none given, allowed: 1 or more; the cosine schedule needs"
                " its end"
            )
        named = [(n, p) for n, p in parameters if p.requires_grad]
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        warm = self.warmup_steps

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            progress = min(1.0, (step - warm) / max(1, total_steps - warm))
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
