"""Metrics of generated text: functions and torchmetrics."""

from dia_lightning.metrics.collection import (
    DistinctN,
    LMPerplexity,
    MeanReward,
    NetworkCosts,
    SecondsPer100Tokens,
    SelfBLEU,
)
from dia_lightning.metrics.evaluation import Evaluated, Evaluator
from dia_lightning.metrics.functional import (
    distinct_n,
    perplexity,
    seconds_per_100_tokens,
    self_bleu,
)
from dia_lightning.metrics.generation import GenerationMetrics, compute_metrics
from dia_lightning.metrics.reference import (
    ReferenceBLEU,
    ReferenceROUGE,
    reference_bleu,
    reference_rouge,
)

__all__ = [
    "DistinctN", "Evaluated", "Evaluator", "GenerationMetrics", "LMPerplexity", "MeanReward",
    "NetworkCosts", "ReferenceBLEU", "ReferenceROUGE", "SecondsPer100Tokens", "SelfBLEU",
    "compute_metrics", "distinct_n", "perplexity", "reference_bleu", "reference_rouge",
    "seconds_per_100_tokens", "self_bleu",
]  # fmt: skip
