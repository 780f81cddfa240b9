"""Baselines: the same interface and output as DIA."""

from dia_lightning.baselines.ppo import PPOModule
from dia_lightning.baselines.smc import SMCModule
from dia_lightning.baselines.zero_shot import ZeroShotModule

__all__ = ["PPOModule", "SMCModule", "ZeroShotModule"]
