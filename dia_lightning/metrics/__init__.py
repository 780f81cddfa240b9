"""Metrics of generated text: functions and torchmetrics."""

from dia_lightning.metrics.collection import DistinctN, GenerationMetrics, LMPerplexity, SelfBLEU, compute_metrics
from dia_lightning.metrics.functional import distinct_n, perplexity, self_bleu

__all__ = [
    "DistinctN", "GenerationMetrics", "LMPerplexity", "SelfBLEU", "compute_metrics", "distinct_n", "perplexity",
    "self_bleu",
]  # fmt: skip
