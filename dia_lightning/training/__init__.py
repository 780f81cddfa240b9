"""LightningModules that train: denoiser, critic, base model, and the baseline that touches p_θ's
weights.
"""

from dia_lightning.training.base import Network, Noising
from dia_lightning.training.base_model import LMModule
from dia_lightning.training.critic import CriticModule
from dia_lightning.training.denoiser import DenoiserModule
from dia_lightning.training.optim import AdamW
from dia_lightning.training.ppo import GAE, LeaveOneOut, PPOModule, Updates

__all__ = [
    "GAE", "AdamW", "CriticModule", "DenoiserModule", "LMModule", "LeaveOneOut", "Network",
    "Noising", "PPOModule", "Updates",
]  # fmt: skip
