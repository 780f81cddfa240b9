"""Rewards: batches of texts in, (B,) float32 out; larger is better."""

from dia_lightning.rewards.base import CachedReward, RewardError, call_reward, check_reward
from dia_lightning.rewards.classifier import SequenceClassifier
from dia_lightning.rewards.compose import WeightedSum
from dia_lightning.rewards.entailment import Entailment
from dia_lightning.rewards.keyword import Keyword, Regex
from dia_lightning.rewards.perspective import Perspective
from dia_lightning.rewards.sentiment import VaderSentiment
from dia_lightning.rewards.toxicity import LocalToxicity

__all__ = [
    "CachedReward",
    "Entailment",
    "Keyword",
    "LocalToxicity",
    "Perspective",
    "Regex",
    "RewardError",
    "SequenceClassifier",
    "VaderSentiment",
    "WeightedSum",
    "call_reward",
    "check_reward",
]
