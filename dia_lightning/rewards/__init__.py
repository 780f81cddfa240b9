"""Rewards: batches of texts in, (B,) float32 out; larger is better."""

from dia_lightning.rewards.base import check_reward
from dia_lightning.rewards.classifier import SequenceClassifier
from dia_lightning.rewards.compose import Hinge, ProductOfExperts, WeightedSum
from dia_lightning.rewards.coverage import Coverage
from dia_lightning.rewards.entailment import Entailment
from dia_lightning.rewards.formality import Formality
from dia_lightning.rewards.function import FunctionReward
from dia_lightning.rewards.keyword import Keyword, Regex
from dia_lightning.rewards.length import Length
from dia_lightning.rewards.perplexity import Perplexity
from dia_lightning.rewards.perspective import Perspective
from dia_lightning.rewards.sentiment import VaderSentiment
from dia_lightning.rewards.similarity import ChrFSimilarity, EmbeddingSimilarity
from dia_lightning.rewards.slots import SlotConsistency, SlotErrorRate
from dia_lightning.rewards.toxicity import LocalToxicity

__all__ = [
    "ChrFSimilarity",
    "Coverage",
    "EmbeddingSimilarity",
    "Entailment",
    "Formality",
    "FunctionReward",
    "Hinge",
    "Keyword",
    "Length",
    "LocalToxicity",
    "Perplexity",
    "Perspective",
    "ProductOfExperts",
    "Regex",
    "SequenceClassifier",
    "SlotConsistency",
    "SlotErrorRate",
    "VaderSentiment",
    "WeightedSum",
    "check_reward",
]
