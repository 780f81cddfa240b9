"""The critic: a reward's value on noised texts."""

from dia_lightning.critic.module import CriticModule

__all__ = ["CriticModule"]
