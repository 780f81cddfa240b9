"""Training that makes a policy of p_θ: the baseline that touches its weights."""

from dia_lightning.training.ppo import PPOModule

__all__ = ["PPOModule"]
