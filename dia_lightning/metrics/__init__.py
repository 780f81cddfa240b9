"""Metrics of generated text: functions and torchmetrics."""

from dia_lightning.metrics.collection import (
    DistinctN,
    LMPerplexity,
    MeanReward,
    SecondsPer100Tokens,
    SelfBLEU,
)
from dia_lightning.metrics.generation import GenerationMetrics

__all__ = [
    "DistinctN", "GenerationMetrics", "LMPerplexity", "MeanReward", "SecondsPer100Tokens",
    "SelfBLEU",
]  # fmt: skip
