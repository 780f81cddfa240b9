"""The one optimiser recipe of all modules: AdamW with linear warm-up and cosine decay."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dia_lightning.errors import UserError


def check_recipe(lr: float, weight_decay: float, warmup_steps: int) -> None:
    """That the arguments of a module make an optimiser.

    Raises:
        UserError: naming the argument that does not.
    """
    for name, value, fits, allowed in (
        ("lr", lr, 0 < lr < math.inf, "above 0"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more"),
        ("warmup_steps", warmup_steps, warmup_steps >= 0, "0 or more"),
    ):
        if not fits:
            raise UserError(f"{name}: {value} given, allowed: {allowed}")


def adamw_warmup_cosine(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
) -> dict[str, Any]:
    """AdamW (betas 0.9, 0.98) with warm-up to `lr`, then cosine to 5 % of it, in the form Lightning
    wants.

    Biases, norms and other vectors are not decayed. `total_steps` counts optimiser steps.

    Raises:
        UserError: if the number of steps is unknown (neither `max_steps` nor `max_epochs` given),
            or see `check_recipe`.
    """
    check_recipe(lr, weight_decay, warmup_steps)
    if not 0 < total_steps < 1 << 60:
        raise UserError(
            "trainer.max_steps: none given, allowed: 1 or more; the cosine schedule needs its end"
        )
    named = [(n, p) for n, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
