"""Weight decay acts on matrices alone: at a gradient of zero a step of AdamW shrinks them by lr
× decay and nothing else.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dia_lightning.training import CriticModule, DenoiserModule, PPOModule
from dia_lightning.training.base_model import LMModule
from dia_lightning.training.optim import AdamW
from tests.oracles.in_parts import in_parts
from tests.wiring.kit import LENGTH, Vowels

LR, DECAY = 0.01, 0.5
RECIPE: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "warmup_steps": 0}
SMALL: dict[str, Any] = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "max_length": LENGTH,
    "init_from_lm": False,
}


def make(kind: str, lm_folder: Path) -> Any:
    if kind == "denoiser":
        return DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **SMALL, **RECIPE))
    if kind == "critic":
        return CriticModule(Vowels(), str(lm_folder), **in_parts(CriticModule, **SMALL, **RECIPE))
    if kind == "base model":
        return LMModule(
            **in_parts(LMModule, vocab_size=50, width=16, layers=1, heads=2, positions=8, **RECIPE)
        )
    return PPOModule(Vowels(), str(lm_folder), **in_parts(PPOModule, lr=LR, warmup_steps=0))


@pytest.mark.parametrize("kind", ["denoiser", "critic", "base model", "ppo"])
def test_a_step_without_gradient(kind: str, lm_folder: Path) -> None:
    """Every trained weight is given; matrices end at (1 − lr decay) times themselves, vectors to
    the bit; PPO has no decay.
    """
    module = make(kind, lm_folder)
    module.trainer = SimpleNamespace(estimated_stepping_batches=1000)
    optimizer = module.configure_optimizers()["optimizer"]
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert given == {id(p) for p in trained.values()}
    for p in trained.values():
        p.data += 1.0  # many vectors begin at zero, which decay would leave as it is
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer.step()
    shapes = {p.ndim for p in trained.values()}
    assert {1, 2} <= shapes
    for name, p in trained.items():
        if p.ndim < 2 or kind == "ppo":
            assert torch.equal(p, before[name]), name
        else:
            torch.testing.assert_close(p.detach(), before[name] * (1 - LR * DECAY), msg=name)


def test_the_rate_of_the_schedule() -> None:
    """Linear to `lr` in the warm-up, then a cosine down to a twentieth of it, by hand."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    made = AdamW(0.4, 0.0, 4).configure([("weight", weight)], 12)
    rates = []
    for _ in range(13):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    falling = [
        0.4 * (0.05 + 0.95 * (1 + torch.cos(torch.tensor(torch.pi * k / 8)).item()) / 2)
        for k in range(9)
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, *falling], rel=1e-6)
