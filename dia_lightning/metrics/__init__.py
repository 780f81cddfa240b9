"""Metrics of generated text: functions and torchmetrics."""

from dia_lightning.metrics.collection import DistinctN, LMPerplexity, MeanReward, NetworkCalls, SecondsPer100Tokens, SelfBLEU
from dia_lightning.metrics.functional import distinct_n, perplexity, seconds_per_100_tokens, self_bleu
from dia_lightning.metrics.generation import GenerationMetrics, compute_metrics

__all__ = [
    "DistinctN", "GenerationMetrics", "LMPerplexity", "MeanReward", "NetworkCalls", "SecondsPer100Tokens", "SelfBLEU",
    "compute_metrics", "distinct_n", "perplexity", "seconds_per_100_tokens", "self_bleu",
]  # fmt: skip
