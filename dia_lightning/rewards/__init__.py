"""Rewards: batches of texts in, (B,) float32 out; larger is better."""

from dia_lightning.rewards.base import CachedReward, RewardError, call_reward, check_reward
from dia_lightning.rewards.compose import WeightedSum
from dia_lightning.rewards.keyword import Keyword, Regex
from dia_lightning.rewards.sentiment import VaderSentiment

__all__ = [
    "CachedReward",
    "Keyword",
    "Regex",
    "RewardError",
    "VaderSentiment",
    "WeightedSum",
    "call_reward",
    "check_reward",
]
