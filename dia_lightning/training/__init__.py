"""LightningModules that train: denoiser, critic, base model, and the baseline that touches p_θ's
weights.
"""

from dia_lightning.training.base_model import LMModule
from dia_lightning.training.critic import CriticModule
from dia_lightning.training.denoiser import DenoiserModule
from dia_lightning.training.ppo import PPOModule

__all__ = ["CriticModule", "DenoiserModule", "LMModule", "PPOModule"]
