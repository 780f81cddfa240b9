"""Baselines: the same interface and output as DIA."""

from dia_lightning.baselines.best_of_n import BestOfNModule
from dia_lightning.baselines.classifier_free import ClassifierFreeModule
from dia_lightning.baselines.guided_decoding import GuidedDecodingModule
from dia_lightning.baselines.ppo import PPOModule
from dia_lightning.baselines.smc import SMCModule
from dia_lightning.baselines.twisted_smc import TwistedSMCModule
from dia_lightning.baselines.zero_shot import ZeroShotModule

__all__ = [
    "BestOfNModule", "ClassifierFreeModule", "GuidedDecodingModule", "PPOModule", "SMCModule", "TwistedSMCModule",
    "ZeroShotModule",
]  # fmt: skip
